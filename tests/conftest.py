"""What every test gets: few threads, fixed seeds; without a GPU the Triton interpreter, and no GPU tests.

The environment is set before anything imports torch or triton: both read it once.
"""

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
import gc
import random

import numpy as np
import pytest
import torch

HAS_CUDA = torch.cuda.is_available()
# Triton reads this when kernels are imported. On a machine with a device kernels run there; CUDA_VISIBLE_DEVICES= hides
# it and has them interpreted. Ahead-of-time compilation (tests/kernels/aot) needs a process with TRITON_INTERPRET=0.
if not HAS_CUDA:
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

try:
    from hypothesis import settings
except ImportError:
    pass
else:
    # Derandomised: a failing example fails for everyone, and a passing suite stays passing.
    settings.register_profile("icegrt", deadline=None, derandomize=True, database=None, max_examples=60)
    settings.load_profile("icegrt")

GPU_TESTS = Path(__file__).parent / "gpu"


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Import the tests without the garbage collector, and keep it from what they have loaded.

    Modules are a million objects that live as long as the process. Visiting them again and again takes a quarter of the
    time of their import, and most of that of each later collection.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()


def pytest_unconfigure():
    gc.unfreeze()  # nanobind reports what is alive at the end as leaks


def pytest_collection_modifyitems(items):
    # Files with tests of minutes come first: whatever is left at the end is small enough to share between workers.
    first = {item.path for item in items if item.get_closest_marker("long")}
    items.sort(key=lambda item: item.path not in first)
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if GPU_TESTS in item.path.parents:
            item.add_marker(pytest.mark.gpu)
        if not HAS_CUDA and item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seeds():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Checkpoints, data files and a reward function under one folder: everything that a small run starts from."""
    from tests.helpers.stage_cases import make_home  # the tests of kernels do not load the engine

    return make_home(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def cluster():
    """The process groups of one process, open while the tests of a module run."""
    from icegrt.distributed.cluster import Cluster

    with Cluster.open() as opened:
        yield opened
