"""`duplex` and `importance` in Triton's interpreter, which takes milliseconds a program: few programs, odd sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastmix.ops import _joint_triton as kernels
from fastmix.ops.duplex import PARTS
from fastmix.testing import assert_close, poisoned_allocations
from tests.duplex_problem import Problem, assert_parity
from tests.generators import non_contiguous
from tests.ops.support import gradients, leaves, rebuild

OPS = ("duplex", "importance")


@pytest.fixture(autouse=True)
def _small_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of a device with one multiprocessor: large, so that there are few programs."""
    monkeypatch.setattr(kernels, "multiprocessors", lambda device: 1)


def problem(op: str, *leading: int, **sizes: Any) -> Problem:
    return Problem(op, *leading, dtype=torch.float32, **sizes)


@pytest.mark.parametrize(
    "sizes",
    [
        {"agents": 1, "actions": 1, "state": 1, "hidden": 1},
        {"agents": 2, "actions": 7, "hidden": 31},
        {"agents": 27, "actions": 2, "hidden": 33},
        {"agents": 5, "actions": 18, "state": 33, "hidden": 64},
        {"kernels": 1, "layers": 1},
        {"kernels": 10, "layers": 1},
        {"kernels": 2, "layers": 3, "hidden": 6},
    ],
    ids=str,
)
@pytest.mark.parametrize("op", OPS)
def test_float64_reference_is_met(op: str, sizes: dict[str, Any]) -> None:
    with poisoned_allocations():
        assert_parity(problem(op, 37, **sizes), "triton")


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("minus_one", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
def test_every_option(weighted: bool, minus_one: bool, part: str) -> None:
    assert_parity(problem("duplex", 13, weighted=weighted, minus_one=minus_one, part=part, hidden=5), "triton")


@pytest.mark.parametrize("leading", [(), (1,), (3, 5), (2, 3, 5), (0, 5)])
@pytest.mark.parametrize("op", OPS)
def test_leading_dimensions(op: str, leading: tuple[int, ...]) -> None:
    assert_parity(problem(op, *leading, hidden=4), "triton")


def test_parts_of_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "multiprocessors", lambda device: 132)
    assert_parity(problem("duplex", 100, hidden=4), "triton")


@pytest.mark.parametrize("op", OPS)
def test_strides_and_unknown_actions(op: str) -> None:
    given = problem(op, 20, hidden=5)
    for name in ("agent_qs", "max_qs", "states"):
        setattr(given, name, non_contiguous(getattr(given, name).detach()).requires_grad_())
    given.actions = non_contiguous(given.actions)
    given.actions[3] = -1
    weights = [non_contiguous(p.detach()).requires_grad_() for p in leaves(given.params)]
    given.params = rebuild(given.params, weights)
    assert_parity(given, "triton")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_bad_row_spoils_no_other(value: float) -> None:
    given = problem("duplex", 20, hidden=5)
    others = torch.arange(20) != 2
    clean = given.run("triton")
    clean += gradients(clean, [given.agent_qs, given.states])
    with torch.no_grad():
        given.states[2] = value
    spoilt = given.run("triton")
    spoilt += gradients(spoilt, [given.agent_qs, given.states])
    for got, want in zip(spoilt, clean, strict=True):
        assert torch.equal(got[others], want[others])
    assert not spoilt[0][2].isfinite().all()


def test_same_from_run_to_run() -> None:
    given = problem("duplex", 70, hidden=5)
    first, second = (gradients(given.run("triton"), given.inputs) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


def test_half_precision() -> None:
    given = problem("duplex", 33, hidden=8)
    halves = [t.detach().bfloat16().requires_grad_(t.requires_grad) for t in given.inputs]
    exact = given.run("reference", [t.double() for t in halves])
    for got, want in zip(given.run("triton", halves), exact, strict=True):
        assert got.dtype == torch.bfloat16
        assert_close(got, want, 2e-2)


@pytest.mark.parametrize("op", OPS)
def test_compiles_whole(op: str) -> None:
    given = problem(op, 7, hidden=4)
    expected = given.run("triton")
    got = torch.compile(lambda: given.run("triton"), fullgraph=True, backend="aot_eager")()
    for pair in zip(got, expected, strict=True):
        assert torch.equal(*pair)
    for pair in zip(gradients(got, given.inputs), gradients(expected, given.inputs), strict=True):
        assert torch.equal(*pair)
