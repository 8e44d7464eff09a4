"""`monotonic` in Triton's interpreter, which takes milliseconds a program: few programs, odd sizes."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

import fastmix
from fastmix import backends
from fastmix.ops import _triton
from fastmix.ops.monotonic import POSITIVITIES, MonotonicParams, monotonic
from fastmix.ops.monotonic import triton as kernels
from fastmix.testing import assert_close, poisoned_allocations, rms_ratio
from fastmix.testing.golden import Golden
from tests import monotonic_problem
from tests.generators import non_contiguous
from tests.golden_rules import Rule, Setting, find_rule
from tests.monotonic_problem import Problem, golden_files, make, solve

FLOAT32 = 1e-6
check = partial(monotonic_problem.check, backend="triton")
KINKS = 3e-2
"""Of gradients in lower precision: weights and hidden units near zero change sign, and with it their slope."""


@pytest.fixture(autouse=True)
def _small_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of a device with one multiprocessor: large, so that there are few programs."""
    monkeypatch.setattr(kernels, "multiprocessors", lambda device: 1)


@pytest.mark.parametrize(
    ("A", "S", "rows", "sizes"),
    [
        (3, 48, 70, {}),
        (5, 98, 100, {}),
        (27, 40, 33, {"E": 33}),
        (1, 7, 33, {"E": 1, "H": 1}),
        (2, 9, 65, {"E": 31, "H": 33}),
        (2, 33, 40, {"E": 16, "H": 128}),
        (64, 12, 17, {"E": 3, "H": 16}),
        (1, 20, 17, {"E": 129, "H": 64}),
        (1, 600, 17, {"E": 4, "H": 4}),
        (3, 48, 70, {"layers": 1}),
        (2, 130, 33, {"E": 31, "layers": 1}),
        (1, 1, 33, {"E": 1, "layers": 1}),
        (2, 20, 17, {"E": 128, "layers": 1}),
    ],
)
def test_float64_reference_is_met(A: int, S: int, rows: int, sizes: dict[str, Any]) -> None:
    check(make(A, S, rows, **sizes), FLOAT32)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("positivity", POSITIVITIES[1:])
def test_every_positivity(positivity: str, layers: int) -> None:
    check(make(3, 20, 40, E=5, layers=layers, positivity=positivity, beta=2.5), FLOAT32)


@pytest.mark.parametrize("layers", [1, 2])
def test_small_tiles(layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "multiprocessors", lambda device: 132)
    check(make(2, 17, 50, E=8, H=16, layers=layers), FLOAT32)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("rows", [0, 1])
def test_few_rows(rows: int, layers: int) -> None:
    problem = make(2, 9, rows, E=4, H=5, layers=layers)
    if rows:
        check(problem, FLOAT32)
        return
    out = kernels.monotonic(*problem[:3], "abs", 1.0)
    grads = torch.autograd.grad(out.sum(), list(problem.inputs().values()))
    assert out.shape == (0,)
    assert all(not grad.any() for grad in grads)


def test_one_tf32_product_rounds_its_operands(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter multiplies float32, so only the rounding remains; truncation would give 10 times the error."""
    problem = make(3, 48, 100)
    expected, _ = solve(problem)
    monkeypatch.setattr(_triton, "float32_precision", lambda: "high")
    check(problem, 4e-4, grads=KINKS)
    assert rms_ratio(kernels.monotonic(*problem[:3], "abs", 1.0), expected) > 1e-5
    _, _, packed = kernels._forward(problem.agent_qs, problem.states, *problem.params, 0, 1.0, True)
    second, first, _ = kernels._unpack(packed, kernels.plan(3, 32, 64, 48, 2))
    for weights in (second, first):
        assert not (weights.contiguous().view(torch.int32) & 0x1FFF).any()


def test_precision_follows_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> str:
        raise RuntimeError("mix of the legacy and new APIs")

    assert _triton.dot_precision(torch.bfloat16) == "none"
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "highest")
    assert _triton.dot_precision(torch.float32) == "tf32x3"
    for precision in ("high", "medium"):
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda precision=precision: precision)
        assert _triton.dot_precision(torch.float32) == "tf32"
    monkeypatch.setattr(torch, "get_float32_matmul_precision", refuse)
    assert _triton.dot_precision(torch.float32) == "tf32x3"


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_autocast(dtype: torch.dtype, tolerance: float, layers: int) -> None:
    """The interpreter cuts off instead of rounding when it stores bfloat16, hence twice the usual tolerance."""
    problem = make(3, 20, 40, E=8, H=16, layers=layers)
    with torch.autocast("cpu", dtype):
        check(problem, tolerance, grads=5 * KINKS if dtype == torch.bfloat16 else KINKS)
        assert kernels.monotonic(problem.agent_qs.to(dtype), *problem[1:3], "abs", 1.0).dtype == torch.float32


def test_half_precision_parameters() -> None:
    problem = make(3, 20, 40, E=8, H=16).to(dtype=torch.float16)
    check(problem, 2e-3, grads=KINKS)
    assert kernels.monotonic(*problem[:3], "abs", 1.0).dtype == torch.float16


@pytest.mark.parametrize("layers", [1, 2])
def test_strides(layers: int) -> None:
    plain = make(3, 10, 40, E=8, H=16, layers=layers)
    expected, expected_grads = solve(plain)
    q, s, params = non_contiguous(plain.agent_qs.detach()), non_contiguous(plain.states.detach()), plain.params
    gaps = torch.full((40, 15), float("nan"))
    gaps[:, 2:12] = plain.states.detach()
    params = MonotonicParams(*(None if p is None else non_contiguous(p.detach()) for p in params))  # type: ignore[arg-type]
    cotangent = plain.cotangent.new_full((40, 3), float("nan"))
    cotangent[:, 1] = plain.cotangent
    for states in (s, gaps[:, 2:12]):
        problem = Problem(q.requires_grad_(), states.requires_grad_(), params, cotangent[:, 1], "abs", 1.0)
        inputs = {k: v.requires_grad_() for k, v in problem.inputs().items()}
        out = kernels.monotonic(*problem[:3], "abs", 1.0)
        grads = torch.autograd.grad(out, list(inputs.values()), problem.cotangent)
        assert_close(out, expected, FLOAT32)
        for name, grad in zip(inputs, grads, strict=True):
            assert_close(grad, expected_grads[name], FLOAT32 * 10, name=name)


def test_expanded_inputs() -> None:
    problem = make(3, 10, 1, E=8, H=16)
    q, s = problem.agent_qs.detach().expand(20, -1).requires_grad_(), problem.states.detach().expand(20, -1)
    out = kernels.monotonic(q, s, problem.params, "abs", 1.0)
    (grad,) = torch.autograd.grad(out.sum(), q)  # the gradient of a sum is expanded too
    expected, _ = solve(problem)
    assert_close(out, expected.expand(20), FLOAT32)
    assert_close(grad, grad[:1].expand(20, -1), FLOAT32)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("wanted", [("agent_qs",), ("states",), ("w1_bias",), ("agent_qs", "v_weight")])
def test_only_the_gradients_asked_for(wanted: tuple[str, ...], layers: int) -> None:
    problem = make(3, 10, 20, E=8, H=16, layers=layers)
    _, expected = solve(problem)
    inputs = problem.inputs()
    for name, tensor in inputs.items():
        tensor.requires_grad_(name in wanted)
    kernels.monotonic(*problem[:3], "abs", 1.0).backward(problem.cotangent)
    for name, tensor in inputs.items():
        assert (tensor.grad is not None) == (name in wanted)
        if tensor.grad is not None:
            assert_close(tensor.grad, expected[name], FLOAT32, name=name)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("positivity", ["abs", "softplus"])
def test_no_unwritten_memory_is_used(positivity: str, layers: int) -> None:
    problem = make(3, 9, 70, E=5, H=7, layers=layers, positivity=positivity)

    def run() -> list[Tensor]:
        inputs = list(problem.inputs().values())
        out = kernels.monotonic(*problem[:3], positivity, 1.0)
        with torch.no_grad():
            fused = kernels.monotonic(*problem[:3], positivity, 1.0)
        return [out, fused, *torch.autograd.grad(out, inputs, problem.cotangent)]

    plain = run()
    with poisoned_allocations() as report:
        poisoned = run()
    assert report.count > 5
    for a, b in zip(plain, poisoned, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy, about what a GPU does silently
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_rows_are_independent(bad: float, layers: int) -> None:
    problem = make(3, 9, 40, E=5, H=7, layers=layers)
    spoiled = problem.to()
    with torch.no_grad():
        spoiled.states[3] = bad
        spoiled.agent_qs[7] = bad
    outs = []
    for p in (problem, spoiled):
        out = kernels.monotonic(*p[:3], "abs", 1.0)
        outs.append((out, *torch.autograd.grad(out, [p.agent_qs, p.states], p.cotangent)))
        with torch.no_grad():
            outs[-1] += (kernels.monotonic(*p[:3], "abs", 1.0),)
    others = [row for row in range(40) if row not in (3, 7)]
    for clean, dirty in zip(*outs, strict=True):
        assert torch.equal(clean[others], dirty[others])
    assert not torch.isfinite(outs[1][0][[3, 7]]).any()


@pytest.mark.parametrize("layers", [1, 2])
def test_derivative_of_abs_at_zero_is_zero(layers: int) -> None:
    problem = make(2, 6, 20, E=4, H=5, layers=layers)
    with torch.no_grad():
        for parameter in (problem.params.w1_weight, problem.params.w1_bias, problem.params.w2_weight):
            parameter.zero_()
        problem.params.w2_bias[:2] = 0
    check(problem, FLOAT32)


def test_operator_is_sound() -> None:
    """Schema, fake implementation, autograd and tracing agree, with and without saving."""
    problem = make(2, 9, 20, E=4, H=5)
    for save in (True, False):
        args: tuple[Any, ...] = (*problem[:2], *problem.params, 0, 1.0, save)
        if not save:
            args = tuple(a.detach() if isinstance(a, Tensor) else a for a in args)
        torch.library.opcheck(torch.ops.fastmix.monotonic_triton.default, args, rtol=1e-4, atol=1e-5)


def test_nothing_saved_nothing_differentiated() -> None:
    problem = make(2, 9, 20, E=4, H=5)
    out, *_ = torch.ops.fastmix.monotonic_triton(*problem[:2], *problem.params, 0, 1.0, False)
    with pytest.raises(RuntimeError, match="save=False"):
        out.sum().backward()


@pytest.mark.parametrize("layers", [1, 2])
def test_compiles_without_a_graph_break(layers: int) -> None:
    problem = make(2, 9, 20, E=4, H=5, layers=layers)
    _, expected = solve(problem)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def loss(q: Tensor, s: Tensor, params: MonotonicParams) -> Tensor:
        from fastmix.ops.monotonic import triton as kernels

        return (kernels.monotonic(q, s, params, "abs", 1.0) * problem.cotangent).sum()

    loss(*problem[:3]).backward()
    for name, tensor in problem.inputs().items():
        assert tensor.grad is not None
        assert_close(tensor.grad, expected[name], FLOAT32 * 10, name=name)


@triton.jit
def _functions(x_ptr, out_ptr, beta, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.arange(0, SIZE)
    x = tl.load(x_ptr + i)
    tl.store(out_ptr + i, _triton.elu(x))
    tl.store(out_ptr + SIZE + i, _triton.elu_slope(x))
    tl.store(out_ptr + 2 * SIZE + i, _triton.softplus(x, beta))
    tl.store(out_ptr + 3 * SIZE + i, _triton.softplus_slope(x, beta))


@pytest.mark.parametrize("beta", [0.5, 1.0, 3.0])
def test_device_functions_are_exact(beta: float) -> None:
    """Relative error of every entry, from 1e-20 to 80, and NaN for NaN."""
    positive = torch.logspace(-20, 1.9, 2047)
    x = torch.cat([positive, torch.zeros(1), -positive, torch.tensor([float("nan")])])
    out = torch.empty(4, x.numel())
    _functions[(1,)](x, out, beta, SIZE=x.numel())
    exact = x.double().requires_grad_()
    elu, softplus = F.elu(exact), F.softplus(exact, beta=beta)
    (elu_slope,) = torch.autograd.grad(elu.sum(), exact, retain_graph=True)
    (softplus_slope,) = torch.autograd.grad(softplus.sum(), exact)
    for actual, expected in zip(out, (elu, elu_slope, softplus, softplus_slope), strict=True):
        assert actual[-1].isnan()
        actual, expected = actual[:-1].double(), expected.detach()[:-1]
        normal = expected.abs() > 1e-36
        assert ((actual - expected).abs()[normal] / expected.abs()[normal]).max() < 1e-5
        assert (actual[~normal].abs() < 1e-35).all()


@pytest.mark.parametrize("file", golden_files())
def test_reference_numbers(file: Golden) -> None:
    rule = find_rule(file)
    assert isinstance(rule, Rule)
    rule.run(file, Setting("triton", torch.float32, "cpu"))


def test_the_public_function_reaches_the_kernels() -> None:
    """With any leading dimensions, and only when asked for: on the CPU it is never chosen."""
    problem = make(3, 9, 24, E=4, H=5)
    q, s = problem.agent_qs.view(2, 3, 4, 3), problem.states.view(2, 3, 4, 9)
    expected, _ = solve(problem)
    with torch.no_grad(), fastmix.backend("triton"):
        out = monotonic(q, s, problem.params)
    assert_close(out, expected.view(2, 3, 4, 1), FLOAT32)
    assert backends.resolve("monotonic", q) != "triton"
    with pytest.raises(RuntimeError, match="got torch"):
        monotonic(*problem.to("cpu", torch.float64)[:3], backend="triton")
