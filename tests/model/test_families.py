"""Every family in every shape: logits, scores and weights of transformers; the decoder agrees with scoring."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from icegrt.kernels import lm_logits
from icegrt.model.build import build_model
from icegrt.model.hf import exporter
from icegrt.model.hf.writer import save_pretrained
from icegrt.packing import pack
from icegrt.ppo.scoring import LogprobScorer, score_sequences
from icegrt.rollout.decoder import Decoder
from icegrt.rollout.types import Sampling
from tests.helpers import tiny_models as tiny

pytestmark = pytest.mark.usefixtures("cluster")

LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONG = {"max_position_embeddings": 256}
WINDOW = {"sliding_window": 5, "use_sliding_window": True}
SHAPES = {
    "llama-linear_rope": ("llama", {"rope_parameters": LINEAR, **LONG}),
    "llama-llama3_rope": ("llama", {"rope_parameters": LLAMA3, "head_dim": 16, **LONG}),
    "llama-multi_query_tied": ("llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "llama-biased": ("llama", {"attention_bias": True}),
    "mistral-grouped": ("mistral", {"num_key_value_heads": 1, "sliding_window": None}),
    "mistral-window": ("mistral", {"sliding_window": 5, "vocab_size": 67}),
    "mistral-wide_heads": ("mistral", {"head_dim": 24, "sliding_window": None, "rope_parameters": {"rope_theta": 1e6}}),
    "mistral-tied_linear_rope": ("mistral", {"tie_word_embeddings": True, "rope_parameters": LINEAR, **LONG}),
    "qwen2-biased": ("qwen2", {}),
    "qwen2-four_to_one": ("qwen2", {"num_attention_heads": 8, "num_key_value_heads": 2, "rms_norm_eps": 1e-4}),
    "qwen2-multi_query_tied": ("qwen2", {"num_key_value_heads": 1, "tie_word_embeddings": True, "vocab_size": 63}),
    "qwen2-upper_windows": ("qwen2", {**WINDOW, "max_window_layers": 1}),
    "qwen3-wide_heads": ("qwen3", {"head_dim": 16, "rope_parameters": {"rope_theta": 1e6}}),
    "qwen3-biased": ("qwen3", {"attention_bias": True, "head_dim": 8}),
    "qwen3-four_to_one_tied": ("qwen3", {"num_attention_heads": 8, "head_dim": 6, "tie_word_embeddings": True}),
    "qwen3-multi_query": ("qwen3", {"num_key_value_heads": 1, "head_dim": 8, "vocab_size": 65}),
    "qwen3-named_windows": ("qwen3", {**WINDOW, "layer_types": ["sliding_attention", "full_attention"], "head_dim": 8}),
}
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
ROWS = [[5, 6, 7], [9], [3, 40, 2, 8, 11, 30], [7, 7, 7], [1] * 12, [(7 * i) % 59 for i in range(26)]]
LONG_ROW = [(11 * i) % 60 for i in range(150)]


@pytest.fixture(scope="module", params=SHAPES)
def pair(request):
    """A language model of transformers, and the same one here."""
    family, changes = SHAPES[request.param]
    hf_model = tiny.causal_lm(0, family=family, **changes)
    return hf_model, build_model(hf_model, "lm", tiny.current_cluster(), dtype=torch.float32)


def logits(model, rows):
    batch = pack([row[:1] for row in rows], [row[1:] for row in rows])
    with torch.no_grad():
        return lm_logits(model.chunks[-1].hidden(batch).squeeze(1), model.lm_weight_VH).split(
            [len(row) for row in rows]
        )


def test_logits_of_packed_sequences_are_those_of_transformers(pair):
    hf_model, model = pair
    rows = [*ROWS, LONG_ROW] if hf_model.config.max_position_embeddings > len(LONG_ROW) else ROWS
    for row, row_logits in zip(rows, logits(model, rows), strict=True):
        with torch.no_grad():
            expected = hf_model(torch.tensor([row])).logits[0]
        assert row_logits.shape == expected.shape and expected.abs().max() > 1
        assert (row_logits - expected).abs().max() < 1e-4


def test_import_and_export_change_no_bit(pair, tmp_path):
    hf_model, _ = pair
    hf_model.save_pretrained(tmp_path / "in", max_shard_size="20KB")
    assert (tmp_path / "in" / "model.safetensors.index.json").is_file()
    model = build_model(tmp_path / "in", "lm", tiny.current_cluster(), dtype=torch.float32)
    out = save_pretrained(
        exporter.export_tensors(model, torch.float32), model.architecture, tmp_path / "out", classifier=False
    )
    reloaded, loading_info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(loading_info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(reloaded) is type(hf_model) and tiny.same(dict(reloaded.state_dict()), dict(hf_model.state_dict()))


def test_the_decoder_agrees_with_scoring(pair):
    _, model = pair
    prompts = [[5, 6, 7], [9], [2] * 12]
    responses = list(Decoder(model, [tiny.EOS]).stream(prompts, 2, Sampling(max_new_tokens=14, seed=3)))
    assert len({tuple(r.tokens) for r in responses}) > 3
    batch = pack([r.prompt for r in responses], [r.tokens for r in responses])
    scored, _ = LogprobScorer(1.0, None)(tiny.Role("actor", model), [batch])
    sampled = torch.tensor([logprob for r in responses for logprob in r.logprobs])
    assert (scored - sampled).abs().max() < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_comes_back_to_the_bit(family, tmp_path):
    hf_model = tiny.causal_lm(0, family=family).bfloat16()
    hf_model.save_pretrained(tmp_path / "in")
    model = build_model(tmp_path / "in", "lm", tiny.current_cluster(), dtype=torch.bfloat16)
    out = save_pretrained(
        exporter.export_tensors(model, torch.bfloat16), model.architecture, tmp_path / "out", classifier=False,
        dtype="bf16",
    )  # fmt: skip
    reloaded = AutoModelForCausalLM.from_pretrained(out)
    assert reloaded.dtype == torch.bfloat16 and tiny.same(dict(reloaded.state_dict()), dict(hf_model.state_dict()))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_a_reward_model_scores_as_in_transformers_and_comes_back_to_the_bit(family, tied, tmp_path):
    hf_model = tiny.scorer(1, family=family, tie_word_embeddings=tied)
    hf_model.save_pretrained(tmp_path / "in")
    role = tiny.role(tmp_path / "in", "scalar")
    score_N = score_sequences(role, [pack([row[:1] for row in ROWS], [row[1:] for row in ROWS])])
    with torch.no_grad():
        expected = torch.cat([hf_model(torch.tensor([row])).logits[0] for row in ROWS])
    assert (score_N - expected).abs().max() < 1e-4 and expected.abs().max() > 0.1
    out = save_pretrained(
        exporter.export_tensors(role.model, torch.float32), role.model.architecture, tmp_path / "out", classifier=True
    )
    reloaded, loading_info = AutoModelForSequenceClassification.from_pretrained(out, output_loading_info=True)
    assert not any(loading_info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(reloaded) is type(hf_model) and tiny.same(dict(reloaded.state_dict()), dict(hf_model.state_dict()))
