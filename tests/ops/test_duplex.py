"""`duplex`, `importance` and `recognise`: against the equations, network by network; gradient routes; refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastmix import backends
from fastmix.ops import duplex, importance, recognise
from fastmix.ops.duplex import PARTS, DuplexParams, ImportanceParams, RecogniserParams
from fastmix.testing import assert_close
from tests.duplex_problem import Problem, assert_parity, network
from tests.generators import (
    ODD_AGENTS,
    ODD_EMBEDS,
    ODD_ROWS,
    non_contiguous,
)
from tests.ops.support import fullgraph, gradients, leaves, rebuild

OPS = ("duplex", "importance", "recognise")
RUNS = [(op, backend) for op in OPS for backend in backends.available(op)]
every_run = pytest.mark.parametrize(("op", "backend"), RUNS)
BACKENDS = backends.available("duplex")


@pytest.mark.parametrize("agents", ODD_AGENTS)
@pytest.mark.parametrize("width", ODD_EMBEDS)
@every_run
def test_parity_over_networks(op: str, backend: str, width: int, agents: int) -> None:
    sizes: dict[str, Any] = {"hidden": width, "kernels": 3}
    sizes = {"embed": width, "hypernet_embed": 9} if op == "recognise" else sizes
    assert_parity(Problem(op, 7, agents=agents, **sizes), backend)


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("kernels", [1, 4, 10])
@pytest.mark.parametrize(("op", "backend"), [run for run in RUNS if run[0] != "recognise"])
def test_parity_over_kernels(op: str, backend: str, kernels: int, layers: int) -> None:
    assert_parity(Problem(op, 13, kernels=kernels, layers=layers, hidden=6), backend)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("minus_one", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_parity_over_options(backend: str, weighted: bool, minus_one: bool, part: str) -> None:
    assert_parity(Problem("duplex", 13, weighted=weighted, minus_one=minus_one, part=part), backend)


@pytest.mark.parametrize("rows", ODD_ROWS)
@every_run
def test_parity_over_rows(op: str, backend: str, rows: int) -> None:
    assert_parity(Problem(op, rows), backend)


@pytest.mark.parametrize("sizes", [{"state": 1, "actions": 1}, {"state": 33, "actions": 18, "agents": 10}], ids=str)
@every_run
def test_parity_over_widths(op: str, backend: str, sizes: dict[str, Any]) -> None:
    assert_parity(Problem(op, 13, **sizes), backend)


@pytest.mark.parametrize("leading", [(), (7,), (3, 5), (2, 3, 5), (0, 5), (5, 0)])
@every_run
def test_leading_dimensions(op: str, backend: str, leading: tuple[int, ...]) -> None:
    problem = Problem(op, *leading)
    width = 3 if op == "importance" else 1
    assert all(out.shape == (*leading, width) for out in problem.run(backend))
    assert_parity(problem, backend)


@every_run
def test_strides_of_any_kind(op: str, backend: str) -> None:
    problem = Problem(op, 6, 9)
    for name in ("agent_qs", "max_qs"):
        setattr(problem, name, non_contiguous(getattr(problem, name).detach()).requires_grad_())
    problem.actions = non_contiguous(problem.actions)
    problem.states = torch.randn(6, 10, 11, dtype=torch.float64)[:, :-1].requires_grad_()
    weights = [non_contiguous(p.detach()).requires_grad_() for p in leaves(problem.params)]
    problem.params = rebuild(problem.params, weights)
    assert_parity(problem, backend)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["agent_qs", "max_qs", "states"])
@every_run
def test_a_bad_row_spoils_no_other(op: str, backend: str, where: str, value: float) -> None:
    problem = Problem(op, 40)
    others = torch.arange(40) != 2
    clean = problem.run(backend)
    clean_grads = gradients(clean, [problem.agent_qs, problem.states])
    with torch.no_grad():
        getattr(problem, where)[2] = value
    spoilt = problem.run(backend)
    grads = gradients(spoilt, [problem.agent_qs, problem.states])
    for got, want in zip(spoilt + grads, clean + clean_grads, strict=True):
        assert torch.equal(got[others], want[others])
    assert (op == "importance" and where != "states") or not spoilt[0][2].isfinite().all()


@every_run
def test_gradcheck(op: str, backend: str) -> None:
    sizes: dict[str, Any] = {"embed": 3, "hypernet_embed": 4} if op == "recognise" else {"hidden": 3, "kernels": 2}
    problem = Problem(op, 3, agents=2, actions=3, state=5, **sizes)
    fixed = [] if op == "importance" else [problem.agent_qs.detach(), problem.max_qs.detach()]

    def function(*inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(problem.run(backend, [*fixed, *inputs]))

    if op == "duplex":  # the detached advantages depend on the transform, which is therefore checked without them
        problem.options["part"] = "v"
        assert torch.autograd.gradcheck(lambda *inputs: problem.run(backend, inputs), problem.inputs)
        problem.options["part"], problem.params = "both", problem.params._replace(scale=(), shift=())
    assert torch.autograd.gradcheck(function, problem.inputs[len(fixed) :])


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_routes(backend: str, part: str) -> None:
    problem = Problem("duplex", 5, part=part)
    problem.run(backend)[0].sum().backward()
    params: DuplexParams = problem.params
    through_v = [problem.agent_qs, *leaves(params.scale), *leaves(params.shift)]
    assert all((tensor.grad is None) == (part == "adv") for tensor in through_v)
    assert all((tensor.grad is None) == (part == "v") for tensor in leaves(params.importance))
    assert problem.max_qs.grad is None
    if part != "adv":
        scale = network(problem.states, params.scale).abs() + 1e-10
        assert problem.agent_qs.grad is not None
        assert_close(problem.agent_qs.grad, scale.detach(), 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_values_part_needs_no_actions(backend: str) -> None:
    problem = Problem("duplex", 5)
    whole = duplex(problem.agent_qs, problem.max_qs, problem.states, problem.actions, problem.params, backend=backend)
    alone = duplex(problem.agent_qs, None, problem.states, None, problem.params, part="v", backend=backend)
    assert whole.v_tot is not None and whole.adv_tot is not None and alone.v_tot is not None
    assert torch.equal(alone.v_tot, whole.v_tot)
    assert torch.equal(alone.q_tot, whole.v_tot)
    assert alone.adv_tot is None
    assert torch.equal(whole.q_tot, whole.v_tot + whole.adv_tot)


@pytest.mark.parametrize("backend", BACKENDS)
def test_greedy_joint_actions_have_the_largest_value(backend: str) -> None:
    """IGM for any weights: with the dueling form, advantages at or below 0 have positive weights."""
    problem = Problem("duplex", 500)
    q_tot = problem.run(backend)[0]
    problem.agent_qs = problem.max_qs
    assert (problem.run(backend)[0] >= q_tot).all()


@pytest.mark.parametrize("backend", backends.available("importance"))
def test_importance_is_positive(backend: str) -> None:
    problem = Problem("importance", 50)
    for layer in problem.params.key:
        layer.weight.data.zero_()
        layer.bias.data.zero_()
    assert (problem.run(backend)[0] > 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", backends.available("recognise"))
def test_greedy_joint_actions_are_recognised(backend: str, dtype: torch.dtype) -> None:
    """A_igm is in A_r for any weights: Q_r is V exactly where every agent is greedy, and never above it."""
    problem = Problem("recognise", 500, dtype=dtype)
    q_r, v = problem.run(backend)
    assert (q_r < v).all()
    problem.agent_qs = torch.where(torch.rand(500, 1) < 0.5, problem.max_qs, problem.agent_qs)
    greedy = (problem.agent_qs == problem.max_qs).all(-1)
    q_r, v = problem.run(backend)
    assert torch.equal(q_r[greedy], v[greedy])
    problem.agent_qs.retain_grad()
    q_r.sum().backward()
    assert problem.agent_qs.grad is None and problem.max_qs.grad is None


@every_run
def test_nothing_is_recorded_without_need(op: str, backend: str) -> None:
    problem = Problem(op, 5)
    assert all(out.requires_grad for out in problem.run(backend))
    assert not any(out.requires_grad for out in problem.run(backend, [t.detach() for t in problem.inputs]))
    with torch.no_grad():
        assert not any(out.requires_grad for out in problem.run(backend))


@pytest.mark.traced
@every_run
def test_compiles_whole(op: str, backend: str) -> None:
    problem = Problem(op, 3, 4)
    results = [run() for run in (lambda: problem.run(backend), fullgraph(lambda: problem.run(backend)))]
    for got, want in zip(*results, strict=True):
        assert_close(got, want, 1e-12)
    for got, want in zip(*(gradients(result, problem.inputs) for result in results), strict=True):
        assert_close(got, want, 1e-12)


@every_run
def test_autocast_is_float32(op: str, backend: str) -> None:
    problem = Problem(op, 9, dtype=torch.float32, grad=False)
    halves = [t.bfloat16() for t in problem.inputs]
    with torch.autocast("cpu", torch.bfloat16):
        results = problem.run(backend, halves)
    wanted = problem.run(backend, [t.float() for t in halves])
    assert all(result.dtype == torch.float32 for result in results)
    assert all(torch.equal(*pair) for pair in zip(results, wanted, strict=True))


# ---- bad input ------------------------------------------------------------------------------------------------------

SIZES: dict[str, Any] = {"agents": 2, "actions": 3, "state": 5, "dtype": torch.float32, "grad": False}
GOOD = {op: Problem(op, 4, **SIZES) for op in OPS}


def arguments(op: str) -> dict[str, Any]:
    problem = GOOD[op]
    given = {"states": problem.states, "actions": problem.actions, "params": problem.params}
    return given if op == "importance" else given | {"agent_qs": problem.agent_qs, "max_qs": problem.max_qs}


def call(op: str, **changes: Any) -> Any:
    functions: dict[str, Callable[..., Any]] = {"duplex": duplex, "importance": importance, "recognise": recognise}
    return functions[op](**(arguments(op) | changes))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"agent_qs": 1.0}, TypeError, "agent_qs must be a torch.Tensor, got float"),
        ({"agent_qs": torch.ones(4, 2).int()}, TypeError, "agent_qs must be a floating-point tensor"),
        ({"agent_qs": torch.ones(4, 0)}, ValueError, "at least one agent"),
        ({"agent_qs": torch.ones(4, 3)}, ValueError, r"max_qs must have shape \[..., A\] = \(4, 3\), got \(4, 2\)"),
        ({"max_qs": None}, TypeError, "max_qs must be a torch.Tensor, got NoneType"),
        ({"max_qs": torch.ones(4, 2).double()}, TypeError, "max_qs must have the dtype of agent_qs"),
        ({"states": None}, TypeError, "states must be a torch.Tensor"),
        ({"states": torch.ones(3, 5)}, ValueError, r"states must have shape .* = \(4, S\), .* got \(3, 5\)"),
        ({"states": torch.ones(4, 5).double()}, TypeError, "states must have the dtype of agent_qs"),
        ({"params": (1, 2)}, TypeError, "params must be a (DuplexParams|RecogniserParams), got tuple"),
    ],
)
@pytest.mark.parametrize("op", ["duplex", "recognise"])
def test_bad_utilities(op: str, changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(op, **changes)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"states": torch.ones(4, 4)}, ValueError, r"there are agents \(2\), got 11|params.scale\[0\].* = \(64, 4\)"),
        ({"actions": None}, TypeError, "actions must be a torch.Tensor, got NoneType"),
        ({"actions": torch.ones(4, 2)}, TypeError, "actions must have dtype torch.int64, got torch.float32"),
        ({"actions": torch.ones(3, 2).long()}, ValueError, r"actions must have shape .*4.* got \(3, 2\)"),
        ({"actions": torch.full((4, 2), 3)}, ValueError, r"actions must lie in \[-1, 3\), got 3"),
        ({"actions": torch.full((4, 2), -2)}, ValueError, r"actions must lie in \[-1, 3\), got -2"),
        ({"actions": torch.ones(4, 2, device="meta").long()}, ValueError, "actions must be on the device of states"),
        ({"backend": "fast"}, ValueError, "backend must be one of"),
    ],
)
@pytest.mark.parametrize("op", OPS)
def test_bad_actions(op: str, changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(op, **changes)


def test_bad_weights() -> None:
    params: DuplexParams = GOOD["duplex"].params
    with pytest.raises(ValueError, match="both of scale and shift, or neither"):
        call("duplex", params=params._replace(shift=()))
    with pytest.raises(ValueError, match=r"params.scale\[1\].weight must have shape .* = \(2, 64\), .* got \(1, 64\)"):
        wrong = (params.scale[0], params.scale[1]._replace(weight=torch.ones(1, 64)))
        call("duplex", params=params._replace(scale=wrong))
    with pytest.raises(TypeError, match=r"params\.importance must be an ImportanceParams, got tuple"):
        call("duplex", params=params._replace(importance=()))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="part must be one of 'both', 'v', 'adv', got 'sum'"):
        call("duplex", part="sum")
    networks: ImportanceParams = GOOD["importance"].params
    with pytest.raises(TypeError, match="params must be an ImportanceParams, got DuplexParams"):
        call("importance", params=params)
    with pytest.raises(TypeError, match="states must be a floating-point tensor"):
        call("importance", states=torch.ones(4, 5).int())
    with pytest.raises(ValueError, match=r"params.key\[0\].weight must have shape \[G, out, in\]"):
        call("importance", params=networks._replace(key=networks.key[1:]))
    with pytest.raises(TypeError, match=r"params.action must be a tuple of one or more Linear, got \(\)"):
        call("importance", params=networks._replace(action=()))
    recogniser: RecogniserParams = GOOD["recognise"].params
    with pytest.raises(ValueError, match=r"params.w1\[1\].weight must have shape .* = \(62, 64\), .* got \(64, 64\)"):
        narrow = (recogniser.w2[0], recogniser.w2[1]._replace(weight=torch.ones(31, 64), bias=torch.ones(31)))
        call("recognise", params=recogniser._replace(w2=narrow))
