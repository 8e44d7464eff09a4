"""`select`: the compiled pass against the reference, ties, padding, bad input, and torch's own op checks."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastmix.ops import select
from fastmix.ops.select import UNAVAILABLE, Selection
from fastmix.testing import assert_close
from tests.cuda import emulate
from tests.cuda.device import captured, late, needs_gpu, no_waiting
from tests.generators import SHAPES, episodes, non_contiguous
from tests.ops.support import ISAS, TOLERANCE, fullgraph, gradients, python, run_tests_under_isa

DTYPES = (torch.float32, torch.float64)
AVAIL_DTYPES = (
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
    torch.float16, torch.float32, torch.float64,
)  # fmt: skip
N_ACTIONS = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 18, 31, 32, 33, 36, 65)


class Problem:
    """Random inputs; a tenth of the agents' rows offer no action."""

    def __init__(self, *shape: int, dtype: torch.dtype = torch.float32, avail: torch.dtype = torch.bool) -> None:
        self.qs = torch.randn(*shape, dtype=dtype, requires_grad=True)
        offered = torch.rand(shape) < 0.6
        offered &= torch.rand((*shape[:-1], 1)) < 0.9
        self.avail = offered.to(avail)
        self.actions = torch.randint(0, shape[-1], shape[:-1])
        self.target_qs = torch.randn(*shape, dtype=dtype)

    def run(self, backend: str, **changes: Any) -> Selection:
        args: dict[str, Any] = {"actions": self.actions, "target_qs": self.target_qs} | changes
        avail = args.pop("avail_actions", self.avail)
        return select(args.pop("agent_qs", self.qs), avail, backend=backend, **args)


def assert_same(ours: Selection, expected: Selection) -> None:
    for name, a, e in zip(Selection._fields, ours, expected, strict=True):
        assert (a is None) == (e is None), name
        if a is not None and e is not None:
            assert a.dtype == e.dtype, name
            assert_close(a, e, 0.0, name=name)


def assert_parity(problem: Problem, **changes: Any) -> None:
    ours, expected = problem.run("native", **changes), problem.run("reference", **changes)
    assert_same(ours, expected)
    qs = changes.get("agent_qs", problem.qs)
    for names in (("greedy_qs",), ("chosen_qs",), ("greedy_qs", "chosen_qs")):
        if any(getattr(ours, name) is None for name in names):
            continue
        (grad,), (wanted,) = (gradients([getattr(s, name) for name in names], [qs]) for s in (ours, expected))
        assert_close(grad, wanted, TOLERANCE[qs.dtype], name=f"gradient through {names}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_actions", N_ACTIONS)
def test_parity_over_actions(n_actions: int, dtype: torch.dtype) -> None:
    assert_parity(Problem(5, 7, 3, n_actions, dtype=dtype))


@pytest.mark.parametrize("leading", [(), (1,), (0,), (257,), (3, 4), (2, 0), (2, 3, 4), (1, 2, 3, 2)])
@pytest.mark.parametrize("n_agents", [1, 2, 27])
def test_parity_over_rows(leading: tuple[int, ...], n_agents: int) -> None:
    assert_parity(Problem(*leading, n_agents, 6))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("avail", AVAIL_DTYPES)
def test_parity_over_availability(avail: torch.dtype, dtype: torch.dtype) -> None:
    assert_parity(Problem(4, 5, 3, 18, dtype=dtype, avail=avail))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_parity_over_threads(threads: int) -> None:
    torch.set_num_threads(threads)
    assert_parity(Problem(16, 50, 8, 9))


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa: str) -> None:
    run_tests_under_isa(__file__, "parity_over_actions or parity_over_availability", isa)


def test_optional_arguments() -> None:
    problem = Problem(3, 4, 2, 5)
    for changes in (
        {"actions": None},
        {"target_qs": None},
        {"avail_actions": None},
        {"actions": None, "target_qs": None},
    ):
        assert_parity(problem, **changes)
    bare = select(problem.qs, None)
    assert bare.chosen_qs is None and bare.target_qs is None and bare.all_greedy is None
    assert_close(bare.greedy_actions, problem.qs.argmax(-1), 0.0)


def test_slices_along_time_are_read_in_place(caplog: pytest.LogCaptureFixture) -> None:
    problem = Problem(4, 6, 3, 9)
    with caplog.at_level(logging.DEBUG, "fastmix"):
        for part in (slice(None, -1), slice(1, None), slice(None, None, 2)):
            changes = {"avail_actions": problem.avail[:, part], "actions": problem.actions[:, part]}
            assert_parity(problem, agent_qs=problem.qs[:, part], target_qs=problem.target_qs[:, part], **changes)
        flipped = [t.transpose(0, 1) for t in (problem.qs, problem.avail, problem.actions, problem.target_qs)]
        names = ("agent_qs", "avail_actions", "actions", "target_qs")
        assert_parity(problem, **dict(zip(names, flipped, strict=True)))
    assert "is copied" not in caplog.text


def test_strides_of_any_kind(caplog: pytest.LogCaptureFixture) -> None:
    problem = Problem(4, 6, 3, 9)
    with caplog.at_level(logging.DEBUG, "fastmix"):
        assert_parity(
            problem,
            agent_qs=non_contiguous(problem.qs.detach()).requires_grad_(),
            avail_actions=non_contiguous(problem.avail),
            actions=non_contiguous(problem.actions),
            target_qs=non_contiguous(problem.target_qs),
        )
    assert "agent_qs with strides" in caplog.text
    assert_parity(problem, avail_actions=problem.avail[:1, :1].expand(4, 6, 3, 9))
    (grad,) = torch.autograd.grad(problem.run("native").chosen_qs.sum(), problem.qs)  # type: ignore[union-attr]
    (wanted,) = torch.autograd.grad(problem.run("reference").chosen_qs.sum(), problem.qs)  # type: ignore[union-attr]
    assert_close(grad, wanted, 0.0, name="from an expanded gradient")


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_take_the_lowest_index(backend: str, dtype: torch.dtype) -> None:
    for n_actions in N_ACTIONS:
        qs = torch.zeros(n_actions, 1, n_actions, dtype=dtype)
        avail = torch.ones(n_actions, n_actions).triu().unsqueeze(1)
        qs[:, :, ::2] = -0.0  # equal to 0
        picked = select(qs, avail, backend=backend).greedy_actions.squeeze(-1)
        assert picked.tolist() == list(range(n_actions))


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values(backend: str, dtype: torch.dtype) -> None:
    nan, inf = torch.nan, torch.inf
    qs = torch.tensor(
        [[nan, 1, 2, inf], [1, nan, nan, inf], [-inf, -inf, -inf, -inf], [inf, -inf, nan, 3], [1, 2, 3, 4]], dtype=dtype
    ).unsqueeze(1)
    avail = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 1, 1], [0, 1, 0, 0], [0, 0, 0, 0]]).unsqueeze(1)
    picked = select(qs, avail, backend=backend, target_qs=qs)
    assert picked.greedy_actions.flatten().tolist() == [2, 1, 2, 1, 0]
    expected = torch.tensor([2, nan, -inf, -inf, UNAVAILABLE], dtype=dtype).unsqueeze(1)
    assert_close(picked.greedy_qs, expected, 0.0)
    assert_close(picked.target_qs, expected, 0.0)  # type: ignore[arg-type]
    # 0/0 gives a NaN whose sign bit is set on x86; it is a NaN like any other.
    negative = -torch.tensor([[[1.0, nan, 2.0]]], dtype=dtype)
    assert select(negative, None, backend=backend).greedy_actions.item() == 1


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_padding_reaches_no_live_row(backend: str) -> None:
    batch = episodes(SHAPES["3m"], 4, 10)
    qs = torch.randn(4, 11, 3, 9, requires_grad=True)
    padded = ~batch.avail_actions.any(-1, keepdim=True)
    assert padded.any()
    spoilt = torch.where(padded, torch.nan, qs)
    clean, dirty = (
        select(q, batch.avail_actions, actions=batch.actions, target_qs=q.detach(), backend=backend)
        for q in (qs, spoilt)
    )
    live = ~padded.squeeze(-1)
    for name in ("greedy_actions", "greedy_qs", "chosen_qs", "target_qs"):
        assert_close(getattr(dirty, name), getattr(clean, name), 0.0, name=name, mask=live)
    assert (dirty.greedy_qs[~live] == UNAVAILABLE).all() and (dirty.target_qs[~live] == UNAVAILABLE).all()  # type: ignore[index]
    (grad,) = torch.autograd.grad(dirty.greedy_qs.sum(), qs)
    assert_close(grad.sum(-1), live.float(), 0.0, name="gradient")


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_outputs_without_gradient(backend: str) -> None:
    picked = Problem(2, 3, 2, 4).run(backend, target_qs=torch.randn(2, 3, 2, 4, requires_grad=True))
    assert [o is not None and o.requires_grad for o in picked] == [False, True, True, False, False]


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.float32, torch.int64])
def test_live_rows_need_an_action(backend: str, mask_dtype: torch.dtype) -> None:
    problem = Problem(3, 5, 2, 4)
    avail = torch.ones_like(problem.avail)
    avail[1, 3, 1] = False
    mask = torch.ones(3, 5, dtype=mask_dtype)
    with pytest.raises(ValueError, match=r"row \(1, 3\)"):
        problem.run(backend, avail_actions=avail, mask=mask)
    mask[1, 3] = 0
    problem.run(backend, avail_actions=avail, mask=mask)
    problem.run(backend, avail_actions=avail)
    problem.run(backend, avail_actions=None, mask=torch.ones(3, 5))
    with pytest.raises(ValueError, match=r"row \(1, 0, 3\)"):
        problem.run(
            backend,
            agent_qs=problem.qs.unsqueeze(1), avail_actions=avail.unsqueeze(1), actions=None, target_qs=None,
            mask=torch.ones(3, 1, 5),
        )  # fmt: skip


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("action", [-1, 4, 2**40])
def test_actions_that_do_not_exist(backend: str, action: int) -> None:
    problem = Problem(3, 5, 2, 4)
    problem.actions[2, 1, 0] = action
    with pytest.raises(ValueError, match=r"actions must lie in \[0, 4\), row \(2, 1\)"):
        problem.run(backend)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"agent_qs": [1.0]}, TypeError, "agent_qs must be a torch.Tensor"),
        ({"agent_qs": torch.zeros(3, 5, 2, 4, dtype=torch.int64)}, TypeError, "agent_qs must be a floating-point"),
        ({"agent_qs": torch.zeros(4)}, ValueError, r"agent_qs must have shape \[..., A, U\]"),
        ({"agent_qs": torch.zeros(3, 5, 2, 0)}, ValueError, "at least one action"),
        ({"avail_actions": torch.ones(3, 5, 2, 3)}, ValueError, "avail_actions must have shape"),
        ({"avail_actions": 1}, TypeError, "avail_actions must be a torch.Tensor"),
        ({"actions": torch.zeros(3, 5, 2, 1, dtype=torch.int64)}, ValueError, "actions must have shape"),
        ({"actions": torch.zeros(3, 5, 2, dtype=torch.int32)}, TypeError, "actions must have dtype torch.int64"),
        ({"target_qs": torch.zeros(3, 4, 2, 4)}, ValueError, "target_qs must have shape"),
        ({"target_qs": torch.zeros(3, 5, 2, 4, dtype=torch.float64)}, TypeError, "target_qs must have the dtype"),
        ({"mask": torch.zeros(3, 5, 1)}, ValueError, "mask must have shape"),
        ({"target_qs": torch.zeros(3, 5, 2, 4, device="meta")}, ValueError, "target_qs must be on the device"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_bad_input(changes: dict[str, Any], error: type[Exception], message: str, backend: str) -> None:
    with pytest.raises(error, match=message):
        Problem(3, 5, 2, 4).run(backend, **changes)


def test_half_precision_takes_the_reference_and_autocast_is_float32() -> None:
    problem = Problem(3, 5, 2, 4)
    half = problem.qs.detach().bfloat16()
    assert select(half, problem.avail).greedy_qs.dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match="asked for, but"):
        select(half, problem.avail, backend="native")
    with torch.autocast("cpu", torch.bfloat16):
        picked = problem.run("native", agent_qs=half)
    assert picked.greedy_qs.dtype == torch.float32
    assert_same(picked, problem.run("native", agent_qs=half.float()))


def test_gradcheck() -> None:
    problem = Problem(2, 3, 2, 5, dtype=torch.float64)

    def values(qs: Tensor) -> tuple[Tensor, ...]:
        picked = problem.run("native", agent_qs=qs)
        assert picked.chosen_qs is not None
        return picked.greedy_qs, picked.chosen_qs

    assert torch.autograd.gradcheck(values, (problem.qs,))


def test_second_derivative_is_refused() -> None:
    problem = Problem(2, 3, 2, 5)
    chosen: Tensor = problem.run("native").chosen_qs  # type: ignore[assignment]
    (grad,) = torch.autograd.grad((chosen**2).sum(), problem.qs, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


@pytest.mark.traced
@pytest.mark.parametrize("given", [True, False])
def test_opcheck(given: bool) -> None:
    problem = Problem(2, 3, 2, 5)
    mask = torch.zeros(2, 3, dtype=torch.bool)
    args = (problem.avail, problem.actions, problem.target_qs, mask) if given else (None, None, None, None)
    torch.library.opcheck(torch.ops.fastmix.select.default, (problem.qs, *args))
    greedy_qs, chosen, _, greedy, _ = torch.ops.fastmix.select(
        problem.qs.detach(), problem.avail, problem.actions, None, None
    )
    torch.library.opcheck(
        torch.ops.fastmix.select_backward.default,
        (greedy_qs, chosen if given else None, greedy, greedy_qs, problem.actions if given else None, 5),
    )


@pytest.mark.traced
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_compiles_whole(backend: str) -> None:
    problem = Problem(2, 3, 2, 5)

    def step(qs: Tensor, avail: Tensor, actions: Tensor, target_qs: Tensor, mask: Tensor) -> Selection:
        return select(qs, avail, actions=actions, target_qs=target_qs, mask=mask, backend=backend)

    args = (problem.qs, problem.avail, problem.actions, problem.target_qs, torch.zeros(2, 3))
    ours, expected = fullgraph(step)(*args), step(*args)
    assert_same(Selection(*ours), expected)
    for names in (("chosen_qs",), ("greedy_qs", "chosen_qs")):
        (grad,), (wanted,) = (gradients([getattr(s, n) for n in names], [problem.qs]) for s in (ours, expected))
        assert_close(grad, wanted, 1e-6, name=f"gradient through {names}")


def test_function_transforms() -> None:
    problem = Problem(2, 3, 2, 5)

    def total(qs: Tensor) -> Tensor:
        chosen: Tensor = problem.run("native", agent_qs=qs).chosen_qs  # type: ignore[assignment]
        return chosen.sum()

    grad = torch.func.grad(total)(problem.qs.detach())
    assert_close(grad, torch.autograd.grad(total(problem.qs), problem.qs)[0], 0.0)


# --- CUDA ------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=[False, True], ids=["ascending", "descending"])
def emulated(request: pytest.FixtureRequest) -> Iterator[None]:
    """The native backend is the CUDA kernels themselves, run on the host with a block's threads in either order."""
    with emulate.in_place_of_a_gpu("select", descending=request.param):
        yield


# Chunks of actions in shared memory: 64 in float32, 32 in float64.
@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_actions", [*range(1, 41), 63, 64, 65, 130])
def test_emulated_cuda_kernels_over_actions(n_actions: int, dtype: torch.dtype) -> None:
    assert_parity(Problem(5, 9, 3, n_actions, dtype=dtype))


# A block takes 128 agents.
@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("leading", [(), (1,), (0,), (257,), (3, 4), (2, 0), (2, 3, 4), (130, 1)])
@pytest.mark.parametrize("n_agents", [0, 1, 2, 27, 128, 129, 300])
def test_emulated_cuda_kernels_over_rows(leading: tuple[int, ...], n_agents: int) -> None:
    assert_parity(Problem(*leading, n_agents, 6))


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("avail", AVAIL_DTYPES)
def test_emulated_cuda_kernels_over_availability(avail: torch.dtype, dtype: torch.dtype) -> None:
    problem = Problem(4, 11, 3, 18, dtype=dtype, avail=avail)
    assert_parity(problem)
    assert_parity(problem, actions=None)
    assert_parity(problem, target_qs=None)
    assert_parity(problem, avail_actions=None)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_actions", [8, 9])
def test_emulated_cuda_kernels_over_strides(n_actions: int, dtype: torch.dtype) -> None:
    problem = Problem(40, 6, 3, n_actions, dtype=dtype)
    names = ("agent_qs", "avail_actions", "actions", "target_qs")
    tensors = (problem.qs, problem.avail, problem.actions, problem.target_qs)
    for view in (
        lambda t: t[:, :-1], lambda t: t[:, 1:], lambda t: t[:, ::2], lambda t: t[1:], lambda t: t[:, 2:3],
        lambda t: t.transpose(0, 1), lambda t: t[:, :, 1:],
    ):  # fmt: skip
        assert_parity(problem, **dict(zip(names, map(view, tensors), strict=True)))
    scattered = [non_contiguous(t.detach()) for t in tensors]
    scattered[0].requires_grad_()
    assert_parity(problem, **dict(zip(names, scattered, strict=True)))
    assert_parity(problem, avail_actions=problem.avail[:1, :1].expand(40, 6, 3, n_actions))
    # Numbers that begin where no 16 bytes do.
    shifted = torch.randn(problem.qs.numel() + 1, dtype=dtype)[1:].view_as(problem.qs).requires_grad_()
    assert_parity(problem, agent_qs=shifted)
    (grad,) = torch.autograd.grad(problem.run("native").chosen_qs.sum(), problem.qs)  # type: ignore[union-attr]
    (wanted,) = torch.autograd.grad(problem.run("reference").chosen_qs.sum(), problem.qs)  # type: ignore[union-attr]
    assert_close(grad, wanted, 0.0, name="from an expanded gradient")


@pytest.mark.usefixtures("emulated")
def test_emulated_cuda_kernels_take_any_number_of_actions() -> None:
    assert_parity(Problem(3, 2, 20_000))
    assert_parity(Problem(3, 2, 5_000, dtype=torch.float64))


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("dtype", DTYPES)
def test_emulated_cuda_kernels_on_ties_and_special_values(dtype: torch.dtype) -> None:
    test_ties_take_the_lowest_index("native", dtype)
    test_special_values("native", dtype)


@pytest.mark.usefixtures("emulated")
def test_emulated_cuda_kernels_find_faults() -> None:
    test_live_rows_need_an_action("native", torch.float32)
    problem = Problem(50, 5, 2, 4)
    problem.actions[33, 1, 0], problem.actions[2, 4, 1] = -1, 2**40
    with pytest.raises(RuntimeError, match="actions must lie in"):  # the device's assertion
        problem.run("native")
    with pytest.raises(ValueError, match=r"actions must lie in \[0, 4\), row \(2, 4\)"):
        problem.run("native", mask=torch.zeros(50, 5))


def on_gpu(problem: Problem) -> Problem:
    there = copy.copy(problem)
    there.qs = problem.qs.detach().cuda().requires_grad_()
    there.avail, there.actions, there.target_qs = problem.avail.cuda(), problem.actions.cuda(), problem.target_qs.cuda()
    return there


def given(picked: Selection) -> list[Tensor]:
    return [o for o in picked if o is not None]


def differentiable(picked: Selection) -> list[Tensor]:
    return [o for o in given(picked) if o.requires_grad]


def assert_same_on_gpu(problem: Problem, view: Callable[[Tensor], Tensor] = lambda t: t, absent: str = "") -> None:
    """Forward and backward on CUDA against the CPU's native pass, every tensor seen through ``view``."""
    there = on_gpu(problem)
    results = []
    for p in (there, problem):
        tensors = {"agent_qs": p.qs, "avail_actions": p.avail, "actions": p.actions, "target_qs": p.target_qs}
        picked = p.run("native", **{k: None if k == absent else view(t) for k, t in tensors.items()})
        results.append([*given(picked), *gradients(differentiable(picked), [p.qs])])
    for i, (ours, expected) in enumerate(zip(*results, strict=True)):
        assert ours.is_cuda
        assert_close(ours, expected, 0.0, name=str(i))


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_actions", N_ACTIONS)
def test_cuda_over_actions(n_actions: int, dtype: torch.dtype) -> None:
    assert_same_on_gpu(Problem(33, 21, 5, n_actions, dtype=dtype))


@needs_gpu
@pytest.mark.parametrize("leading", [(), (1,), (0,), (257,), (2, 3, 4), (130, 1), (1, 130)])
@pytest.mark.parametrize("n_agents", [1, 2, 27, 129])
def test_cuda_over_rows(leading: tuple[int, ...], n_agents: int) -> None:
    assert_same_on_gpu(Problem(*leading, n_agents, 6))


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("avail", AVAIL_DTYPES)
def test_cuda_over_availability_and_strides(avail: torch.dtype, dtype: torch.dtype) -> None:
    problem = Problem(40, 6, 3, 18, dtype=dtype, avail=avail)
    assert_same_on_gpu(problem)
    for absent in ("avail_actions", "actions", "target_qs"):
        assert_same_on_gpu(problem, absent=absent)
    assert_same_on_gpu(problem, lambda t: t[:, 1:])
    assert_same_on_gpu(problem, lambda t: t.transpose(0, 1))
    assert_same_on_gpu(problem, non_contiguous)


@needs_gpu
def test_cuda_takes_a_large_batch_and_gives_the_same_in_every_run() -> None:
    problem = Problem(128, 121, 10, 18)
    assert_same_on_gpu(problem)
    there = on_gpu(problem)

    def run() -> list[Tensor]:
        picked = there.run("native")
        cotangent = torch.ones_like(picked.greedy_qs)
        return [*given(picked), *torch.autograd.grad(differentiable(picked), there.qs, [cotangent] * 2)]

    first = run()
    assert all(torch.equal(a, b) for _ in range(20) for a, b in zip(run(), first, strict=True))


@needs_gpu
def test_cuda_on_ties_special_values_and_faults() -> None:
    qs = torch.tensor([[torch.nan, 1, 2, torch.inf], [1, torch.nan, torch.nan, 3], [-torch.inf] * 4, [0, -0.0, 0, 0]])
    avail = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 1, 1], [0, 1, 1, 1]])
    picked = select(qs.unsqueeze(1).cuda(), avail.unsqueeze(1).cuda(), backend="native")
    assert picked.greedy_actions.flatten().tolist() == [2, 1, 2, 1]
    problem = on_gpu(Problem(50, 5, 2, 4))
    problem.actions[33, 1, 0], problem.actions[2, 4, 1] = -1, 2**40
    with pytest.raises(ValueError, match=r"actions must lie in \[0, 4\), row \(2, 4\)"):
        problem.run("native", mask=torch.zeros(50, 5).cuda())
    problem = on_gpu(Problem(50, 5, 2, 4))
    problem.avail[...] = 1
    problem.avail[7, 3, 1] = 0
    with pytest.raises(ValueError, match=r"row \(7, 3\)"):
        problem.run("native", mask=torch.ones(50, 5).cuda())


@needs_gpu
def test_cuda_asserts_that_actions_exist() -> None:
    """In a process of its own, whose device is of no use afterwards."""
    python(
        """
import torch
from fastmix.ops import select
qs, actions = torch.zeros(3, 2, 4, device="cuda"), torch.full((3, 2), 4, device="cuda")
try:
    select(qs, None, actions=actions, backend="native")
    torch.cuda.synchronize()
except RuntimeError as error:  # torch.AcceleratorError where there is one
    assert "assert" in str(error), error
else:
    raise SystemExit("an action that does not exist was taken")
"""
    )


@needs_gpu
def test_cuda_neither_waits_nor_leaves_the_current_stream() -> None:
    problem = on_gpu(Problem(32, 60, 5, 11))
    expected = problem.run("native")
    with torch.cuda.stream(torch.cuda.Stream()):
        qs = late(problem.qs.detach())
        with no_waiting():
            ours = problem.run("native", agent_qs=qs)
    torch.cuda.synchronize()
    assert_same(ours, expected)


@needs_gpu
def test_cuda_graph_replays() -> None:
    problem = on_gpu(Problem(32, 60, 5, 11))
    cotangent = torch.randn(32, 60, 5).cuda()

    def step() -> list[Tensor]:
        picked = problem.run("native")
        return [*given(picked), *torch.autograd.grad(differentiable(picked), problem.qs, [cotangent] * 2)]

    graph, results = captured(step)
    with torch.no_grad():
        problem.qs.copy_(torch.randn_like(problem.qs))
        problem.avail.copy_(problem.avail.roll(1, 0))
        problem.actions.copy_(problem.actions.roll(1, 0))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(results, step(), strict=True))


@needs_gpu
@pytest.mark.traced
@pytest.mark.parametrize("given", [True, False])
def test_cuda_opcheck(given: bool) -> None:
    problem = on_gpu(Problem(2, 3, 2, 5))
    args = (problem.avail, problem.actions, problem.target_qs, None) if given else (None, None, None, None)
    torch.library.opcheck(torch.ops.fastmix.select.default, (problem.qs, *args))


@needs_gpu
@pytest.mark.traced
def test_cuda_compiles_whole() -> None:
    problem = on_gpu(Problem(2, 3, 2, 5))

    def step(qs: Tensor) -> Selection:
        return problem.run("native", agent_qs=qs)

    ours, expected = fullgraph(step)(problem.qs), step(problem.qs)
    assert_same(Selection(*ours), expected)
    (grad,), (wanted,) = (gradients(differentiable(Selection(*s)), [problem.qs]) for s in (ours, expected))
    assert_close(grad, wanted, 0.0)
