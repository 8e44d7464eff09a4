"""`attention`: training batches against eager, ``torch.compile`` and the products alone; a few rows against eager."""

from __future__ import annotations

from typing import Any

from benchmarks import harness
from fastmix.experiments.bench import joint


@harness.TRAINING
def test_training(benchmark: Any, problem: tuple[str, int], contestant: str) -> None:
    harness.run(benchmark, joint.attention, problem, contestant)


@harness.ACTING
def test_forward(benchmark: Any, problem: tuple[str, int, bool], contestant: str) -> None:
    harness.run(benchmark, joint.attention, problem, contestant)
