"""PPO on a real chat model: SmolLM2-135M-Instruct from a PyPI package, trained on small sums."""
