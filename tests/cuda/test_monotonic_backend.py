"""Backend ``native`` of `monotonic` on CUDA from end to end, its kernels emulated, on CPU tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from fastmix import backends
from fastmix.ops import _library
from fastmix.ops.monotonic import MonotonicParams, cuda, monotonic, native
from fastmix.testing import assert_close, poisoned_allocations
from fastmix.testing.golden import Golden
from tests.cuda import emulate
from tests.generators import non_contiguous
from tests.golden_rules import Rule, Setting, find_rule
from tests.monotonic_problem import Problem, check, cut_off, golden_files, make, mix
from tests.ops.support import fullgraph

KINKS = 0.1
"""Of gradients in lower precision: weights and hidden units near zero change sign, and with it their slope."""


@pytest.fixture(autouse=True)
def _emulated() -> Iterator[None]:
    """Backend ``native`` takes CPU tensors to the CUDA kernels; a precision that a test sets ends with it."""
    from fastmix import _core

    kernels: Any = emulate.core("monotonic")
    names = [name for name in vars(kernels) if name.endswith("_cuda")]
    outer = torch.get_float32_matmul_precision()
    with (
        mock.patch.multiple(_core, create=True, **{name: getattr(kernels, name) for name in names}),
        mock.patch.object(_library, "queue_on", lambda device, function, *args: function(*args, 0)),
        mock.patch.object(
            native, "monotonic", lambda qs, states, params, positivity, beta: _checked(qs, states, params, positivity)
        ),
    ):
        yield
    torch.set_float32_matmul_precision(outer)


def _checked(qs: Tensor, states: Tensor, params: MonotonicParams, positivity: str) -> Tensor:
    limit = cuda.limit(qs, states, params, positivity)
    if limit is not None:
        raise backends.UnavailableError(limit)
    return cuda.monotonic(qs, states, params, positivity)


def run(problem: Problem) -> list[Tensor]:
    out = mix(problem, "native")
    return [out.detach(), *torch.autograd.grad(out, list(problem.inputs().values()), problem.cotangent)]


@pytest.mark.parametrize(("setting", "tolerance", "grads"), [("highest", 2e-6, 1e-5), ("high", 1e-3, KINKS)])
@pytest.mark.parametrize(
    ("A", "S", "rows", "sizes"),
    [
        (5, 98, 70, {}), (1, 1, 33, {"E": 1, "H": 1}), (2, 7, 140, {"E": 31, "H": 33}), (27, 9, 20, {}),
        (10, 322, 40, {}), (64, 40, 90, {}), (3, 48, 1, {}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("positivity", ["abs", "none"])
def test_float64_reference_is_met(
    positivity: str, A: int, S: int, rows: int, sizes: dict[str, int], setting: str, tolerance: float, grads: float
) -> None:
    torch.set_float32_matmul_precision(setting)
    if setting == "highest":
        tolerance = max(tolerance, cut_off(S))
        grads = max(grads, 6 * tolerance)
    with poisoned_allocations() as report:
        check(make(A, S, rows, positivity=positivity, **sizes), tolerance, grads=grads, backend="native")
    assert report.count >= 7


def test_no_rows() -> None:
    problem = make(3, 9, 0)
    out = mix(problem, "native")
    grads = torch.autograd.grad(out, list(problem.inputs().values()), problem.cotangent)
    assert out.shape == (0,) and all(not grad.any() for grad in grads)
    assert [grad.shape for grad in grads] == [tensor.shape for tensor in problem.inputs().values()]


def test_strides() -> None:
    plain = make(5, 19, 66)
    expected = run(plain)
    params = MonotonicParams(*(non_contiguous(p.detach()).requires_grad_() for p in plain.params if p is not None))
    shape = (6, 11)
    sliced_qs = torch.zeros(6, 12, 5)[:, 1:].copy_(plain.agent_qs.detach().view(*shape, 5))
    sliced_states = torch.zeros(6, 12, 19)[:, :-1].copy_(plain.states.detach().view(*shape, 19))
    turned = plain.states.detach().view(*shape, 19).transpose(0, 1).contiguous().transpose(0, 1)
    spread = non_contiguous(plain.agent_qs.detach().view(*shape, 5))
    for qs, states in (
        (sliced_qs, sliced_states),
        (spread, turned),
        (spread, non_contiguous(plain.states.detach()).view(*shape, 19)),
    ):
        problem = plain._replace(agent_qs=qs.requires_grad_(), states=states.requires_grad_(), params=params)
        for ours, wanted in zip(run(problem), expected, strict=True):
            assert_close(ours.view(wanted.shape), wanted, 1e-6)


@pytest.mark.parametrize(
    "wanted", [["agent_qs"], ["states"], ["w1_weight"], ["v_bias", "agent_qs"], ["states", "b1_bias"]]
)
def test_every_subset_of_gradients(wanted: list[str]) -> None:
    problem = make(3, 9, 40, E=8)
    expected = dict(zip(problem.inputs(), run(problem)[1:], strict=True))
    inputs = {name: tensor.detach().requires_grad_(name in wanted) for name, tensor in problem.inputs().items()}
    qs, states, *params = inputs.values()
    monotonic(qs, states, MonotonicParams(*params), backend="native").backward(problem.cotangent.unsqueeze(-1))
    for name, tensor in inputs.items():
        assert (tensor.grad is not None) == (name in wanted)
        assert tensor.grad is None or torch.equal(tensor.grad, expected[name])


def test_nothing_is_kept_without_need() -> None:
    problem = make(3, 9, 40)
    with torch.no_grad():
        assert not mix(problem, "native").requires_grad
    packed = cuda._packed_size(3, 9)
    for training, size in ((False, packed), (True, packed + 40 * 192)):
        kept = cuda._forward(*problem[:2], *problem.params, 0, training)[1]
        assert kept.numel() == size
    with pytest.raises(RuntimeError, match="training=False and cannot be differentiated"):
        cuda._monotonic(*problem[:2], *problem.params, 0, False)[0].sum().backward()


@pytest.mark.parametrize("where", ["agent_qs", "states"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_bad_row_spoils_no_other(value: float, where: str) -> None:
    problem = make(5, 19, 70)
    clean = run(problem)
    with torch.no_grad():
        getattr(problem, where)[41, 2] = value
    spoilt, others = run(problem), torch.arange(70) != 41
    for ours, wanted in zip(spoilt[:3], clean[:3], strict=True):
        assert torch.equal(ours[others], wanted[others])
    if value != value:
        assert spoilt[0][41].isnan() and spoilt[3].isnan().any()


def test_absolute_value_has_slope_zero_at_zero() -> None:
    problem = make(3, 9, 70)
    with torch.no_grad():
        problem.params.w1_weight[:32].zero_()
        problem.params.w1_bias[:32].zero_()
        problem.params.w2_weight[:16].zero_()
        problem.params.w2_bias[:16].zero_()
    check(problem, 2e-6, grads=1e-5, backend="native")


def test_second_derivatives_raise() -> None:
    problem = make(2, 5, 9)
    out = monotonic(*problem[:3], backend="native")
    (grad,) = torch.autograd.grad(out, problem.agent_qs, torch.ones(9, 1, requires_grad=True), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.fixture
def dispatched() -> Iterator[None]:
    """The ops are there for CPU tensors too."""
    library = torch.library.Library("fastmix", "IMPL")
    library.impl("monotonic_cuda", cuda._forward, "CPU")
    library.impl("monotonic_cuda_backward", cuda._backward_forward, "CPU")
    yield
    library._destroy()


@pytest.mark.usefixtures("dispatched")
@pytest.mark.parametrize("training", [True, False])
def test_opcheck(training: bool) -> None:
    problem = make(2, 5, 9)
    tensors = [t if training else t.detach() for t in problem.inputs().values()]
    torch.library.opcheck(torch.ops.fastmix.monotonic_cuda.default, (*tensors, 0, training))


@pytest.mark.usefixtures("dispatched")
def test_opcheck_of_backward() -> None:
    tensors = [tensor.detach() for tensor in make(2, 5, 9).inputs().values()]
    _, kept = cuda._forward(*tensors, 0, True)
    arguments = (torch.randn(9, 1), *tensors, kept, 0)
    for wants in ((True, True), (False, True), (True, False), (False, False)):
        torch.library.opcheck(torch.ops.fastmix.monotonic_cuda_backward.default, (*arguments, *wants))


@pytest.mark.usefixtures("dispatched")
def test_compiles_whole() -> None:
    problem = make(2, 5, 12)
    fast = fullgraph(lambda q, s, *params: monotonic(q, s, MonotonicParams(*params), backend="native"))
    inputs = list(problem.inputs().values())
    out = fast(*inputs)
    expected = run(problem)
    assert torch.equal(out.flatten(), expected[0])
    for ours, wanted in zip(torch.autograd.grad(out.flatten(), inputs, problem.cotangent), expected[1:], strict=True):
        assert torch.equal(ours, wanted)


@pytest.mark.parametrize("file", golden_files())
def test_reference_numbers(file: Golden) -> None:
    rule = find_rule(file)
    assert isinstance(rule, Rule)
    try:
        rule.run(file, Setting("native", torch.float32, "cpu"))
    except backends.UnavailableError as reason:
        assert "positivity" in str(reason) or "two layers" in str(reason)


def test_limit() -> None:
    def limit(
        A: int = 5, S: int = 9, positivity: str = "abs", dtype: torch.dtype = torch.float32, **sizes: int
    ) -> str | None:
        problem = make(A, S, 2, positivity=positivity, **sizes).to(dtype=dtype)
        return cuda.limit(*problem[:3], positivity)

    assert limit() is None and limit(64, 4096, "none", E=32, H=64) is None and limit(1, 1, E=1, H=1) is None
    cases: dict[str, dict[str, Any]] = {
        "float32": {"dtype": torch.float64}, "two layers": {"layers": 1}, "positivity": {"positivity": "softplus"},
        "layers of up to 64": {"H": 65}, "embed of up to 32": {"E": 33}, "64 agents": {"A": 65}, "4096": {"S": 4097},
    }  # fmt: skip
    for reason, changes in cases.items():
        assert reason in str(limit(**changes))
    assert backends.TABLE["monotonic"]["cuda"] == ("native", "triton", "reference")
