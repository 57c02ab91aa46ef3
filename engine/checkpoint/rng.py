"""The generators that every Python program shares: random, numpy's, torch's. As plain JSON types.

The engine draws nothing from them (what it draws is a function of seed and place), but a callback or a reward function
in this process may.
"""

from __future__ import annotations

import array
import random
from typing import Any

import numpy as np
import torch


def capture() -> dict[str, Any]:
    """The state of this process's generators."""
    version, words, gauss = random.getstate()
    theirs = np.random.get_state(legacy=False)
    state = {
        "python": [version, array.array("I", words).tobytes().hex(), gauss],
        "numpy": {
            **{name: theirs[name] for name in ("bit_generator", "has_gauss", "gauss")},
            "key": theirs["state"]["key"].astype("<u4").tobytes().hex(),
            "pos": int(theirs["state"]["pos"]),
        },
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state().numpy().tobytes().hex()
    return state


def restore(state: dict[str, Any]) -> None:
    """Take `capture()` back."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(array.array("I", bytes.fromhex(words))), gauss))
    theirs = state["numpy"]
    key = np.frombuffer(bytes.fromhex(theirs["key"]), dtype="<u4")
    plain = {name: theirs[name] for name in ("bit_generator", "has_gauss", "gauss")}
    np.random.set_state({**plain, "state": {"key": key, "pos": theirs["pos"]}})
    torch.set_rng_state(_bytes(state["torch"]))
    if torch.cuda.is_available() and "cuda" in state:
        torch.cuda.set_rng_state(_bytes(state["cuda"]))


def _bytes(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
