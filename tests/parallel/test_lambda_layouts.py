"""Two lambdas, one lambda per response, and turns: the same run in every layout, with the same value calibration."""

import json

import pytest
import torch

from icegrt.config import ParallelConfig
from icegrt.distributed.cluster import Cluster
from icegrt.distributed.layout import Layout
from icegrt.metrics import calibration_path
from tests.helpers import tiny_models as tiny
from tests.helpers.layout_cases import LAYOUTS, config, step_metrics, trainer
from tests.helpers.ranks import launch

NAMES = ["tp2_sp", "pp2_uneven", "dp2"]
SETTINGS = {
    "decoupled": {"lam_policy": 0.8, "lam_value": 1.0},
    "adaptive": {"lam_policy": "adaptive", "lam_alpha": 0.4, "lam_value": 0.9},
    "turn": {"advantage_unit": "turn"},
}


def run_all(folder, layout):
    """One run of two iterations for each of the settings."""
    results = {}
    with Cluster.open(Layout.of(ParallelConfig(**LAYOUTS[layout][1]))) as cluster:
        for name, keys in SETTINGS.items():
            path = folder / f"{layout}_{name}"
            settings = config(path, layout, iterations=2, ptx_coef=0.0, ptx_data=[], **keys)
            with trainer(settings, False) as run:
                steps = [step_metrics(run.step()) for _ in range(2)]
                weights = {r.name: tiny.by_hugging_face_name(r, lambda p: p) for r in run.roles}
            results[name] = {"steps": steps, "weights": weights, "path": calibration_path(path, 2)}
        if cluster.is_main:
            torch.save(results, folder / f"{layout}.pt")


def assert_same_tables(path, expected_path, where):
    """Sums of value calibration; those of two lambdas, unless the returns are already at lambda 1."""
    tables, expected = (json.loads(p.read_text())["tables"] for p in (path, expected_path))
    assert len(tables) == len(expected) == (2 if "decoupled" in where else 4), where
    for table, other in zip(tables, expected, strict=True):
        assert sum(table["count"]) > 0 and table["count"] == other["count"], where
        for name, column in other.items():
            assert table[name] == pytest.approx(column, rel=1e-4, abs=1e-4) if name != "by" else True, (where, name)


@pytest.mark.timeout(600)
def test_runs_are_the_same_in_every_layout(tmp_path):
    launch(1, run_all, tmp_path, "one")
    one = torch.load(tmp_path / "one.pt", weights_only=False)
    for layout in NAMES:
        launch(LAYOUTS[layout][0], run_all, tmp_path, layout)
        for name, results in torch.load(tmp_path / f"{layout}.pt", weights_only=False).items():
            where = f"{name} in {layout}"
            for role, expected in one[name]["weights"].items():
                assert tiny.gap(results["weights"][role], expected)[0] <= 1e-5, (where, role)
            for step, expected in zip(results["steps"], one[name]["steps"], strict=True):
                for figure in ("policy_loss", "value_loss", "advantage_mean", "value_explained_variance"):
                    assert step[figure] == pytest.approx(expected[figure], abs=1e-4), (where, figure)
                assert step["grad_norm_critic"] == pytest.approx(expected["grad_norm_critic"], rel=1e-4), where
            assert_same_tables(results["path"], one[name]["path"], where)
    figures = [one[name]["steps"][0]["value_loss"] for name in SETTINGS]
    assert len(set(figures)) == len(figures), "a setting had no effect"
