"""Llama through Megatron: the logits of transformers, weights to the bit and back, refusals by name."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from icegrt.errors import CheckpointError, RunError
from icegrt.kernels import lm_logits
from icegrt.model.architecture import Architecture
from icegrt.model.build import build_model
from icegrt.model.hf import exporter
from icegrt.model.hf.reader import HFCheckpointReader
from icegrt.model.hf.writer import save_pretrained
from icegrt.packing import pack
from icegrt.ppo.scoring import score_sequences, score_values
from tests.helpers import tiny_models as tiny

pytestmark = pytest.mark.usefixtures("cluster")

SHAPES = {
    "grouped_query": {},
    "multi_head": {"num_key_value_heads": 4},
    "multi_query": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "odd_vocabulary": {"vocab_size": 47},
    "wide_heads": {"head_dim": 16},
    "narrow_heads": {"head_dim": 4, "num_key_value_heads": 4},
    "other_rope_and_eps": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "rms_norm_eps": 1e-3},
}
ROWS = [[5, 6, 7], [9], [3, 40, 2, 8, 11, 30], [7, 7], [4, 9, 46], [1] * 12]


@pytest.fixture(scope="module", params=SHAPES)
def pair(request):
    """A language model of transformers, and the same one here."""
    hf_model = tiny.causal_lm(0, **SHAPES[request.param])
    return hf_model, build_model(hf_model, "lm", tiny.current_cluster(), dtype=torch.float32)


def hidden(model, rows):
    batch = pack([row[:1] for row in rows], [row[1:] for row in rows])
    with torch.no_grad():
        return model.chunks[-1].hidden(batch).squeeze(1)


def test_logits_of_a_packed_batch_are_those_of_transformers(pair):
    hf_model, model = pair
    with torch.no_grad():
        expected = torch.cat([hf_model(torch.tensor([row])).logits[0] for row in ROWS])
    max_error = (lm_logits(hidden(model, ROWS).detach(), model.lm_weight_VH.detach()) - expected).abs().max()
    assert max_error < 1e-4 and expected.abs().max() > 1


def test_the_float64_model_of_the_tests_is_that_of_transformers(pair):
    hf_model, _ = pair
    exact = tiny.llama64(tiny.doubles(hf_model), hf_model.config, ROWS[2])
    with torch.no_grad():
        assert (hf_model.model(torch.tensor([ROWS[2]])).last_hidden_state[0] - exact).abs().max() < 1e-5


def test_a_language_model_comes_back_to_the_bit(pair, tmp_path):
    hf_model, model = pair
    out = save_pretrained(
        exporter.export_tensors(model, torch.float32), model.architecture, tmp_path / "out", classifier=False,
        tokenizer=tiny.tokenizer(),
    )  # fmt: skip
    reloaded = AutoModelForCausalLM.from_pretrained(out)
    assert type(reloaded) is type(hf_model)
    assert tiny.same(dict(reloaded.state_dict()), dict(hf_model.state_dict()))
    assert reloaded.config.tie_word_embeddings == hf_model.config.tie_word_embeddings
    assert reloaded.dtype == torch.float32 and reloaded.generation_config.eos_token_id == tiny.EOS
    imported = build_model(out, "lm", tiny.current_cluster(), dtype=torch.float32)
    assert tiny.same(dict(imported.named_parameters()), dict(model.named_parameters()))


@pytest.mark.parametrize("shape", ["grouped_query", "multi_query", "tied"])
def test_a_scorer_comes_back_to_the_bit_and_scores_alike(shape, tmp_path):
    hf_model = tiny.scorer(1, **SHAPES[shape])
    role = tiny.role(hf_model, "scalar")
    out = save_pretrained(
        exporter.export_tensors(role.model, torch.float32), role.model.architecture, tmp_path / "out", classifier=True
    )
    reloaded = AutoModelForSequenceClassification.from_pretrained(out)
    assert reloaded.config.num_labels == 1 and tiny.same(dict(reloaded.state_dict()), dict(hf_model.state_dict()))
    score_N = score_sequences(role, [pack([row[:1] for row in ROWS], [row[1:] for row in ROWS])])
    with torch.no_grad():
        expected = torch.cat([reloaded(torch.tensor([row])).logits[0] for row in ROWS])
    assert (score_N - expected).abs().max() < 1e-4 and expected.abs().max() > 0.1


def test_bf16_is_exported_as_it_is_held(tmp_path):
    hf_model = tiny.causal_lm(0)
    model = build_model(hf_model, "lm", tiny.current_cluster(), dtype=torch.bfloat16)
    out = save_pretrained(
        exporter.export_tensors(model, torch.bfloat16), model.architecture, tmp_path / "out", classifier=False,
        dtype="bf16",
    )  # fmt: skip
    reloaded = AutoModelForCausalLM.from_pretrained(out)
    assert reloaded.dtype == torch.bfloat16
    assert tiny.same(dict(reloaded.state_dict()), dict(hf_model.bfloat16().state_dict()))


def test_a_large_export_is_cut_into_files_that_transformers_reads(tmp_path):
    hf_model = tiny.causal_lm(0)
    model = build_model(hf_model, "lm", tiny.current_cluster(), dtype=torch.float32)
    out = save_pretrained(
        exporter.export_tensors(model, torch.float32), model.architecture, tmp_path / "out", classifier=False,
        shard_bytes=20_000,
    )  # fmt: skip
    assert len(list(out.glob("model-0*-of-0*.safetensors"))) > 2 and not (out / "model.safetensors").exists()
    assert tiny.same(dict(AutoModelForCausalLM.from_pretrained(out).state_dict()), dict(hf_model.state_dict()))
    assert tiny.same(
        dict(build_model(out, "lm", tiny.current_cluster(), dtype=torch.float32).named_parameters()),
        dict(model.named_parameters()),
    )
    with pytest.raises(RunError, match="not an empty folder"):
        save_pretrained(iter(()), model.architecture, out, classifier=False)


@pytest.mark.parametrize("rows", [ROWS, [[5, 6, 7], [8, 9, 10], [11, 12, 13]]], ids=["many_lengths", "one_length"])
def test_a_sequence_does_not_change_a_bit_of_another(rows, pair):
    _, model = pair
    lengths = [len(row) for row in rows]
    before = hidden(model, rows).split(lengths)
    for changed_index in range(len(rows)):
        changed_rows = [[(t + 17) % 40 for t in row] if n == changed_index else row for n, row in enumerate(rows)]
        after = hidden(model, changed_rows).split(lengths)
        moved = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
        assert moved == [n == changed_index for n in range(len(rows))]


def test_a_token_does_not_change_a_bit_of_those_before_it(pair):
    _, model = pair
    before, after = hidden(model, [ROWS[2]]), hidden(model, [[*ROWS[2][:4], 39, 38]])
    assert torch.equal(before[:4], after[:4]) and not torch.equal(before[4], after[4])


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    """A checkpoint in a folder, to be damaged."""
    folder = tmp_path / "model"
    tiny.causal_lm(0).save_pretrained(folder)
    return folder


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def refused(folder, *words, head="lm"):
    with pytest.raises(CheckpointError) as error:
        build_model(folder, head, tiny.current_cluster(), dtype=torch.float32)
    for word in (str(folder), *words):
        assert word in str(error.value)


def test_a_missing_value_head_is_refused_and_zero_when_it_is_chosen(saved):
    refused(saved, "no value head (`score.weight`)", "ppo.critic.init=actor", head="scalar")
    critic = tiny.role(saved, "scalar", new_head=True)
    values, last = score_values(critic, [pack([[5, 6]], [[7, 8, 9]])])
    assert torch.equal(values, torch.zeros(3)) and torch.equal(last, torch.zeros(1))
    head = dict(tiny.role(tiny.scorer(1), "scalar", new_head=True).model.named_parameters())["head.weight"]
    assert head.abs().min() > 0  # a head that is there is kept


def test_an_unexpected_tensor_is_refused_by_name(saved):
    change_tensors(saved, lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}))
    refused(saved, "does not have", "`model.layers.0.self_attn.q_proj.bias`")


def test_more_layers_than_the_configuration_says_are_refused(saved):
    change_config(saved, num_hidden_layers=1)
    refused(saved, "`model.layers.1.input_layernorm.weight`")


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "lm_head.weight", "model.embed_tokens.weight"])
def test_a_missing_tensor_is_refused_by_name(name, saved):
    change_tensors(saved, lambda t: t.pop(name))
    refused(saved, f"tensor `{name}` is missing")


@pytest.mark.parametrize(
    "name, shape",
    [
        ("model.layers.0.self_attn.k_proj.weight", (32, 32)),
        ("model.layers.0.self_attn.q_proj.weight", (31, 32)),
        ("model.layers.0.mlp.gate_proj.weight", (47, 32)),
        ("model.layers.1.mlp.down_proj.weight", (32, 47)),
        ("model.embed_tokens.weight", (60, 32)),
        ("model.norm.weight", (31,)),
        ("lm_head.weight", (61, 31)),
    ],
)
def test_a_tensor_of_another_shape_is_refused_by_name(name, shape, saved):
    change_tensors(saved, lambda t: t.update({name: torch.zeros(shape)}))
    refused(saved, f"`{name}` has shape {shape} where config.json asks for")


def test_halves_that_only_add_up_are_refused(saved):
    gate, up = (f"model.layers.0.mlp.{part}_proj.weight" for part in ("gate", "up"))
    change_tensors(saved, lambda t: t.update({gate: torch.zeros(40, 32), up: torch.zeros(56, 32)}))
    refused(saved, f"`{gate}` has shape (40, 32)")


def test_pickled_weights_are_refused_with_the_way_out(saved):
    (saved / "model.safetensors").rename(saved / "pytorch_model.bin")
    refused(saved, "pytorch_model.bin is a pickle", "save_pretrained")


def test_a_damaged_or_absent_file_is_refused_by_name(saved):
    weights_file = saved / "model.safetensors"
    names = list(load_file(weights_file))
    index, part = saved / "model.safetensors.index.json", "model-00001-of-00002.safetensors"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, part)}))
    refused(saved, part, "cannot be read as safetensors")
    save_file({"other": torch.zeros(1)}, saved / part)
    refused(saved, part, "`lm_head.weight`", index.name)
    for text in ("{not json", "[]", '{"weight_map": 3}'):
        index.write_text(text)
        refused(saved, index.name)
    index.unlink()
    weights_file.write_bytes(b"\0" * 64)
    refused(saved, weights_file.name, "cannot be read as safetensors")
    shutil.rmtree(saved)
    refused(saved, "no config.json")


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"model_type": "gpt2"}, ("model_type 'gpt2' is not supported", "llama")),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, ("rope type 'yarn'", "'default'")),
        ({"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, ("rope type 'dynamic'",)),
        ({"attention_bias": 1}, ("`attention_bias` must be true or false",)),
        ({"mlp_bias": True}, ("`mlp_bias` is true",)),
        ({"hidden_act": "gelu"}, ('`hidden_act` is "gelu"', '"silu"')),
        ({"quantization_config": {"bits": 4}}, ("quantised",)),
        ({"hidden_size": None}, ("`hidden_size` is missing",)),
    ],
)
def test_an_architecture_that_is_not_ours_is_refused_by_name(changes, words, saved):
    change_config(saved, **changes)
    refused(saved, "config.json", *words)


def test_rope_theta_is_read_as_old_and_new_transformers_write_it():
    new = tiny.model_config(rope_parameters={"rope_type": "default", "rope_theta": 5e5}).to_dict()
    old = {key: value for key, value in new.items() if key != "rope_parameters"} | {"rope_theta": 5e5}
    for config in (new, old, old | {"rope_scaling": None}):
        assert Architecture.from_config(config).rope.theta == 5e5


def test_what_is_no_checkpoint_at_all_is_refused():
    with pytest.raises(CheckpointError, match="got int"):
        HFCheckpointReader(7)
