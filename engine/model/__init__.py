"""Models: a Hugging Face architecture as a Megatron-core trunk with a head, weights in and out."""
