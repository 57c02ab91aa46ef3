"""PPO in plain PyTorch and `transformers`: what icegrt is measured against.

`generate`, padded batches, full logits, a Python loop for GAE, eager losses, four separate models, torch's AdamW. The
recipe is icegrt's: a test gives both the same weights and answers, and compares advantages, losses and updated weights.
"""
