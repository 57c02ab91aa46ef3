"""Hidden states and gradients of adapters are those of `transformers` with `peft`."""

import pytest
import torch

from icegrt.config import OptimizerConfig
from icegrt.model.lora.spec import AdapterSpec
from icegrt.packing import pack
from icegrt.roles.micro_batch import MicroBatch
from icegrt.training.sft_loss import SFTLoss
from tests.helpers import lora_cases as lora
from tests.helpers import tiny_models as tiny

pytestmark = pytest.mark.usefixtures("cluster")

PROMPTS, ANSWERS = [[2, 3, 4], [5, 6], [9, 9, 8, 7, 2]], [[7, 8, 3], [9, 10, 11, 4], [5, 6]]
SPECS = {
    "all projections": ("llama", {}, lora.SPEC),
    "biases, tied": ("qwen2", {"tie_word_embeddings": True}, AdapterSpec(3, 6.0, lora.TARGETS, rslora=True)),
    "norms of queries": ("qwen3", {}, AdapterSpec(2, 2.0, ("k_proj", "o_proj", "up_proj"))),
    "first and last of a fused product": ("llama", {}, AdapterSpec(5, 2.5, ("q_proj", "v_proj"))),
}


def batch():
    return pack(PROMPTS, ANSWERS)


def peft_loss(adapted):
    """The mean negative log-likelihood of all answer tokens."""
    total, count = 0.0, 0
    for prompt, answer in zip(PROMPTS, ANSWERS, strict=True):
        logits = adapted(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        total = total + torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum")
        count += len(answer)
    return total / count


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("case", SPECS)
def test_gradients_are_those_of_peft(case, recompute, tmp_path):
    family, changes, spec = SPECS[case]
    model = tiny.causal_lm(0, family, **changes)
    adapted = lora.peft_folder(tmp_path, model, spec)
    peft_loss(adapted).backward()
    trunk = lora.trunk(tiny.causal_lm(0, family, **changes), recompute=recompute)
    role = lora.adapted_role(trunk, tmp_path, learns=OptimizerConfig())
    gradients = tiny.gradients(role, [MicroBatch(batch(), SFTLoss(role, 64))])
    total, worst = tiny.gap(gradients, lora.peft_gradients(adapted))
    assert total < 1e-5 and worst < 1e-5
    assert all(p.grad is None and not p.requires_grad for p in trunk.parameters())
