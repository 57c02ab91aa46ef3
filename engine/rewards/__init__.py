"""Reward sources besides reward models: users' functions, in worker processes or in this process, and HTTP scorers.

Words used here and in the configuration:

* score: one number per response. Each source (a reward model, a function, an HTTP scorer) gives one. The score of a
  response without a further word is the total: the weighted sum over the sources, reward models normalized.
* task score: the score of the first function or HTTP scorer. A run is judged by it; a reward model only estimates it.
* reward: one number per token, which PPO discounts and sums: the score at the last token, the KL penalty if
  `kl_in: reward`, and a function's token rewards.

The package imports no torch: a worker process of a plain function starts in a tenth of a second.
"""
