"""The example of `make learn`: eight digits to sort, from a short SFT to PPO on exact match."""
