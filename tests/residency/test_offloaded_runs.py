"""An offloaded run has the bits of a resident one, and what it does not use has left the device."""

import dataclasses
import gc
import multiprocessing
import os
import signal
from functools import partial

import pytest
import torch

from icegrt.config import DataSource, ParallelConfig
from icegrt.errors import RunError
from icegrt.metrics import read_metrics
from icegrt.ppo.trainer import PPOTrainer
from icegrt.residency import GRADIENTS, KINDS, OPTIMIZER, PARAMETERS, Residency, host_memory
from icegrt.residency import part as parts
from icegrt.roles import role as roles
from icegrt.roles.optimizer import inner_optimizers, wrap
from icegrt.roles.role import TrainableRole
from tests.helpers import tiny_models as tiny
from tests.helpers.late_copies import LateCopies
from tests.helpers.ranks import launch

TRAINED = [(role, kind) for role in ("actor", "critic") for kind in KINDS]
FROZEN = [("reference", PARAMETERS), ("reward", PARAMETERS)]


def make(folder, models=(), **changes) -> PPOTrainer:
    settings = {"iterations": 2, "prompts_per_iteration": 3, "ppo_epochs": 1, "checkpoint_every": 1}
    settings |= {"eval_every": 1, "ptx_coef": 0.1, "ptx_data": [DataSource(path=str(folder.parent / "ptx.jsonl"))]}
    (folder.parent / "ptx.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    config = tiny.ppo_config(folder, **(settings | changes))
    actor, scorer = models or (tiny.causal_lm(0), tiny.scorer(1))
    reward = [scorer, tiny.count_letters]
    return PPOTrainer(config, actor, tiny.tokenizer(), reward, tiny.PROMPTS, eval_prompts=tiny.PROMPTS[:2])


def on_host(choice: bool) -> dict:
    """Return changes of the configuration: where the optimizers are."""
    optimizer = tiny.OptimizerConfig(lr=1e-2, on_host=choice)
    return {"optimizer": optimizer, "critic": tiny.CriticConfig(optimizer=optimizer)}


def state(trainer) -> dict[str, torch.Tensor]:
    """Return copies of weights, moments and counts of steps."""
    tensors = {}
    for name, role in trainer.components.roles.items():
        with role.placement.hold(PARAMETERS, OPTIMIZER):
            tensors |= {f"{name}.{n}": p for n, p in tiny.parameters(role).items()}
            for inner in inner_optimizers(role.optimizer) if role.learns else ():
                mains = [main for group in inner.optimizer.param_groups for main in group["params"]]
                entries = [{"main": main.detach(), **inner.optimizer.state[main]} for main in mains]
                tensors |= {f"{name}.{n}.{k}": x.clone() for n, entry in enumerate(entries) for k, x in entry.items()}
    return tensors


def rows(folder) -> list[dict]:
    """Return the metrics of a run without those that a clock made."""
    return [{k: x for k, x in row.items() if "second" not in k} for row in read_metrics(folder)]


def train(folder, **changes):
    with make(folder, **changes) as trainer:
        trainer.train()
        return state(trainer), rows(folder)


def same(one, other) -> bool:
    return tiny.same(one[0], other[0]) and one[1] == other[1]


@pytest.fixture(scope="module")
def resident_run(tmp_path_factory):
    """Return the state and the metrics of a resident run by dtype."""
    folder = tmp_path_factory.mktemp("resident")
    return {dtype: train(folder / dtype, run={"dtype": dtype}) for dtype in ("fp32", "bf16")}


def storages(role) -> dict[str, dict[int, int]]:
    """Return the bytes of a role's storages by kind, found without the code that moves them."""
    tensors = {PARAMETERS: list(role.model.parameters()), GRADIENTS: [], OPTIMIZER: []}
    if isinstance(role, TrainableRole):
        tensors[PARAMETERS] += [buffer.param_data for ddp in role.ddps for buffer in ddp.buffers]
        tensors[GRADIENTS] += [p.main_grad for p in role.model.parameters()]
        for inner in inner_optimizers(role.optimizer):
            masters = [x for group in inner.shard_fp32_from_float16_groups for x in group]
            moments = [s[n] for s in inner.optimizer.state.values() for n in ("exp_avg", "exp_avg_sq")]
            tensors[OPTIMIZER] += [*masters, *moments]
            tensors[GRADIENTS] += [x.grad for x in masters if x.grad is not None]
    return {
        kind: {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in some} for kind, some in tensors.items()
    }


class Watch:
    """Compares, after every move, where the storages are with what is held.

    Attributes:
        held: what was held after each move, without repetitions.
        peak: the most bytes that were on the device after a move.
        peaks: the same by what was held, which is a phase of an iteration.
        complete: bytes of each role and kind.
    """

    def __init__(self, patches, offloaded):
        self.held, self.peak, self.peaks, self.complete = [], 0, {}, {}
        self.trainer = None
        move = Residency.move

        def watched(residency):
            move(residency)
            if self.trainer is not None:
                self.compare(frozenset().union(*residency._held), offloaded)

        patches.setattr(Residency, "move", watched)

    def compare(self, held, offloaded):
        total = 0
        for name, role in self.trainer.components.roles.items():
            for kind, sizes in storages(role).items():
                on_device = (name, kind) in held or (name, kind) not in offloaded
                assert all(bool(size) == on_device for size in sizes.values()), (name, kind, sizes)
                total += sum(sizes.values())
                if on_device:
                    self.complete[name, kind] = sum(sizes.values())
        self.peak = max(self.peak, total)
        self.peaks[held] = max(self.peaks.get(held, 0), total)
        if not self.held or self.held[-1] != held:
            self.held.append(held)


@pytest.mark.parametrize(
    ("dtype", "offload", "offloaded"),
    [
        ("fp32", {"roles": "all"}, {*TRAINED, *FROZEN}),
        ("bf16", {"roles": "all"}, {*TRAINED, *FROZEN}),
        ("bf16", {"roles": "optimizer", "reward": "all", "critic": "none"}, {*TRAINED[1:3], *FROZEN[1:]}),
    ],
    ids=["fp32 all", "bf16 all", "bf16 some"],
)
def test_an_offloaded_run_has_the_bits_of_a_resident_one_and_one_role_at_a_time(
    dtype, offload, offloaded, resident_run, tmp_path, monkeypatch
):
    watch = Watch(monkeypatch, offloaded)
    with make(tmp_path / "run", run={"dtype": dtype}, offload=offload) as trainer:
        watch.trainer = trainer
        trainer.train()
        outcome = state(trainer), rows(tmp_path / "run")
    assert same(outcome, resident_run[dtype])
    of_role = {
        n: sum(size for (role, _), size in watch.complete.items() if role == n) for n in trainer.components.roles
    }
    everything = sum(of_role.values())
    if len(offloaded) == len(TRAINED + FROZEN):
        assert watch.peak == max(of_role.values()) < 0.5 * everything
        # In every phase the device has what the phase holds.
        assert watch.peaks == {held: sum(watch.complete[key] for key in held) for held in watch.peaks}
    else:
        assert watch.peak == everything - of_role["reward"]
    # Rollout, inference and update of an iteration move each role once.
    rollout, update = {("actor", PARAMETERS)}, {("actor", kind) for kind in KINDS}
    first = next(n for n, held in enumerate(watch.held) if held == update)
    uses = [(*sorted({role for role, _ in held}), len(held)) for held in watch.held[first - 5 : first + 2]]
    assert uses == [
        ("actor", 1),
        ("reward", 1),
        ("critic", 1),
        ("actor", 1),
        ("reference", 1),
        ("actor", 3),
        ("critic", 3),
    ]
    assert watch.held[first - 5] == rollout


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_with_prefetching_every_role_is_on_its_way_before_it_is_needed(dtype, tmp_path, monkeypatch):
    changes = {"iterations": 4, "eval_every": 0, "checkpoint_every": 50, "run": {"dtype": dtype}}
    resident = train(tmp_path / "resident", **changes)
    monkeypatch.setattr(host_memory, "copies_of", lambda device: LateCopies())
    fill, late, peaks = parts.Part.fill, [], []

    def filled(part):
        if part.is_kept and not (part.is_resident or part._is_arriving):
            late.append(part.name)
        fill(part)

    monkeypatch.setattr(parts.Part, "fill", filled)
    with make(tmp_path / "run", **changes, offload={"roles": "all", "prefetch": True}) as trainer:
        move, largest = Residency.move, dict.fromkeys(trainer.components.roles, 0)

        def moved(residency):
            move(residency)
            for name, role in trainer.components.roles.items():
                on_device[name] = sum(size for sizes in storages(role).values() for size in sizes.values())
                largest[name] = max(largest[name], on_device[name])
            peaks.append(sum(on_device.values()))

        on_device = {}
        monkeypatch.setattr(Residency, "move", moved)
        trainer.step()
        trainer.step()
        assert late
        late.clear()
        trainer.step()
        assert late == []
        trainer.step()  # it ends with a checkpoint, which nothing has announced
        assert same((state(trainer), rows(tmp_path / "run")), resident)
    # Two roles at most: the one in use and the one after it, whose gradients come when it is used.
    both = largest["actor"] + largest["critic"]
    assert max(largest.values()) < max(peaks) < both < sum(largest.values())


def parallel(folder, layout, dtype):
    roles.wrap = partial(wrap, overlap=True, bucket_size=2000)
    outcomes = []
    early = {"roles": "all", "prefetch": True, "reference": "layers", "reward": "layers"}
    choices = {"none": ({"roles": "none"}, False), "all": ({"roles": "all"}, False), "early": (early, True)}
    for name, (offload, host) in choices.items():
        changes = {"offload": offload, "parallel": ParallelConfig(**layout), "run": {"dtype": dtype}, **on_host(host)}
        with make(folder / name, eval_every=0, **changes) as trainer:
            trainer.train()
            outcomes.append(state(trainer))
    resident, *others = outcomes
    assert all(tiny.same(other, resident) for other in others) and len(resident) > 60


@pytest.mark.parametrize(("layout", "dtype"), [({}, "bf16"), ({"pipeline": 2}, "fp32")], ids=["dp2", "pp2"])
def test_ranks_that_share_roles_and_overlap_their_collectives_move_them_alike(layout, dtype, tmp_path):
    launch(2, parallel, tmp_path, layout, dtype)


def at_call(patches, owner, name, number, act):
    """Call `act` once, before call `number` of a function of `parts` from now on."""
    function, calls = getattr(owner, name), []

    def counted(*arguments):
        calls.append(name)
        if len(calls) == number:
            act()
        return function(*arguments)

    patches.setattr(owner, name, counted)


@pytest.mark.parametrize("number", [1, 60])
def test_a_failing_allocation_in_an_iteration_keeps_the_last_whole_one(number, resident_run, tmp_path, monkeypatch):
    def fail():
        raise RuntimeError("CUDA out of memory")

    changes = {"offload": {"roles": "all"}, "checkpoint_every": 50}
    with (
        pytest.raises(RunError, match=r"do not fit on the device .CUDA out") as caught,
        make(tmp_path / "run", **changes) as trainer,
    ):
        trainer.step()
        at_call(monkeypatch, parts._Slot, "fill", number, fail)
        trainer.step()
    assert "kept: 1 of 2 iterations" in str(getattr(caught.value, "__notes__", caught.value))
    with make(tmp_path / "run", **changes, run={"resume": True}) as trainer:
        trainer.train()
        assert same((state(trainer), rows(tmp_path / "run")), resident_run["fp32"])


def train_until_killed(folder, number):
    torch.set_num_threads(1)
    gc.freeze()  # what the parent has left must not be freed here: its process groups' threads do not exist
    with pytest.MonkeyPatch.context() as patches, make(folder, offload={"roles": "all"}) as trainer:
        trainer.step()
        # Every copy, to the host or back, asks for the content of a storage first.
        at_call(patches, parts, "_content", number, partial(os.kill, os.getpid(), signal.SIGKILL))
        trainer.train()


@pytest.mark.parametrize("number", [3, 150])
def test_a_run_killed_in_the_middle_of_a_swap_resumes_to_the_same_bits(number, resident_run, tmp_path):
    process = multiprocessing.get_context("fork").Process(
        target=train_until_killed, daemon=True, args=(tmp_path / "run", number)
    )
    process.start()
    process.join(100)
    assert process.exitcode == -signal.SIGKILL
    outcome = train(tmp_path / "run", offload={"roles": "all"}, run={"resume": True})
    assert same(outcome, resident_run["fp32"])


def test_a_state_that_callers_may_read_between_passes_is_held_by_them(tmp_path):
    with make(tmp_path / "run", offload={"roles": "all"}) as trainer:
        actor = trainer.actor
        next(iter(trainer))
        with actor.placement.hold(PARAMETERS):
            weights = tiny.parameters(actor)
        out = trainer.save_pretrained(tmp_path / "out")
        trainer.components.engine.generate([[5, 6]], 1, dataclasses.replace(trainer.components.sampling))
    assert (out / "model.safetensors").is_file() and len(weights) == len(dict(actor.model.named_parameters()))
