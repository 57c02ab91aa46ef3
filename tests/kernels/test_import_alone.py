"""icegrt.kernels needs torch and nothing else, and the folder's name does not get in anyone's way."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

BLOCK = """
import importlib.abc, sys
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked}:
            raise ImportError("blocked: " + name)
sys.meta_path.insert(0, Block())
"""

USE = """
import torch
from icegrt.kernels import token_logprobs, linear_ppo_loss, sample_tokens
hidden, weight, labels = torch.randn(3, 2), torch.randn(5, 2), torch.tensor([0, 4, 2])
out = linear_ppo_loss(hidden.requires_grad_(), weight, labels, None, torch.randn(3), normalizer=3.0)
out.loss.backward()
engine = [m for m in sys.modules if m.startswith("icegrt.") and not m.startswith(("icegrt.kernels", "icegrt._C"))]
assert not engine, engine
assert not torch.cuda.is_initialized()
"""


SCANS = """
import torch
from icegrt.kernels import describe, masked_moments, pack_padded, sample_tokens, shaped_gae, whiten
x, cu = torch.randn(6), torch.tensor([0, 2, 6])
out = shaped_gae(torch.randn(2), x, x, x * 2, cu, kl_coef=0.1)
white = whiten(out.advantage_A, masked_moments(out.advantage_A))
ids = torch.arange(2)
sample_tokens(torch.randn(2, 5), temperature=1.0, top_k=2, seed=0, sequence_ids=ids, positions=ids)
pack_padded(torch.ones(1, 3).long(), torch.ones(1, 3), torch.tensor([[0, 1, 1]]))
print(describe("cpu")["shaped_gae"])
"""


def without_extension(block):
    return block.replace('name.split(".")[0] in', 'name == "icegrt._C" or name.split(".")[0] in')


def run_python(code):
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr[-3000:]
    return process.stdout


@pytest.mark.parametrize("extension", [True, False])
def test_without_megatron_transformers_and_triton(extension):
    block = BLOCK.format(blocked={"megatron", "transformers", "triton", "numpy_financial"})
    run_python((block if extension else without_extension(block)) + USE)


def test_scans_and_sampling_with_the_base_install_with_and_without_the_extension():
    blocked = {"megatron", "transformers", "triton", "datasets", "pydantic", "yaml", "rich"}
    assert run_python(BLOCK.format(blocked=blocked) + SCANS).strip() == "cpp"
    without = without_extension(BLOCK.format(blocked=blocked))
    assert run_python(without + SCANS).strip() == "reference"


def test_import_loads_neither_triton_kernels_nor_the_engines_dependencies():
    run_python(
        "import sys, torch\nbefore = set(sys.modules)\nimport icegrt.kernels\n"
        "new = {m.split('.')[0] for m in set(sys.modules) - before}\n"
        "assert not new & {'triton', 'megatron', 'transformers', 'datasets'}, new\n"
        "assert not [m for m in sys.modules if m.startswith('icegrt.kernels') and m.endswith('.triton')]\n"
    )


def test_transformers_imports_from_the_repository_root():
    pytest.importorskip("transformers")
    run_python(
        "import sys\nsys.path.insert(0, '')\nimport transformers\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\nimport icegrt.kernels\n"
    )
