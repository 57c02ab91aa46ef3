"""One PPO update against the recipe written out in float64: loops over sequences and tokens, nothing packed or fused.

The oracle takes its formulas from the recipe, its models from `tiny_models.llama64`, its gradients from autograd. Actor
and critic are moved between scoring and update, so that ratios differ from 1 and clipping has something to clip.
"""

import math
from types import SimpleNamespace

import pytest
import torch

from icegrt.config import CriticConfig, DataSource, OptimizerConfig, SamplingConfig
from icegrt.data import Example
from icegrt.distributed.cluster import Cluster
from icegrt.kernels import whiten
from icegrt.ppo.batch_plan import plan_batches
from icegrt.ppo.experience import Experience, compute_advantages
from icegrt.ppo.scores import ModelScores, RunningScoreNormalizer, total_scores
from icegrt.ppo.scoring import LogprobScorer, score_sequences, score_values
from icegrt.ppo.update import Updater
from tests.helpers import tiny_models as tiny
from tests.helpers.tiny_models import doubles, gap, llama64

CASES = {
    "defaults": {},
    "one_micro_batch": {"token_budget": 4096},
    "temperature": {"sampling": SamplingConfig(temperature=0.7)},
    "k2_in_reward": {"kl_estimator": "k2", "kl_coef": 0.3},
    "k3_in_reward": {"kl_estimator": "k3", "kl_coef": 0.3},
    "abs_in_reward": {"kl_estimator": "abs", "kl_coef": 0.3},
    "k1_in_loss": {"kl_in": "loss", "kl_estimator": "k1", "kl_coef": 0.3},
    "k2_in_loss": {"kl_in": "loss", "kl_estimator": "k2", "kl_coef": 0.3},
    "k3_in_loss": {"kl_in": "loss", "kl_estimator": "k3", "kl_coef": 0.3},
    "abs_in_loss": {"kl_in": "loss", "kl_estimator": "abs", "kl_coef": 0.3},
    "asymmetric_clip": {"clip_low": 0.05, "clip_high": 0.4},
    "dual_clip": {"dual_clip": 1.05},
    "no_value_clip": {"value_clip": 0.0},
    "tight_value_clip": {"value_clip": 0.02},
    "not_whitened": {"whiten_advantages": False},
    "score_shift": {"score_shift": True},
    "score_clip": {"score_clip": 0.3},
    "score_as_it_is": {"score_scale": False, "score_clip": 0.0},
    "missing_eos_penalty": {"missing_eos_penalty": 1.5},
    "bootstrap_truncated": {"bootstrap_truncated": True},
    "discounted": {"gamma": 0.9, "lam": 0.7, "bootstrap_truncated": True},
    "entropy": {"entropy_coef": 0.05},
    "ptx": {"ptx_coef": 0.4, "ptx_data": [DataSource(path="ptx.jsonl")]},
}
STATISTICS = {"count": 20.0, "mean": 0.3, "std": 1.7}
LR, ADAM_EPS = 1e-2, 1e-2
PTX = [
    Example([5, 6], [7, 8, 9, 1], None, "ptx:1", {}),
    Example([9], [10, 11, 12, 13, 1], [True, True, False, False, True], "ptx:2", {}),
]


@pytest.fixture(scope="module", autouse=True)
def cluster():
    with Cluster.open() as opened:
        yield opened


@pytest.fixture(scope="module")
def models():
    """What scores, and what is updated: the same two moved a little."""
    actor, critic = tiny.causal_lm(0), tiny.scorer(2)
    reference, reward = tiny.nudged(actor, 0.02, seed=11), tiny.scorer(1)
    return SimpleNamespace(
        actor=actor,
        critic=critic,
        reference=reference,
        reward=reward,
        moved_actor=tiny.nudged(actor, 0.02),
        moved_critic=tiny.nudged(critic, 0.02),
    )


def configured(case):
    optimizer = OptimizerConfig(lr=LR, eps=ADAM_EPS, clip_grad=0.0, schedule="constant")
    settings = {"ppo_epochs": 1, "minibatches": 1, "token_budget": 40} | CASES[case]
    return tiny.ppo_config("unused", optimizer=optimizer, critic=CriticConfig(optimizer=optimizer), **settings)


def function_score(response) -> float:
    return [0.0, 1.0, -0.5, 0.25][response.sequence_id % 4]


def update_with_the_engine(config, models, cluster):
    """Score with one set of weights, update another: everything the oracle has to say something about."""
    actor = tiny.role(models.actor, learns=config.optimizer)
    critic = tiny.role(models.critic, "scalar", learns=config.critic.optimizer)
    reference, reward = tiny.role(models.reference), tiny.role(models.reward, "scalar")
    plan = plan_batches(tiny.responses(), config.token_budget, 1)
    scorer = LogprobScorer(config.sampling.temperature, 16)
    old, entropy = scorer(actor, plan.batches, entropy=True)
    ref, _ = scorer(reference, plan.batches)
    value, last_value = score_values(critic, plan.batches)
    said = score_sequences(reward, plan.batches)
    scaling = RunningScoreNormalizer(config, STATISTICS)
    scaling.update(said, cluster.data_group)
    given = torch.tensor([function_score(r) for r in plan.local_responses])
    said_N = [ModelScores("reward_model", config.reward_model_weight, said)]
    scores = total_scores(config, {"reward_model": scaling}, said_N, given, plan.truncated_N)
    shaped = compute_advantages(config, config.kl_coef, plan, scores, old, ref, value, last_value)
    experience = Experience(plan, scores, old, entropy, ref, value, shaped, shaped.moments.reduce(cluster.data_group))
    tiny.reload(actor, models.moved_actor)
    tiny.reload(critic, models.moved_critic)
    for role in (actor, critic):  # the optimizer's own copies of the weights
        role.optimizer.reload_model_params()
    updater = Updater(config, actor, critic, scorer, cluster)
    outcome = updater.run(experience, config.kl_coef, 1, [PTX] if config.ptx_coef else ())
    return SimpleNamespace(actor=actor, critic=critic, experience=experience, outcome=outcome)


# -- the recipe in float64 --------------------------------------------------------------------------------------------


def token_terms(weights, settings, response, temperature):
    """Log-prob and entropy of every response token."""
    hidden = llama64(weights, settings, response.prompt + response.tokens)
    terms = []
    for t, token in enumerate(response.tokens):
        logits = hidden[len(response.prompt) - 1 + t] @ weights["lm_head.weight"].t() / temperature
        log_p = logits - torch.logsumexp(logits, 0)
        terms.append((log_p[token], -(log_p.exp() * log_p).sum()))
    return terms


def head_outputs(weights, settings, response):
    """Values before every response token, and the head's output at the last token."""
    hidden = llama64(weights, settings, response.prompt + response.tokens)
    head = weights["score.weight"][0]
    start = len(response.prompt) - 1
    return [hidden[start + t] @ head for t in range(len(response.tokens))], hidden[-1] @ head


def estimate(kind, d):
    return {"k1": d, "k2": d * d / 2, "k3": math.exp(-d) - 1 + d, "abs": abs(d)}[kind]


def oracle_scores(config, said, responses):
    """clip((score - m * shift) / s, -c, c) with the moments of everything seen so far, this batch included."""
    count = STATISTICS["count"] + len(said)
    mean = (STATISTICS["count"] * STATISTICS["mean"] + sum(said)) / count
    squares = STATISTICS["count"] * (STATISTICS["std"] ** 2 + STATISTICS["mean"] ** 2) + sum(x * x for x in said)
    std = math.sqrt(squares / count - mean * mean)
    totals = []
    for x, response in zip(said, responses, strict=True):
        x = (x - mean * config.score_shift) / (std if config.score_scale else 1.0)
        if config.score_clip:
            x = max(-config.score_clip, min(config.score_clip, x))
        penalty = config.missing_eos_penalty if response.finish_reason == "length" else 0.0
        totals.append(x + function_score(response) - penalty)
    return totals


def oracle_gae(config, score, values, last_value, old, ref, finish_reason):
    """Advantages and returns of one response, from its last token backwards."""
    advantages, following = [0.0] * len(values), 0.0
    next_value = last_value if config.bootstrap_truncated and finish_reason == "length" else 0.0
    for t in reversed(range(len(values))):
        kl = estimate(config.kl_estimator, old[t] - ref[t])
        reward = -config.kl_coef * kl if config.kl_in == "reward" else 0.0
        if t == len(values) - 1:
            reward += score
        delta = reward + config.gamma * next_value - values[t]
        following = delta + config.gamma * config.lam * following
        advantages[t], next_value = following, values[t]
    return advantages, [a + v for a, v in zip(advantages, values, strict=True)]


def oracle_policy_term(config, logp, entropy, old, ref, advantage):
    ratio = torch.exp(logp - old)
    clipped = torch.clamp(ratio, 1 - config.clip_low, 1 + config.clip_high)
    loss = torch.maximum(-advantage * ratio, -advantage * clipped)
    if config.dual_clip is not None and advantage < 0:
        loss = torch.minimum(loss, torch.tensor(-advantage * config.dual_clip, dtype=torch.float64))
    if config.kl_in == "loss":
        d = logp.item() - ref
        # Worth what the estimator says, with the gradient of d^2 / 2.
        loss = loss + config.kl_coef * (estimate(config.kl_estimator, d) + d * (logp - logp.detach()))
    return loss - config.entropy_coef * entropy


def oracle_update(config, models, responses):
    temperature = config.sampling.temperature
    settings = {name: getattr(models, name).config for name in ("actor", "critic", "reference", "reward")}
    with torch.no_grad():
        weights = {name: doubles(getattr(models, name)) for name in settings}
        old = [[x.item() for x, _ in token_terms(weights["actor"], settings["actor"], r, temperature)]
               for r in responses]  # fmt: skip
        ref = [[x.item() for x, _ in token_terms(weights["reference"], settings["reference"], r, temperature)]
               for r in responses]  # fmt: skip
        valued = [head_outputs(weights["critic"], settings["critic"], r) for r in responses]
        said = [head_outputs(weights["reward"], settings["reward"], r)[1].item() for r in responses]
    values = [[v.item() for v in before] for before, _ in valued]
    scores = oracle_scores(config, said, responses)
    shaped = [
        oracle_gae(config, scores[n], values[n], valued[n][1].item(), old[n], ref[n], r.finish_reason)
        for n, r in enumerate(responses)
    ]
    flat = [a for advantages, _ in shaped for a in advantages]
    mean = sum(flat) / len(flat)
    variance = sum((a - mean) ** 2 for a in flat) / len(flat)

    actor, critic = doubles(models.moved_actor), doubles(models.moved_critic)
    policy = value = ptx = torch.zeros((), dtype=torch.float64)
    for n, response in enumerate(responses):
        advantages, returns = shaped[n]
        terms = token_terms(actor, settings["actor"], response, temperature)
        now, _ = head_outputs(critic, settings["critic"], response)
        for t, (logp, entropy) in enumerate(terms):
            a = (advantages[t] - mean) / math.sqrt(variance + 1e-8) if config.whiten_advantages else advantages[t]
            policy = policy + oracle_policy_term(config, logp, entropy, old[n][t], ref[n][t], a) / len(flat)
            error = (now[t] - returns[t]) ** 2
            if config.value_clip:
                low, high = values[n][t] - config.value_clip, values[n][t] + config.value_clip
                error = torch.maximum(error, (torch.clamp(now[t], low, high) - returns[t]) ** 2)
            value = value + 0.5 * error / len(flat)
    if config.ptx_coef:
        taught = []
        for example in PTX:
            as_response = SimpleNamespace(prompt=example.prompt, tokens=example.response)
            terms = token_terms(actor, settings["actor"], as_response, 1.0)
            mask = example.action_mask or [True] * len(terms)
            taught += [-logp for (logp, _), counts in zip(terms, mask, strict=True) if counts]
        ptx = sum(taught) / len(taught)
    (policy + config.ptx_coef * ptx).backward()
    value.backward()
    return SimpleNamespace(
        advantages=flat,
        returns=[x for _, returns in shaped for x in returns],
        white=[(a - mean) / math.sqrt(variance + 1e-8) for a in flat],
        kl=[sum(estimate(config.kl_estimator, o - f) for o, f in zip(a, b, strict=True)) for a, b in zip(old, ref)],
        scores=scores,
        policy=policy.item(),
        value=value.item(),
        ptx=ptx.item(),
        actor=actor,
        critic=critic,
    )


# -- the comparison ---------------------------------------------------------------------------------------------------


def distance(ours: torch.Tensor, theirs: list[float]) -> float:
    theirs = torch.tensor(theirs, dtype=torch.float64)
    return ((ours.double() - theirs).norm() / theirs.norm()).item()


def held_gradients(role):
    return tiny.by_hugging_face_name(role, lambda p: p.main_grad)


@pytest.mark.parametrize("case", CASES)
def test_one_update_agrees_with_the_recipe_in_float64(case, models, cluster):
    config = configured(case)
    engine = update_with_the_engine(config, models, cluster)
    experience, outcome = engine.experience, engine.outcome
    truth = oracle_update(config, models, experience.plan.local_responses)
    shaped = experience.shaped
    count = len(truth.advantages)
    away = {
        "scores": distance(experience.scores.total_N, truth.scores),
        "kl": distance(shaped.kl_N, truth.kl),
        "advantages": distance(shaped.advantage_A, truth.advantages),
        "returns": distance(shaped.return_A, truth.returns),
        "whitened": distance(whiten(shaped.advantage_A, experience.moments), truth.white),
        "policy loss": abs(float(outcome.policy_stats.loss_sum) / count - truth.policy),
        "value loss": abs(float(outcome.value_stats.loss_sum) / count - truth.value),
    }
    if config.ptx_coef:
        away["ptx loss"] = abs(outcome.ptx_stats.loss_sum / outcome.ptx_stats.tokens - truth.ptx)
    for name, role, weights in (("actor", engine.actor, truth.actor), ("critic", engine.critic, truth.critic)):
        exact = {n: w.grad for n, w in weights.items()}
        away[f"{name} gradients"], away[f"worst of the {name}'s gradients"] = gap(held_gradients(role), exact)
        # The first step of AdamW, whose moments are g and g^2 once their bias is taken out.
        after = {n: w.detach() - LR * w.grad / (w.grad.abs() + ADAM_EPS) for n, w in weights.items()}
        away[f"{name} weights"], _ = gap(tiny.by_hugging_face_name(role, lambda p: p), after)
    assert {name: x for name, x in away.items() if not x <= 1e-5} == {}


def test_the_cases_clip_what_they_are_about(models, cluster):
    # An update that clips nothing would agree with any clipping rule.
    def stats(case):
        outcome = update_with_the_engine(configured(case), models, cluster).outcome
        return outcome.policy_stats, outcome.value_stats

    policy, value = stats("defaults")
    assert float(policy.clipped_low) > 2 and float(policy.clipped_high) > 2
    assert 0 < float(value.clipped_sum) < float(value.count)
    assert float(stats("dual_clip")[0].dual_clipped_sum) > 2
