"""Bad reward functions and HTTP scorers: refused before training, in one error that names function, row and remedy."""

import json
import threading

import pytest

from tests.helpers import reward_cases, tiny_models
from tests.helpers import stage_cases as cases


def ppo(home, run_dir, *keys):
    return ["ppo", *cases.ppo_keys(home, run_dir, "ppo.reward.timeout_seconds=20", *keys)]


MODULES = {
    "a syntax error": ("def score(samples:\n    return 1\n", ["SyntaxError", "bad.py, line 1"]),
    "an import that fails": (
        "import no_such_package\ndef score(s): ...\n",
        ["ModuleNotFoundError", "bad.py:1"],
    ),
    "an import that raises": ("x = 1 / 0\ndef score(s): ...\n", ["ZeroDivisionError", "bad.py:1"]),
    "an import that exits": ("import sys\nsys.exit(3)\n", ["SystemExit: 3", "bad.py:2"]),
    "an import that kills": ("import os\nos._exit(3)\n", ["ended its process (exit status 3)"]),
    "no such function": ("def scores(samples): ...\n", ["has no function `score`"]),
    "no function": ("score = 3\n", ["has no function `score`"]),
    "a form of nobody": (
        "def score(model, batch): ...\n",
        ["`score(model, batch)`", "reward(samples)", "TRL"],
    ),
}


@pytest.mark.parametrize("text, words", MODULES.values(), ids=MODULES)
@pytest.mark.parametrize("workers", [0, 1])
def test_a_module(home, refused, run_dir, tmp_path, text, words, workers):
    if "_exit" in text and workers == 0:
        pytest.skip("it would end this process: what workers are for")
    (tmp_path / "bad.py").write_text(text)
    keys = [f"ppo.reward_function={tmp_path}/bad.py:score", f"ppo.reward.workers={workers}"]
    refused(ppo(home, run_dir, *keys), "ppo.reward_function: ", "bad.py", *words)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("gone.py:score", ["no file gone.py"]),
        ("score.py", ["expected `file.py:function` or `module:function`"]),
        ("no_such_module:score", ["importing no_such_module failed", "ModuleNotFoundError"]),
    ],
)
def test_a_function_that_is_not_there(home, refused, run_dir, spec, words):
    refused(ppo(home, run_dir, f"ppo.reward_function={spec}"), "ppo.reward_function: ", *words)


BODIES = {
    "raises": ("raise KeyError('truth')", ["raised KeyError: 'truth' in bad.py:3", "prompts.jsonl:"]),
    "raises on a column": ("return [s.row['truth'] for s in samples]", ["KeyError", "prompts.jsonl:"]),
    "exits": ("sys.exit('done')", ["SystemExit: done", "bad.py:3"]),
    "kills its worker": ("os._exit(7)", ["ended its process (exit status 7)", "prompts.jsonl:"]),
    "crashes its worker": ("os.kill(os.getpid(), 11)", ["signal SIGSEGV", "prompts.jsonl:"]),
    "hangs": ("time.sleep(600)", ["took longer than 1 s", "ppo.reward.timeout_seconds", "prompts.jsonl:"]),
    "loops": ("while True: pass", ["took longer than 1 s", "ppo.reward.on_error"]),
    "NaN": ("return [float('nan')] * len(samples)", ["returned nan for", "prompts.jsonl:", "finite number"]),
    "infinite": ("return [float('-inf')] * len(samples)", ["returned -inf for", "prompts.jsonl:"]),
    "None": ("pass", ["returned None for 2 samples", "a list with one number for each"]),
    "None inside": ("return [None] * len(samples)", ["returned None for", "prompts.jsonl:"]),
    "one number": ("return 1.0", ["returned 1.0 for 2 samples"]),
    "a dict": ("return {'score': [1, 2]}", ["returned {'score': [1, 2]} for 2 samples"]),
    "too few": ("return [1.0]", ["returned 1 scores for 2 samples"]),
    "too many": ("return [1.0] * 9", ["returned 9 scores for 2 samples"]),
    "texts": ("return ['1'] * len(samples)", ["returned '1' for", "prompts.jsonl:"]),
    "booleans": ("return [True] * len(samples)", ["returned True for", "finite number"]),
    "too large an integer": ("return [10 ** 5000] * len(samples)", ["returned a int for", "finite number"]),
    "beyond float32": ("return [1e39] * len(samples)", ["returned 1e+39 for", "finite number"]),
    "what cannot be pickled": ("return [lambda: 1] * len(samples)", ["<lambda>", "prompts.jsonl:"]),
    "too few token rewards": (
        "return [icegrt.RewardResult(1.0, {}, [1.0] * 99) for s in samples]",
        ["returned 99 token_rewards_A for", "prompts.jsonl:", "tokens"],
    ),
    "NaN among token rewards": (
        "return [icegrt.RewardResult(1.0, {}, [float('nan')] * len(s.tokens)) for s in samples]",
        ["returned nan as token_rewards_A[0]", "prompts.jsonl:"],
    ),
    "a metric that is text": (
        "return [icegrt.RewardResult(1.0, {'why': 'good'}) for s in samples]",
        ["the metric 'why' as 'good'", "prompts.jsonl:"],
    ),
}


@pytest.mark.parametrize("body, words", BODIES.values(), ids=BODIES)
def test_a_function(home, refused, run_dir, tmp_path, body, words):
    (tmp_path / "bad.py").write_text(f"import os, sys, time, icegrt\ndef score(samples):\n    {body}\n")
    keys = [f"ppo.reward_function={tmp_path}/bad.py:score"]
    keys += ["ppo.reward.timeout_seconds=1"] if "longer" in words[0] else []
    refused(ppo(home, run_dir, *keys), "`score`", *words)


def test_an_async_function_that_raises(home, refused, run_dir, tmp_path):
    (tmp_path / "bad.py").write_text("async def score(samples):\n    raise OSError('no service')\n")
    refused(ppo(home, run_dir, f"ppo.reward_function={tmp_path}/bad.py:score"), "OSError: no service", "bad.py:2")


def test_on_error_does_not_excuse_a_function_that_never_works(home, refused, run_dir, tmp_path):
    (tmp_path / "bad.py").write_text("def score(samples):\n    raise ValueError('no')\n")
    keys = [f"ppo.reward_function={tmp_path}/bad.py:score", "ppo.reward.on_error=score"]
    refused(ppo(home, run_dir, *keys), "`score` could score none of 2 answers", "ValueError: no")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ({}, ["ppo.reward.sources[0] names no model, function or url; expected one of the three"]),
        ({"function": "a.py:f", "url": "http://h/"}, ["ppo.reward.sources[0] names function and url; expected one"]),
        ({"model": "m", "url": "http://h/"}, ["ppo.reward.sources[0] names model and url; expected one of the three"]),
        ({"url": "h:80"}, ["ppo.reward.sources[0]: expected a URL"]),
        ({"function": "a.py:f", "name": "reward_model"}, ["ppo.reward.sources[0].name", "name of the reward model"]),
        ({"function": "a.py:f", "name": "a b"}, ["ppo.reward.sources[0].name", "'a b'"]),
        ({"function": "gone.py:f"}, ["ppo.reward.sources[0]: no file gone.py"]),
        ({"function": "a.py:f", "style": "verll"}, ["ppo.reward.sources[0].style", "one of auto, icegrt, trl, verl"]),
        ({"function": "a.py:f", "weight": "big"}, ["ppo.reward.sources[0].weight", "a number"]),
    ],
)
def test_a_source(home, refused, run_dir, source, words):
    refused(ppo(home, run_dir, f"ppo.reward.sources={json.dumps([source])}"), *words)


MODELS = {
    "another vocabulary": ({"vocab_size": 70}, {}, ["has a vocabulary of 70 tokens", "one of 61"]),
    "other token ids": ({}, {"a": "ä"}, ["map text to different token ids", "one tokenizer"]),
    "a short context": ({"max_position_embeddings": 8}, {}, ["may grow to", "beyond the reward:safety's context of 8"]),
}


@pytest.mark.parametrize("model, letters, words", MODELS.values(), ids=MODELS)
def test_a_further_reward_model(home, refused, run_dir, tmp_path, model, letters, words):
    tokenizer = tiny_models.tokenizer()
    folder = cases.save_model(tmp_path / "safety_model", tiny_models.scorer(**model), tokenizer)
    path = tmp_path / "safety_model" / "tokenizer.json"
    document = json.loads(path.read_text())
    document["model"]["vocab"] = {letters.get(t, t): i for t, i in document["model"]["vocab"].items()}
    path.write_text(json.dumps(document))
    source = f"ppo.reward.sources={json.dumps([{'model': folder, 'name': 'safety'}])}"
    named = [] if "context" in words[-1] else ["the reward model `safety`", folder]
    refused(ppo(home, run_dir, source), *named, *words)


TWICE = {"name": "safety", "model": "m"}


@pytest.mark.parametrize(
    ("sources", "words"),
    [
        ([TWICE, TWICE], ["ppo.reward.sources[0].name: `safety` is given twice"]),
        ([TWICE, {"name": "safety", "url": "http://h/"}], ["ppo.reward.sources[0].name: `safety` is given twice"]),
        (
            [{"name": "reward_model", "model": "m"}],
            ["ppo.reward.sources[0].name", "is the name of the reward model"],
        ),
        ([{"name": "safety", "model": "gone/model"}], ["gone/model", "config.json"]),
    ],
    ids=["two models", "a model and a scorer", "the plain one's name", "no checkpoint"],
)
def test_names_of_reward_models(home, refused, run_dir, sources, words):
    refused(ppo(home, run_dir, f"ppo.reward.sources={json.dumps(sources)}"), *words)


def test_a_column_that_the_data_lack(home, refused, run_dir, tmp_path):
    (tmp_path / "bad.py").write_text("def compute_score(data_source, solution_str, ground_truth): return 1.0\n")
    source = {"function": f"{tmp_path}/bad.py:compute_score"}
    refused(
        ppo(home, run_dir, f"ppo.reward.sources={json.dumps([source])}"),
        "prompts.jsonl:",
        "ground_truth",
        "found prompt",
    )
    source["label_key"] = "gold"
    refused(ppo(home, run_dir, f"ppo.reward.sources={json.dumps([source])}"), "prompts.jsonl:", "no column `gold`")


def test_a_score_function_of_sample(home, refused, tmp_path):
    (tmp_path / "bad.py").write_text("def score(samples):\n    return [float('nan') for s in samples]\n")
    keys = [f"sample.model={home.actor}", f"sample.prompts={home.prompts}", f"sample.out={tmp_path}/new/out.jsonl"]
    keys += ["sample.sampling.max_new_tokens=4"]
    refused(["sample", *keys, "sample.score_function=gone.py:f"], "sample.score_function: no file gone.py")
    refused(["sample", *keys, f"sample.score_function={tmp_path}/bad.py:score"], "returned nan for", "prompts.jsonl:1")


# -- HTTP -----------------------------------------------------------------------------------------------------------

ANSWERS = {
    "500 until it is given up": ((500, {"detail": "boom"}), ["answered 500", "boom", "tried 2 times"]),
    "no such path": ((404, {}), ["answered 404 Not Found"]),
    "malformed JSON": ((200, b'{"scores": [1'), ["is not JSON"]),
    "no scores": ((200, {"result": 1}), ['expected {"scores": [...]}']),
    "too few scores": ((200, {"scores": [1]}), ["answered 1 scores for 2 samples"]),
    "NaN": ((200, b'{"scores": [NaN, NaN]}'), ["returned nan for", "finite number"]),
    "texts": ((200, {"scores": ["a", "b"]}), ["returned 'a' for"]),
    "a redirect": (
        (302, b"", ("Location", "http://other.example/")),
        ["redirects to http://other.example/"],
    ),
    "too long an answer": ((200, b"[" + b"1," * 5000), ["longer than 4096 bytes", "ppo.reward.http.max_answer_bytes"]),
}
HTTP = ["ppo.reward.http.retries=1", "ppo.reward.http.backoff_seconds=0.01", "ppo.reward.http.max_answer_bytes=4096"]


@pytest.mark.parametrize("answer, words", ANSWERS.values(), ids=ANSWERS)
def test_an_http_scorer(home, refused, run_dir, answer, words):
    with reward_cases.http_scorer(lambda body: answer) as place:
        source = f"ppo.reward.sources={json.dumps([{'url': place.url, 'name': 'judge'}])}"
        refused(ppo(home, run_dir, source, *HTTP), "`judge`", place.url, "prompts.jsonl:", *words)


def test_an_http_scorer_that_is_not_there_or_says_nothing(home, refused, run_dir):
    source = "ppo.reward.sources=[{url: 'http://127.0.0.1:9/', name: judge}]"
    refused(ppo(home, run_dir, source, *HTTP), "`judge`", "cannot be reached", "is the scorer running?")
    silence = threading.Event()
    with reward_cases.http_scorer(lambda body: (200, lambda handler: silence.wait(30))) as place:
        source = f"ppo.reward.sources={json.dumps([{'url': place.url, 'name': 'judge'}])}"
        refused(ppo(home, run_dir, source, *HTTP, "ppo.reward.http.timeout_seconds=0.3"), "no answer within 0.3 s")
        silence.set()


def test_a_token_that_is_not_set(home, refused, run_dir, monkeypatch):
    monkeypatch.delenv("NO_SUCH_TOKEN", raising=False)
    source = ["ppo.reward.sources=[{url: 'http://127.0.0.1:9/'}]", "ppo.reward.http.token_env=NO_SUCH_TOKEN"]
    refused(ppo(home, run_dir, *source), "ppo.reward.http.token_env", "NO_SUCH_TOKEN", "not set")
