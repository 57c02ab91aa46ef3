"""What an operator is to the watcher: its tensors, whether it is a view, whether it runs in a backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from icegrt.rehearsal.memory import KV_CACHE, LOGITS, TEMPORARY
from icegrt.rehearsal.sites import Site

# Functions whose allocations have a category of their own: (end of the file's name, function).
_CATEGORY_OF_SITE = {
    ("linear/products.py", "_buffer"): LOGITS,
    ("linear/triton.py", "logits_grad"): LOGITS,
    ("rollout/model_runner.py", "allocate"): LOGITS,
    ("rollout/paged_cache.py", "__init__"): KV_CACHE,
}


def tensors_of(args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    """Return the tensors among arguments, those in lists too, in order."""
    out: list[Tensor] = []
    for x in (*args, *kwargs.values()):
        if isinstance(x, Tensor):
            out.append(x)
        elif isinstance(x, (list, tuple)):
            out += tensors_of(x, {})
    return out


def is_view(func: Any) -> bool:
    """Return whether an operator returns a view of its input and launches nothing."""
    cached = _view_of_operator.get(func)
    if cached is None:
        returns = func._schema.returns
        alias = returns[0].alias_info if returns else None
        cached = _view_of_operator[func] = alias is not None and not alias.is_write
    return cached


_view_of_operator: dict[Any, bool] = {}


def puts_number(args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Return whether an index_put_ puts one number where the mask of the leading dimensions is set."""
    indices, value = args[1], args[2]
    accumulate = args[3] if len(args) > 3 else kwargs.get("accumulate", False)
    masks = [index for index in indices if index is not None]
    return (
        value.numel() == 1
        and not accumulate
        and len(masks) == 1
        and indices[0] is masks[0]
        and masks[0].is_meta
        and masks[0].dtype == torch.bool
    )


def in_backward() -> bool:
    """Return whether autograd runs a backward pass."""
    return torch._C._current_graph_task_id() != -1


def in_recomputation() -> bool:
    """Return whether a backward pass computes a forward pass again: autograd is then at the checkpoint's node."""
    node = torch._C._current_autograd_node()
    return node is not None and "Checkpoint" in node.name()


def category_of(site: Site) -> str:
    """Return the category of what a line allocates."""
    for (file, function), category in _CATEGORY_OF_SITE.items():
        if function == site.function and site.file.endswith(file):
            return category
    return TEMPORARY
