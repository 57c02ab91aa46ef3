"""Advantages whitened by the moments of each of two ranks: the weights are those of a whitening by hand."""

import torch

from icegrt.config import OptimizerConfig, ParallelConfig
from icegrt.distributed.cluster import Cluster
from icegrt.distributed.layout import Layout
from tests.helpers import tiny_models as tiny
from tests.helpers.ranks import launch
from tests.helpers.tied_scores import tied_config, tied_trainer

WHITENING = {"rank": "rank", "by hand": False, "global": True, "none": False}


class WhitenByHand:
    """Replaces the advantages of this rank by whitened ones, in fp64."""

    def on_scores(self, run, experience):
        advantage_A, mask_A = experience.shaped.advantage_A, experience.plan.mask_A
        counted = advantage_A if mask_A is None else advantage_A[mask_A]
        counted = counted.double()
        scale = ((counted - counted.mean()).square().mean() + 1e-8).rsqrt()
        advantage_A.copy_((advantage_A.double() - counted.mean()) * scale)


def runs(folder):
    """One iteration of each kind of whitening; rank 0 writes the weights."""
    still, weights = OptimizerConfig(lr=1e-4, schedule="constant"), {}
    with Cluster.open(Layout.of(ParallelConfig())) as cluster:
        for name, whitening in WHITENING.items():
            config = tied_config(
                folder / name,
                whiten_advantages=whitening,
                kl_coef=0.05,
                optimizer=still,
                iterations=1,
                checkpoint_every=9,
            )
            with tied_trainer(config, [WhitenByHand()] if name == "by hand" else []) as run:
                run.step()
                weights[name] = tiny.by_hugging_face_name(run.actor, lambda p: p)
        if cluster.is_main:
            torch.save(weights, folder / "weights.pt")


def test_each_of_two_ranks_whitens_by_its_own_moments(tmp_path):
    launch(2, runs, tmp_path)
    weights = torch.load(tmp_path / "weights.pt", weights_only=False)
    assert tiny.gap(weights["rank"], weights["by hand"])[0] <= 1e-7
    for other in ("global", "none"):
        assert tiny.gap(weights["rank"], weights[other])[0] > 1e-5, other
