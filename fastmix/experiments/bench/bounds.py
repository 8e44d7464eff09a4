"""What a device can do at most, and the time that no implementation of an op can go much below on it.

The floors count each input read once, each output written once, and the matrix products: the larger of bytes over
bandwidth and operations over the rate of the unit that does them. On CUDA the rates are measured at the start of every
run. The counts of `monotonic` are for QMIX's mixer with two-layer hypernets.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import torch

from fastmix.testing.bench import graphed, interleaved

_FIRST: Final = 192
"""Columns of `monotonic`'s merged first layer: both hypernets' hidden layers (64), b1 and V's hidden layer (32)."""
_HYPERNET, _EMBED, _HIDDEN = 64, 32, 64


@dataclass(frozen=True)
class Ceilings:
    """Rates of a device."""

    bandwidth: float
    """bytes per second read and written by a copy"""
    float32: float
    """operations per second of matrix products, a multiplication and an addition being two"""
    tf32: float
    bfloat16: float
    launch: float
    """seconds an empty kernel takes in a graph"""

    def rate(self, precision: str, autocast: torch.dtype | None = None) -> float:
        """Of products in this precision; "highest" is reached fastest by three tf32 products or by plain float32."""
        if autocast is not None:
            return self.bfloat16
        return max(self.float32, self.tf32 / 3) if precision == "highest" else self.tf32


def measured(size: int = 8192, copied: int = 2**30) -> Ceilings:
    """The ceilings of the current CUDA device, on random data: products of ``size`` cubed, ``copied`` bytes copied."""
    source = torch.randn(copied // 4, device="cuda")
    target = torch.empty_like(source)
    calls: dict[str, Callable[[], object]] = {"copy": lambda: target.copy_(source)}
    products = {}
    for name, dtype, tf32 in (
        ("float32", torch.float32, False),
        ("tf32", torch.float32, True),
        ("bfloat16", torch.bfloat16, False),
    ):
        a, b = (torch.randn(size, size, device="cuda", dtype=dtype) for _ in range(2))
        products[name] = _Product(a, b, torch.empty_like(a), tf32)
    empty = graphed(lambda: torch.cuda._sleep(0), calls=200)
    timings = interleaved({**calls, **products, "launch": empty}, rounds=7, min_time=0.01, device="cuda")
    rates = {name: 2 * size**3 / timings[name].median for name in products}
    return Ceilings(2 * copied / timings["copy"].median, **rates, launch=timings["launch"].median)


def remembered(path: Path) -> Ceilings:
    """The ceilings in the file ``path``; measured and written there when it does not exist."""
    if path.exists():
        return Ceilings(**json.loads(path.read_text()))
    ceilings = measured()
    path.write_text(json.dumps(asdict(ceilings)))
    return ceilings


def monotonic(rows: int, n_agents: int, state_dim: int, train: bool, rate: float, ceilings: Ceilings) -> float:
    """Seconds of forward, and in training of the backward pass that reads what forward stored (``[rows, 192]``)."""
    forward = monotonic_bytes(rows, n_agents, state_dim)
    flops = monotonic_flops(rows, n_agents, state_dim)
    if not train:
        return max(forward / ceilings.bandwidth, flops / rate)
    stored = 4 * rows * _FIRST
    # Each kernel reads and writes: P, q and the gradient of q_tot; gradients G of the first layer, those of the second
    # layers' outputs, of q, and signs; the weight gradients read both hidden layers and these again, and G with states.
    floats = 3 * _FIRST + 2 * _HYPERNET + 3 * _EMBED + 5 * n_agents + state_dim + 1
    backward = 4 * rows * floats
    return max((forward + stored) / ceilings.bandwidth, flops / rate) + max(
        backward / ceilings.bandwidth, monotonic_backward_flops(rows, n_agents, state_dim) / rate
    )


def monotonic_bytes(rows: int, n_agents: int, state_dim: int) -> int:
    """Inputs, weights and output of forward."""
    weights = _FIRST * state_dim + _HYPERNET * _EMBED * (n_agents + 1)
    return 4 * (rows * (n_agents + state_dim + 1) + weights)


def monotonic_flops(rows: int, n_agents: int, state_dim: int) -> int:
    """Products of forward."""
    return 2 * rows * (_FIRST * state_dim + _HYPERNET * _EMBED * (n_agents + 1))


def monotonic_backward_flops(rows: int, n_agents: int, state_dim: int) -> int:
    """Products of backward: the second layers once again, their gradients (two products), first-layer weights."""
    return 2 * rows * (_FIRST * state_dim + 3 * _HYPERNET * _EMBED * (n_agents + 1))


def recurrent(
    rows_and_steps: int, n_inputs: int, n_actions: int, train: bool, rate: float, ceilings: Ceilings
) -> float:
    """Seconds of the products and of reading inputs and writing values; the chain over time steps is not counted.

    In training the inputs are read again, with the gradient of the values; what backward needs else is recomputed.
    """
    n_bytes = 4 * rows_and_steps * (n_inputs + n_actions)
    weights = n_inputs * _HIDDEN + 6 * _HIDDEN**2 + _HIDDEN * n_actions
    flops = 2 * rows_and_steps * weights
    if train:
        n_bytes *= 2
        flops = 2 * rows_and_steps * (3 * weights - n_inputs * _HIDDEN)  # inputs need no gradient
    return max(n_bytes / ceilings.bandwidth, flops / rate)


def returns_bytes(episodes: int, steps: int, item: int = 4) -> int:
    """Rewards, both flags and bootstrap values, read; targets, written."""
    return item * episodes * (5 * steps + 1)


def select_bytes(agents_rows: int, n_agents: int, n_actions: int, train: bool, item: int = 4) -> int:
    """What `select` moves for ``agents_rows`` rows of ``n_actions``, ``n_agents`` of them to a step.

    Read: utilities, availability (one byte each), the action taken, and of the target network's values the 32-byte
    sector of the greedy one. Written: greedy action, three values, and a flag for each step. In training also one
    gradient in, and a row of utilities out.
    """
    read = (item + 1) * n_actions + 8 + min(32, item * n_actions)
    written = 8 + 3 * item
    backward = item + item * n_actions + 8 if train else 0
    return agents_rows * (read + written + backward) + agents_rows // n_agents


def td_loss_bytes(entries: int, item: int = 4) -> int:
    """Values, targets and mask, read; masked error and gradient, written."""
    return item * 5 * entries


def quantile_bytes(rows: int, n: int, item: int = 4) -> int:
    """Quantiles, targets, fractions and mask, read; rows' losses and gradient, written, and both again in backward."""
    return item * rows * (6 * n + 2)


class _Product:
    """One matrix product into kept memory."""

    def __init__(self, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, tf32: bool) -> None:
        self._tensors, self._tf32 = (a, b, out), tf32

    def __call__(self) -> None:
        a, b, out = self._tensors
        outer, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, self._tf32
        torch.mm(a, b, out=out)
        torch.backends.cuda.matmul.allow_tf32 = outer
