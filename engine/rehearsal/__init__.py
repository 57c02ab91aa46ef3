"""Rehearsal: the engine at real size without a GPU. The meta device plays the GPU, and a watcher counts."""
