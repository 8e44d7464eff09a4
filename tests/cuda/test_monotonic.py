"""`monotonic`'s CUDA kernels over rows, emulated on the host: all that they leave in memory, in both precisions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastmix.ops.monotonic import POSITIVITIES, MonotonicParams, reference
from fastmix.testing import assert_close
from tests.cuda import emulate

HIDDEN, EMBED = 64, 32  # what H and E are padded to
COLUMNS = (slice(0, 64), slice(64, 128), slice(128, 160), slice(160, 192))  # of h1, h2, b1 and V's hidden layer
TOLERANCE = {"full": 2e-6, "tf32": 3e-5}
"""RMS ratio; with tf32, where two computations may round an operand to neighbours, against products of rounded ones."""


class Problem(NamedTuple):
    agent_qs: Tensor
    states: Tensor
    params: MonotonicParams
    grad: Tensor
    positivity: str


class Results(NamedTuple):
    """What the kernels leave, without padding: activations and their gradients of h1, h2, b1 and V's hidden layer."""

    q_tot: Tensor
    activations: list[Tensor]
    grad_agent_qs: Tensor
    grad_activations: list[Tensor]
    slopes: Tensor
    """``[rows, A + 1, E]``: -1, 0 or 1, those of w2 last"""


def make(rows: int, A: int, E: int, H: int, S: int, positivity: str = "abs", seed: int = 0) -> Problem:
    g = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return (torch.rand(shape, generator=g) * 2 - 1) / shape[-1] ** 0.5

    shapes = ((H, S), (H,), (A * E, H), (A * E,), (H, S), (H,), (E, H), (E,), (E, S), (E,), (E, S), (E,), (1, E), (1,))
    params = MonotonicParams(*(uniform(*shape) for shape in shapes))
    qs, states = torch.randn(rows, A, generator=g), torch.randn(rows, S, generator=g)
    return Problem(qs, states, params, torch.randn(rows, generator=g), positivity)


def run(problem: Problem, precision: str) -> Results:
    """The kernels on poisoned memory, with one group of rows or two."""
    core: Any = emulate.core("monotonic")
    qs, states, params, grad, positivity = problem
    rows, A = grad.numel(), qs.shape[-1]
    assert params.w1_hidden_weight is not None
    H, S = params.w1_hidden_weight.shape
    E = params.b1_bias.numel()
    sizes, code, full = (rows, A, E, H, S), POSITIVITIES.index(positivity), precision == "full"
    q_tot, unkept = torch.full((rows,), torch.nan), torch.full((rows,), torch.nan)
    packed = torch.full((core.monotonic_packed_cuda(A, S),), torch.nan)
    activations, grad_activations = torch.full((2, rows, 192), torch.nan)
    grad_qs = torch.full((rows, A), torch.nan)
    signs = torch.full((rows, A + 1, 2), 0x5A5A5A5A, dtype=torch.int32)

    core.monotonic_pack_cuda([p.data_ptr() for p in params if p is not None], packed.data_ptr(), sizes, full, 0)
    for result, kept in ((q_tot, activations.data_ptr()), (unkept, 0)):
        core.monotonic_forward_cuda(
            layout(qs), layout(states), packed.data_ptr(), result.data_ptr(), kept, sizes, code, full, 0
        )
    assert torch.equal(q_tot.isnan(), unkept.isnan()) and torch.equal(q_tot.nan_to_num(), unkept.nan_to_num())
    core.monotonic_backward_rows_cuda(
        layout(qs), packed.data_ptr(), grad.data_ptr(), activations.data_ptr(), grad_qs.data_ptr(),
        grad_activations.data_ptr(), signs.data_ptr(), sizes, code, full, 0,
    )  # fmt: skip

    def unpadded(columns: Tensor) -> list[Tensor]:
        parts = [columns[:, part] for part in COLUMNS]
        for part, width in zip(parts, (H, H, E, E), strict=True):
            assert (part[:, width:].isnan() | (part[:, width:] == 0)).all()
        return [part[:, :width] for part, width in zip(parts, (H, H, E, E), strict=True)]

    bits = signs.unsqueeze(-1).long() >> torch.arange(32) & 1
    assert (bits[..., E:] == 0).all()
    slopes = bits[:, :, 0, :E] - bits[:, :, 1, :E]
    return Results(q_tot, unpadded(activations), grad_qs, unpadded(grad_activations), slopes)


def layout(tensor: Tensor) -> tuple[int, int, int, int, int]:
    outer, inner, column = tensor.stride() if tensor.dim() == 3 else (0, *tensor.stride())
    return tensor.data_ptr(), max(tensor.shape[-2], 1), outer, inner, column


class _RoundedLinear(torch.autograd.Function):
    """`F.linear` whose products, in both directions, are of operands rounded to tf32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return F.linear(rounded(x), rounded(weight), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return rounded(grads[0]) @ rounded(ctx.saved_tensors[0]), None, None


def rounded(x: Tensor) -> Tensor:
    return ((x.float().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32).double()


def expect(problem: Problem, precision: str) -> tuple[Results, Tensor]:
    """The same in float64, and the generated weights before positivity."""
    rows, A = problem.grad.numel(), problem.agent_qs.shape[-1]
    p = MonotonicParams(*(param.double() for param in problem.params if param is not None))
    qs, states = problem.agent_qs.double().reshape(rows, A), problem.states.double().reshape(rows, -1)
    linear: Callable[..., Tensor] = F.linear if precision == "full" else _RoundedLinear.apply
    first = [
        linear(states, weight, bias).requires_grad_()
        for weight, bias in (
            (p.w1_hidden_weight, p.w1_hidden_bias), (p.w2_hidden_weight, p.w2_hidden_bias),
            (p.b1_weight, p.b1_bias), (p.v_hidden_weight, p.v_hidden_bias),
        )
    ]  # fmt: skip
    qs.requires_grad_()
    h1, h2, hv = (F.relu(first[i]) for i in (0, 1, 3))
    z1, z2 = linear(h1, p.w1_weight, p.w1_bias).view(rows, A, -1), linear(h2, p.w2_weight, p.w2_bias)
    w1, w2 = (reference.positive(z, problem.positivity, 1.0) for z in (z1, z2))
    mix = torch.einsum("ra,rae->re", qs, w1) + first[2]
    q_tot = (F.elu(mix) * w2).sum(1) + F.linear(hv, p.v_weight, p.v_bias).squeeze(1)
    if precision == "full":
        assert_close(q_tot, reference.monotonic(qs, states, p, problem.positivity, 1.0), 1e-12)
    grad_qs, *grads = torch.autograd.grad(q_tot, [qs, *first], problem.grad.double())
    generated = torch.cat([z1, z2.unsqueeze(1)], 1)
    slopes = generated.sign() if problem.positivity == "abs" else torch.ones_like(generated)
    kept = [h1, h2] if precision == "full" else [rounded(h1), rounded(h2)]
    return Results(q_tot, [*kept, mix, hv], grad_qs, grads, slopes.long()), generated


def assert_parity(problem: Problem, precision: str) -> None:
    ours, (expected, generated) = run(problem, precision), expect(problem, precision)
    tolerance = TOLERANCE[precision]
    assert_close(ours.q_tot, expected.q_tot, tolerance, name="q_tot")
    assert_close(ours.grad_agent_qs, expected.grad_agent_qs, tolerance, name="gradient of agent_qs")
    for name, kept, wanted in zip(("h1", "h2", "mix", "v"), ours.activations, expected.activations, strict=True):
        assert_close(kept, wanted, tolerance, name=name)
    grads = zip(("h1", "h2", "b1", "v"), ours.grad_activations, expected.grad_activations, strict=True)
    for name, grad, wanted in grads:
        assert_close(grad, wanted, tolerance, name=f"gradient of {name}")
    clear = generated.abs() > 1e-4 * generated.abs().max() if generated.numel() else generated > 0
    assert torch.equal(ours.slopes[clear], expected.slopes[clear])


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize(
    ("rows", "A", "E", "H", "S"),
    [
        (40, 5, 32, 64, 98), (1, 1, 1, 1, 1), (15, 2, 31, 33, 7), (16, 5, 32, 64, 8), (17, 27, 32, 64, 9),
        (2, 64, 32, 64, 40), (130, 2, 32, 64, 33), (3, 10, 32, 64, 322), (300, 1, 8, 5, 6),
    ],
)  # fmt: skip
def test_parity(rows: int, A: int, E: int, H: int, S: int, precision: str) -> None:
    assert_parity(make(rows, A, E, H, S), precision)
