"""Step and evaluation records of a healthy PPO run; keyword arguments replace single fields."""

from icegrt.metrics import Evaluation, PPOStep

HEALTHY = {
    "score_mean": 1.0,
    "score_std": 0.5,
    "reward_mean": 0.9,
    "kl_nats_per_response": 0.0,
    "kl_coef": 0.05,
    "entropy_nats_per_token": 1.0,
    "clip_fraction": 0.05,
    "ratio_min": 0.7,
    "ratio_max": 1.4,
    "approx_kl_nats_per_token": 0.003,
    "policy_loss": -0.01,
    "value_loss": 0.2,
    "value_explained_variance": 0.5,
    "advantage_mean": 0.0,
    "advantage_std": 1.0,
    "grad_norm_actor": 0.5,
    "grad_norm_critic": 0.5,
    "lr_actor": 1e-5,
    "lr_critic": 1e-4,
    "response_tokens_mean": 40.0,
    "truncated_fraction": 0.02,
    "response_tokens": 4000,
    "response_tokens_per_second": 900.0,
    "rollout_logprob_gap_mean": 1e-7,
    "rollout_logprob_gap_max": 1e-6,
    "padding_fraction": 0.0,
}


def step(iteration, **changes):
    return PPOStep(iteration=iteration, **(HEALTHY | changes))


def evaluation(iteration, **changes):
    values = {"prompts": 50, "score_mean": 1.0, "kl_nats_per_response": 0.0, "response_tokens_mean": 40.0}
    values |= {"truncated_fraction": 0.0, "distinct_fraction": 0.9}
    return Evaluation(iteration=iteration, **(values | changes))
