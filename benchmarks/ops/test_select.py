"""`select`: masked argmax and gathers against the steps of the public learners."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import harness
from fastmix.experiments.bench import cases
from tests.generators import SHAPES

SIZES = [(128, 120, 10, 18)] + [(s.batch_size, s.steps, s.n_agents, s.n_actions) for s in SHAPES.values()]


@pytest.mark.parametrize(
    ("problem", "contestant"),
    harness.contestants(((*size, train) for train in (False, True) for size in SIZES), ("ours", "eager")),
)
def test_select(benchmark: Any, problem: tuple[int, int, int, int, bool], contestant: str) -> None:
    harness.run(benchmark, cases.select, problem, contestant)
