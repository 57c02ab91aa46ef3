"""The ad-moderation demo: splits without leaks, truth from the text, a checker hard to fool, same seed same bytes."""

import dataclasses
import hashlib
import json
import os
import re
import subprocess
import sys
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("tokenizers")
pytest.importorskip("transformers")

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))
from ad_moderation import ads, docstrings, phrases, tokenizer  # noqa: E402
from ad_moderation import prepare as preparation  # noqa: E402
from ad_moderation.checker import check  # noqa: E402
from ad_moderation.reward import checker_reward, parts_reward  # noqa: E402

HELD_OUT = ("validation", "test")
FILES = ("sft", "reward_prompts", "prompts_train", "prompts_validation", "prompts_test")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """The default output with seed 0, its manifest and its rows by file."""
    out = tmp_path_factory.mktemp("prepared")
    manifest = preparation.prepare(out, seed=0)
    rows = {}
    for path in out.glob("*.jsonl"):
        with path.open(encoding="utf-8") as file:
            rows[path.stem] = [preparation.json.loads(line) for line in file]
    return SimpleNamespace(out=out, manifest=manifest, rows=rows)


def sample_ads(part, count=1000, seed=11):
    return list(islice(ads.generate((part,), seed, "test ads"), count))


def violating(count=200):
    return [row for row in sample_ads("test", count) if row["rule"]]


def digest(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# ---- tables


@pytest.mark.parametrize("rule", phrases.RULES, ids=lambda rule: rule.name)
def test_cues_mark_claims_and_nothing_else(rule):
    for claim in rule.claims:
        assert ads.broken_rules(claim.format(p="Nova tea", t="$900 a day")) == [rule.number], claim
    for text in (*rule.decoys, *rule.rewrites, *ads.topics(rule)):
        assert not ads.broken_rules(text), text
    assert all(re.search(rule.disclosure, rewrite.lower()) for rewrite in rule.rewrites)


def test_everything_but_claims_has_no_cue():
    tables = (phrases.LEADS, phrases.TAILS, phrases.OPENERS, phrases.KINDS, phrases.BRANDS, phrases.SUBJECTS)
    for table in (*tables, phrases.VERBS, phrases.OBJECTS, phrases.TIMES):
        assert len(table) == len(set(table))
        assert not [text for text in table if ads.broken_rules(text)]


def test_every_combination_belongs_to_one_part_and_every_part_has_its_share():
    combinations = [(lead, claim, tail) for lead in phrases.LEADS for claim in phrases.RULES[0].claims
                    for tail in phrases.TAILS]  # fmt: skip
    dealt = [phrases.part_of(*pieces) for pieces in combinations]
    shares = [dealt.count(part) / len(dealt) for part in phrases.PARTS]
    assert shares == pytest.approx([0.4, 0.2, 0.2, 0.2], abs=0.05)


def offending_template(row):
    """The lead, claim and tail that an offending sentence was made of."""
    rule = ads.RULE_BY_NUMBER[row["rule"]]
    for lead in phrases.LEADS:
        for tail in phrases.TAILS:
            if row["sentence"].startswith(lead + " ") and row["sentence"].endswith(f" {tail}."):
                middle = row["sentence"][len(lead) + 1 : -len(tail) - 2]
                for claim in rule.claims:
                    if claim.format(p=row["product"], t=row["topic"]).removesuffix(".") == middle:
                        return lead, claim, tail
    raise AssertionError(row["sentence"])


@pytest.mark.parametrize("part", phrases.PARTS)
def test_templates_products_and_topics_of_an_ad_are_of_its_part(part):
    for row in sample_ads(part, 400):
        assert phrases.part_of(*row["product"].split(" ")) == part
        if row["rule"]:
            assert phrases.part_of(*offending_template(row)) == part
            rule = ads.RULE_BY_NUMBER[row["rule"]]
            pieces = [(m, k) for m in rule.modifiers for k in rule.kinds if row["topic"] in (m + k, f"{m} {k}")]
            assert [phrases.part_of(*piece) for piece in pieces] == [part]


def test_policy_lists_the_rules_of_the_tables():
    policy = (EXAMPLES / "ad_moderation" / "policy.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## Rule (\d+): (.+)$", policy, re.MULTILINE)
    assert headings == [(str(rule.number), rule.name) for rule in phrases.RULES]
    for number, example in re.findall(r'## Rule (\d+).*?\*Violation\*: "([^"]+)"', policy, re.DOTALL):
        assert ads.broken_rules(example) == [int(number)]
    compliant = re.findall(r'\*Compliant\*: "([^"]+)"', policy)
    assert len(compliant) == len(phrases.RULES) and not ads.broken_rules(" ".join(compliant))


# ---- truth and splits


@pytest.mark.parametrize("part", phrases.PARTS)
def test_truth_from_the_text_equals_the_row(part):
    for row in sample_ads(part, 1500):
        expected = ads.Truth(row["rule"], row["sentence"], row["product"], row["topic"])
        assert ads.moderate(row["prompt"]) == expected
        assert row["prompt"].count(row["sentence"]) == 1 or row["rule"] == 0
        assert ads.reference_answer(row["prompt"], expected) == row["response"]


def test_moderate_refuses_what_is_no_ad_of_the_task():
    with pytest.raises(ValueError, match="names a product"):
        ads.moderate("Ad: Hello there.")
    with pytest.raises(ValueError, match="at most one"):
        ads.moderate("Ad: Nova tea cures knee rash in a week. Kids, grab Nova tea and win a red comic.")
    with pytest.raises(ValueError, match="parts"):
        next(ads.generate(("holdout",), 0, "x"))


def test_no_held_out_reference_answer_occurs_in_training(prepared):
    training = {row["response"] for name in ("sft", "reward_prompts", "prompts_train") for row in prepared.rows[name]}
    quotes = {row.get("sentence") for name in ("reward_prompts", "prompts_train") for row in prepared.rows[name]}
    for part in HELD_OUT:
        rows = prepared.rows[f"prompts_{part}"]
        assert {row["response"] for row in rows} & training <= {ads.APPROVE}
        assert {row["sentence"] for row in rows} & quotes <= {""}
    assert not {row["product"] for row in prepared.rows["prompts_validation"]} & {
        row["product"] for row in prepared.rows["prompts_test"]
    }


def test_prompts_are_distinct_within_and_between_files(prepared):
    prompts = [row["prompt"] for name in FILES for row in prepared.rows[name] if row["source"] == "ads"]
    assert len(prompts) == len(set(prompts))
    assert len(prepared.rows["prompts_test"]) >= 512


def test_docstrings_are_split_by_sentence(prepared):
    parts = {part: docstrings.rows(part) for part in ("train", "validation", "test")}
    keys = {part: {docstrings.normalise(row["response"]) for row in rows} for part, rows in parts.items()}
    assert not keys["train"] & keys["validation"] and not keys["train"] & keys["test"]
    assert not keys["validation"] & keys["test"]
    assert sum(len(rows) for rows in parts.values()) > 3000
    trained = {row["prompt"] for row in prepared.rows["general"]}
    assert {row["prompt"] for row in prepared.rows["sft"] if row["source"] == "docstrings"} <= trained


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        ("Return the mean.", "Return the mean."),
        ("Return the\n    mean of e.g. data.\n\nMore.", None),
        ("Split a line\n    in two. Then more.", "Split a line in two."),
        ("Short.", None),
        ("No full stop here at all", None),
        ("Gr\u00fc\u00dfe an alle, die es lesen.", None),
    ],
)
def test_first_sentence(docstring, expected):
    sentence = docstrings.first_sentence(docstring)
    assert sentence == expected or (expected is None and sentence == "Return the mean of e.g.")


# ---- checker


@pytest.mark.parametrize("part", phrases.PARTS)
def test_references_earn_full_marks(part):
    for row in sample_ads(part, 500):
        assert check(row, row["response"]).score == pytest.approx(1.0)
        assert check(row["prompt"], row["response"]).score == pytest.approx(1.0)
        assert 0 < check(row, row["response"], truncated=True).score <= 0.5


def mean_score(rows, answer):
    return sum(check(row, answer(row)).score for row in rows) / len(rows)


HACKS = {
    "empty": lambda row: "",
    "garbage": lambda row: "\x00\ufffd\x01" * 30,
    "approve with a hedge": lambda row: f"{ads.APPROVE}\n{row['response']}",
    "rule line alone": lambda row: row["response"].split("\n")[0],
    "all rules": lambda row: "\n".join(f"Rule {rule.number}: {rule.name}." for rule in phrases.RULES),
    "one rule for all": lambda row: 'Rule 1: health claims.\nQuote: "x"\nRewrite: x',
    "reference without quote": lambda row: re.sub(r'Quote: "[^"]*"\n', "", row["response"]),
}


@pytest.mark.parametrize("hack", HACKS)
def test_hacks_score_low(hack):
    assert mean_score(violating(), HACKS[hack]) < 0.45


def test_always_approve_scores_the_share_of_compliant_ads():
    rows = sample_ads("test", 1000)
    share = sum(row["rule"] == 0 for row in rows) / len(rows)
    assert mean_score(rows, lambda row: ads.APPROVE) == pytest.approx(share)
    assert 0.1 < share < 0.3


def with_rewrite(row, rewrite):
    return row["response"].split("\nRewrite: ")[0] + f"\nRewrite: {rewrite}"


REWRITES = {
    "none": lambda row: "",
    "the offending sentence": lambda row: row["sentence"],
    "garbage": lambda row: "\x00\ufffd \x07 {} %s",
    "one word many times": lambda row: "the " * 30 + ".",
    "product alone": lambda row: row["product"] + ".",
    "product many times": lambda row: " ".join([row["product"]] * 8) + ".",
    "list of the right words": lambda row: f"{row['product']} {row['topic']} adults doctor private plan vary judge.",
    "padded": lambda row: row["response"].split("Rewrite: ")[1] + " and it is very good for all of you" * 3 + ".",
    "another rule's": lambda row: phrases.RULES[row["rule"] % 6].rewrites[0].format(p=row["product"], t=row["topic"]),
}


@pytest.mark.parametrize("name", REWRITES)
def test_poor_rewrites_cost_most_of_their_share(name):
    rows = violating()
    parts = [check(row, with_rewrite(row, REWRITES[name](row))).parts for row in rows]
    assert sum(part["rewrite"] for part in parts) / len(parts) < 0.45


def test_quoting_the_whole_ad_earns_little():
    def answer(row):
        return row["response"].replace(row["sentence"], row["prompt"].removeprefix(ads.PROMPT_PREFIX), 1)

    rows = violating()
    assert sum(check(row, answer(row)).parts["quote"] for row in rows) / len(rows) < 0.25


def test_the_grade_follows_the_damage():
    row = violating()[0]
    score = [
        check(row, row["response"].replace(row["sentence"], sentence, 1)).score
        for sentence in (row["sentence"], row["sentence"][:-4], row["sentence"][:-12], "Nothing at all.")
    ]
    assert score == sorted(score, reverse=True) and len(set(score)) == 4
    wrong_rule = row["response"].replace(f"Rule {row['rule']}", f"Rule {row['rule'] % 6 + 1}", 1)
    assert check(row, wrong_rule).score < 0.4
    assert check(row, row["response"] + "\nThat is all.").score < 0.7


@pytest.mark.parametrize(
    "answer", ["Rule 99999999999999999999: x.", 'Rule 1: \nQuote: "', "Rewrite: .", "Quote: \n" * 50]
)
def test_odd_answers_are_graded_and_never_raise(answer):
    for row in sample_ads("test", 20):
        assert 0 <= check(row, answer).score <= 0.4


def test_checker_reward_reads_samples():
    row = violating()[0]
    stopped = SimpleNamespace(text=row["response"], finish_reason="stop", row=row, messages=[])
    truncated = SimpleNamespace(
        text=row["response"], finish_reason="length", row={"prompt": row["prompt"]}, messages=[]
    )
    assert checker_reward([stopped, truncated]) == pytest.approx([1.0, 0.5])


# ---- token rewards


def answers(prepared, row, texts):
    """Samples as the engine passes them: all are answers to one prompt."""
    from transformers import AutoTokenizer

    tok = AutoTokenizer.from_pretrained(str(prepared.out / "tokenizer"))
    where, end = f"{prepared.out / 'prompts_train.jsonl'}:1", [tok.eos_token_id]
    tokens = [tok(text, add_special_tokens=False)["input_ids"] + end for text in texts]
    samples = [
        SimpleNamespace(text=text, tokens=ids, row=row, where=where, group=7, finish_reason="stop")
        for text, ids in zip(texts, tokens, strict=True)
    ]
    return tok, samples


def damaged(row, line, word):
    """The reference with one wrong word in a line; the form stays."""
    lines = row["response"].split("\n")
    words = lines[line].split(" ")
    lines[line] = " ".join([*words[:word], "7:" if line == 0 else "zzz", *words[word + 1 :]])
    return "\n".join(lines)


def test_parts_are_paid_beside_those_of_the_other_answers(prepared):
    row = next(row for row in prepared.rows["prompts_train"] if row["rule"])
    texts = [row["response"], damaged(row, 1, 3), row["response"].replace("Rule ", "Rule 9", 1), ads.APPROVE, "\n\n\n"]
    _, samples = answers(prepared, row, texts)
    scores = checker_reward(samples)
    assert len(set(scores)) == 4
    for n, result in enumerate(parts_reward(samples)):
        others = [score for m, score in enumerate(scores) if m != n]
        assert result.score == scores[n]
        assert result.score + sum(result.token_rewards_A) == pytest.approx(scores[n] - sum(others) / len(others))


def test_an_answer_alone_is_paid_its_score(prepared):
    row = next(row for row in prepared.rows["prompts_train"] if row["rule"])
    _, samples = answers(prepared, row, [row["response"]])
    (result,) = parts_reward(samples)
    assert result.score == pytest.approx(1) and sum(result.token_rewards_A) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(("line", "word", "part"), [(0, 1, 1), (1, 2, 0.35), (2, 2, 0.35)])
def test_a_part_is_paid_where_it_is_decided(prepared, line, word, part):
    """Of two answers that differ in one line, one is paid at the line's end, the other at its first wrong token."""
    for row in [row for row in prepared.rows["prompts_train"] if row["rule"]][:20]:
        tok, samples = answers(prepared, row, [row["response"], damaged(row, line, word)])
        correct, wrong = (sample.tokens for sample in samples)
        ends = [n for n, token in enumerate(correct) if tok.decode([token]) == "\n"]
        end = [*ends, len(correct) - 1][line]
        prefixes = [tok.decode(wrong[: n + 1], skip_special_tokens=True) for n in range(len(wrong))]
        fault = next(n for n, prefix in enumerate(prefixes) if not row["response"].startswith(prefix))
        paid = []
        for result in parts_reward(samples):
            result.token_rewards_A[-1] += result.score  # which the engine pays
            paid.append({n: x for n, x in enumerate(result.token_rewards_A) if abs(x) > 1e-6})
        assert set(paid[0]) == {end} and set(paid[1]) == {fault}
        assert paid[0][end] == pytest.approx(-paid[1][fault], abs=2e-6)  # scores are rounded
        assert 0 < paid[0][end] <= part


def test_a_verdict_is_paid_at_its_first_token(prepared):
    row = next(row for row in prepared.rows["prompts_train"] if not row["rule"])
    other = next(row for row in prepared.rows["prompts_train"] if row["rule"])
    _, samples = answers(prepared, row, [ads.APPROVE, other["response"]])
    correct, faulty = (result.token_rewards_A for result in parts_reward(samples))
    assert faulty[0] == -1 and not any(faulty[1:])
    assert correct == [0, 0, 0]  # its score is paid at the last token, and nothing is the other answer's


# ---- recipes


@pytest.mark.parametrize("sharing", ["full", "lora"])
def test_recipes_load(sharing):
    from ad_moderation import demo
    from icegrt import PPOConfig, RewardConfig

    assert RewardConfig.load(demo.RECIPE, []).sharing == "full"
    config, full = PPOConfig.load(demo.RECIPE, demo.ppo_changes(sharing)), PPOConfig.load(demo.RECIPE, [])
    assert config.sharing == sharing
    assert (config.optimizer.lr > full.optimizer.lr) == (sharing == "lora")
    # The rest is that of full.
    changed = {"sharing": full.sharing, "optimizer": full.optimizer, "critic": full.critic}
    assert dataclasses.replace(config, **changed) == full
    assert config.optimizer.warmup_fraction == full.optimizer.warmup_fraction


# ---- outcome


def test_the_outcome_has_the_figures_of_the_stages_files(tmp_path):
    from ad_moderation.outcome import Outcome
    from icegrt import PPOConfig

    rows = sample_ads("test", 24)

    def write(name, document):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in document), encoding="utf-8")

    def answers(samples, task, kl):
        prompts, count = [n for n in range(24) for _ in range(samples)], 24 * samples
        texts = [f"answer {n} is {'a' if task else n}" for n in range(count)]
        columns = {"prompt": prompts, "text": texts, "task": [task] * count, "reward_model": [4.0 * task] * count}
        return columns | {"kl": [kl] * count, "tokens": [10 + task] * count, "truncated": [False] * count}

    for when, task in (("before", 0.0), ("after", 1.0)):
        document = {"sampled": answers(3, task, 2 * task), "greedy": answers(1, task, None), "general_loss": 2 + task}
        write(f"assessment_{when}.json", [document])
    write("data/prompts_test.jsonl", rows)
    write("sft/summary.json", [{"heldout_loss_before": 3.0, "heldout_loss_after": 1.0}])
    write("reward/summary.json", [{
        "baseline_accuracy": 0.5, "baseline_feature": "length", "heldout_accuracy": 0.8, "heldout_pairs": 9,
        "heldout_tie_fraction": 0.1,
    }])  # fmt: skip
    write("reward/model/score_statistics.json", [{"after": {"std": 2.0}}])
    PPOConfig(score_clip=1.5, kl_target_nats_per_response=3.0).save(tmp_path / "ppo" / "config.yaml")
    steps = [{"kind": "ppo", "iteration": n, "response_tokens_per_second": 5.0, "seconds_by_phase": {"rollout": 1.0}}
             for n in (1, 2)]  # fmt: skip
    write("ppo/metrics.jsonl", steps)
    write("ppo/summary.json", [{"alarms": ["one"]}])
    outcome = Outcome(tmp_path)
    ppo = outcome.report["ppo"]
    assert (ppo["test_ads"], ppo["iterations"], ppo["kl_nats_per_response"]) == (24, 2, 2.0)
    assert (ppo["kl_target_nats_per_response"], ppo["seconds_by_phase"]) == (3.0, {"rollout": 2.0})
    assert (ppo["task_score_before"], ppo["greedy_task_score_after"], ppo["general_loss_after"]) == (0.0, 1.0, 3.0)
    # The reward model's score over its standard deviation, at most score_clip, beside the checker's.
    config = outcome.config
    total = config.reward_model_weight * 1.5 + config.reward_function_weight
    assert (ppo["heldout_reward_before"], ppo["heldout_reward_after"]) == (0.0, pytest.approx(total))
    lines = outcome.lines()
    assert any(line.startswith("SHORT general held-out loss +50.0%") for line in lines) and lines[-1] == "alarm: one"
    examples = outcome._examples()
    assert len(examples) == 20 and examples[0]["prompt"] == rows[0]["prompt"]


@pytest.mark.parametrize(
    ("name", "gain", "low", "passes"),
    [
        ("task_score", 0.081, 0.06, True),
        ("task_score", 0.079, 0.06, False),
        ("task_score", 0.1, 0.05, False),
        ("greedy_task_score", 0.001, -0.01, True),
        ("greedy_task_score", -0.001, -0.01, False),
        ("greedy_task_score", 0.001, -0.021, False),
    ],
)
def test_the_checks_ask_for_a_gain_and_for_its_interval(name, gain, low, passes):
    from ad_moderation.outcome import Outcome

    ppo = {
        "kl_nats_per_response": 1.0, "kl_target_nats_per_response": 6.0, "alarms": [],
        "general_loss_before": 4.0, "general_loss_after": 4.0,
    }  # fmt: skip
    for figure in ("distinct_fraction", "response_tokens_mean", "truncated_fraction"):
        ppo |= {f"{figure}_before": 0.5, f"{figure}_after": 0.5}
    for score in ("heldout_reward", "task_score", "greedy_task_score"):
        ppo |= {f"{score}_before": 0.5, f"{score}_after": 0.7, f"{score}_gain_ci95": [0.19, 0.21]}
    ppo |= {f"{name}_after": 0.5 + gain, f"{name}_gain_ci95": [low, 0.3]}
    outcome = Outcome.__new__(Outcome)
    reward = {
        "heldout_accuracy": 0.8, "baseline_accuracy": 0.6, "heldout_pairs": 9, "heldout_tie_fraction": 0.5,
        "baseline_feature": "length",
    }  # fmt: skip
    outcome.report = {"sft": {"heldout_loss_before": 3.0, "heldout_loss_after": 1.0}, "reward": reward, "ppo": ppo}
    short = [line for line in outcome.lines() if line.startswith("SHORT")]
    label = "checker, greedy" if name.startswith("greedy") else "checker, sampled"
    assert (not short) if passes else (len(short) == 1 and f"{label}: 0.500 -> " in short[0])


# ---- files


def test_longest_answers_and_prompts_fit(prepared):
    for name, lengths in prepared.manifest["tokens"].items():
        assert lengths["response_max"] <= preparation.MAX_RESPONSE_TOKENS, name
        assert lengths["prompt_max"] <= preparation.MAX_PROMPT_TOKENS, name


@pytest.mark.parametrize("folder", ["tokenizer", "actor_init"])
def test_tokenizer_round_trips_any_text(prepared, folder):
    from transformers import AutoTokenizer

    tok = AutoTokenizer.from_pretrained(str(prepared.out / folder))
    texts = ["", " two  spaces\n\n\ttab ", "Gr\u00fc\u00dfe \u6f22\u5b57 \U0001f600", "$4,300 a week.", 'a "b" <c> {d}']
    for text in texts + [row["prompt"] + row["response"] for row in prepared.rows["prompts_test"][:50]]:
        assert tok.decode(tok(text, add_special_tokens=False)["input_ids"]) == text
    assert len(tok) == tokenizer.VOCAB_SIZE
    assert tok.pad_token_id != tok.eos_token_id and tok.bos_token_id is None


def test_chat_template_marks_the_answer(prepared):
    from transformers import AutoTokenizer

    tok = AutoTokenizer.from_pretrained(str(prepared.out / "tokenizer"))
    row = prepared.rows["prompts_test"][0]
    question = [{"role": "user", "content": row["prompt"]}]
    chat = [*question, {"role": "assistant", "content": row["response"]}]
    prompt = tok.apply_chat_template(question, add_generation_prompt=True, return_dict=True)["input_ids"]
    encoded = tok.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    assert encoded["input_ids"][: len(prompt)] == prompt
    assert encoded["input_ids"][-1] == tok.eos_token_id
    assert encoded["assistant_masks"] == [0] * len(prompt) + [1] * (len(encoded["input_ids"]) - len(prompt))


def test_actor_loads_and_copies_better_than_chance(prepared):
    import torch
    from transformers import AutoModelForCausalLM

    actor = AutoModelForCausalLM.from_pretrained(str(prepared.out / "actor_init"))
    assert actor.config.vocab_size == tokenizer.VOCAB_SIZE
    assert 2_500_000 < sum(p.numel() for p in actor.parameters()) < 3_500_000
    half = torch.randint(4, tokenizer.VOCAB_SIZE, (4, 40), generator=torch.Generator().manual_seed(0))
    tokens = torch.cat([half, half], dim=1)
    with torch.no_grad():
        logprob = actor(tokens).logits.log_softmax(-1)[:, :-1].gather(2, tokens[:, 1:, None])[..., 0]
    assert logprob[:, 42:].mean() > logprob[:, :38].mean() + 0.1


def test_same_seed_same_bytes_in_a_fresh_process(prepared, tmp_path):
    command = [sys.executable, str(EXAMPLES / "ad_moderation" / "prepare.py"), "--out", str(tmp_path), "--seed", "0"]
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    subprocess.run(command, check=True, env=environment, cwd=tmp_path, capture_output=True)
    assert digest(tmp_path) == digest(prepared.out)


def test_another_seed_gives_other_ads():
    first, second = (list(islice(ads.generate(("test",), seed, "x"), 50)) for seed in (0, 1))
    assert [row["prompt"] for row in first] != [row["prompt"] for row in second]
