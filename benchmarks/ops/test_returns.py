"""`returns`: TD(lambda) targets against the recursion in Python."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import harness
from fastmix.experiments.bench import cases

SIZES = ((32, 120), (128, 400))


@pytest.mark.parametrize(("problem", "contestant"), harness.contestants(SIZES, ("ours", "eager")))
def test_td_lambda(benchmark: Any, problem: tuple[int, int], contestant: str) -> None:
    harness.run(benchmark, cases.returns, problem, contestant)
