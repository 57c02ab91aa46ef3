"""Client of an HTTP scorer: post batches of samples as JSON, several at once, and retry after passing errors.

    POST {"samples": [{"prompt", "messages", "response", "response_ids", "finish_reason", "row", "group", "index"}]}
    200  {"scores": [0.5, {"score": 1.0, "metrics": {"length": 12}, "token_rewards": [...]}]}  (or the list alone)

The client uses the standard library only: the cost of a request is small beside that of scoring.
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
from icegrt.rewards.error_policy import wait_limit
from icegrt.rewards.function import checked_result
from icegrt.rewards.sample import RewardResult, Sample, ScoreOrFailure, ScoringFailure
from icegrt.utils.redaction import REDACTED, redact_text

_RETRYABLE_STATUS = {408, 425, 429, 500, 502, 503, 504}
_MAX_PAUSE_S = 30.0
_CHUNK_BYTES = 1 << 16


class _RequestError(Exception):
    """A failed request, with a message in words. `retryable`: the same request may succeed later."""

    def __init__(self, message: str, retryable: bool) -> None:
        super().__init__(message)
        self.retryable = retryable


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    # A redirect could send prompts and the token to a host that the user did not configure.
    def redirect_request(self, *args: Any) -> None:
        return None


class ScoringClient:
    """Score samples with the HTTP scorer at `url`. Pauses between tries double, with a jitter that `seed` fixes."""

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
        self.redacted_url = redact_text(url)
        self._url, basic = _split_credentials(url, key)
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
        """Return a result or a `ScoringFailure` for every sample, in order."""
        size, self._calls = self.config.batch_size, self._calls + 1
        batches = [samples[i : i + size] for i in range(0, len(samples), size)]
        with ThreadPoolExecutor(min(self.config.concurrency, len(batches)), "scorer") as threads:
            results_by_batch = threads.map(self._score_batch, range(len(batches)), batches)
            return [result for results in results_by_batch for result in results]

    def _score_batch(self, number: int, samples: list[Sample]) -> list[ScoreOrFailure]:
        scorer = f"HTTP scorer `{self.name}` ({self.redacted_url})"
        try:
            body = json.dumps({"samples": [_as_json(s) for s in samples]}, allow_nan=False, default=str).encode()
            scores = _scores(self._post_with_retries(body, random.Random(f"{self._seed}/{self._calls}/{number}")))
            if len(scores) != len(samples):
                raise _RequestError(
                    f"answered {len(scores)} scores for {len(samples)} samples; expected one for each", False
                )
            return [checked_result(scorer, _result(x), sample) for x, sample in zip(scores, samples, strict=True)]
        except _RequestError as error:
            message = f"{scorer}: {self._without_secrets(str(error))}"
        except ValueError as error:  # for example NaN in a row
            message = f"HTTP scorer `{self.name}`: a sample cannot be written as JSON ({error})"
        return [ScoringFailure(f"{message} (at {sample.where})") for sample in samples]

    def _post_with_retries(self, body: bytes, jitter: random.Random) -> bytes:
        tries = 1 + self.config.retries
        for number in range(1, tries + 1):
            try:
                return self._post(body)
            except _RequestError as error:
                if not error.retryable:
                    raise
                if number == tries:
                    raise _RequestError(f"{error} (tried {tries} times); is the scorer running?", False) from None
            pause = min(self.config.backoff_seconds * 2 ** (number - 1), _MAX_PAUSE_S)
            self._sleep(pause * (0.5 + 0.5 * jitter.random()))
        raise AssertionError("the last try returns or raises")

    def _post(self, body: bytes) -> bytes:
        seconds = self.config.timeout_seconds
        deadline = time.monotonic() + seconds
        request = urllib.request.Request(self._url, body, self._headers, method="POST")
        timeout = _RequestError(f"no answer within {seconds:g} s (ppo.reward.http.timeout_seconds)", True)
        try:
            with self._opener.open(request, timeout=wait_limit(seconds)) as response:
                return self._read_body(response, deadline, timeout)
        except urllib.error.HTTPError as error:
            raise _status_error(error) from None
        except TimeoutError:
            raise timeout from None
        except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, TimeoutError):
                raise timeout from None
            raise _RequestError(f"cannot be reached: {reason or type(error).__name__}", True) from None

    def _read_body(self, response: Any, deadline: float, timeout: _RequestError) -> bytes:
        # Read in chunks: each byte of a slow server restarts the socket's own time-out.
        body, limit = bytearray(), self.config.max_answer_bytes
        while chunk := response.read1(_CHUNK_BYTES):
            body += chunk
            if len(body) > limit:
                raise _RequestError(
                    f"the answer is longer than {limit} bytes (ppo.reward.http.max_answer_bytes)", False
                )
            if time.monotonic() > deadline:
                raise timeout
        if response.length:  # bytes of Content-Length that did not arrive
            raise _RequestError("the answer broke off", True)
        return bytes(body)

    def _without_secrets(self, message: str) -> str:
        message = redact_text(message)
        return message.replace(self._token, REDACTED) if self._token else message


def _status_error(error: urllib.error.HTTPError) -> _RequestError:
    if 300 <= error.code < 400:
        target = error.headers.get("Location", "elsewhere")
        return _RequestError(f"redirects to {target}, which is not followed; name that URL if it is meant", False)
    try:
        text = " ".join(error.read(300).decode("utf-8", "replace").split())[:120]
    except OSError:
        text = ""
    return _RequestError(
        f"answered {error.code} {error.reason}{f': {text!r}' if text else ''}", error.code in _RETRYABLE_STATUS
    )


def _scores(body: bytes) -> list[Any]:
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        raise _RequestError(f"the answer is not JSON: {body[:60]!r}", False) from None
    scores = document.get("scores", document.get("rewards")) if isinstance(document, dict) else document
    if not isinstance(scores, list):
        raise _RequestError(
            f'the answer holds no list of scores; expected {{"scores": [...]}}, got {body[:60]!r}', False
        )
    return scores


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


def _split_credentials(url: str, key: str) -> tuple[str, str]:
    """Return the URL without user and password, and these as an Authorization header.

    Raises:
        ConfigError: not an HTTP URL.
    """
    try:
        parts = urlsplit(url)
        is_http = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_http = False
    if not is_http:
        raise ConfigError(
            f"{key}: expected a URL such as http://host:port/path or https://host/path, got {redact_text(url)!r}"
        )
    credentials, separator, host = parts.netloc.rpartition("@")
    basic = f"Basic {base64.b64encode(unquote(credentials).encode()).decode()}" if separator else ""
    return parts._replace(netloc=host).geturl(), basic
