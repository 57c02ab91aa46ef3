"""dispatch: who decides, what is refused, and that the choice is logged."""

import ast
import importlib
import logging
import threading
from pathlib import Path

import pytest
import torch

from icegrt.kernels import available_backends, describe, dispatch, record_launches, token_logprobs, use_backend

ARGUMENTS = (torch.zeros(1, 3), torch.zeros(1, dtype=torch.long))


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch):
    monkeypatch.delenv("ICEGRT_BACKEND", raising=False)


def selected_module(op="token_logprobs"):
    return dispatch.select(op, ARGUMENTS[0]).__module__


def install_only(monkeypatch, *backends):
    # Private: what is installed is a fact about the machine, and no public function changes it.
    monkeypatch.setattr(dispatch, "_installed", lambda backend: backend in backends)


def test_auto_takes_the_reference_on_cpu():
    assert selected_module().endswith(".reference")
    assert describe("cpu")["whiten"] == "reference"
    assert set(describe("cpu")) == set(dispatch.IMPLEMENTATIONS)


def test_auto_takes_cpp_on_cpu_where_the_extension_is(monkeypatch):
    install_only(monkeypatch, "cpp", "reference")
    assert describe("cpu")["shaped_gae"] == "cpp" and describe("cuda")["shaped_gae"] == "reference"
    install_only(monkeypatch, "reference")
    assert describe("cpu")["shaped_gae"] == "reference"
    install_only(monkeypatch, *dispatch.BACKENDS)
    with use_backend(shaped_gae="cpp"), pytest.raises(RuntimeError, match=r"shaped_gae.*runs on the CPU, got 'cuda'"):
        describe("cuda")


def test_auto_takes_triton_for_cuda_where_it_is_installed(monkeypatch):
    install_only(monkeypatch, *dispatch.BACKENDS)
    assert describe("cuda")["token_logprobs"] == "triton" and describe("cuda")["pack_padded"] == "reference"
    install_only(monkeypatch, "reference")
    assert describe("cuda")["token_logprobs"] == "reference"
    assert available_backends("token_logprobs") == ("reference",)


def test_context_beats_environment_and_names_beat_the_general(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("ICEGRT_BACKEND", "triton")
    assert selected_module().endswith(".triton")
    with use_backend("reference"):
        assert selected_module().endswith(".reference")
        with use_backend(token_logprobs="triton"):
            assert selected_module().endswith(".triton")
            assert selected_module("shaped_gae").endswith("shaped_gae.reference")
            with use_backend("auto", shaped_gae="triton"):
                assert selected_module().endswith(".reference") and selected_module("shaped_gae").endswith(".triton")
    monkeypatch.setenv("ICEGRT_BACKEND", "shaped_gae=triton, token_logprobs=reference")
    assert selected_module().endswith(".reference") and selected_module("shaped_gae").endswith(".triton")


def test_a_named_backend_that_cannot_run_is_an_error_that_says_what_to_do(monkeypatch):
    with (
        use_backend("triton"),
        pytest.raises(RuntimeError, match=r"pack_padded.*has none; choose one of reference or auto"),
    ):
        selected_module("pack_padded")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with (
        use_backend("triton"),
        pytest.raises(RuntimeError, match=r"token_logprobs.*'cpu'.*TRITON_INTERPRET=1|not installed"),
    ):
        token_logprobs(*ARGUMENTS)
    install_only(monkeypatch, "reference")
    with use_backend("triton"), pytest.raises(RuntimeError, match=r"token_logprobs.*is not installed"):
        token_logprobs(*ARGUMENTS)
    install_only(monkeypatch, *dispatch.BACKENDS)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with use_backend("triton"), pytest.raises(RuntimeError, match=r"token_logprobs.*got fp64"):
        token_logprobs(ARGUMENTS[0].double(), ARGUMENTS[1])


def test_unknown_names_are_refused(monkeypatch):
    for arguments, options in ((("cuda",), {}), ((), {"token_logprob": "triton"}), ((), {"pack_padded": "triton"})):
        with pytest.raises(ValueError, match="expected"), use_backend(*arguments, **options):
            pass
    monkeypatch.setenv("ICEGRT_BACKEND", "fast")
    with pytest.raises(ValueError, match="ICEGRT_BACKEND: expected one of"):
        token_logprobs(*ARGUMENTS)


def test_a_choice_is_logged_once(caplog):
    # Private: an earlier test of this process may have made and logged the choice.
    dispatch._log_once.cache_clear()
    dispatch._selected.cache_clear()
    with caplog.at_level(logging.INFO, logger="icegrt.kernels.dispatch"):
        token_logprobs(*ARGUMENTS)
        token_logprobs(*ARGUMENTS)
    assert [r.getMessage() for r in caplog.records] == [
        "token_logprobs runs on backend reference for cpu tensors (auto)"
    ]


def test_the_choice_ends_with_the_context_also_on_an_error():
    with pytest.raises(KeyError), use_backend("triton"):
        raise KeyError
    assert selected_module("pack_padded")  # it has no Triton backend: the choice would be an error


def test_launches_of_other_threads_are_recorded_too():
    """Autograd runs the backward of CUDA tensors in threads of its own."""
    with record_launches() as outer:
        with record_launches() as inner:
            thread = threading.Thread(target=dispatch.log_launch, args=("kernel", "triton"))
            thread.start()
            thread.join()
        dispatch.log_launch("later", "triton")
    dispatch.log_launch("too late", "triton")
    assert inner == [("kernel", "triton")] and outer == [("kernel", "triton"), ("later", "triton")]


def test_every_implementation_exists():
    for op, backends in dispatch.IMPLEMENTATIONS.items():
        for backend in {*backends} & {*available_backends(op)} | {"reference"}:
            module, function = backends[backend].split(":")
            assert callable(getattr(importlib.import_module(f"icegrt.kernels.{module}"), function))


def test_nothing_is_autotuned():
    """A trial run of a kernel that writes over its input corrupts it; a tuned block changes bits between runs."""
    files = sorted(Path(dispatch.__file__).parent.glob("*/triton.py"))
    assert len(files) > 5
    for path in files:
        names = {n.attr for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Attribute)}
        assert not names & {"autotune", "heuristics"}, path
