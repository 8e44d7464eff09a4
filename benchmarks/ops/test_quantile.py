"""`quantile`: the pairwise loss and its gradient against all pairs in memory; the mean-shape mix against eager."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import harness
from fastmix.experiments.bench import cases, joint

SIZES = ((128, 120, 8), (128, 120, 32))
MIXES = tuple((shape, 15_360, n) for shape in ("5m_vs_6m", "MMM2") for n in (8, 32))


@pytest.mark.parametrize(("problem", "contestant"), harness.contestants(SIZES, ("ours", "eager")))
def test_quantile(benchmark: Any, problem: tuple[int, int, int], contestant: str) -> None:
    harness.run(benchmark, cases.quantile, problem, contestant)


@pytest.mark.parametrize(
    ("problem", "contestant"), harness.contestants(MIXES, ("ours", "eager", "compile", "products"))
)
def test_quantile_mix(benchmark: Any, problem: tuple[str, int, int], contestant: str) -> None:
    harness.run(benchmark, joint.quantile_mix, problem, contestant)
