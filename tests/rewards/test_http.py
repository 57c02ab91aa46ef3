"""The HTTP scorer: what it sends, what it takes for an answer, when it tries again, and what it never shows."""

import threading
import time

import pytest

from icegrt.config import HTTPConfig
from icegrt.errors import ConfigError, RewardError
from icegrt.rewards.http import ScoringClient
from icegrt.rewards.sample import RewardResult, ScoringFailure
from tests.helpers import reward_cases as cases

QUICK = {"timeout_seconds": 10.0, "retries": 2, "backoff_seconds": 0.01}


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def scorer(url, *, sleep=time.sleep, seed=0, **changes):
    return ScoringClient(
        "judge", url, HTTPConfig(**(QUICK | changes)), key="ppo.reward.sources[0]", seed=seed, sleep=sleep
    )


def failure(answer, *, texts=("a", "bb"), **changes):
    """The one message that all samples get."""
    with cases.http_scorer(answer) as endpoint:
        results = scorer(endpoint.url, sleep=lambda s: None, **changes).score(cases.samples(*texts))
    assert all(isinstance(x, ScoringFailure) for x in results)
    assert [f"(at data.jsonl:{i + 1})" in x.message for i, x in enumerate(results)] == [True] * len(texts)
    return results[0].message


def test_samples_go_out_in_batches_and_scores_come_back_in_order():
    texts = ["x" * n for n in (3, 1, 4, 1, 5)]
    with cases.http_scorer() as endpoint:
        results = scorer(endpoint.url, batch_size=2, concurrency=3).score(cases.samples(*texts))
    assert [x.score for x in results] == [3.0, 1.0, 4.0, 1.0, 5.0]
    assert sorted(len(body["samples"]) for body, _ in endpoint.requests) == [1, 2, 2]


def test_a_request_holds_what_a_reward_function_is_given():
    with cases.http_scorer() as endpoint:
        scorer(endpoint.url).score([cases.sample("yes", 4, prompt="q", truth=1, tokens=[5, 1])])
    ((body, headers),) = endpoint.requests
    assert body == {
        "samples": [
            {
                "prompt": "<user>q4<assistant>",
                "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "yes"}],
                "response": "yes",
                "response_ids": [5, 1],
                "finish_reason": "stop",
                "row": {"prompt": "q", "truth": 1},
                "group": 4,
                "index": 0,
            }
        ]
    }
    assert headers["Content-Type"] == "application/json" and "Authorization" not in headers


@pytest.mark.parametrize(
    "document", [{"scores": [1, 2.5]}, {"rewards": [1, 2.5]}, [1, 2.5], {"scores": [{"score": 1}, {"score": 2.5}]}]
)
def test_the_forms_of_an_answer(document):
    with cases.http_scorer(lambda body: (200, document)) as endpoint:
        assert scorer(endpoint.url).score(cases.samples("a", "b")) == [RewardResult(1.0), RewardResult(2.5)]


def test_an_answer_may_hold_metrics_and_token_rewards():
    scored = {"score": 1, "metrics": {"long": True}, "token_rewards": [0.5, -0.5]}
    with cases.http_scorer(lambda body: (200, {"scores": [scored]})) as endpoint:
        assert scorer(endpoint.url).score(cases.samples("ab")) == [RewardResult(1.0, {"long": 1.0}, [0.5, -0.5])]


def test_requests_run_at_the_same_time_up_to_the_limit():
    barrier = threading.Barrier(3, timeout=20)

    def answer(body):
        barrier.wait()  # broken, and answered with an error, unless three requests are under way at once
        return cases.echo(body)

    with cases.http_scorer(answer) as endpoint:
        results = scorer(endpoint.url, batch_size=1, concurrency=3, retries=0).score(cases.samples("a", "b", "c"))
    assert [x.score for x in results] == [1.0] * 3


def failing_first(times, status=503):
    count = iter(range(100))

    def answer(body):
        return cases.echo(body) if next(count) >= times else (status, {"detail": "busy"})

    return answer


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_a_passing_error_is_tried_again(status):
    pauses = []
    with cases.http_scorer(failing_first(2, status)) as endpoint:
        assert scorer(endpoint.url, sleep=pauses.append).score(cases.samples("ab"))[0].score == 2.0
    assert len(pauses) == 2 and len(endpoint.requests) == 3


def test_pauses_double_with_a_jitter_that_the_seed_fixes():
    def pauses(seed):
        seconds = []
        with cases.http_scorer(failing_first(6)) as endpoint:
            scorer(endpoint.url, sleep=seconds.append, seed=seed, retries=6, backoff_seconds=8.0).score(
                cases.samples("a")
            )
        return seconds

    first = pauses(0)
    assert first == pauses(0) != pauses(1)
    for number, pause in enumerate(first):
        longest = min(8.0 * 2**number, 30.0)
        assert longest / 2 <= pause <= longest


def test_a_server_that_stays_broken_is_given_up_with_its_words():
    message = failure(lambda body: (500, {"detail": "out of memory"}))
    assert "answered 500 Internal Server Error" in message and "out of memory" in message and "tried 3 times" in message


def test_nobody_listens():
    (result,) = scorer("http://127.0.0.1:9/score", sleep=lambda s: None).score(cases.samples("a"))
    assert "HTTP scorer `judge` (http://127.0.0.1:9/score): cannot be reached: [Errno 111]" in result.message
    assert "tried 3 times" in result.message and "is the scorer running?" in result.message


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ((400, {"detail": "bad sample"}), ["answered 400 Bad Request", "bad sample"]),
        ((401, {"detail": "who?"}), ["answered 401 Unauthorized"]),
        (
            (302, b"", ("Location", "http://elsewhere.example/")),
            ["redirects to http://elsewhere.example/", "not followed"],
        ),
        ((200, b"<html>hello</html>"), ["is not JSON", "<html>hello"]),
        ((200, b'{"scores": [1.0, 2'), ["is not JSON"]),
        ((200, b"[" * 100_000), ["is not JSON"]),
        ((200, {"result": [1, 2]}), ['expected {"scores": [...]}', "result"]),
        ((200, {"scores": "12"}), ["no list of scores"]),
        ((200, {"scores": [1.0]}), ["answered 1 scores for 2 samples"]),
        ((200, {"scores": []}), ["answered 0 scores for 2 samples"]),
        ((200, b'{"scores": [NaN, Infinity]}'), ["returned nan for data.jsonl:1", "finite number"]),
        ((200, {"scores": ["1.0", "2.0"]}), ["returned '1.0' for data.jsonl:1"]),
        ((200, {"scores": [None, None]}), ["returned None for data.jsonl:1"]),
        ((200, {"scores": [True, True]}), ["returned True for data.jsonl:1"]),
        ((200, {"scores": [{"score": 1, "token_rewards": [1]}] * 2}), ["token_rewards_A"]),
        ((200, b'{"scores": [1e999, 1]}'), ["returned inf for data.jsonl:1"]),
    ],
)
def test_an_answer_that_cannot_be_used_is_not_asked_for_again(answer, words):
    with cases.http_scorer(lambda body: answer) as endpoint:
        results = scorer(endpoint.url, sleep=lambda s: None).score(cases.samples("aa", "bb"))
    assert isinstance(results[0], ScoringFailure) and len(endpoint.requests) == 1
    for word in words:
        assert word in results[0].message


def test_an_answer_that_never_ends_is_cut():
    def flood(handler):
        handler.send_response(200)
        handler.end_headers()
        while True:
            handler.wfile.write(b"[" + b"1," * 50_000)

    message = failure(lambda body: (200, flood), max_answer_bytes=1_000_000)
    assert "longer than 1000000 bytes (ppo.reward.http.max_answer_bytes)" in message


def test_a_server_that_trickles_is_given_up_like_one_that_is_silent():
    stop = threading.Event()

    def trickle(handler):
        handler.send_response(200)
        handler.end_headers()
        while not stop.wait(0.05):
            handler.wfile.write(b" ")
            handler.wfile.flush()

    for answer in (lambda body: (200, trickle), lambda body: (200, lambda handler: stop.wait(20))):
        message = failure(answer, timeout_seconds=0.4, retries=0)
        assert "no answer within 0.4 s (ppo.reward.http.timeout_seconds)" in message
    stop.set()


@pytest.mark.parametrize("seconds", [3e6, 1e10])
def test_a_time_limit_beyond_what_the_system_counts_is_none(seconds):
    with cases.http_scorer(lambda body: (200, {"scores": [1.5] * len(body["samples"])})) as endpoint:
        results = scorer(endpoint.url, timeout_seconds=seconds).score(cases.samples("a", "b"))
    assert results == [RewardResult(1.5)] * 2


def test_a_broken_connection_is_a_message():
    def hang_up(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", "100")
        handler.end_headers()
        handler.wfile.write(b"[1")

    assert "the answer broke off (tried 3 times)" in failure(lambda body: (200, hang_up))


def test_only_the_batch_at_fault_fails():
    def answer(body):
        return (400, {}) if any(s["response"] == "bad" for s in body["samples"]) else cases.echo(body)

    with cases.http_scorer(answer) as endpoint:
        results = scorer(endpoint.url, batch_size=2).score(cases.samples("a", "b", "bad", "d", "e"))
    assert [isinstance(x, ScoringFailure) for x in results] == [False, False, True, True, False]


# -- secrets --------------------------------------------------------------------------------------------------------


def test_a_token_goes_into_the_header_and_nowhere_else(monkeypatch):
    monkeypatch.setenv("SCORER_TOKEN", "hunter2-hunter2")
    echoed = lambda body: (403, {"detail": "hunter2-hunter2 is not welcome"})  # noqa: E731
    with cases.http_scorer(echoed) as endpoint:
        http_source = scorer(endpoint.url, token_env="SCORER_TOKEN")
        (result,) = http_source.score(cases.samples("a"))
    assert endpoint.requests[0][1]["Authorization"] == "Bearer hunter2-hunter2"
    assert "hunter2" not in result.message and "is not welcome" in result.message


def test_a_password_in_the_url_is_sent_as_basic_and_not_shown():
    with cases.http_scorer(lambda body: (403, {})) as endpoint:
        url = endpoint.url.replace("http://", "http://me:hunter2@")
        (result,) = scorer(url).score(cases.samples("a"))
    assert endpoint.requests[0][1]["Authorization"] == "Basic bWU6aHVudGVyMg=="
    assert "hunter2" not in result.message and "<redacted>@127.0.0.1" in result.message


def test_a_redirect_does_not_carry_the_token_away(monkeypatch):
    monkeypatch.setenv("SCORER_TOKEN", "hunter2-hunter2")
    with cases.http_scorer() as redirect_target:
        with cases.http_scorer(lambda body: (307, b"", ("Location", redirect_target.url))) as endpoint:
            (result,) = scorer(endpoint.url, token_env="SCORER_TOKEN").score(cases.samples("a"))
    assert redirect_target.requests == [] and isinstance(result, ScoringFailure)


def test_configuration_that_cannot_be(monkeypatch):
    for url in ("ftp://h/x", "http://", "h:80/x", "http://h:99999/x", "http://me:hunter2@[oops/x"):
        with pytest.raises(ConfigError, match=r"ppo\.reward\.sources\[0\]: expected a URL") as error_info:
            scorer(url)
        assert "hunter2" not in str(error_info.value)
    monkeypatch.delenv("NO_SUCH", raising=False)
    with pytest.raises(ConfigError, match=r"ppo\.reward\.http\.token_env.*NO_SUCH, which is not set"):
        scorer("http://h/x", token_env="NO_SUCH")


# -- as a source ----------------------------------------------------------------------------------------------------


def test_as_a_source_it_obeys_on_error():
    def answer(body):
        return 200, {"scores": [None if s["response"] == "bad" else 2.0 for s in body["samples"]]}

    http = HTTPConfig(**QUICK)
    with cases.http_scorer(answer) as endpoint:
        entry = cases.RewardSpec(url=endpoint.url, key="ppo.reward.sources[0]")
        for on_error, expected in (("score", RewardResult(-1.0)), ("drop", RewardResult(None))):
            with cases.scorers(entry, on_error=on_error, error_score=-1.0, http=http) as sources:
                (source_scores,) = sources.score_by_source(cases.samples("a", "bad"))
            assert source_scores.results == [RewardResult(2.0), expected] and source_scores.errors[0] is None
            assert "returned None for data.jsonl:2" in source_scores.errors[1]
        with cases.scorers(entry, http=http) as sources:
            with pytest.raises(RewardError, match=r"returned None for data\.jsonl:2"):
                sources.score_by_source(cases.samples("a", "bad"))
