"""`quantile`: the pairwise loss and its gradient against all pairs in memory."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import harness
from fastmix.experiments.bench import cases

SIZES = ((128, 120, 8), (128, 120, 32))


@pytest.mark.parametrize(("problem", "contestant"), harness.contestants(SIZES, ("ours", "eager")))
def test_quantile(benchmark: Any, problem: tuple[int, int, int], contestant: str) -> None:
    harness.run(benchmark, cases.quantile, problem, contestant)
