"""`quantile`: compiled passes against the reference, padding, kappa, the fractions' generator, torch's op checks."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fastmix
from fastmix import ops
from fastmix.ops import fractions, mean_shape, midpoints, monotonic, quantile_loss, quantile_mix
from fastmix.ops.monotonic import POSITIVITIES
from fastmix.ops.quantile import QuantileLoss, native
from fastmix.testing import assert_close
from fastmix.testing.bench import saved_bytes
from tests.cuda import emulate
from tests.cuda.device import captured, needs_gpu, no_waiting
from tests.generators import ODD_AGENTS, Shape, monotonic_params, non_contiguous
from tests.ops import test_monotonic
from tests.ops.support import ISAS, TOLERANCE, fullgraph, gradients, run_tests_under_isa

DTYPES = (torch.float32, torch.float64)
ODD_COUNTS = [(1, 1), (1, 33), (2, 3), (8, 8), (7, 5), (32, 31), (33, 1), (65, 2)]
"""Quantiles and targets: around what is worked on at once, and never only equal"""


class Problem:
    """Random distributions of ragged episodes."""

    def __init__(
        self, B: int, T: int, G: int, N: int, n_targets: int, dtype: torch.dtype = torch.float32, wide: bool = False
    ) -> None:
        self.theta = torch.randn(B, T, G, N, dtype=dtype, requires_grad=True)
        self.targets = 1.5 * torch.randn(B, T, G if wide else 1, n_targets, dtype=dtype)
        self.fractions = torch.rand(B, T, G if wide else 1, N, dtype=dtype)
        self.mask = (torch.arange(T) < torch.randint(0, T + 1, (B, 1))).unsqueeze(-1).to(dtype)
        if wide:
            self.mask = self.mask * (torch.rand(B, T, G) < 0.8)
        self.weights = torch.rand(B, T, G, dtype=dtype)

    def run(self, backend: str, **changes: Any) -> QuantileLoss:
        names = ("theta", "targets", "fractions", "mask")
        args = [changes.pop(name, getattr(self, name)) for name in names]
        return quantile_loss(*args, backend=backend, **changes)


def assert_parity(problem: Problem, **changes: Any) -> None:
    theta = changes.get("theta", problem.theta)
    ours, expected = problem.run("native", **dict(changes)), problem.run("reference", **dict(changes))
    tolerance = TOLERANCE[theta.dtype]
    assert_close(ours.loss, expected.loss, tolerance, name="loss")
    assert_close(ours.row_losses, expected.row_losses, tolerance, name="row_losses")
    assert not ours.row_losses.requires_grad
    (grad,), (wanted,) = gradients(ours.loss, [theta]), gradients(expected.loss, [theta])
    assert_close(grad, wanted, tolerance, name="gradient")


# --- The loss --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize(("N", "n_targets"), ODD_COUNTS)
def test_loss_over_counts(N: int, n_targets: int, wide: bool, dtype: torch.dtype) -> None:
    problem = Problem(5, 7, 3, N, n_targets, dtype, wide)
    for kappa in (1.0, 0.0, 0.3, 50.0):
        assert_parity(problem, kappa=kappa)
    for weights in (None, problem.weights):
        for normaliser in (None, 13.0, torch.tensor(7.0)):
            assert_parity(problem, weights=weights, normaliser=normaliser, scale=0.5)


@pytest.mark.parametrize(
    ("B", "T", "G"), [(0, 5, 1), (5, 0, 1), (5, 1, 0), (1, 1, 1), (1, 1, 27), (1, 15, 1), (4, 4, 1), (17, 33, 2)]
)
def test_loss_over_sizes(B: int, T: int, G: int) -> None:
    assert_parity(Problem(B, T, G, 8, 5))
    assert_parity(Problem(B, T, G, 1, 1, torch.float64))


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa: str) -> None:
    select = "(loss_over_counts or split_over_sizes or mix_over_sizes or backends_draw) and not cuda"
    run_tests_under_isa(__file__, select, isa)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_same_loss_in_every_run(threads: int) -> None:
    torch.set_num_threads(threads)
    problem = Problem(60, 61, 1, 8, 9)
    assert_parity(problem)
    assert len({problem.run("native").loss.item() for _ in range(20)}) == 1


def test_loss_takes_strides_of_any_kind() -> None:
    whole, problem = Problem(5, 8, 3, 6, 4, wide=True), Problem(5, 7, 3, 6, 4, wide=True)
    assert_parity(problem, theta=whole.theta[:, :-1], targets=whole.targets[:, 1:], fractions=whole.fractions[:, :-1])
    theta = non_contiguous(problem.theta.detach()).requires_grad_()
    assert_parity(problem, theta=theta, targets=non_contiguous(problem.targets))
    assert_parity(problem, mask=non_contiguous(problem.mask), weights=non_contiguous(problem.weights))
    assert_parity(problem, theta=problem.theta.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_())
    assert_parity(problem, theta=problem.theta.detach().transpose(2, 3).contiguous().transpose(2, 3).requires_grad_())
    assert_parity(problem, targets=torch.randn(1, 1, 1, 1).expand(5, 7, 3, 9))


@pytest.mark.parametrize("shape", [(6,), (1, 6), (3, 6), (1, 1, 6), (7, 1, 6), (5, 1, 1, 6), (5, 7, 1, 6)])
def test_fractions_broadcast(shape: tuple[int, ...]) -> None:
    assert_parity(Problem(5, 7, 3, 6, 4), fractions=torch.rand(shape))


@pytest.mark.parametrize("shape", [(5, 1, 1), (3,), (), (7, 1), (1, 7, 3), (5, 7, 3)])
def test_weights_broadcast(shape: tuple[int, ...]) -> None:
    assert_parity(Problem(5, 7, 3, 6, 4), weights=torch.rand(shape))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float64])
def test_masks_of_any_dtype(dtype: torch.dtype) -> None:
    problem = Problem(5, 7, 1, 3, 2)
    assert_parity(problem, mask=problem.mask.to(dtype))


def test_fractional_masks() -> None:
    assert_parity(Problem(5, 7, 2, 3, 4, torch.float64), mask=torch.rand(5, 7, 1), weights=torch.rand(5, 1, 1).double())


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e38])
def test_padding_reaches_neither_loss_nor_gradient(backend: str, value: float) -> None:
    problem = Problem(6, 9, 2, 5, 3, wide=True)
    problem.mask[0, 4:] = 0
    padded = problem.mask == 0
    clean = problem.run(backend, weights=problem.weights)
    spoilt = {
        name: torch.where(padded.unsqueeze(-1), value, getattr(problem, name))
        for name in ("theta", "targets", "fractions")
    }
    dirty = problem.run(backend, **spoilt, weights=torch.where(padded, value, problem.weights))
    assert_close(dirty.loss, clean.loss, 0.0)
    assert_close(dirty.row_losses, clean.row_losses, 0.0)
    (grad,), (wanted,) = gradients(dirty.loss, [problem.theta]), gradients(clean.loss, [problem.theta])
    assert_close(grad, wanted, 0.0)
    assert (grad[padded] == 0).all()


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_live_nan_reaches_the_loss(backend: str) -> None:
    problem = Problem(2, 3, 1, 4, 4)
    problem.mask.fill_(1)
    problem.targets[1, 2, 0, 3] = torch.nan
    assert problem.run(backend).loss.isnan()


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_nothing_live_is_no_loss(backend: str) -> None:
    problem = Problem(3, 4, 1, 5, 2)
    result = problem.run(backend, mask=torch.zeros(3, 4, 1))
    assert result.loss.item() == 0.0
    assert (gradients(result.loss, [problem.theta])[0] == 0).all()


def test_definition() -> None:
    """Worked by hand: the mean is over targets, the sum over quantiles, an error of 0 counts as below."""
    theta = torch.tensor([[[[0.0, 1.0]]]], requires_grad=True)
    targets, taus = torch.tensor([[[[0.5, 1.0, -2.0]]]]), torch.tensor([0.25, 0.5])
    for backend in ("native", "reference"):
        result = quantile_loss(theta, targets, taus, torch.ones(1, 1, 1), backend=backend)
        # Errors of theta_0: 0.5, 1, -2; of theta_1: -0.5, 0, -3.
        first = (0.25 * 0.125 + 0.25 * 0.5 + 0.75 * 1.5) / 3
        second = (0.5 * 0.125 + 0.5 * 0.0 + 0.5 * 2.5) / 3
        assert_close(result.loss, torch.tensor(first + second), 1e-7)
        (grad,) = torch.autograd.grad(result.loss, theta)
        wanted = [-(0.25 * 0.5 + 0.25 * 1.0 - 0.75 * 1.0) / 3, -(-0.5 * 0.5 - 0.5 * 1.0) / 3]
        assert_close(grad.flatten(), torch.tensor(wanted), 1e-7)


def test_smallest_kappa_is_the_quantile_loss_whose_minimum_is_a_quantile() -> None:
    samples = torch.randn(1, 1, 1, 999, dtype=torch.float64).sort().values
    theta = samples[..., [99, 499, 899]].clone().requires_grad_()
    taus = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    loss = quantile_loss(theta, samples, taus, torch.ones(1, 1, 1), kappa=0.0, backend="native").loss
    (grad,) = torch.autograd.grad(loss, theta)
    assert grad.abs().max() < 1e-3


def test_gradient_scales_with_the_loss() -> None:
    problem = Problem(3, 4, 1, 5, 2)
    (grad,) = torch.autograd.grad(3 * problem.run("native").loss, problem.theta)
    (wanted,) = torch.autograd.grad(3 * problem.run("reference").loss, problem.theta)
    assert_close(grad, wanted, 1e-6)
    assert not problem.run("native", theta=problem.theta.detach()).loss.requires_grad


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"theta": torch.zeros(5, 7, 2)}, ValueError, r"theta must have shape \[B, T, G, N\]"),
        ({"theta": torch.zeros(5, 7, 2, 0)}, ValueError, "theta must have .* at least one quantile"),
        ({"theta": torch.zeros(5, 7, 2, 3, dtype=torch.int64)}, TypeError, "theta must be a floating-point"),
        ({"theta": 3.0}, TypeError, "theta must be a torch.Tensor"),
        ({"targets": torch.zeros(5, 6, 2, 4)}, ValueError, "targets must have shape"),
        ({"targets": torch.zeros(5, 7, 2, 0)}, ValueError, "targets must have .* at least one sample"),
        ({"targets": torch.zeros(5, 7, 2, 4, dtype=torch.float64)}, TypeError, "targets must have the dtype"),
        ({"fractions": torch.zeros(4)}, ValueError, "fractions must have a shape"),
        ({"fractions": torch.zeros(5, 7, 3)}, ValueError, "fractions must have a shape"),
        ({"fractions": torch.zeros(())}, ValueError, "fractions must have a shape"),
        ({"mask": None}, TypeError, "mask must be a torch.Tensor"),
        ({"mask": torch.zeros(5, 7)}, ValueError, "mask must have shape"),
        ({"mask": torch.zeros(5, 7, 1, device="meta")}, ValueError, "mask must be on the device"),
        ({"weights": torch.zeros(4, 1, 1)}, ValueError, "weights must have a shape that broadcasts"),
        ({"kappa": -1.0}, ValueError, "kappa must be finite and not negative, got -1.0"),
        ({"kappa": float("nan")}, ValueError, "kappa must be finite"),
        ({"normaliser": torch.zeros(2)}, ValueError, "normaliser must be a number"),
    ],
)
def test_loss_refuses(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    problem = Problem(5, 7, 2, 3, 4)
    for backend in ("native", "reference"):
        with pytest.raises(error, match=message):
            problem.run(backend, **dict(changes))


def test_autocast_computes_in_single_precision() -> None:
    problem = Problem(5, 7, 2, 3, 4)
    half = problem.theta.detach().bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        result = problem.run("native", theta=half)
    assert result.loss.dtype == result.row_losses.dtype == torch.float32
    assert_close(result.loss, problem.run("native", theta=half.float()).loss, 0.0)


def test_loss_gradcheck() -> None:
    problem = Problem(3, 4, 2, 3, 5, torch.float64)
    for kappa in (1.0, 0.2):
        assert torch.autograd.gradcheck(
            lambda theta, kappa=kappa: problem.run("native", theta=theta, weights=problem.weights, kappa=kappa).loss,
            (problem.theta,),
        )


# --- Means and shape -------------------------------------------------------------------------------------------------


def assert_same_split(quantiles: Tensor) -> None:
    ours, expected = (mean_shape(quantiles, backend=backend) for backend in ("native", "reference"))
    tolerance = TOLERANCE[quantiles.dtype]
    for name, part, wanted in zip(("means", "shape"), ours, expected, strict=True):
        assert_close(part, wanted, tolerance, name=name)
    if quantiles.requires_grad:
        (grad,), (wanted,) = gradients(ours, [quantiles]), gradients(expected, [quantiles])
        assert_close(grad, wanted, tolerance, name="gradient")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("A", ODD_AGENTS)
@pytest.mark.parametrize("N", [1, 8, 15, 33])
def test_split_over_sizes(N: int, A: int, dtype: torch.dtype) -> None:
    for leading in ((), (0,), (19,), (5, 7), (3, 1, 4)):
        assert_same_split(torch.randn(*leading, A, N, dtype=dtype, requires_grad=True))


def test_split_takes_strides_of_any_kind() -> None:
    whole = torch.randn(5, 8, 3, 9, requires_grad=True)
    assert_same_split(whole[:, :-1])
    assert_same_split(non_contiguous(whole.detach()).requires_grad_())
    assert_same_split(whole.transpose(2, 3))
    assert_same_split(torch.randn(3, 9).expand(5, 7, 3, 9))


def test_split_is_the_definition_and_keeps_the_mean() -> None:
    quantiles = torch.randn(5, 7, 3, 9, dtype=torch.float64)
    means, shape = mean_shape(quantiles, backend="native")
    assert_close(means, quantiles.mean(-1), 1e-14)
    assert_close(shape.mean(-1), torch.zeros(5, 7, dtype=torch.float64), 1e-14)
    assert_close(means.sum(-1, keepdim=True) + shape, quantiles.sum(-2), 1e-14)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_one_row_spoils_no_other(backend: str) -> None:
    quantiles = torch.randn(5, 3, 4)
    expected = mean_shape(quantiles, backend=backend)
    quantiles[2] = torch.nan
    for part, wanted in zip(mean_shape(quantiles, backend=backend), expected, strict=True):
        assert torch.equal(part[[0, 1, 3, 4]], wanted[[0, 1, 3, 4]])


@pytest.mark.parametrize(
    ("quantiles", "error", "message"),
    [
        (torch.zeros(5), ValueError, r"quantiles must have shape \[..., A, N\]"),
        (torch.zeros(5, 0, 3), ValueError, "at least one agent"),
        (torch.zeros(5, 3, 0), ValueError, "and one quantile"),
        (torch.zeros(5, 3, dtype=torch.int32), TypeError, "quantiles must be a floating-point"),
        (None, TypeError, "quantiles must be a torch.Tensor"),
    ],
)
def test_split_refuses(quantiles: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        mean_shape(quantiles)


def test_split_gradcheck_and_autocast() -> None:
    quantiles = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda q: tuple(mean_shape(q, backend="native")), (quantiles,))
    with torch.autocast("cpu", torch.bfloat16):
        assert mean_shape(quantiles.bfloat16(), backend="native").means.dtype == torch.float32


# --- The mean-shape mix ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_mix(backend: str) -> None:
    """`monotonic` of the means has the joint mean; every gradient is that of the two parts written out."""
    params = monotonic_params(Shape(3, 5, state_dim=17, obs_dim=11), embed=31, dtype=torch.float64)
    quantiles = torch.randn(6, 3, 9, dtype=torch.float64, requires_grad=True)
    states = torch.randn(6, 17, dtype=torch.float64)
    mixed = quantile_mix(quantiles, states, params, backend=backend)
    means = quantiles.mean(-1)
    q_tot = monotonic(means, states, params, backend="reference")
    assert_close(mixed.mean(-1, keepdim=True), q_tot, 1e-12)
    expected = q_tot + quantiles.sum(-2) - means.sum(-1, keepdim=True)
    assert_close(mixed, expected, 1e-12)
    inputs = [quantiles, *(p for p in params if p is not None)]
    for grad, wanted in zip(gradients(mixed, inputs), gradients(expected, inputs), strict=True):
        assert_close(grad, wanted, 1e-11)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize(("A", "N"), [(1, 1), (1, 33), (2, 8), (5, 32), (27, 15), (27, 33)])
def test_mix_over_sizes(A: int, N: int, layers: int, dtype: torch.dtype) -> None:
    for positivity in POSITIVITIES:
        assert_mixed(61, agents=A, quantiles=N, embed=33, layers=layers, dtype=dtype, positivity=positivity)


@pytest.mark.parametrize("leading", [(), (0,), (1,), (6,), (97,), (3, 5), (0, 5), (2, 100), (2, 3, 5)])
def test_mix_over_leading_dimensions(leading: tuple[int, ...]) -> None:
    assert_mixed(*leading, quantiles=9)


@pytest.mark.parametrize("threads", [2, 3])
def test_mix_on_threads(threads: int) -> None:
    torch.set_num_threads(threads)
    assert_mixed(1_000, state=100, quantiles=8)


def assert_mixed(*leading: int, **sizes: Any) -> None:
    """Result and gradients as in float64 by the reference."""
    test_monotonic.assert_parity(test_monotonic.Problem(*leading, **sizes))


def test_mix_takes_strides_of_any_kind() -> None:
    problem = test_monotonic.Problem(6, 9, quantiles=9)
    quantiles = problem.agent_qs.detach()
    for view in (
        torch.randn(6, 10, 5, 9)[:, 1:],
        torch.randn(6, 9, 9, 5).transpose(2, 3),
        torch.randn(5, 6, 9, 9).permute(1, 2, 0, 3),
        quantiles[:1].expand(6, 9, 5, 9),
        quantiles[..., :1, :].expand(6, 9, 5, 9),
        quantiles[..., :1].expand(6, 9, 5, 9),
        non_contiguous(quantiles),
    ):
        problem.agent_qs = view.requires_grad_()
        test_monotonic.assert_parity(problem)
    problem.states = torch.randn(6, 10, 19)[:, :-1].requires_grad_()
    test_monotonic.assert_parity(problem)


def test_mix_does_not_depend_on_how_often_quantiles_come() -> None:
    problem = test_monotonic.Problem(20, quantiles=9, dtype=torch.float64)
    once = problem.run()
    problem.agent_qs = problem.agent_qs.repeat_interleave(3, -1)
    assert_close(problem.run(), once.repeat_interleave(3, -1), 1e-13)


def test_mix_of_points_is_monotonic() -> None:
    problem = test_monotonic.Problem(20, quantiles=1)
    ours = problem.run()
    expected = monotonic(problem.agent_qs.squeeze(-1), problem.states, problem.params, **problem.settings)
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("rows", [4, 40])
def test_one_row_spoils_no_other_mix(rows: int) -> None:
    problem, others = test_monotonic.Problem(rows, quantiles=9), torch.arange(rows) != 2
    results = []
    for value in (0.0, torch.nan):
        with torch.no_grad():
            problem.agent_qs[2] = value
            quick = problem.run()
        mixed = problem.run()
        results.append([mixed, quick, *torch.autograd.grad(mixed, problem.inputs[:2], torch.ones_like(mixed))])
    for clean, spoilt in zip(*results, strict=True):
        assert torch.equal(clean[others], spoilt[others])
    assert mixed[2].isnan().all() and quick[2].isnan().all()


def test_every_subset_of_gradients_of_a_mix() -> None:
    problem = test_monotonic.Problem(31, quantiles=9, dtype=torch.float64)
    result = problem.run()
    upstream = torch.randn_like(result)
    wanted = torch.autograd.grad(result, problem.inputs, upstream)
    for subset in ([0], [1], [0, 1], [3], list(range(2, len(wanted)))):
        inputs = [t.detach().requires_grad_(i in subset) for i, t in enumerate(problem.inputs)]
        grads = torch.autograd.grad(problem.run(inputs=inputs), [inputs[i] for i in subset], upstream)
        for i, grad in zip(subset, grads, strict=True):
            assert_close(grad, wanted[i], 1e-13)


def test_mix_keeps_what_monotonic_keeps() -> None:
    kept = []
    for quantiles in (None, 9):
        problem = test_monotonic.Problem(96, quantiles=quantiles)
        kept.append(saved_bytes(problem.run, problem.inputs))
    assert kept[0] == kept[1]


@pytest.mark.parametrize("layers", [1, 2])
def test_mix_gradcheck(layers: int) -> None:
    for positivity in POSITIVITIES:
        problem = test_monotonic.Problem(
            3, agents=2, quantiles=3, embed=3, hyper=4, state=5, layers=layers, dtype=torch.float64,
            positivity=positivity,
        )  # fmt: skip
        assert torch.autograd.gradcheck(lambda *inputs, p=problem: p.run(inputs=inputs), problem.inputs)


def test_mix_under_autocast() -> None:
    problem = test_monotonic.Problem(9, quantiles=8, grad=False)
    half = problem.agent_qs.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        result = quantile_mix(half, problem.states, problem.params)
    assert torch.equal(result, quantile_mix(half.float(), problem.states, problem.params))


@pytest.mark.traced
@pytest.mark.parametrize("leading", [(7,), (3, 4)])
def test_opcheck_of_mix(leading: tuple[int, ...]) -> None:
    problem = test_monotonic.Problem(*leading, quantiles=5)
    arguments = (problem.agent_qs, problem.states, *problem.params, 0, 1.0)
    torch.library.opcheck(torch.ops.fastmix.monotonic.default, (*arguments, True))
    with torch.no_grad():
        q_tot, activations, signs = torch.ops.fastmix.monotonic.default(*arguments, True)
    inputs = [t.detach() for t in problem.inputs]
    arguments = (torch.randn_like(q_tot), *inputs, activations, signs, 0, 1.0, True, False, True)
    torch.library.opcheck(torch.ops.fastmix.monotonic_backward.default, arguments)


@pytest.mark.traced
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_mix_compiles_whole(backend: str) -> None:
    problem = test_monotonic.Problem(2, 3, 4, quantiles=5)
    result, wanted = fullgraph(lambda: problem.run(backend))(), problem.run(backend)
    assert_close(result, wanted, 1e-6)
    for ours, expected in zip(gradients(result, problem.inputs), gradients(wanted, problem.inputs), strict=True):
        assert_close(ours, expected, 1e-6)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"quantiles": torch.zeros(4, 5)}, ValueError, "states must have shape"),
        ({"quantiles": torch.zeros(5)}, ValueError, r"quantiles must have shape \[..., A, N\]"),
        ({"quantiles": torch.zeros(4, 3, 9)}, ValueError, "params.w1_weight must have shape"),
        ({"states": torch.zeros(3, 19)}, ValueError, "states must have shape"),
        ({"states": torch.zeros(4, 19, dtype=torch.float64)}, TypeError, "states must have the dtype"),
        ({"params": ()}, TypeError, "params must be a MonotonicParams"),
        ({"positivity": "exp"}, ValueError, "positivity must be one of"),
    ],
)
def test_mix_refuses(changes: dict[str, Any], error: type[Exception], message: str, backend: str) -> None:
    problem = test_monotonic.Problem(4, quantiles=9, grad=False)
    good: dict[str, Any] = {"quantiles": problem.agent_qs, "states": problem.states, "params": problem.params}
    with pytest.raises(error, match=message):
        quantile_mix(**good | changes, backend=backend)


# --- Fractions -------------------------------------------------------------------------------------------------------

KEYS = [(0, 0), (1, 2), (-1, -1), (2**40 + 3, 2**50 + 5)]


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize(
    ("words", "key", "draw", "stream", "block"),
    [
        # The known answers of the authors' library, for a counter and a key of zeros, ones, and digits of pi.
        ((0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8), (0, 0), (0, 0), 0, 0),
        ((0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1), (0xA4093822, 0x299F31D0), (0x13198A2E, 0x03707344),
         0x85A308D3, 0x243F6A88),
    ],
)  # fmt: skip
def test_known_answers(
    words: tuple[int, ...], key: tuple[int, int], draw: tuple[int, int], stream: int, block: int, backend: str
) -> None:
    pair = torch.tensor([key[0] | key[1] << 32, draw[0] | draw[1] << 32])
    if block == 0:
        drawn = fractions((4,), pair, stream=stream, dtype=torch.float64, backend=backend)
    else:  # far behind what can be drawn in a test: the rounds of the reference alone
        drawn = ops.quantile.reference.philox(torch.tensor([block]), pair, stream).to(torch.float64).flatten()
        drawn = torch.floor(drawn / 2**8) * 2.0**-24
    assert drawn.tolist() == [(word >> 8) * 2.0**-24 for word in words]


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("size", [0, 1, 3, 4, 63, 64, 65, 1027, 20000])
def test_backends_draw_the_same_bits(size: int, key: tuple[int, int]) -> None:
    pair = torch.tensor(key)
    expected = fractions((size,), pair, stream=5, dtype=torch.float64, backend="reference")
    for backend in ("native", "reference"):
        for dtype in DTYPES:
            assert torch.equal(fractions((size,), pair, stream=5, dtype=dtype, backend=backend).double(), expected)


def test_threads_draw_the_same_bits() -> None:
    key, drawn = torch.tensor([3, 4]), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        drawn.append(fractions((300, 401), key, backend="native"))
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[0], drawn[2])


def test_padding_time_changes_no_real_step() -> None:
    key = torch.tensor([7, 1])
    short, long = fractions((5, 3, 8), key), fractions((9, 3, 8), key)
    assert torch.equal(short, long[:5])


def test_seeds_draws_and_streams_differ() -> None:
    drawn = [fractions((64,), torch.tensor(key), stream=stream) for key in KEYS for stream in (0, 1, 2**32 - 1)]
    assert len({tuple(d.tolist()) for d in drawn}) == len(drawn)


def test_fractions_are_uniform() -> None:
    drawn = fractions((100_000,), torch.tensor([11, 0]), dtype=torch.float64)
    assert drawn.min() >= 0 and drawn.max() < 1
    counts = torch.histc(drawn, 20, 0, 1)
    chi_square = ((counts - 5000) ** 2 / 5000).sum()
    assert 5 < chi_square < 45  # 19 degrees of freedom
    assert abs(torch.corrcoef(torch.stack([drawn[:-1], drawn[1:]]))[0, 1]) < 0.01


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"key": torch.zeros(3, dtype=torch.int64)}, ValueError, "key must have shape"),
        ({"key": torch.zeros(2)}, TypeError, "key must have dtype torch.int64"),
        ({"key": 3}, TypeError, "key must be a torch.Tensor"),
        ({"dtype": torch.float16}, ValueError, "dtype must be one of"),
        ({"stream": -1}, ValueError, "stream must lie in"),
        ({"stream": 2**32}, ValueError, "stream must lie in"),
        ({"shape": (3, -1)}, ValueError, "shape must hold"),
    ],
)
def test_fractions_refuse(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    args: dict[str, Any] = {"shape": (3,), "key": torch.tensor([1, 2])} | changes
    with pytest.raises(error, match=message):
        fractions(**args)


def test_midpoints() -> None:
    assert midpoints(4).tolist() == [0.125, 0.375, 0.625, 0.875]
    assert midpoints(1, dtype=torch.float64).tolist() == [0.5]
    with pytest.raises(ValueError, match="n must be at least 1"):
        midpoints(0)


# --- Torch's own checks ----------------------------------------------------------------------------------------------


@pytest.mark.traced
@pytest.mark.parametrize("everything", [True, False])
def test_opcheck(everything: bool) -> None:
    p = Problem(3, 4, 2, 3, 5)
    extras = (p.weights, 0.7, 0.5, torch.tensor(3.0)) if everything else (None, 1.0, 1.0, None)
    given = (p.targets, p.fractions, p.mask)
    torch.library.opcheck(torch.ops.fastmix.quantile_loss.default, (p.theta, *given, *extras, True))
    torch.library.opcheck(torch.ops.fastmix.quantile_loss.default, (p.theta.detach(), *given, *extras, False))
    torch.library.opcheck(torch.ops.fastmix.mean_shape.default, (p.theta,))
    torch.library.opcheck(torch.ops.fastmix.mean_shape_backward.default, (torch.randn(3, 4, 2), torch.randn(3, 4, 5)))
    torch.library.opcheck(torch.ops.fastmix.fractions.default, (torch.tensor([1, 2]), [3, 5], 1, torch.float32))


@pytest.mark.traced
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_compiles_whole(backend: str) -> None:
    problem, key = Problem(3, 4, 2, 3, 5), torch.tensor([1, 2])

    def step(theta: Tensor) -> tuple[Tensor, ...]:
        with fastmix.backend(backend):
            means, shape = mean_shape(theta)
            drawn = fractions((3, 4, 1, 3), key, stream=1)
            loss = quantile_loss(theta, problem.targets, drawn, problem.mask, weights=problem.weights, normaliser=3.0)
        return loss.loss, loss.row_losses, means, shape, drawn

    ours, expected = fullgraph(step)(problem.theta), step(problem.theta)
    for got, wanted in zip(ours, expected, strict=True):
        assert_close(got, wanted, 1e-6)
    outputs = [[results[i] for i in (0, 2, 3)] for results in (ours, expected)]
    for grad, wanted in zip(*(gradients(o, [problem.theta]) for o in outputs), strict=True):
        assert_close(grad, wanted, 1e-6)


# --- CUDA ------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=[False, True], ids=["ascending", "descending"])
def emulated(request: pytest.FixtureRequest) -> Iterator[None]:
    """The native backend is the CUDA kernels themselves, run on the host with a block's threads in either order."""
    with emulate.in_place_of_a_gpu("quantile", descending=request.param):
        yield


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "n_targets"), ODD_COUNTS)
def test_emulated_cuda_loss_over_counts(N: int, n_targets: int, dtype: torch.dtype) -> None:
    problem = Problem(5, 7, 3, N, n_targets, dtype, wide=True)
    for kappa in (1.0, 0.0):
        assert_parity(problem, kappa=kappa)
    for weights in (None, problem.weights):
        for normaliser in (None, torch.tensor(7.0)):
            assert_parity(problem, weights=weights, normaliser=normaliser, scale=0.5)


@pytest.mark.usefixtures("emulated")
def test_emulated_cuda_loss_over_sizes_and_strides() -> None:
    for sizes in ((0, 5, 1), (5, 1, 0), (1, 1, 1), (17, 33, 2)):
        test_loss_over_sizes(*sizes)
    test_loss_takes_strides_of_any_kind()
    test_fractions_broadcast((3, 6))
    test_weights_broadcast((7, 1))
    test_fractional_masks()
    test_definition()
    test_gradient_scales_with_the_loss()


@pytest.mark.usefixtures("emulated")
def test_emulated_cuda_loss_with_fewer_blocks_than_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_PARTS", 6)
    assert_parity(Problem(17, 19, 1, 33, 3))


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e38])
def test_emulated_cuda_loss_keeps_padding_out(value: float) -> None:
    test_padding_reaches_neither_loss_nor_gradient("native", value)
    test_nothing_live_is_no_loss("native")
    test_live_nan_reaches_the_loss("native")


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("A", ODD_AGENTS)
def test_emulated_cuda_split(A: int) -> None:
    for N in (1, 8, 33):
        test_split_over_sizes(N, A, torch.float32)
    test_split_takes_strides_of_any_kind()


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("size", [0, 1, 65, 1027])
def test_emulated_cuda_draws_the_same_bits(size: int) -> None:
    for key in KEYS:
        test_backends_draw_the_same_bits(size, key)


def on_gpu(problem: Problem) -> Problem:
    there = copy.copy(problem)
    for name, tensor in vars(problem).items():
        setattr(there, name, tensor.detach().cuda().requires_grad_(tensor.requires_grad))
    return there


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("B", "T", "G", "N", "n_targets"),
    [(0, 5, 1, 3, 3), (1, 1, 1, 1, 1), (7, 61, 3, 33, 5), (128, 120, 1, 8, 8), (128, 120, 1, 32, 31)],
)
def test_cuda_loss(B: int, T: int, G: int, N: int, n_targets: int, dtype: torch.dtype) -> None:
    here = Problem(B, T, G, N, n_targets, dtype, wide=True)
    there = on_gpu(here)
    for kappa in (1.0, 0.0, 0.3):
        for extras in ((), ("weights",)):
            results = []
            for p in (there, here):
                loss = p.run("native", kappa=kappa, scale=0.5, **{name: getattr(p, name) for name in extras})
                results.append([*loss, *torch.autograd.grad(3 * loss.loss, [p.theta])])
            for i, (ours, expected) in enumerate(zip(*results, strict=True)):
                assert ours.is_cuda
                assert_close(ours, expected, TOLERANCE[dtype], name=f"{kappa} {extras} {i}")


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("A", "N"), [(1, 1), (3, 8), (27, 33)])
def test_cuda_split(A: int, N: int, dtype: torch.dtype) -> None:
    here = torch.randn(64, 61, A, N, dtype=dtype, requires_grad=True)
    there = here.detach().cuda().requires_grad_()
    results = []
    for quantiles in (there, here):
        split = mean_shape(quantiles, backend="native")
        results.append([*split, *gradients(split, [quantiles])])
    for ours, expected in zip(*results, strict=True):
        assert_close(ours, expected, TOLERANCE[dtype])


@needs_gpu
def test_cuda_draws_the_same_bits_in_every_replay() -> None:
    key = torch.tensor([3, 2**40])
    there = key.cuda()
    for dtype in DTYPES:
        ours = fractions((61, 32, 9), there, stream=2, dtype=dtype, backend="native")
        assert torch.equal(ours.cpu(), fractions((61, 32, 9), key, stream=2, dtype=dtype))

    def draw() -> Tensor:
        drawn = fractions((61, 32, 9), there, stream=2)
        there[1] += 1
        return drawn

    graph, drawn = captured(draw)
    for _ in range(3):
        expected = fractions((61, 32, 9), there.clone(), stream=2)
        graph.replay()
        assert torch.equal(drawn, expected)


@needs_gpu
def test_cuda_loss_waits_for_nothing_and_replays() -> None:
    problem = on_gpu(Problem(32, 60, 1, 8, 8))
    with no_waiting():
        problem.run("native", normaliser=5.0).loss.backward()

    def step() -> list[Tensor]:
        loss = problem.run("native")
        return [*loss, *torch.autograd.grad(loss.loss, [problem.theta])]

    graph, results = captured(step)
    with torch.no_grad():
        problem.theta.copy_(torch.randn_like(problem.theta))
        problem.mask.copy_(problem.mask.roll(1, 0))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(results, step(), strict=True))
