"""`returns`: the compiled scans against the reference and against each other, padding, truncation, bad input."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from fastmix import _core, backends
from fastmix.ops import returns
from fastmix.ops.returns import KINDS
from fastmix.testing import assert_close
from tests.cuda import emulate
from tests.cuda.device import captured, late, needs_gpu, no_waiting
from tests.generators import non_contiguous
from tests.ops.support import ISAS, TOLERANCE, fullgraph, gradients, run_tests_under_isa

DTYPES = (torch.float32, torch.float64)
TRAILING = ((1,), (3,), (1, 8), (2, 33))
SETTINGS: dict[str, dict[str, Any]] = {
    "one_step": {"kind": "one_step"},
    "td_lambda_0": {"kind": "td_lambda", "td_lambda": 0.0},
    "td_lambda_0.6": {"kind": "td_lambda", "td_lambda": 0.6},
    "td_lambda_1": {"kind": "td_lambda", "td_lambda": 1.0},
    "q_lambda": {"kind": "q_lambda", "td_lambda": 0.7},
    "n_step_1": {"kind": "n_step", "n_step": 1},
    "n_step_3": {"kind": "n_step", "n_step": 3},
    "n_step_99": {"kind": "n_step", "n_step": 99},
}


class Problem(NamedTuple):
    """Ragged episodes that end in a terminal or are truncated, also before the batch does."""

    rewards: Tensor
    terminated: Tensor
    mask: Tensor
    target_qs: Tensor
    behaviour_qs: Tensor

    def inputs(self, kind: str) -> list[Tensor]:
        return [self.rewards, self.target_qs] + ([self.behaviour_qs] if kind == "q_lambda" else [])


def make(
    B: int, T: int, trailing: tuple[int, ...] = (1,), dtype: torch.dtype = torch.float32, wide: bool = False
) -> Problem:
    lengths = torch.randint(0, T + 1, (B, 1, 1))
    time = torch.arange(T).view(1, T, 1)
    ended = (time == lengths - 1) & (torch.rand(B, 1, 1) < 0.5)
    return Problem(
        torch.randn(B, T, *(trailing if wide else (1,) * len(trailing)), dtype=dtype, requires_grad=True)
        if wide
        else torch.randn(B, T, 1, dtype=dtype, requires_grad=True),
        ended.to(dtype),
        (time < lengths).to(dtype),
        torch.randn(B, T + 1, *trailing, dtype=dtype, requires_grad=True),
        torch.randn(B, T + 1, *trailing, dtype=dtype, requires_grad=True),
    )


def run(problem: Problem, backend: str, settings: dict[str, Any]) -> Tensor:
    behaviour = problem.behaviour_qs if settings["kind"] == "q_lambda" else None
    return returns(*problem[:4], gamma=0.95, behaviour_qs=behaviour, backend=backend, **settings)


def assert_parity(problem: Problem, settings: dict[str, Any]) -> None:
    ours, expected = run(problem, "native", settings), run(problem, "reference", settings)
    tolerance = TOLERANCE[problem.target_qs.dtype]
    assert_close(ours, expected, tolerance)
    inputs = problem.inputs(settings["kind"])
    for i, (grad, wanted) in enumerate(zip(gradients(ours, inputs), gradients(expected, inputs), strict=True)):
        assert_close(grad, wanted, tolerance, name=f"gradient {i}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("trailing", TRAILING)
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_parity(settings: dict[str, Any], trailing: tuple[int, ...], wide: bool, dtype: torch.dtype) -> None:
    assert_parity(make(7, 13, trailing, dtype, wide), settings)


@pytest.mark.parametrize(("B", "T"), [(0, 5), (5, 0), (0, 0), (1, 1), (1, 31), (2, 32), (2, 33), (3, 130), (257, 2)])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_parity_over_sizes(settings: dict[str, Any], B: int, T: int) -> None:
    assert_parity(make(B, T), settings)


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa: str) -> None:
    run_tests_under_isa(__file__, "parity and (trailing0 or trailing3) and not sizes", isa)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_nothing(threads: int) -> None:
    problem, settings = make(200, 60), SETTINGS["td_lambda_0.6"]
    torch.set_num_threads(1)
    expected = run(problem, "native", settings)
    torch.set_num_threads(threads)
    assert_close(run(problem, "native", settings), expected, 0.0)
    assert_parity(problem, settings)


def public_td_lambda(problem: Problem, gamma: float, td_lambda: float) -> Tensor:
    """The recursion of the public trainers as the spec writes it."""
    qs, live = problem.target_qs, problem.mask
    value = qs[:, -1] * (1 - problem.terminated.sum(1))
    values = []
    for t in reversed(range(live.shape[1])):
        bootstrap = (1 - td_lambda) * gamma * qs[:, t + 1] * (1 - problem.terminated[:, t])
        value = td_lambda * gamma * value + live[:, t] * (problem.rewards[:, t] + bootstrap)
        values.append(value)
    return torch.stack(values[::-1], 1)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_public_recursion_where_it_is_right(backend: str) -> None:
    """Terminated episodes of any length, and truncated ones of full length."""
    problem = make(6, 9, dtype=torch.float64)
    mask, terminated = torch.ones_like(problem.mask), torch.zeros_like(problem.terminated)
    for episode, length in enumerate([3, 9, 1]):
        mask[episode, length:], terminated[episode, length - 1] = 0, 1
    problem = problem._replace(mask=mask, terminated=terminated)
    for td_lambda in (0.0, 0.6, 1.0):
        ours = returns(*problem[:4], gamma=0.9, td_lambda=td_lambda, backend=backend)
        assert_close(ours, public_td_lambda(problem, 0.9, td_lambda), 1e-14)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_longer_padding_changes_nothing(settings: dict[str, Any], terminal: bool, backend: str) -> None:
    """An episode truncated before the batch ends bootstraps from its last state, not from the padding behind it."""
    length, pad = 5, 4
    short = make(3, length, (2,), torch.float64, wide=True)
    short = short._replace(mask=torch.ones_like(short.mask), terminated=torch.zeros_like(short.terminated))
    short.terminated[:, -1] = float(terminal)

    def padded(tensor: Tensor, value: float) -> Tensor:
        tail = torch.full_like(tensor[:, :1], value).expand(-1, pad, *tensor.shape[2:])
        return torch.cat([tensor, tail], 1)

    long = Problem(
        *(padded(t, 0.0 if name in ("terminated", "mask") else torch.nan) for name, t in short._asdict().items())
    )
    expected = run(short, backend, settings)
    ours = run(long, backend, settings)[:, :length]
    assert_close(ours, expected, 1e-14)
    inputs = short.inputs(settings["kind"])
    for grad, wanted in zip(gradients(ours, inputs), gradients(expected, inputs), strict=True):
        assert_close(grad, wanted, 1e-14)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -1e38])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_padding_reaches_neither_live_targets_nor_gradients(
    settings: dict[str, Any], value: float, backend: str
) -> None:
    clean = make(9, 11, (3,))
    live = clean.mask != 0
    # The state behind the last live step is stored as well, for truncated episodes bootstrap from it.
    stored = torch.cat([torch.zeros_like(live[:, :1]), live & (clean.terminated == 0)], 1)
    stored[:, :-1] |= live
    spoilt = {
        "rewards": torch.where(live, clean.rewards, value),
        "target_qs": torch.where(stored, clean.target_qs, value),
        "behaviour_qs": torch.where(stored, clean.behaviour_qs, value),
    }
    expected, ours = (run(p, backend, settings)[live.squeeze(-1)] for p in (clean, clean._replace(**spoilt)))
    assert_close(ours, expected, 0.0)
    inputs = clean.inputs(settings["kind"])
    for grad, wanted in zip(gradients(ours, inputs), gradients(expected, inputs), strict=True):
        assert_close(grad, wanted, 0.0)


def test_definition() -> None:
    rewards = torch.tensor([1.0, 2.0, 4.0]).view(1, 3, 1)
    qs = torch.tensor([10.0, 20.0, 30.0, 40.0]).view(1, 4, 1)
    none, every = torch.zeros(1, 3, 1), torch.ones(1, 3, 1)

    def targets(ended: Tensor = none, **settings: Any) -> list[float]:
        return returns(rewards, ended, every, qs, gamma=0.5, backend="native", **settings).flatten().tolist()

    assert targets(kind="one_step") == [11.0, 17.0, 24.0]
    assert targets(td_lambda=1.0) == [1 + 1 + 1 + 5, 2 + 2 + 10, 4 + 20]
    assert targets(kind="n_step", n_step=2) == [1 + 1 + 7.5, 2 + 2 + 10, 24.0]
    ended = torch.tensor([0.0, 0.0, 1.0]).view(1, 3, 1)
    assert targets(ended, td_lambda=1.0) == [3.0, 4.0, 4.0]
    assert targets(ended, kind="one_step") == [11.0, 17.0, 4.0]


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32, torch.float64])
def test_flags_of_any_dtype(dtype: torch.dtype) -> None:
    problem = make(5, 8)
    flags = {"mask": problem.mask.to(dtype), "terminated": problem.terminated.to(dtype)}
    ours = run(problem._replace(**flags), "native", SETTINGS["td_lambda_0.6"])
    assert_close(ours, run(problem, "native", SETTINGS["td_lambda_0.6"]), 0.0)


def test_strides_of_any_kind() -> None:
    whole, settings = make(5, 9, (2,), wide=True), SETTINGS["q_lambda"]
    sliced = Problem(
        whole.rewards[:, 1:],
        whole.terminated[:, 1:],
        whole.mask[:, 1:],
        whole.target_qs[:, 1:],
        whole.behaviour_qs[:, 1:],
    )
    assert_parity(sliced, settings)
    scattered = Problem(*(non_contiguous(t.detach()).requires_grad_(t.requires_grad) for t in whole))
    assert_parity(scattered, settings)
    assert_close(run(scattered, "native", settings), run(whole, "native", settings), 0.0)
    (grad,) = torch.autograd.grad(run(whole, "native", settings).sum(), whole.target_qs)
    (wanted,) = torch.autograd.grad(run(whole, "reference", settings).sum(), whole.target_qs)
    assert_close(grad, wanted, 1e-6, name="from an expanded gradient")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"kind": "gae"}, ValueError, "kind must be one of"),
        ({"gamma": 1.5}, ValueError, "gamma must lie in"),
        ({"gamma": torch.nan}, ValueError, "gamma must lie in"),
        ({"td_lambda": -0.1}, ValueError, "td_lambda must lie in"),
        ({"n_step": 0}, ValueError, "n_step must be at least 1"),
        ({"kind": "q_lambda"}, ValueError, "behaviour_qs belongs to kind"),
        ({"behaviour_qs": torch.zeros(5, 8, 2)}, ValueError, "behaviour_qs belongs to kind"),
        ({"kind": "q_lambda", "behaviour_qs": torch.zeros(5, 8, 1)}, ValueError, "behaviour_qs must have shape"),
        ({"rewards": torch.zeros(5, 7)}, ValueError, "rewards must have shape"),
        ({"rewards": torch.zeros(5, 7, 1, dtype=torch.int64)}, TypeError, "rewards must be a floating-point"),
        ({"rewards": torch.zeros(5, 7, 1, dtype=torch.float64)}, TypeError, "rewards must have the dtype"),
        ({"rewards": torch.zeros(5, 7, 1, device="meta")}, ValueError, "rewards must be on the device"),
        ({"terminated": torch.zeros(5, 8, 1)}, ValueError, "terminated must have shape"),
        ({"mask": torch.zeros(5, 7)}, ValueError, "mask must have shape"),
        ({"mask": None}, TypeError, "mask must be a torch.Tensor"),
        ({"mask": torch.zeros(5, 7, 1, device="meta")}, ValueError, "mask must be on the device"),
        ({"target_qs": torch.zeros(5, 8)}, ValueError, "target_qs must have shape"),
        ({"target_qs": torch.zeros(5, 0, 1)}, ValueError, "target_qs must have shape"),
        ({"target_qs": torch.zeros(5, 8, 2, dtype=torch.int64)}, TypeError, "target_qs must be a floating-point"),
    ],
)
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_bad_input(changes: dict[str, Any], error: type[Exception], message: str, backend: str) -> None:
    problem = make(5, 7, (2,))
    args = {**dict(list(problem._asdict().items())[:4]), "gamma": 0.9, **changes}
    with pytest.raises(error, match=message):
        returns(backend=backend, **args)


def test_autocast_is_float32() -> None:
    problem = make(5, 7)
    half = problem._replace(
        rewards=problem.rewards.detach().bfloat16(), target_qs=problem.target_qs.detach().bfloat16()
    )
    assert run(half, "reference", SETTINGS["one_step"]).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        ours = run(half, "native", SETTINGS["one_step"])
    upcast = half._replace(rewards=half.rewards.float(), target_qs=half.target_qs.float())
    assert ours.dtype == torch.float32
    assert_close(ours, run(upcast, "native", SETTINGS["one_step"]), 0.0)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_gradcheck(settings: dict[str, Any]) -> None:
    problem = make(3, 5, (2,), torch.float64)

    def function(rewards: Tensor, target_qs: Tensor, behaviour_qs: Tensor) -> Tensor:
        return run(
            problem._replace(rewards=rewards, target_qs=target_qs, behaviour_qs=behaviour_qs), "native", settings
        )

    assert torch.autograd.gradcheck(function, (problem.rewards, problem.target_qs, problem.behaviour_qs))


@pytest.mark.traced
@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind: str) -> None:
    p, settings = make(3, 4, (2,)), (0.9, KINDS.index(kind), 0.5, 2)
    behaviour = p.behaviour_qs if kind == "q_lambda" else None
    torch.library.opcheck(torch.ops.fastmix.returns.default, (*p[:4], behaviour, *settings))
    torch.library.opcheck(
        torch.ops.fastmix.returns_backward.default, (torch.randn(3, 4, 2), p.terminated, p.mask, 1, *settings)
    )


@pytest.mark.traced
@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("kind", ["td_lambda_0.6", "q_lambda"])
def test_compiles_whole(kind: str, backend: str) -> None:
    problem, settings = make(3, 4, (2,)), SETTINGS[kind]

    def step(*args: Tensor) -> Tensor:
        return run(Problem(*args), backend, settings)

    ours, expected = fullgraph(step)(*problem), step(*problem)
    assert_close(ours, expected, 1e-6)
    inputs = problem.inputs(settings["kind"])
    for grad, wanted in zip(gradients(ours, inputs), gradients(expected, inputs), strict=True):
        assert_close(grad, wanted, 1e-6)


def test_function_transforms() -> None:
    problem = make(3, 4)

    def total(qs: Tensor) -> Tensor:
        return run(problem._replace(target_qs=qs), "native", SETTINGS["td_lambda_0.6"]).sum()

    grad = torch.func.grad(total)(problem.target_qs.detach())
    assert_close(grad, torch.autograd.grad(total(problem.target_qs), problem.target_qs)[0], 0.0)


# --- CUDA ------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=[False, True], ids=["ascending", "descending"])
def emulated(request: pytest.FixtureRequest) -> Iterator[None]:
    """The native backend is the CUDA kernels themselves, run on the host with a block's threads in either order."""
    with emulate.in_place_of_a_gpu("returns", descending=request.param):
        yield


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("B", "T", "trailing", "wide"),
    [
        (3, 70, (1,), False), (2, 33, (3,), True), (2, 32, (3,), False), (2, 31, (1, 8), False), (9, 5, (1,), False),
        (1, 1, (1,), False), (0, 5, (1,), False), (5, 0, (1,), False), (2, 97, (2,), False), (3, 161, (1,), False),
        (2, 13, (33,), True), (2, 9, (40,), False),
    ],
)  # fmt: skip
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_emulated_cuda_kernels(
    settings: dict[str, Any], B: int, T: int, trailing: tuple[int, ...], wide: bool, dtype: torch.dtype
) -> None:
    assert_parity(make(B, T, trailing, dtype, wide), settings)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_emulated_cuda_kernels_keep_padding_out(settings: dict[str, Any]) -> None:
    test_padding_reaches_neither_live_targets_nor_gradients(settings, torch.nan, "native")
    for terminal in (False, True):
        test_longer_padding_changes_nothing(settings, terminal, "native")


def test_cuda_backend_is_named_or_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    for op in ("select", "returns", "td_loss", "optimise"):
        assert backends.available(op, "cuda") == (("native", "reference") if _core.cuda else ("reference",))
    monkeypatch.setattr(backends, "cuda_problem", lambda: "the compiled core was built without CUDA")
    backends._decide.cache_clear()
    try:
        assert backends._decide("returns", "cuda", torch.float32, None) == "reference"
        with pytest.raises(RuntimeError, match="built without CUDA"):
            backends._decide("returns", "cuda", torch.float32, "native")
    finally:
        backends._decide.cache_clear()


def on_gpu(problem: Problem) -> Problem:
    return Problem(*(t.detach().cuda().requires_grad_(t.requires_grad) for t in problem))


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("B", "T"), [(0, 5), (5, 0), (1, 1), (3, 33), (32, 120), (128, 400)])
def test_cuda(B: int, T: int, dtype: torch.dtype) -> None:
    for trailing, wide in (((1,), False), ((3,), True), ((1, 8), False), ((40,), True)):
        for settings in SETTINGS.values():
            problem = make(B, T, trailing, dtype, wide)
            there = on_gpu(problem)
            ours, expected = run(there, "native", settings), run(problem, "native", settings)
            assert_close(ours, expected, TOLERANCE[dtype], name=str(settings))
            inputs, wanted_of = there.inputs(settings["kind"]), problem.inputs(settings["kind"])
            for grad, wanted in zip(gradients(ours, inputs), gradients(expected, wanted_of), strict=True):
                assert_close(grad, wanted, TOLERANCE[dtype], name=f"gradient, {settings}")


@needs_gpu
@pytest.mark.parametrize("trailing", [(1,), (40,)])
def test_cuda_gives_the_same_in_every_run(trailing: tuple[int, ...]) -> None:
    problem = on_gpu(make(300, 120, trailing))
    first = run(problem, "native", SETTINGS["td_lambda_0.6"])
    assert all(torch.equal(run(problem, "native", SETTINGS["td_lambda_0.6"]), first) for _ in range(20))


@needs_gpu
def test_cuda_neither_waits_nor_leaves_the_current_stream() -> None:
    problem, settings = on_gpu(make(32, 120)), SETTINGS["td_lambda_0.6"]
    expected = run(problem, "native", settings)
    with torch.cuda.stream(torch.cuda.Stream()):
        rewards = late(problem.rewards.detach())
        with no_waiting():
            ours = run(problem._replace(rewards=rewards), "native", settings)
    torch.cuda.synchronize()
    assert torch.equal(ours, expected)


@needs_gpu
def test_cuda_graph_replays() -> None:
    problem, settings, cotangent = on_gpu(make(32, 120)), SETTINGS["td_lambda_0.6"], torch.randn(32, 120, 1).cuda()

    def step() -> list[Tensor]:
        targets = run(problem, "native", settings)
        return [targets, *torch.autograd.grad(targets, problem.inputs("td_lambda"), cotangent)]

    graph, results = captured(step)
    with torch.no_grad():
        problem.rewards.copy_(torch.randn_like(problem.rewards))
        problem.mask.copy_(problem.mask.roll(1, 0))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(results, step(), strict=True))


@needs_gpu
@pytest.mark.traced
@pytest.mark.parametrize("kind", KINDS)
def test_cuda_opcheck(kind: str) -> None:
    p, settings = on_gpu(make(3, 4, (2,))), (0.9, KINDS.index(kind), 0.5, 2)
    behaviour = p.behaviour_qs if kind == "q_lambda" else None
    torch.library.opcheck(torch.ops.fastmix.returns.default, (*p[:4], behaviour, *settings))
