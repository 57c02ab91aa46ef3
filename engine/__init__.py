"""icegrt: PPO with four Megatron-core models in one process set."""
