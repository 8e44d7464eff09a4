"""`recognise`: training batches against eager, ``torch.compile`` and the products alone; a few rows against eager."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import harness
from fastmix.experiments.bench import joint
from tests.generators import SHAPES

LARGE = [name for name, shape in SHAPES.items() if shape.state_dim > 5]


@pytest.mark.parametrize(
    ("problem", "contestant"),
    harness.contestants(
        ((shape, rows) for rows in (1_920, 15_360) for shape in LARGE), ("ours", "eager", "compile", "products")
    ),
)
def test_training(benchmark: Any, problem: tuple[str, int], contestant: str) -> None:
    harness.run(benchmark, joint.recognise, problem, contestant)


@pytest.mark.parametrize(
    ("problem", "contestant"),
    harness.contestants(((shape, rows, False) for rows in (1, 64) for shape in LARGE), ("ours", "eager", "compile")),
)
def test_forward(benchmark: Any, problem: tuple[str, int, bool], contestant: str) -> None:
    harness.run(benchmark, joint.recognise, problem, contestant)
