"""`duplex` and `importance` in the compiled core: float32, instruction sets, threads, strides, PyTorch's demands."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastmix.ops import _networks, duplex, importance
from tests.duplex_problem import Problem, assert_parity
from tests.ops.support import ISAS, TOLERANCE, fullgraph, gradients, leaves, run_tests_under_isa

OPS = ("duplex", "importance")
BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
SIZES: list[dict[str, Any]] = [
    {"agents": 27, "actions": 7, "state": 70, "hidden": 33, "kernels": 2},
    {"agents": 3, "actions": 1, "state": 1, "hidden": 65, "layers": 3},
    {"agents": 1, "kernels": 10, "layers": 1},
]
"""More than a vector, a tile and a panel of each, and less"""


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("op", OPS)
@BOTH
def test_parity_over_sizes(dtype: torch.dtype, op: str, sizes: dict[str, Any]) -> None:
    assert_parity(Problem(op, 130, dtype=dtype, **sizes), "native")


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 63, 64, 65, 129])
@BOTH
def test_parity_over_rows(dtype: torch.dtype, rows: int) -> None:
    assert_parity(Problem("duplex", rows, dtype=dtype, hidden=20, part="both"), "native")


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa: str) -> None:
    run_tests_under_isa(__file__, "parity_over", isa)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_same_result_in_every_run(threads: int) -> None:
    torch.set_num_threads(threads)
    problem = Problem("duplex", 1_000, state=100, dtype=torch.float32)
    assert_parity(problem, "native")

    def everything() -> list[Tensor]:
        result = problem.run("native")
        return [*result, *gradients(result, problem.inputs)]

    first = everything()
    for _ in range(3):
        assert all(torch.equal(*pair) for pair in zip(everything(), first, strict=True))


def test_much_is_kept_in_the_pool_and_stays_apart() -> None:
    problems = [Problem("duplex", 1_000, dtype=torch.float32) for _ in range(2)]
    results = [problem.run("native") for problem in problems]
    wanted = [gradients(problem.run("native"), problem.inputs) for problem in problems]
    for problem, result, want in zip(problems, results, wanted, strict=True):
        assert all(torch.equal(*pair) for pair in zip(gradients(result, problem.inputs), want, strict=True))


@pytest.mark.parametrize("op", OPS)
def test_every_subset_of_gradients(op: str) -> None:
    problem = Problem(op, 70)
    wanted = gradients(problem.run("native"), problem.inputs)
    for chosen in range(len(problem.inputs)):
        inputs = [x.detach().requires_grad_(i == chosen) for i, x in enumerate(problem.inputs)]
        outputs = problem.run("native", inputs)
        if op == "duplex" and chosen == 1:
            assert not any(out.requires_grad for out in outputs)  # max_qs has no gradient
        else:
            torch.testing.assert_close(gradients(outputs, [inputs[chosen]])[0], wanted[chosen], rtol=0, atol=1e-13)


def test_one_part_of_the_sum_alone() -> None:
    """Parameters that the upstream gradient does not reach get none."""
    problem = Problem("duplex", 9)
    _, v_tot, adv_tot = problem.run("native")
    grads = torch.autograd.grad(v_tot.sum(), problem.inputs, allow_unused=True, retain_graph=True)
    reached = {id(t) for t in (problem.agent_qs, problem.states, *leaves((problem.params.scale, problem.params.shift)))}
    assert [grad is not None for grad in grads] == [id(t) in reached for t in problem.inputs]
    grads = torch.autograd.grad(adv_tot.sum(), problem.inputs, allow_unused=True)
    reached = {id(t) for t in (problem.states, *leaves(problem.params.importance))}
    assert [grad is not None for grad in grads] == [id(t) in reached for t in problem.inputs]


def test_rows_with_gaps_are_not_copied(caplog: pytest.LogCaptureFixture) -> None:
    problem = Problem("duplex", 6, 9)
    problem.states = torch.randn(6, 10, 11, dtype=torch.float64)[:, :-1]
    with caplog.at_level(logging.DEBUG, "fastmix"):
        assert_parity_without_states(problem)
    assert "copies" not in caplog.text


def assert_parity_without_states(problem: Problem) -> None:
    for got, want in zip(problem.run("native"), problem.expected(), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=TOLERANCE[torch.float64])


def test_offsets_beyond_32_bits(tmp_path: Path) -> None:
    # A sparse file: 2^31 numbers apart, but only the pages in use exist.
    far = 2**31
    memory = torch.from_file(str(tmp_path / "sparse"), shared=True, size=far + 4_096, dtype=torch.float32)
    problem = Problem("duplex", 2, 7, dtype=torch.float32)
    for offset, (name, width) in enumerate((("agent_qs", 3), ("max_qs", 3), ("states", 11))):
        values = getattr(problem, name).detach()
        view = memory.as_strided((2, 7, width), (far, width, 1), 1_024 * offset)
        setattr(problem, name, view.copy_(values).requires_grad_())
    assert_parity(problem, "native")


# ---- what PyTorch asks of an op -------------------------------------------------------------------------------------


def test_second_derivatives_raise() -> None:
    problem = Problem("duplex", 3)
    upstream = torch.ones(3, 1, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(problem.run("native")[0], problem.agent_qs, upstream, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.traced
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("op", OPS)
def test_opcheck(op: str, training: bool) -> None:
    problem = Problem(op, 3, 4, grad=training, hidden=5)
    torch.library.opcheck(torch.ops.fastmix.duplex.default, native_arguments(problem, training))


@pytest.mark.traced
@pytest.mark.parametrize("op", OPS)
def test_opcheck_of_backward(op: str) -> None:
    problem = Problem(op, 7, grad=False, hidden=5)
    agent_qs, max_qs, states, actions, depths, *_, params = native_arguments(problem, True)
    *_, hidden, outputs = torch.ops.fastmix.duplex.default(*native_arguments(problem, True))
    width = 3 if op == "importance" else 1
    grad = torch.randn(7, width, dtype=torch.float64)
    grads = (None, None, grad) if op == "importance" else (grad, grad, None)
    wants = [0, 1, 1, 0, 1] if op == "duplex" else [0, 0, 1, 0, 1]
    torch.library.opcheck(
        torch.ops.fastmix.duplex_backward.default,
        (*grads, agent_qs, max_qs, states, actions, hidden, outputs, depths, wants, op == "duplex", True, params),
    )


def native_arguments(problem: Problem, training: bool) -> tuple[Any, ...]:
    joint, networks = (None, None), ((), (), *problem.params)
    if problem.op == "duplex":
        joint = (problem.agent_qs, problem.max_qs)  # type: ignore[assignment]
        networks = (problem.params.scale, problem.params.shift, *problem.params.importance)
    params, depths = _networks.flatten(networks)
    return (*joint, problem.states, problem.actions, depths, True, problem.op == "duplex", training, params)


def test_without_training_there_is_no_backward() -> None:
    outputs = torch.ops.fastmix.duplex.default(*native_arguments(Problem("duplex", 3), False))
    with pytest.raises(RuntimeError, match="training=False"):
        outputs[0].sum().backward()


@pytest.mark.traced
@pytest.mark.parametrize("op", OPS)
def test_compiles_whole_in_float32(op: str) -> None:
    problem = Problem(op, 3, 4, dtype=torch.float32, hidden=5)
    got, want = fullgraph(lambda: problem.run("native"))(), problem.run("native")
    for pair in zip([*got, *gradients(got, problem.inputs)], [*want, *gradients(want, problem.inputs)], strict=True):
        torch.testing.assert_close(*pair, rtol=0, atol=1e-6)


@pytest.mark.traced
def test_compiles_for_any_number_of_rows() -> None:
    problem = Problem("duplex", 5, grad=False)
    torch.compiler.reset()

    def run(q: Tensor, m: Tensor, s: Tensor, u: Tensor) -> Tensor:
        return duplex(q, m, s, u, problem.params, backend="native").q_tot

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (5, 13, 200):
        given = Problem("duplex", rows)
        inputs = (given.agent_qs, given.max_qs, given.states, given.actions)
        result, wanted = compiled(*inputs), run(*inputs)
        assert torch.equal(result, wanted)
        assert torch.equal(*(torch.autograd.grad(r.sum(), given.agent_qs)[0] for r in (result, wanted)))


@pytest.mark.traced
def test_an_unknown_action_is_no_action_where_nobody_looks() -> None:
    """Compiled code does not look at the numbers in ``actions``; the kernel must not read behind its weights."""
    problem = Problem("importance", 5, grad=False)
    torch.compiler.reset()
    compiled = torch.compile(
        lambda a: importance(problem.states, a, problem.params, backend="native"), fullgraph=True, backend="aot_eager"
    )
    none = torch.full_like(problem.actions, -1)
    for number in (4, 2**40, -(2**40)):
        assert torch.equal(compiled(torch.full_like(none, number)), compiled(none))
