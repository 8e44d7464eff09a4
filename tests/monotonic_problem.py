"""One problem of `monotonic` and its solution in float64: for Triton's interpreter, the host emulation, and a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from fastmix.ops import monotonic
from fastmix.ops.monotonic import MonotonicParams, reference
from fastmix.testing import assert_close, golden, rms_ratio
from tests.generators import Shape, monotonic_params


class Problem(NamedTuple):
    """Inputs that require gradients, and the gradient of the result."""

    agent_qs: Tensor
    states: Tensor
    params: MonotonicParams
    cotangent: Tensor
    positivity: str
    beta: float

    def inputs(self) -> dict[str, Tensor]:
        named = {"agent_qs": self.agent_qs, "states": self.states}
        named.update({name: t for name, t in zip(self.params._fields, self.params, strict=True) if t is not None})
        return named

    def to(self, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Problem:
        """A copy with leaves of its own."""

        def copy(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.detach().to(device, dtype).clone().requires_grad_()

        q, s, c = (self.agent_qs, self.states, self.cotangent)
        return Problem(
            q.detach().to(device, dtype).clone().requires_grad_(),
            s.detach().to(device, dtype).clone().requires_grad_(),
            MonotonicParams(*(copy(p) for p in self.params)),  # type: ignore[arg-type]
            c.to(device, dtype),
            self.positivity,
            self.beta,
        )


def make(
    A: int, S: int, rows: int, *, E: int = 32, H: int = 64, layers: int = 2, positivity: str = "abs", beta: float = 1.0
) -> Problem:
    params = monotonic_params(Shape(A, 5, S, 5), E, H, layers)
    g = torch.Generator().manual_seed(rows)
    q, s = (torch.randn(rows, size, generator=g).requires_grad_() for size in (A, S))
    return Problem(q, s, params, torch.randn(rows, generator=g), positivity, beta)


def solve(problem: Problem) -> tuple[Tensor, dict[str, Tensor]]:
    """Result and gradients of the reference in float64."""
    exact = problem.to("cpu", torch.float64)
    out = reference.monotonic(exact.agent_qs, exact.states, exact.params, exact.positivity, exact.beta)
    inputs = exact.inputs()
    grads = torch.autograd.grad(out, list(inputs.values()), exact.cotangent)
    return out.detach(), dict(zip(inputs, grads, strict=True))


def mix(problem: Problem, backend: str) -> Tensor:
    """``[N]``"""
    q, s, params, _, positivity, beta = problem
    return monotonic(q, s, params, positivity=positivity, beta=beta, backend=backend).flatten()


def check(
    problem: Problem, tolerance: float, *, backend: str, grads: float | None = None, rounding: float = 2.0**-24
) -> None:
    """A backend's result, with gradient and without, and gradients; ``grads``: their tolerance where it differs.

    Gradients of few entries are sums over all rows that may cancel, and get ten times the tolerance. Gradients jump
    where a ReLU or an absolute value changes sign: one that misses may still err by twice what a relative ``rounding``
    of all operands does to the exact one.
    """
    expected, expected_grads = solve(problem)
    out = mix(problem, backend)
    inputs = problem.inputs()
    results = torch.autograd.grad(out, list(inputs.values()), problem.cotangent.to(out.dtype))
    with torch.no_grad():
        fused = mix(problem, backend)
    assert_close(out, expected, tolerance, name="q_tot")
    assert_close(fused, expected, tolerance, name="q_tot without gradient")
    for (name, value), grad in zip(inputs.items(), results, strict=True):
        assert grad.shape == value.shape and grad.dtype == value.dtype and grad.device == value.device
        allowed = (grads or tolerance) * (10.0 if grad.numel() <= 4 else 1.0)
        if rms_ratio(grad, expected_grads[name]) > allowed:
            allowed = max(allowed, 2 * kink(problem, name, expected_grads[name], rounding))
        assert_close(grad, expected_grads[name], allowed, name=f"gradient of {name}")


def kink(problem: Problem, name: str, expected: Tensor, rounding: float, draws: int = 8) -> float:
    """How far a relative ``rounding`` of all operands moves the exact gradient of ``name`` at most, as an RMS ratio."""
    exact = problem.to(problem.states.device.type, torch.float64)
    moved = 0.0
    for seed in range(draws):
        generator = torch.Generator(exact.states.device).manual_seed(seed)
        shaken = exact.to(exact.states.device.type, torch.float64)
        with torch.no_grad():
            for tensor in shaken.inputs().values():
                noise = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype, device=tensor.device)
                tensor.mul_(1 + rounding * noise)
        out = reference.monotonic(*shaken[:3], shaken.positivity, shaken.beta)
        moved = max(moved, rms_ratio(torch.autograd.grad(out, shaken.inputs()[name], shaken.cotangent)[0], expected))
    return moved


def cut_off(state_dim: int) -> float:
    """What forward's first layer loses with three tf32 products for one: the matrix unit cuts its sums off.

    For each state feature 1.3e-8 on an H200, and 2e-8 in the emulation, which keeps no bit more than a float has.
    """
    return 3e-8 * state_dim


def golden_files() -> list[Any]:
    """The reference numbers of everything that is this op and no other."""
    folder = golden.folder(Path(__file__).parent / "golden")
    files = [golden.load(path) for path in sorted(folder.glob("**/*.npz"))]
    return [
        pytest.param(file, id=file.name) for file in files if file.kind in ("qmix", "nmix", "qmix_noabs", "resq.qmixer")
    ]
