"""Read the value heads of other libraries: the names of their tensors, under the names that icegrt loads.

TRL's `AutoModelForCausalLMWithValueHead` saves a language model and `v_head.summary.weight` [1, H] with its bias [1].
"""

from __future__ import annotations

from collections.abc import Iterable

SCORE = "score.weight"
_TRL_WEIGHT, TRL_BIAS = "v_head.summary.weight", "v_head.summary.bias"
_WRAPPER = "pretrained_model."  # of state dicts that were saved without TRL's `save_pretrained`


def stored_names(names: Iterable[str]) -> dict[str, str]:
    """Return the stored name of every tensor by the name that it is loaded under.

    A checkpoint of TRL with a value head is read as a model with a scalar head. Its language model can be loaded too,
    as from any checkpoint with both heads. Other checkpoints keep their names.

    Args:
        names: of the tensors in the files.
    """
    stored = list(names)
    if _TRL_WEIGHT not in stored or SCORE in stored:
        return {name: name for name in stored}
    return {SCORE if name == _TRL_WEIGHT else name.removeprefix(_WRAPPER): name for name in stored}
