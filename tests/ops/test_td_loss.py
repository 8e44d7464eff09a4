"""`td_loss`: the compiled pass against the reference, padding, normalisers, precision, and torch's own op checks."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastmix.ops import td_loss
from fastmix.ops.td_loss import Favoured, TDLoss, native
from fastmix.ops.td_loss.types import RULES
from fastmix.testing import assert_close
from tests.cuda import emulate
from tests.cuda.device import captured, late, needs_gpu, no_waiting
from tests.generators import non_contiguous
from tests.ops.support import ISAS, TOLERANCE, fullgraph, gradients, run_tests_under_isa

DTYPES = (torch.float32, torch.float64)


class Problem:
    """Random inputs with ragged episodes."""

    def __init__(self, B: int, T: int, K: int = 1, dtype: torch.dtype = torch.float32, wide: bool = False) -> None:
        self.qs = torch.randn(B, T, K, dtype=dtype, requires_grad=True)
        self.residual = torch.randn(B, T, K, dtype=dtype, requires_grad=True)
        self.targets = torch.randn(B, T, K if wide else 1, dtype=dtype)
        self.mask = (torch.arange(T) < torch.randint(0, T + 1, (B, 1))).unsqueeze(-1).to(dtype)
        if wide:
            self.mask = self.mask * (torch.rand(B, T, K) < 0.8)
        self.weights = torch.rand(B, T, K, dtype=dtype)
        self.all_greedy = torch.rand(B, T, K if wide else 1) < 0.5
        self.values, self.thresholds = torch.randn(2, B, T, K if wide else 1, dtype=dtype)

    def favoured(self, rule: str, **changes: Any) -> Favoured:
        return Favoured(rule, self.all_greedy, self.values, self.thresholds, 0.3, 5.0, 0.1)._replace(**changes)

    def run(self, backend: str, **changes: Any) -> TDLoss:
        args: dict[str, Any] = {"qs": self.qs, "targets": self.targets, "mask": self.mask} | changes
        return td_loss(args.pop("qs"), args.pop("targets"), args.pop("mask"), backend=backend, **args)


def assert_parity(problem: Problem, **changes: Any) -> None:
    ours, expected = problem.run("native", **changes), problem.run("reference", **changes)
    tolerance = TOLERANCE[problem.qs.dtype]
    assert_close(ours.loss, expected.loss, tolerance, name="loss")
    assert_close(ours.td_error, expected.td_error, tolerance, name="td_error")
    assert not ours.td_error.requires_grad
    if expected.factors is None:
        assert ours.factors is None
    else:
        assert ours.factors is not None and not ours.factors.requires_grad
        assert_close(ours.factors, expected.factors, 0.0, name="factors")
    inputs = [changes.get("qs", problem.qs)] + ([changes["residual"]] if "residual" in changes else [])
    for i, (grad, wanted) in enumerate(
        zip(gradients(ours.loss, inputs), gradients(expected.loss, inputs), strict=True)
    ):
        assert_close(grad, wanted, tolerance, name=f"gradient {i}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("K", [1, 2, 3, 27])
def test_parity_over_columns(K: int, wide: bool, dtype: torch.dtype) -> None:
    problem = Problem(7, 61, K, dtype, wide)
    for weights in (None, problem.weights):
        for residual in ({}, {"residual": problem.residual}):
            for normaliser in (None, 13.0, torch.tensor(7.0)):
                assert_parity(problem, weights=weights, normaliser=normaliser, scale=0.5, **residual)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("K", [1, 3])
@pytest.mark.parametrize("rule", RULES)
def test_parity_over_rules(rule: str, K: int, wide: bool, dtype: torch.dtype) -> None:
    problem = Problem(7, 61, K, dtype, wide)
    favoured = problem.favoured(rule)
    for weights in (None, problem.weights):
        for residual in ({}, {"residual": problem.residual}):
            assert_parity(problem, weights=weights, favoured=favoured, scale=0.5, **residual)


@pytest.mark.parametrize("rule", RULES)
def test_rules_over_strides(rule: str) -> None:
    whole, problem = Problem(5, 8, 3, wide=True), Problem(5, 7, 3)
    favoured = problem.favoured(
        rule, all_greedy=whole.all_greedy[:, :-1], values=whole.values[:, 1:],
        thresholds=torch.ones(1).expand(5, 7, 1),
    )  # fmt: skip
    assert_parity(problem, favoured=favoured)
    assert_parity(problem, favoured=favoured, residual=whole.residual[:, :-1])


RULE_CASES = [
    # greedy, q_tot, target, value, threshold, favoured
    ("greedy", True, 0.0, 9.0, 9.0, 0.0, True),
    ("greedy", False, 0.0, 9.0, 1.0, 0.0, False),
    ("greedy_or_above", True, 0.0, 1.0, 2.0, 0.0, True),
    ("greedy_or_above", False, 0.0, 2.0, 1.0, 0.0, True),
    ("greedy_or_above", False, 0.0, 2.0, 2.0, 0.0, False),  # strictly above
    ("below", True, 1.0, 2.0, 0.0, 0.0, True),
    ("below", True, 2.0, 2.0, 0.0, 0.0, False),  # strictly below
    ("not_below", False, 2.0, 2.0, 0.0, 0.0, True),
    ("not_below", False, 1.0, 2.0, 0.0, 0.0, False),
    ("recognised", False, 0.0, 9.0, 1.5, 2.0, True),  # within the tolerance of 0.5, which is included
    ("recognised", True, 0.0, 9.0, 1.25, 2.0, False),
]


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize(("rule", "greedy", "q", "target", "value", "threshold", "favoured"), RULE_CASES)
def test_rules_are_what_they_say(
    rule: str, greedy: bool, q: float, target: float, value: float, threshold: float, favoured: bool, backend: str
) -> None:
    def of(number: float) -> Tensor:
        return torch.full((1, 1, 1), number)

    qs, residual = of(q).requires_grad_(), of(-3.0).requires_grad_()
    decided = Favoured(rule, torch.full((1, 1, 1), greedy), of(value), of(threshold), 0.5, high=5.0, low=0.25)
    weighted = td_loss(qs, of(target), of(1.0), favoured=decided, backend=backend)
    assert weighted.loss.item() == (5.0 if favoured else 0.25) * (q - target) ** 2
    assert weighted.td_error.item() == q - target  # the error itself is not weighed
    masked = td_loss(qs, of(target), of(1.0), residual=residual, favoured=decided, backend=backend)
    assert masked.loss.item() == (q - target - (0.0 if favoured else 3.0)) ** 2
    assert masked.factors is not None and masked.factors.item() == (0.0 if favoured else 1.0)
    wanted = [2 * masked.td_error.item(), 0.0 if favoured else 2 * masked.td_error.item()]
    assert [grad.item() for grad in torch.autograd.grad(masked.loss, [qs, residual])] == wanted


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_residual_that_is_left_out_may_be_anything(backend: str) -> None:
    problem = Problem(6, 9)
    problem.mask.fill_(1)
    spoilt = torch.where(problem.all_greedy, torch.inf, problem.residual.detach()).requires_grad_()
    inputs = problem.residual, spoilt
    results = [problem.run(backend, residual=r, favoured=problem.favoured("greedy")) for r in inputs]
    assert_close(results[1].loss, results[0].loss, 0.0)
    grads = [torch.autograd.grad(result.loss, r)[0] for result, r in zip(results, inputs, strict=True)]
    assert_close(grads[1], grads[0], 0.0)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_what_decides_has_no_gradient(backend: str) -> None:
    problem = Problem(4, 5)
    values = problem.values.requires_grad_()
    result = problem.run(backend, favoured=problem.favoured("recognised", values=values))
    (grad,) = torch.autograd.grad(result.loss, values, allow_unused=True)
    assert grad is None
    alone = problem.run(backend, qs=problem.qs.detach(), favoured=problem.favoured("recognised", values=values))
    assert not alone.loss.requires_grad


@pytest.mark.parametrize(("B", "T"), [(0, 5), (5, 0), (1, 1), (1, 255), (1, 256), (1, 257), (33, 17), (300, 300)])
@pytest.mark.parametrize("K", [1, 3])
def test_parity_over_sizes(B: int, T: int, K: int) -> None:
    assert_parity(Problem(B, T, K))


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa: str) -> None:
    run_tests_under_isa(__file__, "parity_over_columns", isa)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_same_result_in_every_run(threads: int) -> None:
    torch.set_num_threads(threads)
    problem = Problem(200, 301)
    assert_parity(problem)
    losses = {problem.run("native").loss.item() for _ in range(20)}
    assert len(losses) == 1


@pytest.mark.parametrize("shape", [(5, 1, 1), (1, 1, 1), (7, 1), (1,), (), (5, 7, 1), (1, 7, 3), (5, 7, 3)])
def test_weights_broadcast(shape: tuple[int, ...]) -> None:
    assert_parity(Problem(5, 7, 3), weights=torch.rand(shape))


@pytest.mark.parametrize("K", [1, 4])
def test_strides_of_any_kind(K: int) -> None:
    whole, problem = Problem(5, 8, K), Problem(5, 7, K)
    assert_parity(problem, qs=whole.qs[:, :-1], targets=whole.targets[:, 1:], residual=whole.residual[:, :-1])
    assert_parity(
        problem, qs=non_contiguous(problem.qs.detach()).requires_grad_(), targets=non_contiguous(problem.targets)
    )
    assert_parity(problem, mask=non_contiguous(problem.mask), weights=non_contiguous(problem.weights))
    assert_parity(problem, qs=problem.qs.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_())
    assert_parity(problem, mask=problem.mask[:1].expand(5, 7, 1), targets=torch.ones(1).expand(5, 7, K))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float64])
def test_masks_of_any_dtype(dtype: torch.dtype) -> None:
    problem = Problem(5, 7)
    assert_parity(problem, mask=problem.mask.to(dtype))


def test_fractional_masks() -> None:
    assert_parity(Problem(5, 7, 2, torch.float64), mask=torch.rand(5, 7, 1), weights=torch.rand(5, 1, 1).double())


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e38])
def test_padding_reaches_neither_loss_nor_gradient(backend: str, value: float) -> None:
    problem = Problem(6, 9, 2)
    problem.mask[0, 4:] = 0
    padded = (problem.mask == 0).expand(6, 9, 2)

    def spoilt(tensor: Tensor) -> Tensor:
        return torch.where(padded, value, tensor)

    clean = problem.run(backend, residual=problem.residual, weights=problem.weights)
    dirty = problem.run(
        backend,
        qs=spoilt(problem.qs), targets=spoilt(problem.targets.expand(6, 9, 2)), residual=spoilt(problem.residual),
        weights=spoilt(problem.weights),
    )  # fmt: skip
    assert_close(dirty.loss, clean.loss, 0.0)
    assert_close(dirty.td_error, clean.td_error, 0.0)
    inputs = [problem.qs, problem.residual]
    for grad, wanted in zip(gradients(dirty.loss, inputs), gradients(clean.loss, inputs), strict=True):
        assert_close(grad, wanted, 0.0)
        assert (grad[padded] == 0).all()


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_nothing_live_is_no_loss(backend: str) -> None:
    problem = Problem(3, 4)
    result = problem.run(backend, mask=torch.zeros(3, 4, 1))
    assert result.loss.item() == 0.0
    assert (gradients(result.loss, [problem.qs])[0] == 0).all()


def test_definition() -> None:
    qs = torch.tensor([[[1.0, 2.0], [5.0, -1.0]]], requires_grad=True)
    result = td_loss(qs, torch.tensor([[[0.0], [7.0]]]), torch.tensor([[[1.0], [1.0]]]), scale=0.5, backend="native")
    assert result.td_error.tolist() == [[[1.0, 2.0], [-2.0, -8.0]]]
    assert result.loss.item() == 0.5 * (1 + 4 + 4 + 64) / 4
    result.loss.backward()
    assert_close(qs.grad, result.td_error / 4, 0.0)  # type: ignore[arg-type]


def test_sums_in_double_precision() -> None:
    steps = 2**21
    td = torch.full((1, steps, 1), 1.0)
    td[0, 0] = 2.0**12  # its square is so large that single precision loses each of the others' in a running sum
    loss = td_loss(td, torch.zeros(1, steps, 1), torch.ones(1, steps, 1), normaliser=1.0, backend="native").loss
    assert abs(loss.item() - (2.0**24 + steps - 1)) <= 2  # the spacing of numbers of this size


def test_gradient_scales_with_the_loss() -> None:
    problem = Problem(3, 4)
    (grad,) = torch.autograd.grad(3 * problem.run("native").loss, problem.qs)
    (wanted,) = torch.autograd.grad(3 * problem.run("reference").loss, problem.qs)
    assert_close(grad, wanted, 1e-6)
    assert not problem.run("native", qs=problem.qs.detach()).loss.requires_grad


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"qs": torch.zeros(5, 7)}, ValueError, r"qs must have shape \[B, T, K\]"),
        ({"qs": torch.zeros(5, 7, 2, dtype=torch.int64)}, TypeError, "qs must be a floating-point"),
        ({"qs": 3.0}, TypeError, "qs must be a torch.Tensor"),
        ({"targets": torch.zeros(5, 6, 2)}, ValueError, "targets must have shape"),
        ({"targets": torch.zeros(5, 7, 3)}, ValueError, "targets must have shape"),
        ({"targets": torch.zeros(5, 7, 2, dtype=torch.float64)}, TypeError, "targets must have the dtype"),
        ({"mask": None}, TypeError, "mask must be a torch.Tensor"),
        ({"mask": torch.zeros(5, 7)}, ValueError, "mask must have shape"),
        ({"mask": torch.zeros(5, 7, 1, device="meta")}, ValueError, "mask must be on the device"),
        ({"weights": torch.zeros(4, 1, 1)}, ValueError, "weights must have a shape that broadcasts"),
        ({"weights": torch.zeros(1, 5, 7, 2)}, ValueError, "weights must have a shape that broadcasts"),
        ({"residual": torch.zeros(5, 7, 1)}, ValueError, "residual must have shape"),
        ({"residual": torch.zeros(5, 7, 2, dtype=torch.float64)}, TypeError, "residual must have the dtype"),
        ({"normaliser": torch.zeros(2)}, ValueError, "normaliser must be a number"),
        ({"favoured": Favoured("best")}, ValueError, "favoured.rule must be one of 'greedy'"),
        ({"favoured": Favoured("greedy")}, TypeError, "favoured.all_greedy must be a torch.Tensor"),
        ({"favoured": Favoured("greedy", torch.zeros(5, 7, 1))}, TypeError, "favoured.all_greedy must have dtype"),
        ({"favoured": Favoured("greedy", torch.zeros(5, 7) > 0)}, ValueError, "favoured.all_greedy must have shape"),
        (
            {"favoured": Favoured("recognised", None, torch.zeros(5, 7, 1))},
            TypeError,
            "favoured.thresholds must be a torch.Tensor",
        ),
        (
            {"favoured": Favoured("recognised", None, torch.zeros(5, 7, 1), torch.zeros(5, 7, 1).double())},
            TypeError,
            "favoured.thresholds must have the dtype",
        ),
    ],
)
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_bad_input(changes: dict[str, Any], error: type[Exception], message: str, backend: str) -> None:
    with pytest.raises(error, match=message):
        Problem(5, 7, 2).run(backend, **changes)


def test_autocast_is_float32() -> None:
    problem = Problem(5, 7)
    half = problem.qs.detach().bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        result = problem.run("native", qs=half)
    assert result.loss.dtype == result.td_error.dtype == torch.float32
    assert_close(result.loss, problem.run("native", qs=half.float()).loss, 0.0)


def test_gradcheck() -> None:
    problem = Problem(3, 4, 2, torch.float64)
    assert torch.autograd.gradcheck(
        lambda qs, residual: problem.run("native", qs=qs, residual=residual, weights=problem.weights).loss,
        (problem.qs, problem.residual),
    )
    assert torch.autograd.gradcheck(
        lambda qs, residual: (
            problem.run("native", qs=qs, residual=residual, favoured=problem.favoured("greedy_or_above")).loss
        ),
        (problem.qs, problem.residual),
    )


def opcheck_arguments(p: Problem, kind: str) -> tuple[Any, ...]:
    """What the registered op is called with: everything, nothing but what it must have, or that without gradient."""
    if kind != "everything":
        qs = p.qs if kind == "least" else p.qs.detach()
        unruled = (None, None, None, None, 0.0, 1.0, 1.0)
        return (qs, p.targets, p.mask, None, None, *unruled, 1.0, None, kind == "least")
    normaliser = torch.tensor(3.0, device=p.qs.device)
    ruled = p.favoured("greedy_or_above", thresholds=None)
    return (p.qs, p.targets, p.mask, p.weights, p.residual, *ruled, 0.5, normaliser, True)


@pytest.mark.traced
@pytest.mark.parametrize("kind", ["everything", "least", "no gradient"])
def test_opcheck(kind: str) -> None:
    torch.library.opcheck(torch.ops.fastmix.td_loss.default, opcheck_arguments(Problem(3, 4, 2), kind))


@pytest.mark.traced
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_compiles_whole(backend: str) -> None:
    problem = Problem(3, 4, 2)

    def step(qs: Tensor, residual: Tensor) -> TDLoss:
        favoured = problem.favoured("greedy")
        return problem.run(
            backend, qs=qs, residual=residual, weights=problem.weights, favoured=favoured, normaliser=3.0
        )

    inputs = [problem.qs, problem.residual]
    ours, expected = fullgraph(step)(*inputs), step(*inputs)
    assert_close(ours.loss, expected.loss, 1e-6)
    assert_close(ours.td_error, expected.td_error, 1e-6)
    for grad, wanted in zip(gradients(ours.loss, inputs), gradients(expected.loss, inputs), strict=True):
        assert_close(grad, wanted, 1e-6)


# --- CUDA ------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=[False, True], ids=["ascending", "descending"])
def emulated(request: pytest.FixtureRequest) -> Iterator[None]:
    """The native backend is the CUDA kernels themselves, run on the host with a block's threads in either order."""
    with emulate.in_place_of_a_gpu("td_loss", descending=request.param):
        yield


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("K", [1, 2, 27])
def test_emulated_cuda_kernels_over_columns(K: int, wide: bool, dtype: torch.dtype) -> None:
    problem = Problem(7, 61, K, dtype, wide)
    for weights in (None, problem.weights):
        for residual in ({}, {"residual": problem.residual}):
            for normaliser in (None, 13.0, torch.tensor(7.0)):
                assert_parity(problem, weights=weights, normaliser=normaliser, scale=0.5, **residual)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("rule", RULES)
def test_emulated_cuda_kernels_over_rules(rule: str) -> None:
    for K in (1, 3):
        for wide in (False, True):
            test_parity_over_rules(rule, K, wide, torch.float32)
    test_rules_over_strides(rule)
    for case in RULE_CASES:
        test_rules_are_what_they_say(*case, backend="native")
    test_a_residual_that_is_left_out_may_be_anything("native")


# A block takes 1,024 elements at a time, and at most 1,024 blocks share them.
@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize(
    ("B", "T", "K"), [(0, 5, 1), (5, 0, 1), (1, 1, 1), (1, 1023, 1), (4, 256, 1), (5, 205, 1), (33, 17, 3)]
)
def test_emulated_cuda_kernels_over_sizes(B: int, T: int, K: int) -> None:
    assert_parity(Problem(B, T, K))


@pytest.mark.usefixtures("emulated")
def test_emulated_cuda_kernels_with_fewer_blocks_than_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_PARTS", 6)
    assert_parity(Problem(70, 151, 1))


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("K", [1, 4])
def test_emulated_cuda_kernels_over_strides(K: int) -> None:
    test_strides_of_any_kind(K)
    for shape in ((5, 1, 1), (1,), (), (5, 7, 1), (1, 7, 3)):
        test_weights_broadcast(shape)
    test_fractional_masks()


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e38])
def test_emulated_cuda_kernels_keep_padding_out(value: float) -> None:
    test_padding_reaches_neither_loss_nor_gradient("native", value)
    test_nothing_live_is_no_loss("native")


@pytest.mark.usefixtures("emulated")
def test_emulated_cuda_kernels_scale_with_the_loss_and_add_exactly() -> None:
    test_definition()
    test_gradient_scales_with_the_loss()
    test_gradcheck()


def on_gpu(problem: Problem) -> Problem:
    there = copy.copy(problem)
    for name, tensor in vars(problem).items():
        setattr(there, name, tensor.detach().cuda().requires_grad_(tensor.requires_grad))
    return there


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize(
    ("B", "T", "K"), [(0, 5, 1), (1, 1, 1), (7, 61, 27), (33, 17, 3), (512, 120, 1), (300, 500, 10)]
)
def test_cuda(B: int, T: int, K: int, wide: bool, dtype: torch.dtype) -> None:
    here = Problem(B, T, K, dtype, wide)
    there = on_gpu(here)
    for extras in ((), ("weights",), ("residual",), ("weights", "residual")):
        for normaliser in (None, 13.0, torch.tensor(7.0)):
            results = []
            for p in (there, here):
                total = normaliser.to(p.qs.device) if isinstance(normaliser, Tensor) else normaliser
                loss = p.run("native", normaliser=total, scale=0.5, **{name: getattr(p, name) for name in extras})
                inputs = [p.qs] + ([p.residual] if "residual" in extras else [])
                results.append([loss.loss, loss.td_error, *torch.autograd.grad(3 * loss.loss, inputs)])
            for i, (ours, expected) in enumerate(zip(*results, strict=True)):
                assert ours.is_cuda
                assert_close(ours, expected, TOLERANCE[dtype], name=f"{extras} {normaliser} {i}")


@needs_gpu
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_cuda_over_rules(rule: str, wide: bool) -> None:
    here = Problem(33, 170, 3, torch.float32, wide)
    there = on_gpu(here)
    for extras in ((), ("residual",)):
        results = []
        for p in (there, here):
            loss = p.run("native", favoured=p.favoured(rule), **{name: getattr(p, name) for name in extras})
            assert loss.factors is not None
            inputs = [p.qs] + ([p.residual] if extras else [])
            results.append([loss.loss, loss.td_error, loss.factors, *torch.autograd.grad(loss.loss, inputs)])
        for i, (ours, expected) in enumerate(zip(*results, strict=True)):
            assert_close(ours, expected, TOLERANCE[torch.float32], name=f"{extras} {i}")


@needs_gpu
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e38])
def test_cuda_keeps_padding_out(value: float) -> None:
    problem = on_gpu(Problem(6, 9, 2))
    padded = problem.mask.expand(6, 9, 2) == 0
    results = []
    for spoil in (False, True):
        qs, residual, targets, weights = (
            torch.where(padded, value, t) if spoil else t
            for t in (problem.qs, problem.residual, problem.targets.expand(6, 9, 2), problem.weights)
        )
        loss = problem.run("native", qs=qs, residual=residual, targets=targets, weights=weights)
        results.append([loss.loss, loss.td_error, *torch.autograd.grad(loss.loss, [problem.qs, problem.residual])])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert problem.run("native", mask=torch.zeros_like(problem.mask)).loss.item() == 0


@needs_gpu
def test_cuda_gives_the_same_in_every_run() -> None:
    problem = on_gpu(Problem(512, 301, 3))
    first = problem.run("native", weights=problem.weights)
    for _ in range(20):
        again = problem.run("native", weights=problem.weights)
        assert torch.equal(again.loss, first.loss) and torch.equal(again.td_error, first.td_error)


@needs_gpu
def test_cuda_neither_waits_nor_leaves_the_current_stream() -> None:
    problem = on_gpu(Problem(32, 60))
    normaliser = torch.tensor(5.0).cuda()
    expected = problem.run("native", normaliser=normaliser)
    with torch.cuda.stream(torch.cuda.Stream()):
        qs = late(problem.qs.detach()).requires_grad_()
        with no_waiting():
            ours = problem.run("native", qs=qs, normaliser=normaliser)
            problem.run("native", qs=qs, normaliser=5.0).loss.backward()
    torch.cuda.synchronize()
    assert torch.equal(ours.loss, expected.loss)


@needs_gpu
def test_cuda_graph_replays() -> None:
    problem = on_gpu(Problem(32, 60))

    def step() -> list[Tensor]:
        loss = problem.run("native", residual=problem.residual)
        return [loss.loss, loss.td_error, *torch.autograd.grad(loss.loss, [problem.qs, problem.residual])]

    graph, results = captured(step)
    with torch.no_grad():
        problem.qs.copy_(torch.randn_like(problem.qs))
        problem.mask.copy_(problem.mask.roll(1, 0))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(results, step(), strict=True))


@needs_gpu
@pytest.mark.traced
@pytest.mark.parametrize("kind", ["everything", "least"])
def test_cuda_opcheck(kind: str) -> None:
    p = on_gpu(Problem(3, 4, 2))
    torch.library.opcheck(torch.ops.fastmix.td_loss.default, opcheck_arguments(p, kind))
    one = torch.ones((), device="cuda")
    torch.library.opcheck(torch.ops.fastmix.td_loss_backward.default, (p.qs.detach(), one, one))


@needs_gpu
@pytest.mark.traced
def test_cuda_compiles_whole() -> None:
    problem = on_gpu(Problem(3, 4, 2))

    def step(qs: Tensor, residual: Tensor) -> TDLoss:
        return problem.run("native", qs=qs, residual=residual, weights=problem.weights, normaliser=3.0)

    inputs = [problem.qs, problem.residual]
    ours, expected = fullgraph(step)(*inputs), step(*inputs)
    assert_close(ours.loss, expected.loss, 1e-6)
    for grad, wanted in zip(gradients(ours.loss, inputs), gradients(expected.loss, inputs), strict=True):
        assert_close(grad, wanted, 1e-6)
