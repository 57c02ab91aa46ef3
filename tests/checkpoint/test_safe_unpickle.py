"""What of a checkpoint is a pickle runs nothing: at every entry point a canary is refused by the name of its class."""

import io
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from icegrt.checkpoint import directory as files
from icegrt.checkpoint.manager import Checkpoints
from icegrt.checkpoint.safe_unpickle import load_object, read_metadata
from icegrt.checkpoint.tensor_reader import CheckpointTensors
from icegrt.config import OptimizerConfig
from icegrt.distributed.cluster import Cluster
from icegrt.errors import CheckpointError
from tests.helpers import tiny_models as tiny

TENSOR, ENTRY = "embedding.word_embeddings.weight", "decoder.layers.mlp.linear_fc1._extra_state/shard_0_2"


class Canary:
    """Leaves a file where it was unpickled. It names a function that a careless allow-list could well have."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (io.open, (str(self.path), "w"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint of one role that learns, and what that role is."""
    with Cluster.open() as cluster:
        role = tiny.role(tiny.causal_lm(0), learns=OptimizerConfig())
        run = tmp_path_factory.mktemp("run")
        yield Checkpoints(cluster, run, 1, background=False).save(1, [role], {}), role


@pytest.fixture
def copied(saved, tmp_path):
    """A copy to tamper with, its role, and where a canary would sing."""
    folder = files.checkpoint_path(tmp_path / "run", 1)
    shutil.copytree(saved[0], folder)
    return folder, saved[1], tmp_path / "sang"


def sealed_again(folder):
    """The manifest of whoever tampered with the files: it agrees with them."""
    (folder / files.MANIFEST).unlink()
    files.write_manifest(folder, {})
    assert files.verify(folder) == []


def put(folder, name, payload):
    """`payload` in place of what the data files hold of `name`."""
    path = folder / "role" / ".metadata"
    metadata = read_metadata(path.parent)
    with open(path.parent / "__0_0.distcp", "ab") as data:
        start = data.tell()
        data.write(payload)
    for index, entry in metadata.storage_data.items():
        if index.fqn == name:
            entry.offset, entry.length = start, len(payload)
    path.write_bytes(pickle.dumps(metadata))


def torch_saved(value):
    out = io.BytesIO()
    torch.save(value, out)
    return out.getvalue()


def in_metadata(folder, canary):
    (folder / "role" / ".metadata").write_bytes(pickle.dumps(canary))


def deep_in_metadata(folder, canary):
    metadata = read_metadata(folder / "role")
    metadata.planner_data = {"deep": [canary]}
    (folder / "role" / ".metadata").write_bytes(pickle.dumps(metadata))


def in_an_entry(folder, canary):
    put(folder, ENTRY, torch_saved(canary))


def in_a_tensor(folder, canary):
    put(folder, TENSOR, torch_saved(canary))


def in_common(folder, canary):
    (folder / "role" / "common.pt").write_bytes(torch_saved({"optimizer": canary}))


def checkpoints_of(folder, role):
    return Checkpoints(role.model.cluster, folder.parent.parent, 1, background=False)


def resume(folder, role):
    checkpoints_of(folder, role).load(folder, [role])


def take_weights(folder, role):
    checkpoints_of(folder, role).load_weights(folder, [role])


def export(folder, role):
    CheckpointTensors(folder / "role").read(TENSOR)


WAYS_IN = [
    *(
        (plant, reader)
        for plant in (in_metadata, deep_in_metadata, in_a_tensor)
        for reader in (resume, take_weights, export)
    ),
    *((plant, reader) for plant in (in_an_entry, in_common) for reader in (resume, take_weights)),
]


@pytest.mark.parametrize(("plant", "reader"), WAYS_IN, ids=[f"{w.__name__}-{r.__name__}" for w, r in WAYS_IN])
def test_a_canary_is_refused_by_name_and_does_not_sing(plant, reader, copied):
    folder, role, song = copied
    plant(folder, Canary(song))
    sealed_again(folder)
    with pytest.raises(CheckpointError, match=r"`_?io\.open`") as refused:
        reader(folder, role)
    assert str(folder) in str(refused.value) and not song.exists()


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # the canary opens a file and never closes it
def test_the_canary_sings_where_nobody_guards(tmp_path):
    # Else the tests above would prove nothing.
    pickle.loads(pickle.dumps(Canary(tmp_path / "one")))
    torch.load(io.BytesIO(torch_saved(Canary(tmp_path / "two"))), weights_only=False)
    assert (tmp_path / "one").exists() and (tmp_path / "two").exists()


def test_the_manifest_speaks_before_any_pickle_is_opened(copied):
    folder, _, song = copied
    in_metadata(folder, Canary(song))
    (fault,) = files.verify(folder)
    assert fault.startswith("role/.metadata") and not song.exists()


def test_a_process_that_trusts_more_classes_does_not_make_metadata_trust_them(copied):
    folder, role, song = copied
    in_metadata(folder, Canary(song))
    with torch.serialization.safe_globals([open]), pytest.raises(CheckpointError, match=r"io\.open"):
        resume(folder, role)
    assert not song.exists()


@pytest.mark.parametrize("way_out", ["../../elsewhere.distcp", "/etc/passwd"])
def test_metadata_that_leads_out_of_the_checkpoint_is_refused(way_out, copied):
    folder, role, _ = copied
    metadata = read_metadata(folder / "role")
    next(iter(metadata.storage_data.values())).relative_path = way_out
    (folder / "role" / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="outside of"):
        resume(folder, role)


# torch 2.13 warns of pickles that are not of its own protocol before it refuses these.
@pytest.mark.filterwarnings("ignore:Detected pickle protocol 4:UserWarning:torch")
@pytest.mark.parametrize("data", [b"", b"\x80\x04", b"PK\x03\x04 no archive", pickle.dumps({"a": 1})])
def test_what_is_no_metadata_or_no_archive_is_named(data, copied):
    folder, role, _ = copied
    (folder / "role" / ".metadata").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"role/\.metadata"):
        resume(folder, role)
    common = Path(folder / "role" / "common.pt")
    common.write_bytes(data[:10])
    with pytest.raises(CheckpointError, match=r"common\.pt"):
        load_object(common, common)


def test_a_checkpoint_that_nobody_touched_is_read(copied):
    folder, role, _ = copied
    for reader in (resume, take_weights, export):
        reader(folder, role)
