"""`recurrent`: batches against ``nn.GRU``, the cell loop and the products alone; acting steps against eager."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from benchmarks import harness
from fastmix.experiments.bench import cases

# Called without gradients, with the cell of the loop compiled.
_forward = partial(cases.recurrent, train=False, compiled=("compile",))
_training = partial(cases.recurrent, train=True, compiled=("compile",))


@pytest.mark.parametrize(
    ("problem", "contestant"),
    harness.contestants(((shape,) for shape in cases.RECURRENT_SIZES), ("ours", "gru", "cell", "compile", "products")),
)
def test_training(benchmark: Any, problem: tuple[str], contestant: str) -> None:
    harness.run(benchmark, _training, problem, contestant)


@pytest.mark.parametrize(
    ("problem", "contestant"),
    harness.contestants(((shape,) for shape in cases.RECURRENT_SIZES), ("ours", "gru", "cell", "compile")),
)
def test_forward(benchmark: Any, problem: tuple[str], contestant: str) -> None:
    harness.run(benchmark, _forward, problem, contestant)


@pytest.mark.parametrize(
    ("problem", "contestant"),
    harness.contestants(
        ((shape, rows) for shape in ("3m", "MMM2", "27m_vs_30m") for rows in (3, 8, 27, 64, 128, 512)),
        ("ours", "eager"),
    ),
)
def test_acting(benchmark: Any, problem: tuple[str, int], contestant: str) -> None:
    harness.run(benchmark, cases.acting, problem, contestant)
