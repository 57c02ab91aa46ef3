"""Checkpoints that cannot work: refused by the name of the file, key or tensor before anything is computed."""

import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from icegrt import cli
from tests.helpers import stage_cases as cases
from tests.helpers import tiny_models
from tests.helpers.refusals import change_json

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
QUERY, UP = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"
NORM = "model.norm.weight"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(home, tmp_path):
    """A whole checkpoint of a language model, to be damaged."""
    return Path(shutil.copytree(home.actor, tmp_path / "model"))


def sample(home, folder):
    """The command that reads a language model, and would write answers."""
    out = folder.parent / "new" / "answers.jsonl"
    keys = [f"sample.model={folder}", f"sample.prompts={home.prompts}", f"sample.out={out}"]
    return ["sample", *keys, "sample.sampling.max_new_tokens=2"]


# -- config.json ------------------------------------------------------------------------------------------------------

CONFIGS = {
    "no model_type": ({"model_type": ...}, ["no model_type", "llama, mistral, qwen2, qwen3"]),
    "another architecture": ({"model_type": "gpt2"}, ["'gpt2'", "llama, mistral, qwen2, qwen3"]),
    "no width": ({"hidden_size": ...}, ["`hidden_size` is missing"]),
    "no context": ({"max_position_embeddings": None}, ["`max_position_embeddings` is missing"]),
    "width as text": ({"hidden_size": "32"}, ["`hidden_size`", "whole number", "'32'"]),
    "width as fraction": ({"intermediate_size": 48.5}, ["`intermediate_size`", "48.5"]),
    "no layers": ({"num_hidden_layers": 0}, ["`num_hidden_layers`", "above 0"]),
    "layers as truth": ({"num_hidden_layers": True}, ["`num_hidden_layers`", "True"]),
    "heads that do not group": ({"num_key_value_heads": 3}, ["`num_attention_heads` 4", "`num_key_value_heads` 3"]),
    "width that heads do not divide": (
        {"num_attention_heads": 5, "num_key_value_heads": 5, "head_dim": ...},
        ["`hidden_size` 32", "`num_attention_heads` 5", "`head_dim`"],
    ),
    "heads of odd size": ({"head_dim": 7}, ["heads of 7 dimensions"]),
    "epsilon of zero": ({"rms_norm_eps": 0}, ["`rms_norm_eps`", "between 0 and 1"]),
    "epsilon as text": ({"rms_norm_eps": "1e-5"}, ["`rms_norm_eps`", "'1e-5'"]),
    "quantised": ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, ["`quantization_config`", "bf16"]),
    "compressed": ({"compression_config": {"format": "int"}}, ["`compression_config`"]),
    "rope of yarn": ({"rope_parameters": YARN}, ["`rope_parameters`", "'yarn'", "'llama3'"]),
    "rope that adapts": (
        {"rope_parameters": ..., "rope_scaling": {"type": "dynamic", "factor": 2.0}},
        ["`rope_scaling`", "'dynamic'"],
    ),
    "rope of long contexts": ({"rope_parameters": {"rope_type": "longrope"}}, ["'longrope'"]),
    "rope of three axes": ({"rope_scaling": {"type": "mrope"}, "rope_parameters": ...}, ["'mrope'"]),
    "linear rope without its factor": ({"rope_parameters": {"rope_type": "linear"}}, ["`factor`", "None"]),
    "a factor as text": ({"rope_parameters": {"rope_type": "linear", "factor": "4"}}, ["`factor`", "'4'"]),
    "llama3 rope without its context": ({"rope_parameters": LLAMA3}, ["`original_max_position_embeddings`"]),
    "llama3 rope with one band": (
        {"rope_parameters": LLAMA3 | {"high_freq_factor": 1.0, "original_max_position_embeddings": 32}},
        ["`rope_parameters.high_freq_factor`", "`low_freq_factor`"],
    ),
    "a rope parameter of another type": (
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "beta_fast": 32}},
        ["`rope_parameters.beta_fast`", "'linear'"],
    ),
    "two ropes": (
        {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        ["`rope_parameters` and `rope_scaling` disagree"],
    ),
    "rope by layer": (
        {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
        ["`rope_parameters.full_attention`"],
    ),
    "rope that is no object": ({"rope_parameters": "default"}, ["`rope_parameters` must be an object"]),
    "rope of half a head": ({"partial_rotary_factor": 0.5}, ["`partial_rotary_factor`"]),
    "a negative base": ({"rope_parameters": {"rope_theta": -1.0}}, ["`rope_theta`", "-1.0"]),
    "a bias that has no tensors": ({"attention_bias": True}, ["self_attn.q_proj.bias` is missing"]),
    "a bias that is no flag": ({"attention_bias": 1}, ["`attention_bias` must be true or false"]),
    "a bias in mistral's attention": (
        {"model_type": "mistral", "attention_bias": True},
        ["`attention_bias` is true", "only false"],
    ),
    "a bias in the mlp": ({"mlp_bias": True}, ["`mlp_bias` is true"]),
    "another activation": ({"hidden_act": "gelu"}, ['`hidden_act` is "gelu"', '"silu"']),
    "soft-capped logits": ({"final_logit_softcapping": 30.0}, ["`final_logit_softcapping`", "remove it"]),
    "scaled logits": ({"logit_scale": 0.0625}, ["`logit_scale`", "llama"]),
    "a window where the family has none": ({"sliding_window": 8}, ["`sliding_window`"]),
    "ties that are no truth": ({"tie_word_embeddings": "yes"}, ["`tie_word_embeddings`", "true or false"]),
    "EOS outside the vocabulary": ({"eos_token_id": [1, 61]}, ["`eos_token_id` 61", "61 tokens"]),
    "a vocabulary beyond memory": ({"vocab_size": 2**31 - 1}, [f"`{EMBEDDING}`", "(61, 32)"]),
    "a width beyond any": ({"hidden_size": 10**12}, ["`hidden_size` is 1000000000000, more than any model has"]),
    "a billion layers": ({"num_hidden_layers": 10**9}, ["`num_hidden_layers` is 1000000000"]),
    "a larger vocabulary": ({"vocab_size": 64}, [f"`{EMBEDDING}`", "(61, 32)", "(64, 32)"]),
    "fewer layers than weights": ({"num_hidden_layers": 1}, ["`model.layers.1.input_layernorm.weight`"]),
    "more layers than weights": ({"num_hidden_layers": 3}, ["`model.layers.2.input_layernorm.weight` is missing"]),
    "another family": ({"model_type": "qwen3", "attention_bias": False}, ["self_attn.q_norm.weight` is missing"]),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_configuration_that_cannot_be_computed(case, folder, home, refused):
    changes, needles = CONFIGS[case]
    change_json(folder / "config.json", **changes)
    refused(sample(home, folder), folder, *needles)


@pytest.mark.parametrize(
    ("changes", "needles"),
    [
        ({"layer_types": ["full_attention"]}, ["`layer_types`", "2 layers"]),
        ({"layer_types": ["full_attention", "chunked_attention"]}, ["`layer_types`", "sliding_attention"]),
        ({"layer_types": ["full_attention", "sliding_attention"]}, ["`layer_types`", "`use_sliding_window`"]),
        ({"use_sliding_window": True, "sliding_window": -1}, ["`sliding_window`", "-1"]),
        ({"use_sliding_window": 1}, ["`use_sliding_window`", "true or false"]),
        ({"layer_types": None, "max_window_layers": "all"}, ["`max_window_layers`", "'all'"]),
    ],
)
def test_windows_that_contradict_themselves(changes, needles, home, refused, tmp_path):
    model = cases.save_model(tmp_path / "model", tiny_models.causal_lm(family="qwen2"), tiny_models.tokenizer())
    change_json(Path(model) / "config.json", **changes)
    refused(sample(home, Path(model)), model, *needles)


FILES = {
    "not JSON": (b"{not json", "config.json"),
    "not an object": (b"[1, 2]", "config.json"),
    "not text": (b"\xff\xfe\x00", "config.json"),
    "empty": (b"", "config.json"),
    "nested too deeply": (b"[" * 100_000, "config.json"),
    "generation settings that are not JSON": (b"{", "generation_config.json"),
    "an index that is not JSON": (b"{", INDEX),
    "an index that is a list": (b"[]", INDEX),
    "an index without a map": (b'{"metadata": {}}', INDEX),
    "an index of no file": (b'{"weight_map": {"x": 7}}', INDEX),
    "weights that are none": (b"\0" * 64, "model.safetensors"),
    "weights that are empty": (b"", "model.safetensors"),
    "a page in place of weights": (b"<html>not found</html>", "model.safetensors"),
    "a tokenizer that is not JSON": (b"{", "tokenizer.json"),
    "a tokenizer that is another object": (b'{"model": 3}', "tokenizer.json"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_is_not_what_it_should_be(case, folder, home, refused):
    content, name = FILES[case]
    (folder / name).write_bytes(content)
    refused(sample(home, folder), folder, name)


def test_no_configuration(folder, home, refused):
    (folder / "config.json").unlink()
    refused(sample(home, folder), folder, "no config.json")


# -- weights ----------------------------------------------------------------------------------------------------------


def change_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


TENSORS = {
    "one is missing": (lambda t: t.pop(UP), [f"tensor `{UP}` is missing"]),
    "the head is missing": (lambda t: t.pop(HEAD), [f"tensor `{HEAD}` is missing"]),
    "one too many": (
        lambda t: t.update({"model.extra.weight": torch.zeros(1)}),
        ["1 tensor(s)", "`model.extra.weight`"],
    ),
    "another shape": (lambda t: t.update({QUERY: torch.zeros(31, 32)}), [f"`{QUERY}`", "(31, 32)", "(32, 32)"]),
    "transposed": (lambda t: t.update({UP: torch.zeros(32, 48)}), [f"`{UP}`", "(32, 48)", "(48, 32)"]),
    "whole numbers": (lambda t: t.update({UP: torch.zeros(48, 32, dtype=torch.int8)}), [f"`{UP}`", "I8", "BF16"]),
    "eight bits": (lambda t: t.update({UP: torch.zeros(48, 32).to(torch.float8_e4m3fn)}), [f"`{UP}`", "F8_E4M3"]),
    "doubles": (lambda t: t.update({UP: torch.zeros(48, 32).double()}), [f"`{UP}`", "F64"]),
    "a NaN": (lambda t: t[UP][5, 3].fill_(float("nan")), [f"`{UP}` holds NaN or infinity"]),
    "an infinite norm": (lambda t: t[NORM][0].fill_(float("-inf")), [f"`{NORM}` holds NaN or infinity"]),
    "other names": (lambda t: t.update({"embed.weight": t.pop(EMBEDDING)}), [f"tensor `{EMBEDDING}` is missing"]),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_are_not_those_of_the_configuration(case, folder, home, refused):
    change, needles = TENSORS[case]
    change_tensors(folder, change)
    refused(sample(home, folder), folder, *needles)


def test_ties_that_the_weights_do_not_keep(folder, home, refused):
    change_json(folder / "config.json", tie_word_embeddings=True)
    refused(sample(home, folder), folder, "`tie_word_embeddings`", f"`{HEAD}`", f"`{EMBEDDING}`")


@pytest.mark.parametrize("share", [0.001, 0.5, 0.999])
def test_weights_that_are_cut_short(share, folder, home, refused):
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    refused(sample(home, folder), path, "copy the file again")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "consolidated.00.pth"])
def test_a_pickle_is_refused_with_the_command_that_converts_it(name, folder, home, refused):
    (folder / "model.safetensors").rename(folder / name)
    text = refused(sample(home, folder), folder, name, "pickle", "python -c", "AutoModelForCausalLM")
    assert f"{folder}-safetensors" in text


def test_the_command_that_converts_a_pickle_does(folder, home, refused):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    text = refused(sample(home, folder), "pytorch_model.bin")
    (code,) = shlex.split(text.split("python -c ", 1)[1])
    exec(code, {})
    assert cli.main(sample(home, Path(f"{folder}-safetensors"))) == 0


def test_no_weights_at_all(folder, home, refused):
    (folder / "model.safetensors").unlink()
    (folder / "adapter_model.safetensors").write_bytes(b"")
    refused(sample(home, folder), folder, "no model.safetensors", INDEX)


# -- an index, and what it may name -----------------------------------------------------------------------------------


def indexed(folder, file):
    """Weights in the one file that an index names, which is written where it says."""
    names = list(load_file(folder / "model.safetensors"))
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, str(file))}))
    (folder / "model.safetensors").rename(folder / file)


@pytest.mark.parametrize("path_kind", ["up", "absolute", "link", "linked folder", "up and down"])
def test_an_index_that_names_a_file_outside_its_folder(path_kind, folder, home, refused):
    outside = folder.parent / "outside"
    outside.mkdir()
    indexed(folder, outside / "part.safetensors")
    named = {
        "up": "../outside/part.safetensors",
        "absolute": str(outside / "part.safetensors"),
        "link": "part.safetensors",
        "linked folder": "sub/part.safetensors",
        "up and down": f"../{folder.name}/part.safetensors",
    }[path_kind]
    if path_kind == "link":
        (folder / named).symlink_to(outside / "part.safetensors")
    elif path_kind == "linked folder":
        (folder / "sub").symlink_to(outside)
    names = json.loads((folder / INDEX).read_text())["weight_map"]
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, named)}))
    refused(sample(home, folder), folder / INDEX, repr(named), "outside")


def test_an_index_that_names_an_absent_file(folder, home, refused):
    indexed(folder, "part.safetensors")
    (folder / "part.safetensors").unlink()
    refused(sample(home, folder), "part.safetensors", "cannot be read")


def test_an_index_that_names_a_tensor_that_its_file_lacks(folder, home, refused):
    indexed(folder, "part.safetensors")
    names = json.loads((folder / INDEX).read_text())["weight_map"]
    (folder / INDEX).write_text(json.dumps({"weight_map": names | {"x.weight": "part.safetensors"}}))
    refused(sample(home, folder), "part.safetensors", "`x.weight`", INDEX)


def test_an_index_that_names_a_pickle(folder, home, refused):
    indexed(folder, "part.bin")
    refused(sample(home, folder), INDEX, "'part.bin'")


def test_links_of_the_hubs_cache_are_followed(folder, home, capsys):
    repository = folder.parent / "models--a--b"
    (repository / "blobs").mkdir(parents=True)
    indexed(folder, "part.safetensors")
    (folder / "part.safetensors").rename(repository / "blobs" / "0a1b")
    (folder / "part.safetensors").symlink_to(Path("../../blobs/0a1b"))
    (repository / "snapshots").mkdir()
    snapshot = folder.rename(repository / "snapshots" / "c0ffee")
    assert cli.main([*sample(home, snapshot), f"sample.out={folder.parent}/answers.jsonl"]) == 0


# -- code that comes with a checkpoint --------------------------------------------------------------------------------


@pytest.fixture
def trap(folder):
    """A module beside the weights that leaves a mark where it is imported."""
    mark = folder.parent / "ran"
    (folder / "code.py").write_text(f"open({str(mark)!r}, 'w')\n")
    return mark


def test_code_that_a_configuration_names_never_runs(folder, home, trap, tmp_path):
    names = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")
    change_json(folder / "config.json", auto_map={name: "code.Thing" for name in names})
    out = tmp_path / "answers.jsonl"
    assert cli.main([*sample(home, folder), f"sample.out={out}"]) == 0
    assert out.is_file() and not trap.exists()


def test_a_tokenizer_that_is_code(folder, home, refused, trap):
    change_json(
        folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["code.Thing", None]}, tokenizer_class="Thing"
    )
    text = refused(sample(home, folder), folder, "`auto_map`", "tokenizer.json")
    assert "trust_remote_code" not in text and not trap.exists()


# -- heads and tokenizers ---------------------------------------------------------------------------------------------


def test_a_reward_model_of_two_labels(home, refused, tmp_path):
    model = tiny_models.scorer(num_labels=2)
    model_path = cases.save_model(tmp_path / "two", model)
    argv = ["ppo", *cases.ppo_keys(home, tmp_path / "run", f"ppo.reward_model={model_path}")]
    refused(argv, model_path, "`score.weight`", "(2, 32)", "(1, 32)")


def test_a_language_model_in_place_of_a_critic(home, refused, tmp_path):
    argv = ["ppo", *cases.ppo_keys(home, tmp_path / "run", f"ppo.reward_model={home.actor}")]
    refused(argv, home.actor, "no value head", "icegrt reward")


def test_a_reward_model_in_place_of_an_actor(home, refused, tmp_path):
    argv = ["ppo", *cases.ppo_keys(home, tmp_path / "run", f"ppo.actor={home.reward}")]
    refused(argv, home.reward, "a reward model or critic")


def test_no_tokenizer(folder, home, refused):
    for path in folder.glob("*token*"):
        path.unlink()
    refused(sample(home, folder), folder, "tokenizer cannot be loaded", "tokenizer.json")


def test_a_tokenizer_larger_than_the_vocabulary(home, refused, tmp_path):
    small = cases.save_model(tmp_path / "small", tiny_models.causal_lm(vocab_size=40), tiny_models.tokenizer())
    refused(sample(home, Path(small)), "the tokenizer has", "only 40")


def test_a_tokenizer_without_eos(home, refused, tmp_path):
    tokenizer = tiny_models.tokenizer()
    tokenizer.eos_token = None
    model = cases.save_model(tmp_path / "endless", tiny_models.causal_lm(), tokenizer)
    refused(sample(home, Path(model)), model, "no EOS token", "eos_token")


@pytest.mark.parametrize("text", ['{"eos_token_id": 99999}', '{"eos_token_id": "</s>"}', "[", "[" * 100_000])
def test_a_generation_config_that_ends_nothing(folder, home, refused, text):
    (folder / "generation_config.json").write_text(text)
    refused(sample(home, folder), folder / "generation_config.json")


@pytest.mark.parametrize("name", ["score_statistics.json", "tokenizer.json"])
@pytest.mark.parametrize("text", ["{", "[1]", '{"after": 3, "model": 4}'])
def test_what_lies_beside_a_reward_model(name, text, home, refused, tmp_path):
    folder = Path(shutil.copytree(home.reward, tmp_path / "reward"))
    (folder / name).write_text(text)
    argv = ["ppo", *cases.ppo_keys(home, tmp_path / "new" / "run", f"ppo.reward_model={folder}")]
    refused(argv, folder / name)
