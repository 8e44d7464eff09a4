"""`monotonic`'s CUDA kernels for the gradients of the weights, emulated on the host: on any activations and slopes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastmix.ops.monotonic import POSITIVITIES, MonotonicParams
from fastmix.testing import assert_close
from tests.cuda import emulate
from tests.cuda.test_monotonic import layout, rounded

PRECISIONS = ("full", "tf32")
TOLERANCE = 2e-6
"""RMS ratio in both precisions: products of rounded operands are compared with sums of such products in float64."""


class Problem(NamedTuple):
    """What the rows' kernels leave for the weights'; sizes are those of the network."""

    agent_qs: Tensor
    states: Tensor
    grad: Tensor
    activations: Tensor
    grad_activations: Tensor
    slopes: Tensor
    """``[rows, A + 1, 32]``: -1, 0 or 1"""
    embed: int
    hidden: int
    positivity: str


def make(rows: int, A: int, E: int, H: int, S: int, *, positivity: str = "abs", zeros: float = 0.0) -> Problem:
    """``zeros``: how often a slope is 0."""
    g = torch.Generator().manual_seed(rows + A)
    inside = torch.zeros(192, dtype=torch.bool)
    for start, width in ((0, H), (64, H), (128, E), (160, E)):
        inside[start : start + width] = True
    activations, grad_activations = torch.randn(2, rows, 192, generator=g) * inside
    hidden = activations[:, :128]
    hidden.copy_(rounded(hidden.relu()))  # tf32, as it is where precision is not full
    activations[:, 160:].relu_()
    slopes = torch.ones(rows, A + 1, 32)
    if positivity == "abs":
        slopes = torch.where(torch.rand(slopes.shape, generator=g) < 0.5, slopes, -slopes)
        slopes *= torch.rand(slopes.shape, generator=g) >= zeros
    qs, states = torch.randn(rows, A, generator=g), torch.randn(rows, S, generator=g)
    grad = torch.randn(rows, generator=g)
    return Problem(qs, states, grad, activations, grad_activations, slopes, E, H, positivity)


def run(problem: Problem, precision: str) -> MonotonicParams:
    core: Any = emulate.core("monotonic")
    qs, states, grad, activations, grad_activations, slopes, E, H, positivity = problem
    rows, A, S = grad.numel(), qs.shape[-1], states.shape[-1]
    bit = 1 << torch.arange(E)
    positive, negative = ((slopes[..., :E] == sign).long() @ bit for sign in (1, -1))
    signs = torch.stack([positive, negative], -1)
    signs = torch.where(signs >= 2**31, signs - 2**32, signs).int()
    sizes, full = (rows, A, E, H, S), precision == "full"
    parts = torch.full((core.monotonic_parts_cuda(sizes, full, 0),), torch.nan)
    shapes = ((H, S), (H,), (A * E, H), (A * E,), (H, S), (H,), (E, H), (E,), (E, S), (E,), (E, S), (E,), (1, E), (1,))
    gradients = [torch.Size(shape) for shape in shapes]
    flat = torch.full((sum(shape.numel() for shape in gradients) + 1,), torch.nan)
    core.monotonic_backward_weights_cuda(
        layout(qs), layout(states), grad.data_ptr(), activations.data_ptr(), grad_activations.data_ptr(),
        signs.data_ptr() if positivity == "abs" else 0, parts.data_ptr(), parts.numel(), flat.data_ptr(),
        sizes, POSITIVITIES.index(positivity), full, 0,
    )  # fmt: skip
    assert flat[-1].isnan()
    split = flat[:-1].split([shape.numel() for shape in gradients])
    return MonotonicParams(*(part.view(shape) for part, shape in zip(split, gradients, strict=True)))


def expect(problem: Problem, precision: str) -> MonotonicParams:
    """Sums over the rows in float64, of products whose operands are rounded as the kernels do."""
    qs, states, grad, activations, grad_activations, slopes, E, H, _ = problem
    rows, A = grad.numel(), qs.shape[-1]
    operand = Tensor.double if precision == "full" else rounded
    qs, states = qs.reshape(rows, A), states.reshape(rows, -1)
    h1, h2, mix, v = (activations[:, s : s + n] for s, n in ((0, H), (64, H), (128, E), (160, E)))
    grad_first = [grad_activations[:, s : s + n] for s, n in ((0, H), (64, H), (128, E), (160, E))]
    x = qs.unsqueeze(-1) * grad_first[2].unsqueeze(1) * slopes[:, :A, :E]
    x2 = grad.unsqueeze(-1) * F.elu(mix) * slopes[:, A, :E]
    first = [(operand(d).T @ operand(states), operand(d).sum(0)) for d in grad_first]
    return MonotonicParams(
        *first[0],
        operand(x.reshape(rows, -1)).T @ operand(h1), x.double().sum(0).flatten(),
        *first[1],
        operand(x2).T @ operand(h2), x2.double().sum(0),
        *first[2],
        *first[3],
        grad.double().unsqueeze(0) @ v.double(), grad.double().sum(0, keepdim=True),
    )  # fmt: skip


def assert_parity(problem: Problem, precision: str) -> None:
    ours, expected = run(problem, precision), expect(problem, precision)
    for name, grad, wanted in zip(MonotonicParams._fields, ours, expected, strict=True):
        assert grad is not None and wanted is not None
        if grad.numel() == 1:  # a sum of numbers of either sign may be nearly nothing
            assert (grad - wanted).abs().item() <= TOLERANCE * problem.activations.norm().clamp(min=1).item(), name
        else:
            assert_close(grad, wanted, TOLERANCE, name=name)


@pytest.fixture(params=[False, True], ids=["ascending", "descending"], autouse=True)
def _order(request: pytest.FixtureRequest) -> Iterator[None]:
    core: Any = emulate.core("monotonic")
    core.descending(request.param)
    yield
    core.descending(False)
    core.device(0)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("rows", "A", "E", "H", "S"),
    [
        (40, 5, 32, 64, 98), (1, 1, 1, 1, 1), (15, 2, 31, 33, 7), (129, 3, 32, 64, 48), (9, 27, 32, 64, 9),
        (70, 8, 7, 40, 112), (33, 10, 32, 64, 322), (8, 64, 32, 64, 16), (300, 1, 8, 5, 6),
    ],
)  # fmt: skip
def test_parity(rows: int, A: int, E: int, H: int, S: int, precision: str) -> None:
    assert_parity(make(rows, A, E, H, S), precision)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("rows", "A", "S"), [(200, 3, 7), (200, 7, 98), (130, 5, 322)])
def test_a_device_of_less_shared_memory(rows: int, A: int, S: int, precision: str) -> None:
    core: Any = emulate.core("monotonic")
    core.device(1)
    assert_parity(make(rows, A, 32, 64, S, zeros=0.01), precision)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_no_positivity(precision: str) -> None:
    assert_parity(make(70, 5, 31, 64, 98, positivity="none"), precision)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("zeros", [0.001, 0.3, 1.0])
def test_slopes_of_zero(zeros: float, precision: str) -> None:
    problem = make(200, 5, 30, 64, 7, zeros=zeros)
    ours, expected = run(problem, precision), expect(problem, precision)
    if zeros == 1:
        assert all((grad == 0).all() for grad in (ours.w1_weight, ours.w1_bias, ours.w2_weight, ours.w2_bias))
    else:
        for name in ("w1_weight", "w1_bias", "w2_weight", "w2_bias"):
            assert_close(getattr(ours, name), getattr(expected, name), TOLERANCE, name=name)


def test_no_rows() -> None:
    for grad in run(make(0, 3, 32, 64, 9), "tf32"):
        assert grad is not None and (grad == 0).all()


@pytest.mark.parametrize("S", [98, 100, 99])
def test_strides(S: int) -> None:
    """Rows in groups, with gaps: of the states in copies of 8, 16 and 4 bytes, and of less where a gap asks for it."""
    plain = make(66, 5, 32, 64, S)
    for offset in range(4):
        qs = torch.full((22, 4, 7), torch.nan)[:, :3, 1:6].copy_(plain.agent_qs.view(22, 3, 5))
        states = torch.full((22 * 4 * (S + offset) + offset,), torch.nan)[offset:].view(22, 4, -1)[:, :-1, :S]
        states.copy_(plain.states.view(22, 3, S))
        strided = plain._replace(agent_qs=qs, states=states)
        for ours, wanted in zip(run(strided, "tf32"), run(plain, "tf32"), strict=True):
            assert ours is not None and wanted is not None and torch.equal(ours, wanted)


@pytest.mark.parametrize("where", ["agent_qs", "grad_activations", "states"])
def test_nan_shows(where: str) -> None:
    """A gradient that cannot be told is not told wrongly, and other agents' and units' are not harmed."""
    problem = make(70, 5, 32, 64, 98)
    clean = run(problem, "tf32")
    column = {"agent_qs": 3, "grad_activations": 17, "states": 50}[where]
    getattr(problem, where)[41, column] = torch.nan
    ours = run(problem, "tf32")
    if where == "agent_qs":
        assert ours.w1_weight.view(5, 32, 64)[3].isnan().all() and ours.w1_bias.view(5, 32)[3].isnan().all()
        others = torch.arange(5) != 3
        assert torch.equal(ours.w1_weight.view(5, 32, 64)[others], clean.w1_weight.view(5, 32, 64)[others])
    else:
        assert ours.w1_hidden_weight is not None and clean.w1_hidden_weight is not None
        bad = torch.zeros(64, 98, dtype=torch.bool)
        bad[column if where == "grad_activations" else slice(None), column if where == "states" else slice(None)] = True
        assert ours.w1_hidden_weight[bad].isnan().all()
        assert torch.equal(ours.w1_hidden_weight[~bad], clean.w1_hidden_weight[~bad])
