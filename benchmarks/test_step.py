"""Whole learner steps against the same steps the public way."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import harness
from fastmix.experiments.bench import steps

PROBLEMS = [("qmix", shape) for shape in ("matrix", "3m", "5m_vs_6m", "prey", "MMM2")]
PROBLEMS += [(algo, "3m") for algo in steps.WITH_BASELINE if algo != "qmix"]


@pytest.mark.parametrize(("problem", "contestant"), harness.contestants(PROBLEMS, ("ours", "eager", "compile")))
def test_step(benchmark: Any, problem: tuple[str, str], contestant: str) -> None:
    harness.run(benchmark, steps.step, problem, contestant)
