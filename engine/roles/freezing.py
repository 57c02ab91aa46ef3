"""Kinds of modules of a model that do not train beside those that do."""

from __future__ import annotations

from collections.abc import Sequence

from icegrt.distributed.pipeline import all_ranks_true
from icegrt.errors import ConfigError
from icegrt.model.hf.mapping import EMBEDDING
from icegrt.model.pipeline_model import PipelineModel

MODULES = ("attention", "mlp", "embedding", "norm")


def check_freeze(modules: Sequence[str], key: str) -> None:
    """Raise `ConfigError` for a kind of module that there is not; `key` is named in the message."""
    unknown = [name for name in modules if name not in MODULES]
    if unknown:
        raise ConfigError(f"{key}: `{unknown[0]}` is no kind of module; expected a list of {', '.join(MODULES)}")


def freeze(model: PipelineModel, modules: Sequence[str], key: str) -> None:
    """Freeze the parameters of some kinds of modules: no gradient, no optimizer state, no part in the gradient norm.

    The head always trains. Of an adapted model the adapters of these modules are frozen. Call it before the role is
    built. Collective.

    Args:
        model: that trains.
        modules: names of `MODULES`. The norms of queries and keys are part of attention, and norms too.
        key: of the configuration, for the error message.

    Raises:
        ConfigError: no parameter belongs to one of the modules, as adapters have no embedding and no norm; or a rank
            would hold no parameter that trains.
    """
    check_freeze(modules, key)
    if not modules:
        return
    names = [name for name, _ in model.named_parameters()]
    present = [m for m in MODULES if not all_ranks_true(not any(_belongs_to(name, m) for name in names))]
    absent = [module for module in modules if module not in present]
    if absent:
        raise ConfigError(
            f"{key}: no parameter of this model belongs to `{absent[0]}`, so freezing it has no effect; of adapters "
            f"(sharing=lora) only those of {' and '.join(present)} can be frozen. Take `{absent[0]}` from the list"
        )
    for name, parameter in model.named_parameters():
        if any(_belongs_to(name, module) for module in modules):
            parameter.requires_grad_(False)
    model.frozen = tuple(module for module in MODULES if module in modules)
    if not all_ranks_true(any(parameter.requires_grad for parameter in model.parameters())):
        raise ConfigError(
            f"{key} is {list(modules)}, which leaves a pipeline stage without a parameter that trains: take one module "
            "from the list, or set parallel.pipeline=1"
        )


def _belongs_to(name: str, module: str) -> bool:
    if module == "norm":
        return "norm." in name
    if module == "embedding":
        return name == EMBEDDING
    return f".{'self_attention' if module == 'attention' else 'mlp'}." in name
