"""What the benchmark tests share: one contestant of one case under pytest-benchmark."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any

import pytest
import torch

from fastmix.experiments.bench.cases import Case
from fastmix.testing.bench import peak_memory
from tests.generators import SHAPES

_built: dict[Hashable, Case] = {}

_WITH_STATES = [name for name, shape in SHAPES.items() if shape.state_dim > 5]


def contestants(problems: Iterable[tuple[Any, ...]], names: Iterable[str]) -> list[Any]:
    """Parameters ``(problem, contestant)``, all contestants of a problem one after another."""
    names = list(names)
    return [
        pytest.param(problem, name, id="-".join(map(str, (*problem, name)))) for problem in problems for name in names
    ]


TRAINING = pytest.mark.parametrize(
    ("problem", "contestant"),
    contestants(
        ((shape, rows) for rows in (1_920, 15_360) for shape in _WITH_STATES), ("ours", "eager", "compile", "products")
    ),
)
"""Marks a test of a mixing operator: batches as training has them."""

ACTING = pytest.mark.parametrize(
    ("problem", "contestant"),
    contestants(((shape, rows, False) for rows in (1, 64) for shape in _WITH_STATES), ("ours", "eager", "compile")),
)
"""The same of a few rows, forward alone."""


def run(benchmark: Any, build: Callable[..., Case], problem: tuple[Any, ...], contestant: str) -> None:
    """Check ``ours`` against the reference, then time ``contestant``; peak memory goes into ``extra_info``."""
    case = _case(build, problem)
    if contestant == "ours":
        errors, allowed = case.measured_errors()
        assert errors["ours"].within(allowed), f"{case.name} differs from the reference: {errors}, {allowed} allowed"
        benchmark.extra_info["parity_error"] = errors["ours"].values
    call = case.contestants[contestant]
    call()  # compilation, libraries and their workspaces are not memory of the operator
    benchmark.group = case.name
    benchmark.extra_info |= {
        "op": case.op,
        "phase": case.phase,
        "shape": case.shape,
        **case.sizes,
        "contestant": contestant,
        "threads": torch.get_num_threads(),
        "peak_bytes": peak_memory(call),
    }
    benchmark(call)


def _case(build: Callable[..., Case], problem: tuple[Any, ...]) -> Case:
    """The case, kept while its contestants follow each other; only one, because they hold large tensors."""
    key = (build, problem)
    if key not in _built:
        _built.clear()
        _built[key] = build(*problem)
    return _built[key]
