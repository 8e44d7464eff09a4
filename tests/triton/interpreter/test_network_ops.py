"""`attention`, `unrestricted` and `recognise` in Triton's interpreter: few programs, odd sizes, float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastmix.ops import _joint_triton
from fastmix.testing import assert_close, poisoned_allocations
from tests import duplex_problem
from tests.ops import test_attention, test_unrestricted
from tests.ops.support import gradients, leaves

FLOAT32 = 1e-6
GRADIENTS = 5e-5
"""Some are a single sum over rows in which terms cancel."""


@pytest.fixture(autouse=True)
def _small_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of the rows as on a device with one multiprocessor, so that there are few programs."""
    monkeypatch.setattr(_joint_triton, "multiprocessors", lambda device: 1)


def check(problem: Any) -> None:
    with poisoned_allocations():
        got = leaves((problem.run("triton"),))
        grads = gradients(got, problem.inputs)
    want = leaves((problem.expected(),))
    for i, pair in enumerate(zip(got, want, strict=True)):
        assert_close(*pair, FLOAT32, name=f"output {i}", zero=1e-6)  # as the entropy of one agent
    for i, pair in enumerate(zip(grads, gradients(want, problem.inputs), strict=True)):
        assert_close(*pair, GRADIENTS, name=f"gradient of input {i}", zero=1e-4)


@pytest.mark.parametrize("form", test_attention.FORMS)
@pytest.mark.parametrize(
    "sizes", [{"agents": 1, "own": 1, "heads": 1, "embed": 1}, {"agents": 27, "own": 2, "heads": 2}], ids=str
)
def test_attention_meets_the_equations(form: str, sizes: dict[str, Any]) -> None:
    check(test_attention.Problem(35, dtype=torch.float32, **sizes, **test_attention.FORMS[form]))


@pytest.mark.parametrize("form", test_attention.FORMS)
def test_attention_of_no_rows(form: str) -> None:
    problem = test_attention.Problem(0, dtype=torch.float32, **test_attention.FORMS[form])
    assert not any(grad.any() for grad in gradients(leaves(problem.run("triton")), problem.inputs))


def test_attention_gives_its_results_one_by_one() -> None:
    problem = test_attention.Problem(9, dtype=torch.float32, **test_attention.FORMS["pymarl_all"])
    results = [leaves(problem.run(backend)) for backend in ("triton", "reference")]
    for i, pair in enumerate(zip(*results, strict=True)):
        ours, wanted = (gradients(result, problem.inputs) for result in pair)
        for k, (got, want) in enumerate(zip(ours, wanted, strict=True)):
            assert_close(got, want, GRADIENTS, name=f"output {i}, gradient of input {k}", zero=1e-4)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_bad_row_spoils_no_other_of_attention(value: float) -> None:
    problem = test_attention.Problem(20, dtype=torch.float32, **test_attention.FORMS["pymarl_all"])
    others = torch.arange(20) != 2
    clean = leaves(problem.run("triton"))
    with torch.no_grad():
        problem.states[2] = value
    for got, want in zip(leaves(problem.run("triton")), clean, strict=True):
        assert torch.equal(got[others], want[others])


@pytest.mark.parametrize("form", test_unrestricted.FORMS)
@pytest.mark.parametrize(
    "sizes", [{}, {"agents": 27, "actions": 1, "width": 33}, {"actions": 18, "width": 70}], ids=str
)
def test_unrestricted_meets_the_equations(form: str, sizes: dict[str, Any]) -> None:
    check(test_unrestricted.Problem(35, dtype=torch.float32, **sizes, **test_unrestricted.FORMS[form]))


@pytest.mark.parametrize("sizes", [{}, {"agents": 1, "actions": 1, "embed": 1}, {"agents": 27, "embed": 33}], ids=str)
@pytest.mark.parametrize("rows", [0, 1, 35])
def test_recognise_meets_the_equations(rows: int, sizes: dict[str, Any]) -> None:
    check(duplex_problem.Problem("recognise", rows, dtype=torch.float32, **sizes))


def test_greedy_actions_give_the_value_exactly() -> None:
    problem = duplex_problem.Problem("recognise", 9, dtype=torch.float32)
    problem.max_qs = problem.agent_qs
    q_r, v = problem.run("triton")
    assert torch.equal(q_r, v)


def test_the_columns_gradient_in_many_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_joint_triton, "multiprocessors", lambda device: 132)
    check(test_unrestricted.Problem(100, dtype=torch.float32, **test_unrestricted.FORMS["coma"]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    """Attention itself is float32: what is lost is what the operands' digits lose."""
    problem = test_attention.Problem(9, dtype=torch.float32, grad=False)
    halves = [tensor.to(dtype) for tensor in problem.inputs]
    out = problem.run("triton", halves)
    want = problem.run("reference", [tensor.float() for tensor in halves])
    assert out.q_tot.dtype == dtype
    assert_close(out.q_tot.float(), want.q_tot, 5e-2)


@pytest.mark.parametrize(
    "make",
    [
        lambda: test_attention.Problem(3, 4, dtype=torch.float32, **test_attention.FORMS["pymarl_all"]),
        lambda: test_unrestricted.Problem(3, 4, dtype=torch.float32, **test_unrestricted.FORMS["everything"]),
        lambda: duplex_problem.Problem("recognise", 3, 4, dtype=torch.float32),
    ],
    ids=["attention", "unrestricted", "recognise"],
)
def test_compiles_whole(make: Callable[[], Any]) -> None:
    problem = make()

    def everything() -> list[Tensor]:
        return leaves((problem.run("triton"),))

    torch.compiler.reset()
    results = [everything(), torch.compile(everything, fullgraph=True, backend="aot_eager")()]
    for got, want in zip(*results, strict=True):
        assert_close(got, want, FLOAT32)
    for got, want in zip(*(gradients(result, problem.inputs) for result in results), strict=True):
        assert_close(got, want, GRADIENTS, zero=1e-4)


def test_strides_of_any_kind() -> None:
    problem = test_attention.Problem(6, dtype=torch.float32)
    problem.agent_qs = torch.randn(5, 6).t().requires_grad_()
    problem.states = torch.randn(6, 40)[:, ::2][:, :19].requires_grad_()
    check(problem)
