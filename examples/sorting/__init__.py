"""The example of `make learn`: six digits to sort, from a short SFT to PPO on exact match."""
