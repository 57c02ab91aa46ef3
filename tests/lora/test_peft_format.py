"""Adapters travel between the engine and `peft`: equal logits, merged or not, and none on weights of another model."""

import json

import pytest
import torch
from peft import PeftModel

from icegrt.errors import CheckpointError
from icegrt.model.hf.reader import HFCheckpointReader
from icegrt.model.lora.peft_format import AdapterReader
from icegrt.model.lora.spec import AdapterSpec
from icegrt.model.lora.writer import save_adapter
from icegrt.packing import pack
from icegrt.ppo.scoring import score_sequences
from tests.helpers import lora_cases as lora
from tests.helpers import tiny_models as tiny

pytestmark = pytest.mark.usefixtures("cluster")

TOKENS = [[2, 3, 4, 9], [5, 6, 7, 8, 10]]
SPECS = {
    "all": lora.SPEC,
    "some, rslora": AdapterSpec(3, 5.0, ("q_proj", "v_proj", "up_proj", "down_proj"), rslora=True),
}


def logits(role):
    """Return the engine's logits of every sequence."""
    batch = pack([tokens[:1] for tokens in TOKENS], [tokens[1:] for tokens in TOKENS])
    with torch.no_grad():
        hidden_TH = role.model.gather_hidden_rows(role.model.chunks[0].hidden(batch))
    rows = hidden_TH @ role.model.lm_weight_VH.t()
    starts = batch.cu_seqlens.tolist()
    return [rows[start : start + len(tokens)] for start, tokens in zip(starts, TOKENS, strict=False)]


def hf_logits(model):
    with torch.no_grad():
        return [model(torch.tensor([tokens])).logits[0] for tokens in TOKENS]


def assert_close(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert float((a - b).abs().max() / b.abs().max()) < 1e-5


@pytest.mark.parametrize("case", SPECS)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_an_adapter_of_peft_is_read_and_written_with_equal_logits(family, case, tmp_path):
    base = tiny.causal_lm(0, family)
    adapted = lora.peft_folder(tmp_path / "peft", tiny.causal_lm(0, family), SPECS[case])
    role = lora.adapted_role(lora.trunk(base), tmp_path / "peft")
    assert role.model.adapter == SPECS[case]
    expected = hf_logits(adapted)
    assert_close(logits(role), expected)
    assert float((expected[0] - hf_logits(base)[0]).abs().max()) > 0.1, "the adapter changes nothing"
    # Out again, in the format of peft and merged.
    save_adapter(role.model, tmp_path / "ours")
    assert_close(hf_logits(PeftModel.from_pretrained(tiny.causal_lm(0, family), tmp_path / "ours").eval()), expected)
    role.save_pretrained(tmp_path / "merged", "fp32")
    assert_close(hf_logits(type(base).from_pretrained(tmp_path / "merged").eval()), expected)


def test_a_reward_adapter_has_its_head(tmp_path):
    scorer = tiny.scorer(1)
    adapted = lora.peft_folder(tmp_path / "peft", tiny.scorer(1))
    assert AdapterReader(tmp_path / "peft").head == "scalar"
    batch = pack([tokens[:1] for tokens in TOKENS], [tokens[1:] for tokens in TOKENS])
    expected = torch.stack([adapted(torch.tensor([tokens])).logits[0, 0] for tokens in TOKENS]).detach()
    # A head of its own over the trunk of a language model.
    role = lora.adapted_role(lora.trunk(scorer, "scalar"), tmp_path / "peft", "scalar")
    assert_close([score_sequences(role, [batch])], [expected])
    save_adapter(role.model, tmp_path / "ours")
    other = tiny.scorer(1)
    torch.nn.init.zeros_(other.score.weight)
    again = PeftModel.from_pretrained(other, tmp_path / "ours").eval()
    assert_close([torch.stack([again(torch.tensor([tokens])).logits[0, 0] for tokens in TOKENS]).detach()], [expected])
    role.save_pretrained(tmp_path / "merged", "fp32")
    merged = type(scorer).from_pretrained(tmp_path / "merged").eval()
    assert_close([torch.stack([merged(torch.tensor([tokens])).logits[0, 0] for tokens in TOKENS]).detach()], [expected])


def test_an_adapter_carries_the_hash_of_its_trunk_and_is_refused_on_another(tmp_path):
    model = tiny.causal_lm(0)
    identity = lora.identity(model)
    role = lora.adapted_role(lora.trunk(model), None, identity=identity)
    save_adapter(role.model, tmp_path / "adapter")
    reader = AdapterReader(tmp_path / "adapter")
    assert reader.trunk_hash == identity.hash and len(identity.hash) == 64
    reader.check(role.model.architecture, identity)
    # The hash is that of the weights: the same in memory and in a folder, another after a change of one number.
    model.save_pretrained(tmp_path / "model")
    assert lora.identity(tmp_path / "model").hash == identity.hash
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] += 1e-6
    other = lora.identity(model)
    with pytest.raises(CheckpointError, match=r"adapter: an adapter of other weights \(hash .*Name the checkpoint"):
        reader.check(role.model.architecture, other)
    # A head is no part of the trunk: a reward model's adapter belongs to the language model that it started from.
    with torch.no_grad():
        model.lm_head.weight.add_(1.0)
    assert lora.identity(model).hash == other.hash


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("use_dora", True, "`use_dora` is True; only False is supported"),
        ("bias", "all", "`bias` is 'all'; only 'none' is supported"),
        ("rank_pattern", {"q_proj": 2}, "`rank_pattern` is"),
        ("init_lora_weights", "pissa", "`init_lora_weights` is 'pissa'"),
        ("peft_type", "IA3", "`peft_type` is 'IA3'; only 'LORA' is supported"),
        ("r", 0, "rank"),
        ("target_modules", ["query_key_value"], "`query_key_value` is no projection that can get an adapter"),
        ("modules_to_save", ["lm_head"], "only a `score` head is supported"),
        ("target_modules", ["q_proj"], "belongs to no projection of the trunk"),
        ("r", 5, "where rank 5"),
    ],
)
def test_an_adapter_that_would_compute_something_else_is_refused(key, value, message, tmp_path):
    lora.peft_folder(tmp_path, tiny.causal_lm(0))
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(CheckpointError, match=message):
        AdapterReader(tmp_path).check(
            HFCheckpointReader(tiny.causal_lm(0)).architecture, lora.identity(tiny.causal_lm(0))
        )


def test_an_adapter_is_no_model(tmp_path):
    lora.peft_folder(tmp_path, tiny.causal_lm(0))
    with pytest.raises(CheckpointError, match=r"an adapter, not a model\. Name the merged model instead"):
        HFCheckpointReader(tmp_path)
