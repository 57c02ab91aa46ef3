"""Samples, reward functions in files, and a local HTTP scorer for the tests of reward sources."""

import contextlib
import http.server
import json
import threading
from pathlib import Path

from icegrt.config import RewardCallConfig
from icegrt.rewards.sample import Sample
from icegrt.rewards.sources import RewardSourceGroup, RewardSpec


def sample(text="hello", number=0, group=None, tokens=None, **row):
    """Return sample `number`, whose row is that line of data.jsonl, counted from 0."""
    return Sample(
        text=text,
        tokens=[5] * len(text) if tokens is None else tokens,
        prompt=f"<user>q{number}<assistant>",
        prompt_tokens=[2, 10 + (number if group is None else group), 3],
        finish_reason="stop",
        row=row or {"prompt": f"q{number}"},
        where=f"data.jsonl:{number + 1}",
        group=number if group is None else group,
    )


def samples(*texts, **row):
    return [sample(text, i, **row) for i, text in enumerate(texts)]


def function_file(folder, body, name="score"):
    """Write a reward function and return its spec. body: of the function, or of the module if it has a `def`."""
    text = body if "def " in body else f"def {name}(samples):\n    " + body.replace("\n", "\n    ")
    path = Path(folder) / f"{name}_file.py"
    path.write_text(f"import os, signal, sys, time\n{text}\n", encoding="utf-8")
    return f"{path}:{name}"


def scorers(*functions, **settings):
    """Return started reward sources, to be used in a `with`. functions: specs, callables or `RewardSpec`s."""
    entries = [f if isinstance(f, RewardSpec) else RewardSpec(function=f, key="ppo.reward_function") for f in functions]
    sources = RewardSourceGroup.of(entries, RewardCallConfig(**({"timeout_seconds": 20.0} | settings)))
    try:
        sources.start()
    except BaseException:
        sources.close()
        raise
    return sources


def echo(request):
    """Return a valid answer: the length of each response is its score."""
    return 200, {"scores": [len(s["response"]) for s in request["samples"]]}


@contextlib.contextmanager
def http_scorer(answer=echo):
    """Serve an HTTP scorer on a free port. answer(request) returns status and document (bytes, or a handler function).

    Yields an object with `url` and `requests`, the documents and headers received.
    """

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            received.append((body, dict(self.headers)))
            status, document, *headers = answer(body)
            if callable(document):
                with contextlib.suppress(OSError):  # the client gave up
                    document(self)
                return
            data = document if isinstance(document, bytes) else json.dumps(document).encode()
            self.send_response(status)
            for name, value in headers:
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            with contextlib.suppress(OSError):
                self.wfile.write(data)

        def log_message(self, *args): ...

    received = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        endpoint = type("Endpoint", (), {"url": f"http://127.0.0.1:{server.server_port}/score", "requests": received})
        yield endpoint
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
