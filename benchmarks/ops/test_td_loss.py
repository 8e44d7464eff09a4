"""`td_loss`: loss and gradient against the steps of the public learners."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import harness
from fastmix.experiments.bench import cases

SIZES = ((32, 120), (128, 400))


@pytest.mark.parametrize(("problem", "contestant"), harness.contestants(SIZES, ("ours", "eager")))
def test_td_loss(benchmark: Any, problem: tuple[int, int], contestant: str) -> None:
    harness.run(benchmark, cases.td_loss, problem, contestant)
