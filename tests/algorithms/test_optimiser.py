"""The fused clip and optimiser step against `torch.optim`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastmix import backends
from fastmix.algorithms.optimiser import Optimiser
from fastmix.testing import rms_ratio

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
