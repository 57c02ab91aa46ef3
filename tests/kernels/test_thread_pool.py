"""The threads of the C++ operations: calls from several threads, after a fork, at exit, and without further threads."""

import os
import subprocess
import sys
import threading
import warnings
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from icegrt.kernels import rms_norm, swiglu, use_backend

ROOT = Path(__file__).resolve().parents[2]
TASKS = Path("/proc/self/task")
needs_proc = pytest.mark.skipif(not TASKS.exists(), reason="counts the threads of a process in /proc")
# 2,048 rows of 256 elements are work for four threads. A process of its own starts with this.
SETUP = '''
import os, resource, threading, torch
from icegrt.kernels import rms_norm, use_backend
x, weight, out = torch.ones(2048, 256), torch.ones(256), torch.zeros(2048, 256)
def tasks():
    return len(os.listdir("/proc/self/task")) if os.path.exists("/proc/self/task") else 0
def call():
    """Normalise, and return how many threads that started."""
    torch.set_num_threads(4)  # it starts threads of its own
    before = tasks()
    with use_backend("cpp"):
        rms_norm(x, weight, out=out)
    started = tasks() - before
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
    assert ((out - 1).abs() < 1e-4).all()
    return started
'''


@contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def norm(x, count=4):
    with threads(count), use_backend("cpp"):
        return rms_norm(x, torch.ones(x.shape[1]))


def drawn(rows, width=256):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(rows))


def run_alone(code):
    """Run code after SETUP in a process of its own; return its output."""
    result = subprocess.run([sys.executable, "-c", SETUP + code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_sizes_around_the_thresholds_have_the_bits_of_one_thread():
    for rows in (1, 63, 64, 65, 127, 128, 129, 511, 512, 1023, 1024, 1500, 2048):
        x = drawn(rows)
        for count in (2, 3, 8):
            assert torch.equal(norm(x, count), norm(x, 1)), (rows, count)


def test_many_small_calls():
    """Each is work for two threads and less than a wake-up: workers join or do not, and the result is the same."""
    x, memory = drawn(256), torch.empty(256, 256)
    expected, weight = norm(x, 1), torch.ones(256)
    norm(drawn(2048))  # starts workers, which are awake for the first calls
    with threads(4), use_backend("cpp"):
        for _ in range(300):
            assert torch.equal(rms_norm(x, weight, out=memory.fill_(torch.nan)), expected)


def test_python_threads_call_at_once():
    """Jobs of four callers are in the pool together; each caller has its own results."""
    inputs = [drawn(2048 + 64 * i) for i in range(4)]
    expected = [(norm(x, 1), swiglu(x)) for x in inputs]
    barrier, wrong = threading.Barrier(4), []

    def caller(index):
        torch.set_num_threads(3)
        barrier.wait()
        with use_backend("cpp"):
            for _ in range(20):
                x = inputs[index]
                results = rms_norm(x, torch.ones(256)), swiglu(x)
                if not all(map(torch.equal, results, expected[index])):
                    wrong.append(index)

    with threads(torch.get_num_threads()):
        callers = [threading.Thread(target=caller, args=(i,)) for i in range(4)]
        for thread in callers:
            thread.start()
        for thread in callers:
            thread.join()
    assert not wrong


@needs_proc
def test_a_forked_child_starts_its_own_workers():
    code = """
assert call() == 3
for _ in range(3):
    child = os.fork()
    if child == 0:
        os._exit(call() * 10 + call())
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
assert call() == 0
"""
    assert run_alone(code) == "30\n" * 3


@needs_proc
def test_a_fork_beside_a_running_call():
    """The child's copy of the pool may be locked by a thread that the child does not have."""
    stop, x = threading.Event(), drawn(2048)
    expected = bytes(norm(x, 1).numpy())

    def work():
        torch.set_num_threads(4)
        while not stop.is_set():
            norm(x)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        with threads(4), warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of a fork with threads
            for _ in range(20):
                child = os.fork()
                if child == 0:
                    os._exit(0 if bytes(norm(x).numpy()) == expected else 1)
                assert os.waitpid(child, 0)[1] == 0
    finally:
        stop.set()
        thread.join()


def test_a_process_ends_beside_its_workers():
    code = """
for _ in range(20):
    call()
print("done")
"""
    assert run_alone(code) == "done\n"


@needs_proc
def test_a_system_that_starts_no_thread():
    """Without memory for a thread's stack the caller runs all parts, and a later call starts the workers."""
    code = """
torch.set_num_threads(4)
with use_backend("cpp"):
    rms_norm(x[:8], weight, out=out[:8])
    size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = tasks()
    resource.setrlimit(resource.RLIMIT_AS, (size + (1 << 20), hard))
    rms_norm(x, weight, out=out)
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
assert tasks() == before and ((out - 1).abs() < 1e-4).all()
print(call())
"""
    assert run_alone(code) == "3\n"
