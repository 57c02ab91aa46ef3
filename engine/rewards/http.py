"""A scorer behind HTTP: batches of samples are posted as JSON, several at once, and tried again where that can help.

    POST {"samples": [{"prompt", "messages", "response", "response_ids", "finish_reason", "row", "group", "index"}]}
    200  {"scores": [0.5, {"score": 1.0, "metrics": {"length": 12}, "token_rewards": [...]}]}  (or the list alone)

Standard library only: a request is small beside what it costs to score, and nothing need be installed.
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import random
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import unquote, urlsplit

from icegrt.config import HTTPConfig
from icegrt.errors import ConfigError
from icegrt.rewards.function import result_of
from icegrt.rewards.sample import RewardResult, Sample, ScoreOrFailure, ScoringFailure
from icegrt.utils.redaction import REDACTED, redact_text

_TRY_AGAIN = {408, 425, 429, 500, 502, 503, 504}
_LONGEST_PAUSE_S = 30.0
_CHUNK_BYTES = 1 << 16


class _Trouble(Exception):
    """What went wrong with a request, in words; `passing` if the same request may succeed later."""

    def __init__(self, message: str, passing: bool) -> None:
        super().__init__(message)
        self.passing = passing


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    # A redirect could carry prompts and the token to a place that nobody named.
    def redirect_request(self, *args: Any) -> None:
        return None


class HTTPScorer:
    """Scores samples by asking `url`. Pauses between tries grow twofold, with a jitter that `seed` fixes."""

    def __init__(
        self,
        name: str,
        url: str,
        config: HTTPConfig,
        *,
        key: str = "url",
        seed: int = 0,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.name, self.config = name, config
        self.shown = redact_text(url)
        self._url, basic = _checked(url, self.shown, key)
        token = os.environ.get(config.token_env, "") if config.token_env else ""
        if config.token_env and not token:
            raise ConfigError(
                f"ppo.reward.http.token_env names the environment variable {config.token_env}, which is not set"
            )
        authorization = f"Bearer {token}" if token else basic
        self._headers = {"Content-Type": "application/json"} | (
            {"Authorization": authorization} if authorization else {}
        )
        self._token, self._seed, self._sleep = token, seed, sleep
        self._calls = 0
        self._opener = urllib.request.build_opener(_NoRedirect)

    def score(self, samples: list[Sample]) -> list[ScoreOrFailure]:
        """A result or a `ScoringFailure` for every sample, in order."""
        size, self._calls = self.config.batch_size, self._calls + 1
        batches = [samples[i : i + size] for i in range(0, len(samples), size)]
        with ThreadPoolExecutor(min(self.config.concurrency, len(batches)), "scorer") as threads:
            return [x for part in threads.map(self._grade_batch, range(len(batches)), batches) for x in part]

    def _grade_batch(self, number: int, samples: list[Sample]) -> list[ScoreOrFailure]:
        try:
            body = json.dumps({"samples": [_as_json(s) for s in samples]}, allow_nan=False, default=str).encode()
            answer = self._ask(body, random.Random(f"{self._seed}/{self._calls}/{number}"))
            return self._read(answer, samples)
        except _Trouble as trouble:
            message = f"HTTP scorer `{self.name}` ({self.shown}): {self._clean(trouble)}"
        except ValueError as error:  # such as NaN in a row
            message = f"HTTP scorer `{self.name}`: a sample cannot be written as JSON ({error})"
        return [ScoringFailure(f"{message} (at {sample.where})") for sample in samples]

    def _ask(self, body: bytes, jitter: random.Random) -> bytes:
        tries = 1 + self.config.retries
        for number in range(1, tries + 1):
            try:
                return self._post(body)
            except _Trouble as trouble:
                if not trouble.passing:
                    raise
                if number == tries:
                    raise _Trouble(f"{trouble} (tried {tries} times); is the scorer running?", False) from None
            pause = min(self.config.backoff_seconds * 2 ** (number - 1), _LONGEST_PAUSE_S)
            self._sleep(pause * (0.5 + 0.5 * jitter.random()))
        raise AssertionError("the last try returns or raises")

    def _post(self, body: bytes) -> bytes:
        deadline = time.monotonic() + self.config.timeout_seconds
        request = urllib.request.Request(self._url, body, self._headers, method="POST")
        slow = _Trouble(f"no answer within {self.config.timeout_seconds:g} s (ppo.reward.http.timeout_seconds)", True)
        try:
            with self._opener.open(request, timeout=self.config.timeout_seconds) as response:
                return self._read_all(response, deadline, slow)
        except urllib.error.HTTPError as error:
            raise self._refusal(error) from None
        except TimeoutError:
            raise slow from None
        except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, TimeoutError):
                raise slow from None
            raise _Trouble(f"cannot be reached: {reason or type(error).__name__}", True) from None

    def _read_all(self, response: Any, deadline: float, slow: _Trouble) -> bytes:
        # In parts: the socket's own time-out starts anew with every byte of a server that trickles.
        parts, limit = bytearray(), self.config.max_answer_bytes
        while part := response.read1(_CHUNK_BYTES):
            parts += part
            if len(parts) > limit:
                raise _Trouble(f"the answer is longer than {limit} bytes (ppo.reward.http.max_answer_bytes)", False)
            if time.monotonic() > deadline:
                raise slow
        if response.length:  # what Content-Length still owes
            raise _Trouble("the answer broke off", True)
        return bytes(parts)

    def _refusal(self, error: urllib.error.HTTPError) -> _Trouble:
        if 300 <= error.code < 400:
            there = error.headers.get("Location", "elsewhere")
            return _Trouble(f"redirects to {there}, which is not followed; name that URL if it is meant", False)
        try:
            said = " ".join(error.read(300).decode("utf-8", "replace").split())[:120]
        except OSError:
            said = ""
        return _Trouble(
            f"answered {error.code} {error.reason}{f': {said!r}' if said else ''}", error.code in _TRY_AGAIN
        )

    def _read(self, body: bytes, samples: list[Sample]) -> list[ScoreOrFailure]:
        try:
            document = json.loads(body)
        except (ValueError, RecursionError):
            raise _Trouble(f"the answer is not JSON: {body[:60]!r}", False) from None
        scores = document.get("scores", document.get("rewards")) if isinstance(document, dict) else document
        if not isinstance(scores, list):
            raise _Trouble(
                f'the answer holds no list of scores; expected {{"scores": [...]}}, got {body[:60]!r}', False
            )
        if len(scores) != len(samples):
            raise _Trouble(f"answered {len(scores)} scores for {len(samples)} samples; expected one for each", False)
        who = f"HTTP scorer `{self.name}` ({self.shown})"
        return [result_of(who, _result(score), sample) for score, sample in zip(scores, samples, strict=True)]

    def _clean(self, trouble: _Trouble) -> str:
        text = redact_text(str(trouble))
        return text.replace(self._token, REDACTED) if self._token else text


def _result(score: Any) -> Any:
    if not isinstance(score, dict):
        return score
    number = score.get("score")
    return RewardResult(
        float("nan") if number is None else number, score.get("metrics") or {}, score.get("token_rewards")
    )


def _as_json(sample: Sample) -> dict[str, Any]:
    return {
        "prompt": sample.prompt,
        "messages": sample.messages,
        "response": sample.text,
        "response_ids": sample.tokens,
        "finish_reason": sample.finish_reason,
        "row": sample.row,
        "group": sample.group,
        "index": sample.index,
    }


def _checked(url: str, shown: str, key: str) -> tuple[str, str]:
    """The URL without user and password, and these as an Authorization header. Raises `ConfigError`."""
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    if not good:
        raise ConfigError(f"{key}: expected a URL such as http://host:port/path or https://host/path, got {shown!r}")
    user, at, host = parts.netloc.rpartition("@")
    basic = f"Basic {base64.b64encode(unquote(user).encode()).decode()}" if at else ""
    return parts._replace(netloc=host).geturl(), basic
