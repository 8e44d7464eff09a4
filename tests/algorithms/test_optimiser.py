"""The fused clip and optimiser step against `torch.optim`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastmix import backends
from fastmix.algorithms import optimiser as optimiser_module
from fastmix.algorithms.optimiser import Optimiser
from fastmix.testing import poisoned_allocations, rms_ratio
from tests.cuda import emulate
from tests.cuda.device import captured, needs_gpu, no_waiting

SHAPES = ((64, 33), (64,), (7, 5, 3), (1,), (130, 257), (0,))
FROZEN = 1
"""Index of the parameter that never gets a gradient"""


def make(parameters: list[Tensor], backend: str, kind: str, **overrides: Any) -> Optimiser:
    settings = {"lr": 1e-2, "alpha": 0.99, "eps": 1e-5, "weight_decay": 0.01, "clip": 10.0} | overrides
    with backends.backend(backend):
        return Optimiser(parameters, kind=kind, **settings)


def start(dtype: torch.dtype) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=g, dtype=dtype).requires_grad_() for shape in SHAPES]


def set_grads(parameters: list[Tensor], step: int, scale: float = 1.0) -> None:
    g = torch.Generator().manual_seed(step)
    for i, p in enumerate(parameters):
        grad = scale * torch.randn(p.shape, generator=g, dtype=p.dtype)
        p.grad = None if i == FROZEN else grad


@pytest.mark.parametrize("scale", [1e-3, 1.0], ids=["under the clip", "clipped"])
@pytest.mark.parametrize("kind", ["adam", "rmsprop"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("backend", ["reference", "native"])
def test_steps_are_those_of_torch(backend: str, dtype: torch.dtype, kind: str, scale: float) -> None:
    ours, theirs = start(dtype), start(dtype)
    optimiser = make(ours, backend, kind)
    common: dict[str, Any] = {"lr": 1e-2, "eps": 1e-5, "weight_decay": 0.01}
    public: torch.optim.Optimizer = torch.optim.RMSprop(theirs, alpha=0.99, **common)
    if kind == "adam":
        public = torch.optim.Adam(theirs, **common)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for step in range(5):
        set_grads(ours, step, scale)
        set_grads(theirs, step, scale)
        norm = optimiser.step()
        expected = torch.nn.utils.clip_grad_norm_(theirs, 10.0)
        public.step()
        assert (expected > 10) == (scale == 1.0)
        assert rms_ratio(norm, expected) < tolerance
    for a, b, first in zip(ours, theirs, start(dtype), strict=True):
        assert rms_ratio(a.detach() - first.detach(), b.detach() - first.detach()) < 10 * tolerance
    assert torch.equal(ours[FROZEN], start(dtype)[FROZEN])


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_state_decides_the_next_step(backend: str) -> None:
    one, other = start(torch.float32), start(torch.float32)
    a, b = make(one, backend, "adam"), make(other, backend, "adam")
    for step in range(3):
        set_grads(one, step)
        a.step()
    with torch.no_grad():
        for p, q in zip(other, one, strict=True):
            p.copy_(q)
    b.load_state_dict({k: v.clone() for k, v in a.state_dict().items()})
    for parameters, optimiser in ((one, a), (other, b)):
        set_grads(parameters, 9)
        optimiser.step()
    assert all(torch.equal(p, q) for p, q in zip(one, other, strict=True))


def test_a_native_step_counts_as_a_change_of_the_parameters() -> None:
    parameters = start(torch.float32)
    versions = [p._version for p in parameters]
    set_grads(parameters, 0)
    make(parameters, "native", "adam").step()
    changed = [p._version > v for p, v in zip(parameters, versions, strict=True)]
    assert changed == [i != FROZEN for i in range(len(SHAPES))]


def test_gradients_may_have_strides() -> None:
    dense, strided = torch.zeros(4, 6, requires_grad=True), torch.zeros(4, 6, requires_grad=True)
    grad = torch.arange(24.0).view(6, 4)
    dense.grad, strided.grad = grad.t().contiguous(), grad.t()
    for p in (dense, strided):
        make([p], "native", "rmsprop").step()
    assert torch.equal(dense, strided)


def test_parameters_that_do_not_fit_are_refused_before_the_core_sees_them() -> None:
    with pytest.raises(ValueError, match="parameters must share one dtype and device"):
        make([torch.zeros(2), torch.zeros(2, dtype=torch.float64)], "native", "adam")
    for exchanged in (torch.zeros(4, 6, dtype=torch.float64), torch.zeros(6, 4).t()):
        p = torch.zeros(4, 6, requires_grad=True)
        optimiser = make([p], "native", "adam")
        p.data = exchanged
        p.grad = torch.ones_like(p)
        with pytest.raises(ValueError, match=r"parameter 0 must still be a contiguous torch\.float32 tensor"):
            optimiser.step()
    with pytest.raises(ValueError, match="optimiser state must be"):
        make([torch.zeros(2)], "native", "adam").load_state_dict(make([torch.zeros(3)], "native", "adam").state_dict())


def test_steps_are_counted_also_without_any_gradient() -> None:
    for backend in ("reference", "native"):
        optimiser = make(start(torch.float32), backend, "adam")
        assert optimiser.step().item() == 0 and optimiser.state_dict()["steps"].item() == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_reference_with_its_count_on_the_device(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it runs on CUDA: bias corrections are tensors, for a graph to replay them."""
    one, other = start(dtype), start(dtype)
    a, b = make(one, "reference", "adam"), make(other, "reference", "adam")
    for step in range(5):
        set_grads(one, step)
        a.step()
        set_grads(other, step)
        with monkeypatch.context() as patch:
            patch.setattr(Optimiser, "_steps_as_factor", lambda self: self.steps.double())
            b.step()
    for p, q, first in zip(one, other, start(dtype), strict=True):
        assert rms_ratio(q.detach() - first.detach(), p.detach() - first.detach()) < (
            1e-12 if dtype == torch.float64 else 1e-5
        )


# --- CUDA ------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=[False, True], ids=["ascending", "descending"])
def emulated(request: pytest.FixtureRequest) -> Iterator[None]:
    """The native backend is the CUDA kernels themselves, run on the host with a block's threads in either order."""
    with emulate.in_place_of_a_gpu("optimise", descending=request.param, module="fastmix.algorithms.optimiser"):
        yield


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("scale", [1e-3, 1.0], ids=["under the clip", "clipped"])
@pytest.mark.parametrize("kind", ["adam", "rmsprop"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_emulated_cuda_kernels(dtype: torch.dtype, kind: str, scale: float) -> None:
    test_steps_are_those_of_torch("native", dtype, kind, scale)


@pytest.mark.usefixtures("emulated")
def test_emulated_cuda_kernels_keep_the_rules() -> None:
    test_state_decides_the_next_step("native")
    test_a_native_step_counts_as_a_change_of_the_parameters()
    test_gradients_may_have_strides()
    test_steps_are_counted_also_without_any_gradient()


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("count", [63, 64, 65, 150])
def test_emulated_cuda_kernels_take_any_number_of_tensors(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch holds 64; the blocks of all share the sums, also where there are fewer than chunks."""
    monkeypatch.setattr(optimiser_module, "_PARTS", 5)
    shapes = [(1 + 37 * i % 1500,) for i in range(count)]
    parameters = {name: [torch.ones(s, requires_grad=True) for s in shapes] for name in ("native", "reference")}
    for backend, own in parameters.items():
        optimiser = make(own, backend, "adam")
        for step in range(2):
            set_grads(own, step, 0.1)
            norm = optimiser.step()
        assert rms_ratio(norm, torch.cat([p.grad for p in own if p.grad is not None]).norm()) < 1e-6
    for a, b in zip(parameters["native"], parameters["reference"], strict=True):
        assert rms_ratio(a.detach() - 1, b.detach() - 1) < 1e-5


@pytest.mark.usefixtures("emulated")
def test_emulated_cuda_kernels_let_nan_go_on() -> None:
    parameters = start(torch.float32)
    set_grads(parameters, 0)
    parameters[2].grad[0] = torch.nan  # type: ignore[index]
    assert make(parameters, "native", "adam").step().isnan()
    assert all(p.isnan().all() for i, p in enumerate(parameters) if i != FROZEN)


def on_gpu(parameters: list[Tensor]) -> list[Tensor]:
    there = [p.detach().cuda().requires_grad_() for p in parameters]
    for p, q in zip(parameters, there, strict=True):
        q.grad = None if p.grad is None else p.grad.cuda()
    return there


@needs_gpu
@pytest.mark.parametrize("scale", [1e-3, 1.0], ids=["under the clip", "clipped"])
@pytest.mark.parametrize("kind", ["adam", "rmsprop"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("backend", ["reference", "native"])
def test_cuda_steps_are_those_of_the_cpu(backend: str, dtype: torch.dtype, kind: str, scale: float) -> None:
    here = start(dtype)
    there = on_gpu(here)
    a, b = make(here, "native", kind), make(there, backend, kind)
    for step in range(5):
        set_grads(here, step, scale)
        for p, q in zip(here, there, strict=True):
            q.grad = None if p.grad is None else p.grad.cuda()
        expected = a.step()
        with no_waiting(), poisoned_allocations():
            norm = b.step()
        assert norm.is_cuda and rms_ratio(norm, expected) < 1e-5
    tolerance = 1e-11 if dtype == torch.float64 else 1e-4
    for p, q, first in zip(here, there, start(dtype), strict=True):
        assert rms_ratio(q.detach().cpu() - first.detach(), p.detach() - first.detach()) < tolerance


@needs_gpu
@pytest.mark.parametrize("count", [1, 64, 65, 200])
def test_cuda_takes_any_number_of_tensors_and_gives_the_same_in_every_run(count: int) -> None:
    ends = []
    for _ in range(20):
        there = [torch.ones(1 + 3_701 * i % 50_000, device="cuda", requires_grad=True) for i in range(count)]
        for i, p in enumerate(there):
            p.grad = torch.full_like(p, 0.01 * (i + 1))
        norm = make(there, "native", "adam").step()
        ends.append([norm, *(p.detach() for p in there)])
    assert all(torch.equal(x, y) for end in ends for x, y in zip(end, ends[0], strict=True))
    expected = sum((0.01 * (i + 1)) ** 2 * (1 + 3_701 * i % 50_000) for i in range(count)) ** 0.5
    assert rms_ratio(ends[0][0], torch.tensor(expected, device="cuda")) < 1e-6


@needs_gpu
@pytest.mark.parametrize("kind", ["adam", "rmsprop"])
@pytest.mark.parametrize("backend", ["reference", "native"])
def test_cuda_graph_replays_count_their_steps(backend: str, kind: str) -> None:
    here = start(torch.float64)
    set_grads(here, 0)
    there = on_gpu(here)
    a, b = make(here, "native", kind), make(there, backend, kind)
    # `captured` takes one step before it captures another, which only a replay makes.
    graph, norm = captured(b.step)
    for _ in range(3):
        graph.replay()
    for _ in range(4):
        expected = a.step()
    assert b.state_dict()["steps"].item() == 4
    assert rms_ratio(norm, expected) < 1e-12
    for p, q in zip(here, there, strict=True):
        assert rms_ratio(q.detach().cpu(), p.detach()) < 1e-11


@needs_gpu
def test_cuda_state_goes_to_the_cpu_and_back() -> None:
    there = on_gpu(start(torch.float32))
    one = make(there, "native", "adam")
    for step in range(3):
        for p in there:
            p.grad = torch.full_like(p, 0.1 * (step + 1))
        one.step()
    saved = {name: tensor.cpu() for name, tensor in one.state_dict().items()}
    twin = [p.detach().clone().requires_grad_() for p in there]
    other = make(twin, "native", "adam")
    other.load_state_dict(saved)
    for parameters, optimiser in ((there, one), (twin, other)):
        for p in parameters:
            p.grad = torch.ones_like(p)
        optimiser.step()
    assert all(torch.equal(p, q) for p, q in zip(there, twin, strict=True))
