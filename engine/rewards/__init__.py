"""Reward sources besides reward models: users' functions, in worker processes or in this process, and HTTP scorers.

Words used here and in the configuration:

* task score: the number that one source (a function, a scorer or a reward model) gives one response.
* score: the weighted sum of a response's task scores, normalized if the configuration asks for it.
* reward: a number per token, which PPO sums and discounts: the score at the last token, the KL penalty, and the token
  rewards of a function.

The package imports no torch: a worker process of a plain function starts in a tenth of a second.
"""
