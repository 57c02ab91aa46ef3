"""Adapters under test: tiny models of `peft`, the same adapter in the engine, and folders of both."""

import torch
from peft import LoraConfig, TaskType, get_peft_model

from icegrt.model.build import build_adapter, build_model
from icegrt.model.hf.reader import HFCheckpointReader
from icegrt.model.lora.initial import InitialAdapter
from icegrt.model.lora.peft_format import AdapterReader
from icegrt.model.lora.spec import TARGETS, AdapterSpec
from icegrt.model.lora.trunk_hash import TrunkIdentity, identity_of
from icegrt.roles.role import Role, TrainableRole
from tests.helpers import tiny_models as tiny

SPEC = AdapterSpec(4, 6.0, TARGETS)


def peft_model(model, spec=SPEC, seed=11):
    """Return a transformers model with an adapter of random A and B, as peft builds it."""
    head = "score" if hasattr(model, "score") else None
    torch.manual_seed(seed)
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        use_rslora=spec.rslora,
        target_modules=list(spec.targets),
        task_type=TaskType.SEQ_CLS if head else TaskType.CAUSAL_LM,
        modules_to_save=[head] if head else None,
    )
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return adapted


def peft_folder(folder, model, spec=SPEC, seed=11):
    """Save such an adapter. Returns the adapted model, in evaluation mode."""
    adapted = peft_model(model, spec, seed)
    adapted.save_pretrained(folder)
    return adapted.eval()


def trunk(source, head="lm", *, dtype=torch.float32, **kwargs):
    """Return the trunk of a transformers model."""
    return build_model(source, head, tiny.current_cluster(), dtype=dtype, new_head=True, **kwargs)


def adapted_role(model, source, head="lm", *, learns=None, name="role", spec=SPEC, identity=None):
    """Return a role that is an adapter over a trunk.

    source: a folder of peft; None: a new adapter.
    """
    if source is None:
        tensors = InitialAdapter(model.architecture, spec, head, seed=3, name=name)
    else:
        tensors = AdapterReader(source)
        spec = tensors.spec
    identity = identity or TrunkIdentity("0" * 64, "")
    adapted = build_adapter(model, spec, head, tensors, identity)
    adapted.requires_grad_(learns is not None)
    return Role(name, adapted) if learns is None else TrainableRole(name, adapted, learns, 10)


def identity(source) -> TrunkIdentity:
    """Return the identity of a checkpoint."""
    return identity_of(HFCheckpointReader(source), tiny.current_cluster())


def peft_gradients(adapted) -> dict[str, torch.Tensor]:
    """Return the gradients of an adapter of peft under the engine's names of its tensors."""
    gradients = {}
    for name, parameter in adapted.named_parameters():
        if parameter.grad is not None:
            short = name.removeprefix("base_model.model.").replace(".default", "").replace(".modules_to_save", "")
            gradients[short] = parameter.grad.clone()
    return gradients
