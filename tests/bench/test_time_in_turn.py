"""Iterations that take turns: the order alternates, the first of each is left out, and quotients are of pairs."""

from types import SimpleNamespace

import pytest

from bench.bench_iteration import Timings, median_quotients, time_in_turn


class FakeTrainer:
    def __init__(self, name, log):
        self.name, self.log, self.steps = name, log, 0

    def step(self):
        self.steps += 1
        self.log.append(self.name)
        return SimpleNamespace(seconds_by_phase={"update": float(self.steps)})

    def close(self):
        self.log.append(f"{self.name} closed")


def test_trainers_alternate_and_their_first_iterations_are_left_out():
    log = []
    timings = time_in_turn({name: FakeTrainer(name, log) for name in "ab"}, rounds=2)
    assert log == ["b", "a", "a", "b", "b", "a", "a closed", "b closed"]
    for each in timings.values():
        assert len(each.seconds) == len(each.cpu_seconds) == 2
        assert each.phases == [{"update": 2.0}, {"update": 3.0}] and each.summary == "update 2.500"


def test_quotients_are_medians_of_pairs():
    slow, fast = Timings([4.0, 9.0, 8.0], [2.0, 2.0, 2.0]), Timings([2.0, 3.0, 8.0], [1.0, 2.0, 4.0])
    assert median_quotients(slow, fast) == pytest.approx((2.0, 1.0))
