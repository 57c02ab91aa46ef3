"""Balancing 4096 sequences over 256 bins: ours, Karmarkar-Karp as other trainers write it in Python, and a heap.

Quality is stored beside time: a fast plan that is uneven costs more in the step than it saves here. The alternatives know no
token cap; with one, they are given bins wide enough and judged on evenness alone.
"""
