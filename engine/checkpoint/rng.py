"""The global random generators of Python, numpy and torch, as plain JSON types.

The engine does not draw from them: its noise is a function of seed and position. A callback or a reward function in
this process may.
"""

from __future__ import annotations

import array
import random
from typing import Any

import numpy as np
import torch


def capture() -> dict[str, Any]:
    """Return the states of this process's generators."""
    version, words, gauss = random.getstate()
    numpy_state = np.random.get_state(legacy=False)
    state = {
        "python": [version, array.array("I", words).tobytes().hex(), gauss],
        "numpy": {
            **{name: numpy_state[name] for name in ("bit_generator", "has_gauss", "gauss")},
            "key": numpy_state["state"]["key"].astype("<u4").tobytes().hex(),
            "pos": int(numpy_state["state"]["pos"]),
        },
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state().numpy().tobytes().hex()
    return state


def restore(state: dict[str, Any]) -> None:
    """Restore the states that `capture()` returned."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(array.array("I", bytes.fromhex(words))), gauss))
    numpy_state = state["numpy"]
    key = np.frombuffer(bytes.fromhex(numpy_state["key"]), dtype="<u4")
    plain = {name: numpy_state[name] for name in ("bit_generator", "has_gauss", "gauss")}
    np.random.set_state({**plain, "state": {"key": key, "pos": numpy_state["pos"]}})
    torch.set_rng_state(_bytes(state["torch"]))
    if torch.cuda.is_available() and "cuda" in state:
        torch.cuda.set_rng_state(_bytes(state["cuda"]))


def _bytes(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
