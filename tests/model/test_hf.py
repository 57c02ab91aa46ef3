"""How parameters are cut over tensor-parallel ranks, and that a rank reads no more than it holds."""

import json

import pytest
import torch

from icegrt.distributed.cluster import Cluster
from icegrt.model.architecture import Architecture
from icegrt.model.build import build_model
from icegrt.model.hf import exporter, loader
from icegrt.model.hf import mapping as weights
from icegrt.model.hf.reader import HFCheckpointReader
from icegrt.model.hf.writer import save_pretrained
from tests.helpers import tiny_models as tiny

SHAPES = {
    "grouped": ("llama", {}, (1, 2, 4)),
    "fewer groups than ranks": ("llama", {"num_key_value_heads": 1}, (1, 2, 4)),
    "biased": ("qwen2", {}, (1, 2)),
    "normed": ("qwen3", {"head_dim": 6}, (1, 2)),
    "vocabulary shorter than a rank's rows": ("llama", {"vocab_size": 5}, (4,)),
}


def random_sources(architecture, head="lm"):
    draw = torch.Generator().manual_seed(0)
    return {n: torch.randn(s, generator=draw) for n, s in weights.source_shapes(architecture, head).items()}


def shard_of(entry, sources, architecture, rank, ranks):
    """A rank's parameter, put together from its pieces; padding is 7."""
    slices = list(weights.shard_slices(entry, architecture, rank, ranks))
    rows = {"vocabulary": architecture.padded_vocab_size(ranks) // ranks}.get(entry.partition)
    rows = rows or max(p.offset + p.stop - p.start if p.dim == 0 else entry.shapes[0][0] for p in slices)
    columns = list(entry.shapes[0][1:])
    if entry.partition == "columns":
        columns[0] //= ranks
    parameter = torch.full((rows, *columns), 7.0)
    for piece in slices:
        piece.of(parameter).copy_(
            sources[entry.sources[piece.source]].narrow(piece.dim, piece.start, piece.stop - piece.start)
        )
    return parameter


@pytest.mark.parametrize("shape", SHAPES)
def test_the_shards_of_all_ranks_are_the_checkpoint(shape):
    family, changes, sizes = SHAPES[shape]
    architecture = Architecture.from_config(tiny.model_config(family, **changes).to_dict())
    sources = random_sources(architecture)
    for ranks in sizes:
        for entry in weights.parameter_mapping(architecture, "lm"):
            shards = [shard_of(entry, sources, architecture, rank, ranks) for rank in range(ranks)]
            assert len({shard.shape for shard in shards}) == 1
            exported = dict(exporter.exported(entry, shards, architecture, torch.float32))
            assert list(exported) == list(entry.sources)
            for name, tensor in exported.items():
                assert torch.equal(tensor, sources[name]), (name, ranks)


def test_heads_lie_beside_the_key_and_value_that_they_share():
    architecture = Architecture.from_config(tiny.model_config(num_attention_heads=4, num_key_value_heads=2).to_dict())
    name = "decoder.layers.0.self_attention.linear_qkv.weight"
    (entry,) = [e for e in weights.parameter_mapping(architecture, "lm") if e.name == name]
    sources = random_sources(architecture)
    q, k, v = (sources[name].unflatten(0, (-1, 8)) for name in entry.sources)
    expected = torch.cat([q[:2], k[:1], v[:1], q[2:], k[1:], v[1:]]).flatten(0, 1)
    assert torch.equal(shard_of(entry, sources, architecture, 0, 1), expected)
    halves = [shard_of(entry, sources, architecture, rank, 2) for rank in range(2)]
    assert torch.equal(torch.cat(halves), expected)


class Watched(HFCheckpointReader):
    """Counts the numbers that are read."""

    numbers = 0

    def get(self, *args):
        part = super().get(*args)
        self.numbers += part.numel()
        return part


@pytest.mark.parametrize(("family", "changes"), [("llama", {}), ("qwen2", {"num_key_value_heads": 4})])
def test_a_rank_reads_only_what_it_holds(family, changes, tmp_path):
    hf_model = tiny.causal_lm(0, family=family, vocab_size=61, **changes)
    hf_model.save_pretrained(tmp_path / "in")
    source = Watched(tmp_path / "in")
    entries = [
        e for e in weights.parameter_mapping(source.architecture, "lm") if e.name.startswith("decoder.layers.1.")
    ]
    with Cluster.open() as cluster:
        parameters = dict(build_model(source, "lm", cluster, dtype=torch.float32).named_parameters())
    assert source.numbers == sum(p.numel() for p in hf_model.parameters())
    for rank in range(2):
        source.numbers = 0
        for entry in entries:
            slices = list(weights.shard_slices(entry, source.architecture, rank, 2))
            parameter = shard_of(entry, dict(hf_model.state_dict()), source.architecture, rank, 2)
            loaded = torch.empty_like(parameter)
            loader.read_into(loaded, entry, source, slices)
            assert torch.equal(loaded, parameter)
        matrices = (
            sum(p.numel() for n, p in parameters.items() if n.startswith("decoder.layers.1.") and "norm" not in n) // 2
        )
        norms = sum(p.numel() for n, p in parameters.items() if n.startswith("decoder.layers.1.") and "norm" in n)
        assert source.numbers == matrices + norms


def test_padding_of_the_vocabulary_is_zero_and_is_not_exported(tmp_path):
    hf_model = tiny.causal_lm(0, vocab_size=61)
    hf_model.save_pretrained(tmp_path / "in")
    source = HFCheckpointReader(tmp_path / "in")
    entry = next(weights.parameter_mapping(source.architecture, "lm"))
    shards = [torch.full((16, 32), torch.nan) for _ in range(4)]
    for rank, shard in enumerate(shards):
        loader.read_into(shard, entry, source, list(weights.shard_slices(entry, source.architecture, rank, 4)))
    assert source.architecture.padded_vocab_size(4) == 64 and not shards[3][13:].any()
    ((name, embedding),) = exporter.exported(entry, shards, source.architecture, torch.float32)
    assert torch.equal(embedding, hf_model.state_dict()[name])


def test_what_a_checkpoint_says_of_itself_is_handed_on(tmp_path):
    hf_model = tiny.causal_lm(0, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0})
    hf_model.config.eos_token_id = [tiny.EOS, 9]
    hf_model.config.auto_map = {"AutoConfig": "code.Thing"}
    hf_model.generation_config.update(temperature=0.6, top_p=0.9, do_sample=True, eos_token_id=[9, 11])
    hf_model.save_pretrained(tmp_path / "in")
    with Cluster.open() as cluster:
        model = build_model(tmp_path / "in", "lm", cluster, dtype=torch.float32)
        tensors = exporter.export_tensors(model, torch.float32)
        out = save_pretrained(
            tensors, model.architecture, tmp_path / "out", classifier=False, tokenizer=tiny.tokenizer()
        )
    config = json.loads((out / "config.json").read_text())
    assert config["rope_parameters"] == hf_model.config.rope_parameters and "auto_map" not in config
    assert config["eos_token_id"] == [tiny.EOS, 9] and config["dtype"] == "float32"
    settings = json.loads((out / "generation_config.json").read_text())
    assert (settings["temperature"], settings["top_p"], settings["do_sample"]) == (0.6, 0.9, True)
    assert settings["eos_token_id"] == [tiny.EOS, 9, 11] and settings["pad_token_id"] == tiny.PAD
    assert (out / "tokenizer.json").is_file() and (out / "chat_template.jinja").is_file()


def test_a_scorer_whose_padding_is_eos_is_exported_without_padding(tmp_path):
    tokenizer = tiny.tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    architecture = Architecture.from_config(tiny.model_config().to_dict())
    for classifier, pad_token_id in ((True, None), (False, tiny.EOS)):
        head = "scalar" if classifier else "lm"
        out = save_pretrained(
            iter(random_sources(architecture, head).items()), architecture, tmp_path / head, classifier=classifier,
            tokenizer=tokenizer,
        )  # fmt: skip
        assert json.loads((out / "config.json").read_text())["pad_token_id"] == pad_token_id


def test_an_export_that_fails_leaves_nothing(tmp_path):
    architecture = Architecture.from_config(tiny.model_config().to_dict())

    def broken():
        yield from list(random_sources(architecture).items())[:3]
        raise KeyError("gone")

    with pytest.raises(KeyError, match="gone"):
        save_pretrained(broken(), architecture, tmp_path / "new" / "out", classifier=False)
    assert not (tmp_path / "new").exists()
