"""Several ranks save, notice damage and end together; what one rank cannot write all ranks hear of."""

import json
import os
import signal
import time

import pytest
import torch

from icegrt.checkpoint import directory as files
from icegrt.checkpoint.manager import write_bucket
from icegrt.errors import RunError
from tests.helpers import tiny_models as tiny
from tests.helpers.layout_cases import LAYOUTS, config, trainer, write_ptx
from tests.helpers.ranks import launch


def weights_now(run):
    return {r.name: tiny.by_hugging_face_name(r, lambda p: p) for r in run.roles}


def names(run):
    return [p.name for p in files.list_checkpoints(run.dir)]


def settings(folder, layout, **changes):
    run = {"resume": "auto", "checkpoint_in_background": True} | changes.pop("run", {})
    changes = {"iterations": 4, "checkpoint_every": 9, "keep_checkpoints": 9, "ptx_coef": 0.0, "run": run} | changes
    return config(folder / "run", layout, **changes)


class TermOnTheLastRank:
    """SIGTERM to one of the ranks only, after the third iteration."""

    def on_update(self, run, row):
        if run.done_steps == 3 and run.cluster.rank == run.cluster.world_size - 1:
            os.kill(os.getpid(), signal.SIGTERM)


def save_fail_and_resume(folder, layout):
    """Saves in the background while it trains on, a rank that cannot write, SIGTERM, damage, and how it goes on."""
    tied = LAYOUTS[layout][2]
    with trainer(settings(folder, layout), tied) as run:
        last = run.cluster.world_size - 1

        def write_slowly(*args):
            time.sleep(0.3 * (run.cluster.rank + 1))
            return write_bucket(*args)

        run.checkpoints.write_bucket = write_slowly
        run.step()
        at_1 = weights_now(run)
        run.save_checkpoint()
        run.step()
        assert names(run) == [] and run.checkpoints.pending
        run.complete_checkpoint()
        assert names(run) == ["step_000001"]

        def write_to_full_disk(*args):
            if run.cluster.rank == last:
                raise OSError(28, "No space left on device")
            return write_bucket(*args)

        run.checkpoints.write_bucket = write_to_full_disk
        with pytest.raises(RunError, match=rf"step_000002: .* \(No space left on device, on rank {last}\)"):
            run.save_checkpoint()
            run.complete_checkpoint()
        run.checkpoints.write_bucket = write_bucket
        run.cluster.barrier()
        assert [p.name for p in files.checkpoints_dir(run.dir).iterdir() if p.is_dir()] == ["step_000001"]
        run.save_checkpoint()

    with pytest.raises(SystemExit) as ended:
        with trainer(settings(folder, layout), tied, [TermOnTheLastRank()]) as run:
            assert run.done_steps == 2
            run.train()
    assert ended.value.code == 0 and names(run) == ["step_000001", "step_000002", "step_000003"]

    with trainer(settings(folder, layout), tied) as run:
        run.train()
        main, at_4 = run.cluster.is_main, weights_now(run)
    assert names(run)[-1] == "step_000004"
    with trainer(settings(folder, layout, run={"resume": True}), tied) as run:
        if main:
            for step in (2, 3, 4):
                data = sorted(files.checkpoint_path(run.dir, step).glob("critic/*.distcp"))[-1]
                data.write_bytes(data.read_bytes()[:-9] + b"otherwise")
        run.cluster.barrier()
    with trainer(settings(folder, layout, run={"resume": True}), tied) as run:
        # Found by whichever rank read that file, believed by all.
        assert run.done_steps == 1 and names(run) == ["step_000001"]
        assert all(tiny.same(x, at_1[name]) for name, x in weights_now(run).items()) or not main
        run.train()
        resumed_weights = weights_now(run)
    if main:
        assert all(tiny.same(x, at_4[name]) for name, x in resumed_weights.items())
        rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
        assert [row["iteration"] for row in rows] == [1, 2, 3, 4]
        torch.save(resumed_weights, folder / f"{layout}.pt")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("layout", ["tp2", pytest.param("tp2_pp2", marks=pytest.mark.long)])
def test_ranks_save_fail_end_and_go_on_together(layout, tmp_path):
    write_ptx(tmp_path)
    launch(LAYOUTS[layout][0], save_fail_and_resume, tmp_path, layout)
