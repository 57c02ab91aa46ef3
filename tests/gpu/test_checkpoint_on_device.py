"""Checkpoints of a run on a CUDA device: in the background by default, of the state when they were asked for."""

import pytest

pytest.importorskip("megatron.core", reason="the engine needs megatron-core, and the kernels beside it do not")

from icegrt.checkpoint import directory as files
from icegrt.config import SFTConfig
from icegrt.training.sft import SFTTrainer
from tests.helpers import stage_cases as cases
from tests.helpers import tiny_models as tiny


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_checkpoint_in_the_background_is_what_a_resumed_run_starts_from(dtype, tmp_path):
    home = cases.make_home(tmp_path)
    keys = [*cases.sft_keys(home, tmp_path / "run"), "sft.epochs=4", f"sft.run.dtype={dtype}"]
    with SFTTrainer(SFTConfig.load(None, keys)) as run:
        assert run.checkpoints.background
        run.step()
        run.save_checkpoint()
        saved_parameters = tiny.parameters(run.role)
        second, third = run.step(), run.step()
    assert files.verify(files.checkpoint_path(run.dir, 1)) == []
    with SFTTrainer(SFTConfig.load(None, [*keys, "sft.run.resume=true"])) as resumed:
        assert resumed.done_steps == 1 and tiny.same(tiny.parameters(resumed.role), saved_parameters)
        for expected in (second, third):
            step = resumed.step()
            assert (step.loss, step.grad_norm) == (expected.loss, expected.grad_norm)
