"""Code that several operations share: statistics, vocabulary rows, optional streams and parts of Triton kernels."""
