"""`implicit`: compiled passes against the reference, shapes at the edges, isolation of rows, torch's op checks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastmix.ops import chosen_quantiles, quantile_features
from fastmix.ops.implicit import native
from fastmix.testing import assert_close
from tests.generators import non_contiguous
from tests.ops.support import ISAS, TOLERANCE, fullgraph, gradients, run_tests_under_isa

DTYPES = (torch.float32, torch.float64)
SIZES = [
    (1, 1, 1, 1),
    (1, 8, 64, 64),
    (2, 33, 31, 5),
    (3, 5, 33, 64),
    (10, 8, 64, 64),
    (27, 3, 65, 2),
    (2, 100, 130, 7),
]
"""Agents, fractions, features and cosines: around a vector, a tile and a block"""


def layer(outputs: int, inputs: int, dtype: torch.dtype) -> list[Tensor]:
    weight, bias = torch.randn(outputs, inputs, dtype=dtype) / inputs**0.5, torch.randn(outputs, dtype=dtype) / 4
    return [weight.requires_grad_(), bias.requires_grad_()]


class Problem:
    """One head on random rows."""

    def __init__(
        self, lead: tuple[int, ...], A: int, N: int, D: int, n: int, U: int = 5, dtype: torch.dtype = torch.float32
    ) -> None:
        self.fractions = torch.rand(*lead, N, dtype=dtype)
        self.phi = layer(D, n, dtype)
        self.hidden = torch.randn(*lead, A, D, dtype=dtype, requires_grad=True)
        self.actions = torch.randint(U, (*lead, A))
        self.fc2 = layer(U, D, dtype)

    @property
    def leaves(self) -> list[Tensor]:
        return [self.hidden, *self.phi, *self.fc2]

    def run(self, backend: str) -> list[Tensor]:
        """Features, their mean and quantiles, which are made of features as an agent makes them."""
        values, mean = quantile_features(self.fractions, *self.phi, backend=backend)
        return [values, mean, chosen_quantiles(self.hidden, values, self.actions, *self.fc2, backend=backend)]


def assert_parity(problem: Problem) -> None:
    tolerance = TOLERANCE[problem.hidden.dtype]
    ours, expected = problem.run("native"), problem.run("reference")
    for got, want in zip(ours, expected, strict=True):
        assert_close(got, want, tolerance)
    for got, want in zip(gradients(ours, problem.leaves), gradients(expected, problem.leaves), strict=True):
        assert_close(got, want, 10 * tolerance, zero=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("A", "N", "D", "n"), SIZES)
def test_over_sizes(A: int, N: int, D: int, n: int, dtype: torch.dtype) -> None:
    assert_parity(Problem((29,), A, N, D, n, dtype=dtype))


@pytest.mark.parametrize("lead", [(), (0,), (1,), (4, 7), (3, 2, 5), (0, 4), (257,)])
def test_over_leading_dimensions(lead: tuple[int, ...]) -> None:
    assert_parity(Problem(lead, 3, 8, 33, 16, dtype=torch.float64))


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa: str) -> None:
    run_tests_under_isa("tests/ops/test_implicit.py", "over_sizes", isa)


def test_more_rows_than_a_thread_takes_at_once() -> None:
    torch.set_num_threads(2)
    problem = Problem((1500,), 3, 8, 64, 64, dtype=torch.float64)
    assert_parity(problem)
    first, second = (gradients(problem.run("native"), problem.leaves) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))  # sums in a fixed order


def test_strides_of_any_kind() -> None:
    problem = Problem((4, 7), 3, 5, 33, 9, dtype=torch.float64)
    expected = problem.run("native")
    for name in ("fractions", "hidden", "actions"):
        setattr(problem, name, non_contiguous(getattr(problem, name).detach()))
    values, mean = quantile_features(problem.fractions, *map(non_contiguous, problem.phi), backend="native")
    strided = [non_contiguous(values), *map(non_contiguous, problem.fc2)]
    got = chosen_quantiles(problem.hidden, strided[0], problem.actions, *strided[1:], backend="native")
    for ours, want in zip((values, mean, got), expected, strict=True):
        assert_close(ours, want, 1e-13)
    shared = torch.randn(5, 33, dtype=torch.float64, requires_grad=True)  # the same features in every row
    results = []
    for backend in ("native", "reference"):
        z = chosen_quantiles(problem.hidden, shared.expand(4, 7, 5, 33), problem.actions, *problem.fc2, backend=backend)
        results.append([z, *gradients(z, [shared, *problem.fc2])])
    for ours, want in zip(*results, strict=True):
        assert_close(ours, want, 1e-12)


@pytest.mark.parametrize("used", [0, 1])
def test_one_result_alone_has_its_gradient(used: int) -> None:
    problem = Problem((11,), 2, 5, 33, 9, dtype=torch.float64)
    both = [quantile_features(problem.fractions, *problem.phi, backend=name)[used] for name in ("native", "reference")]
    for got, want in zip(*(gradients(out, problem.phi) for out in both), strict=True):
        assert_close(got, want, 1e-12)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_definition(backend: str) -> None:
    phi = [torch.tensor([[1.0, 2.0, -1.0]]), torch.tensor([0.25])]
    values, mean = quantile_features(torch.tensor([[0.0, 0.5, 1.0]]), *phi, backend=backend)
    # 1 + 2 cos(pi f) - cos(2 pi f) + 1/4 at f = 0, 1/2, 1
    assert_close(values, torch.tensor([[[2.25], [2.25], [0.0]]]), 1e-6)
    assert_close(mean, torch.tensor([[1.5]]), 1e-6)
    fc2 = [torch.tensor([[1.0], [3.0]]), torch.tensor([0.0, 0.5])]
    z = chosen_quantiles(torch.tensor([[[2.0], [1.0]]]), values, torch.tensor([[0, 1]]), *fc2, backend=backend)
    assert_close(z, torch.tensor([[[4.5, 4.5, 0.0], [7.25, 7.25, 0.5]]]), 1e-6)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_row_spoils_no_other(backend: str, value: float) -> None:
    problem = Problem((13,), 3, 5, 33, 9, dtype=torch.float64)
    clean = problem.run(backend)
    with torch.no_grad():
        problem.fractions[4, 1] = value
        problem.hidden[6, 2] = value
    dirty = problem.run(backend)
    others = [i for i in range(13) if i not in (4, 6)]
    for got, want in zip(dirty, clean, strict=True):
        assert torch.equal(got[others], want[others])
    assert dirty[0][4, 1].isnan().all() and dirty[1][4].isnan().all()
    assert torch.equal(dirty[0][4, 0], clean[0][4, 0])
    assert torch.equal(dirty[2][6, 0], clean[2][6, 0]) and not dirty[2][6, 2].isfinite().any()


def test_float32_keeps_its_digits_at_many_cosines() -> None:
    """The recurrence of cosines is made in double precision."""
    fractions = torch.linspace(0, 1, 4001).unsqueeze(0)
    weight = torch.eye(512)
    values, _ = quantile_features(fractions, weight, torch.zeros(512), backend="native")
    exact = torch.cos(fractions.double().unsqueeze(-1) * torch.pi * torch.arange(512)).clamp(min=0)
    assert (values.double() - exact).abs().max() < 1e-6


def test_gradcheck() -> None:
    problem = Problem((3,), 2, 5, 4, 3, dtype=torch.float64)

    def run(hidden: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        features = quantile_features(problem.fractions, *weights[:2], backend="native")
        z = chosen_quantiles(hidden, features.values, problem.actions, *weights[2:], backend="native")
        return z, features.mean

    assert torch.autograd.gradcheck(run, tuple(problem.leaves))


@pytest.mark.parametrize("used", [0, 1])
def test_fractions_have_a_gradient(used: int) -> None:
    problem = Problem((3,), 2, 5, 4, 7, dtype=torch.float64)
    fractions = problem.fractions.requires_grad_()
    both = [quantile_features(fractions, *problem.phi, backend=name)[used] for name in ("native", "reference")]
    got, want = (gradients(out, [fractions])[0] for out in both)
    assert_close(got, want, 1e-12)
    assert want.abs().sum() > 0


def test_autocast_computes_in_single_precision() -> None:
    problem = Problem((7,), 3, 5, 33, 9)
    expected = problem.run("native")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = quantile_features(problem.fractions.bfloat16(), *problem.phi)
        z = chosen_quantiles(problem.hidden.bfloat16(), features.values.bfloat16(), problem.actions, *problem.fc2)
    assert features.values.dtype is z.dtype is torch.float32
    assert_close(z, expected[2], 3e-2)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"fractions": torch.zeros(())}, ValueError, r"fractions must have shape \[..., N\]"),
        ({"fractions": torch.zeros(3, 0)}, ValueError, r"fractions must have shape \[..., N\]"),
        ({"fractions": torch.zeros(3, dtype=torch.int64)}, TypeError, "fractions must be a floating-point"),
        ({"weight": torch.zeros(4)}, ValueError, r"weight must have shape \[D, n\]"),
        ({"weight": torch.zeros(4, 3, dtype=torch.float64)}, TypeError, "weight must have"),
        ({"bias": torch.zeros(5)}, ValueError, r"bias must have shape \[D\]"),
        ({"bias": None}, TypeError, "bias must be a torch.Tensor"),
    ],
)
def test_features_refuse(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    args: dict[str, Any] = {"fractions": torch.zeros(2, 3), "weight": torch.zeros(4, 3), "bias": torch.zeros(4)}
    with pytest.raises(error, match=message):
        quantile_features(**(args | changes))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"hidden": torch.zeros(4)}, ValueError, r"hidden must have shape \[..., A, D\]"),
        ({"features": torch.zeros(2, 5)}, ValueError, r"features must have shape \[..., N, D\]"),
        ({"features": torch.zeros(2, 6, 3)}, ValueError, r"features must have shape"),
        ({"features": torch.zeros(3, 6, 4)}, ValueError, r"features must have shape"),
        ({"actions": torch.zeros(2, 2, dtype=torch.int64)}, ValueError, "actions must have shape"),
        ({"actions": torch.zeros(2, 3)}, TypeError, "actions must have dtype torch.int64"),
        ({"weight": torch.zeros(5, 3)}, ValueError, r"weight must have shape \[U, D\]"),
        ({"weight": torch.zeros(5, 4, dtype=torch.float64)}, TypeError, "weight must have"),
        ({"bias": torch.zeros(4)}, ValueError, r"bias must have shape \[U\]"),
    ],
)
def test_quantiles_refuse(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    args: dict[str, Any] = {
        "hidden": torch.zeros(2, 3, 4), "features": torch.zeros(2, 6, 4),
        "actions": torch.zeros(2, 3, dtype=torch.int64), "weight": torch.zeros(5, 4), "bias": torch.zeros(5),
    }  # fmt: skip
    with pytest.raises(error, match=message):
        chosen_quantiles(**(args | changes))


@pytest.mark.parametrize("action", [-1, 5])
def test_actions_that_do_not_exist_are_named(action: int) -> None:
    problem = Problem((7,), 3, 5, 33, 9)
    problem.actions[3, 1] = action
    with pytest.raises(ValueError, match=rf"actions must lie in \[0, 5\), got {action}"):
        problem.run("native")


@pytest.mark.traced
def test_opcheck() -> None:
    problem = Problem((7,), 3, 5, 33, 9)
    values, mean = native.quantile_features(problem.fractions, *problem.phi)
    torch.library.opcheck(torch.ops.fastmix.implicit_features.default, (problem.fractions, *problem.phi))
    torch.library.opcheck(
        torch.ops.fastmix.implicit_features_backward.default,
        (problem.fractions, values.detach(), torch.randn_like(values), torch.randn_like(mean), 9),
    )
    args = (problem.hidden, values.detach(), problem.actions, *problem.fc2)
    torch.library.opcheck(torch.ops.fastmix.implicit_quantiles.default, args)
    plain = tuple(x.detach() for x in args[:4])
    torch.library.opcheck(torch.ops.fastmix.implicit_quantiles_backward.default, (*plain, torch.randn(7, 3, 5)))


@pytest.mark.traced
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_compiles_whole(backend: str) -> None:
    problem = Problem((4, 7), 3, 5, 33, 9, dtype=torch.float64)

    def run(fractions: Tensor, hidden: Tensor, *weights: Tensor) -> Tensor:
        features = quantile_features(fractions, *weights[:2], backend=backend)
        return chosen_quantiles(hidden, features.values, problem.actions, *weights[2:], backend=backend)

    args = (problem.fractions, *problem.leaves)
    compiled, plain = fullgraph(run)(*args), run(*args)
    assert_close(compiled, plain, 1e-12)
    for got, want in zip(gradients(compiled, problem.leaves), gradients(plain, problem.leaves), strict=True):
        assert_close(got, want, 1e-12)
