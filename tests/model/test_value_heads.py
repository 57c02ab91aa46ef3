"""Value heads of other libraries become scalar heads, and what cannot be imported is said."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from icegrt.errors import CheckpointError
from icegrt.packing import pack
from icegrt.ppo.scoring import score_values
from tests.helpers import stage_cases as cases
from tests.helpers import tiny_models as tiny

pytestmark = pytest.mark.usefixtures("cluster")


def trl_checkpoint(folder, *, bias=0.0, prefix="", width=32):
    """Write what TRL's `AutoModelForCausalLMWithValueHead.save_pretrained` does; return the folder and the head."""
    model = tiny.causal_lm(3)
    cases.save_model(folder, model, tiny.tokenizer())
    tensors = {f"{prefix}{name}": x for name, x in load_file(folder / "model.safetensors").items()}
    tensors["v_head.summary.weight"] = torch.linspace(-1, 1, width)[None]
    tensors["v_head.summary.bias"] = torch.tensor([bias])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return model, tensors["v_head.summary.weight"]


@pytest.mark.parametrize("prefix", ["", "pretrained_model."])
def test_a_trl_value_head_is_read_as_a_critic(prefix, tmp_path, capsys):
    model, weight_1H = trl_checkpoint(tmp_path / "trl", prefix=prefix)
    critic = tiny.role(str(tmp_path / "trl"), "scalar")
    batch = pack([[2, 3, 4], [5, 6]], [[7, 8], [9, 10, 11]])
    value_A, last_value_N = score_values(critic, [batch])
    expected_A, expected_N = [], []
    for prompt, response in (([2, 3, 4], [7, 8]), ([5, 6], [9, 10, 11])):
        hidden_LH = model.model(torch.tensor([prompt + response])).last_hidden_state[0]
        value_L = hidden_LH @ weight_1H[0]
        expected_A.append(value_L[len(prompt) - 1 : -1])
        expected_N.append(value_L[-1])
    torch.testing.assert_close(value_A, torch.cat(expected_A), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(last_value_N, torch.stack(expected_N), rtol=1e-4, atol=1e-5)
    assert "bias" not in capsys.readouterr().err


def test_the_bias_of_a_value_head_is_named_in_a_warning(tmp_path, capsys):
    trl_checkpoint(tmp_path / "trl", bias=0.25)
    tiny.role(str(tmp_path / "trl"), "scalar")
    assert f"{tmp_path / 'trl'}: the value head's bias of 0.25 is not imported" in capsys.readouterr().err


def test_the_language_model_of_a_trl_checkpoint_can_be_an_actor(tmp_path):
    model, _ = trl_checkpoint(tmp_path / "trl", bias=0.25)
    actor = tiny.role(str(tmp_path / "trl"), "lm")
    assert torch.equal(tiny.parameters(actor)["head.weight"][: tiny.VOCAB], model.lm_head.weight)


def test_a_value_head_of_another_width_is_refused_by_name(tmp_path):
    trl_checkpoint(tmp_path / "trl", width=31)
    with pytest.raises(CheckpointError, match=r"tensor `score\.weight` has shape \(1, 31\) where .* \(1, 32\)"):
        tiny.role(str(tmp_path / "trl"), "scalar")
