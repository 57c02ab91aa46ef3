"""The ad-moderation demo: policy, ad generator, checker, general data, tokenizer and reward function."""
