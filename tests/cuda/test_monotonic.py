"""`monotonic`'s CUDA kernels over rows, emulated on the host: all that they leave in memory, in both precisions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastmix.ops.monotonic import POSITIVITIES, MonotonicParams, reference
from fastmix.testing import assert_close
from tests.cuda import emulate
from tests.monotonic_problem import cut_off

COLUMNS = (slice(0, 64), slice(64, 128), slice(128, 160), slice(160, 192))  # of h1, h2, b1 and V's hidden layer
TOLERANCE = {"full": 2e-6, "tf32": 1.5e-4}
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


def run(problem: Problem, precision: str, wants_rest: bool = True) -> Results:
    """The kernels on poisoned memory; without ``wants_rest`` neither gradients of ``agent_qs`` nor slopes."""
    core: Any = emulate.core("monotonic")
    qs, states, params, grad, positivity = problem
    rows, A = grad.numel(), qs.shape[-1]
    E, S = params.b1_weight.shape
    H = params.w1_weight.shape[1]
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
        layout(qs), packed.data_ptr(), grad.data_ptr(), activations.data_ptr(), grad_qs.data_ptr() * wants_rest,
        grad_activations.data_ptr(), signs.data_ptr() * wants_rest, sizes, code, full, 0,
    )  # fmt: skip

    def unpadded(columns: Tensor) -> list[Tensor]:
        parts = [columns[:, part] for part in COLUMNS]
        for part, width in zip(parts, (H, H, E, E), strict=True):
            assert (part[:, width:].isnan() | (part[:, width:] == 0)).all()
        return [part[:, :width] for part, width in zip(parts, (H, H, E, E), strict=True)]

    bits = signs.unsqueeze(-1).long() >> torch.arange(32) & 1
    assert (bits[..., E:] == 0).all() or not wants_rest
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
    tolerance = max(TOLERANCE[precision], cut_off(problem.states.shape[-1]))
    assert_close(ours.q_tot, expected.q_tot, tolerance, name="q_tot")
    assert_close(ours.grad_agent_qs, expected.grad_agent_qs, tolerance, name="gradient of agent_qs")
    names = ("h1", "h2", "b1", "v")
    for name, mine, wanted in zip(names, ours.activations, expected.activations, strict=True):
        assert_close(mine, wanted, tolerance, name=name)
    for name, mine, wanted in zip(names, ours.grad_activations, expected.grad_activations, strict=True):
        assert_close(mine, wanted, tolerance, name=f"gradient of {name}")
    clear = generated.abs() > 1e-4 * generated.abs().max() if generated.numel() else generated > 0
    assert torch.equal(ours.slopes[clear], expected.slopes[clear])


@pytest.fixture(params=[(0, False), (1, True)], ids=["large", "small-descending"], autouse=True)
def _device(request: pytest.FixtureRequest) -> Iterator[None]:
    """A GPU with much shared memory, and one with less whose threads run in the opposite order."""
    core: Any = emulate.core("monotonic")
    device, descending = request.param
    core.device(device)
    core.descending(descending)
    yield
    core.device(0)
    core.descending(False)


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize(
    ("rows", "A", "E", "H", "S"),
    [
        (40, 5, 32, 64, 98), (1, 1, 1, 1, 1), (15, 2, 31, 33, 7), (16, 5, 32, 64, 8), (17, 27, 32, 64, 9),
        (2, 64, 32, 64, 40), (130, 2, 32, 64, 33), (3, 10, 32, 64, 322), (300, 1, 8, 5, 6),
        (400, 14, 32, 64, 40), (600, 2, 32, 64, 8),
    ],
)  # fmt: skip
def test_parity(rows: int, A: int, E: int, H: int, S: int, precision: str) -> None:
    """The last two are several tiles a block, with weights that do not fit into shared memory and with some that do."""
    assert_parity(make(rows, A, E, H, S), precision)


@pytest.mark.parametrize("precision", TOLERANCE)
def test_no_positivity(precision: str) -> None:
    assert_parity(make(40, 5, 31, 64, 20, "none"), precision)


def test_no_rows() -> None:
    results = run(make(0, 3, 32, 64, 9), "tf32")
    assert results.q_tot.shape == (0,) and results.slopes.shape == (0, 4, 32)


@pytest.mark.parametrize("S", [18, 19])
def test_strides(S: int) -> None:
    """Rows in groups with gaps; an even number of features is loaded two at a time where all addresses allow it."""
    plain = make(66, 5, 32, 64, S)
    expected = run(plain, "tf32")
    for offset in range(3):
        qs = torch.full((22, 4, 7), torch.nan)[:, :3, 1:6].copy_(plain.agent_qs.view(22, 3, 5))
        states = torch.full((22 * 4 * (S + offset) + offset,), torch.nan)[offset:].view(22, 4, -1)[:, :-1, :S]
        states.copy_(plain.states.view(22, 3, S))
        assert_same(run(plain._replace(agent_qs=qs, states=states), "tf32"), expected)
    spread = torch.full((66, 10), torch.nan)[:, ::2].copy_(plain.agent_qs)
    assert_same(run(plain._replace(agent_qs=spread), "tf32"), expected)


def test_offsets_beyond_32_bits(tmp_path: Path) -> None:
    # A sparse file: 2^31 numbers apart, but only the pages in use exist.
    far = 2**31
    memory = torch.from_file(str(tmp_path / "sparse"), shared=True, size=far + 4_096, dtype=torch.float32)
    plain = make(6, 5, 32, 64, 19)
    qs = memory.as_strided((2, 3, 5), (far, 5, 1), 0).copy_(plain.agent_qs.view(2, 3, 5))
    states = memory.as_strided((2, 3, 19), (far, 19, 1), 1_024).copy_(plain.states.view(2, 3, 19))
    assert_same(run(plain._replace(agent_qs=qs, states=states), "tf32"), run(plain, "tf32"))


def assert_same(ours: Results, expected: Results, rows: Tensor | slice = slice(None)) -> None:
    for mine, theirs in zip(_flat(ours), _flat(expected), strict=True):
        assert torch.equal(mine[rows], theirs[rows])


def _flat(results: Results) -> list[Tensor]:
    q_tot, activations, grad_agent_qs, grad_activations, slopes = results
    return [q_tot, *activations, grad_agent_qs, *grad_activations, slopes]


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["agent_qs", "states", "grad"])
def test_a_bad_row_spoils_no_other(where: str, value: float, precision: str) -> None:
    problem = make(40, 5, 31, 64, 20)
    clean = run(problem, precision)
    getattr(problem, where).view(40, -1)[21, -1] = value
    ours = run(problem, precision)
    assert_same(ours, clean, torch.arange(40) != 21)
    if where == "grad":
        assert torch.equal(ours.q_tot, clean.q_tot) and not ours.grad_agent_qs[21].isfinite().any()
    elif where == "states":
        assert ours.q_tot[21].isnan()
        assert ours.grad_agent_qs[21].isnan().all()
        assert all(grad[21].isnan().any() for grad in ours.grad_activations[:3])
    else:
        expected, _ = expect(problem, precision)
        assert_close(ours.q_tot[21:22], expected.q_tot[21:22], TOLERANCE[precision])


@pytest.mark.parametrize("precision", TOLERANCE)
def test_absolute_value_has_slope_zero_at_zero(precision: str) -> None:
    problem = make(40, 5, 30, 64, 20)
    p, E = problem.params, 30
    for weight, bias, unit in ((p.w1_weight[E : 2 * E], p.w1_bias[E : 2 * E], 1), (p.w2_weight[:3], p.w2_bias[:3], -1)):
        weight.zero_()
        bias.zero_()
        ours, (expected, _) = run(problem, precision), expect(problem, precision)
        assert (ours.slopes[:, unit, : len(bias)] == 0).all()
        assert torch.equal(ours.slopes[:, [0, 2, 3, 4]], expected.slopes[:, [0, 2, 3, 4]])
        for grads in zip(ours.grad_activations, expected.grad_activations, strict=True):
            assert_close(*grads, TOLERANCE[precision])


def test_what_is_not_wanted_is_not_written() -> None:
    problem = make(20, 3, 32, 64, 9)
    ours, expected = run(problem, "full", wants_rest=False), run(problem, "full")
    for grads in zip(ours.grad_activations, expected.grad_activations, strict=True):
        assert torch.equal(*grads)
    assert ours.grad_agent_qs.isnan().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"A": 3, "E": 33}, "embed must be at most 32"),
        ({"A": 3, "H": 65}, "hidden layers of at most 64"),
        ({"positivity": "softplus"}, "positivity must be abs or none"),
    ],
)
def test_what_the_kernels_cannot_take_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(make(**{"rows": 2, "A": 2, "E": 4, "H": 8, "S": 5} | change), "full")
