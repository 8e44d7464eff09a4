"""Memory of what forward keeps for backward, on the CPU, uninitialised."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_SMALL = 1 << 20
"""bytes up to which the allocator of the C library keeps memory for the next call by itself"""


def kept(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Out of the core's pool where it is much, see `from_pool`."""
    small = math.prod(shape) * dtype.itemsize <= _SMALL
    return torch.empty(shape, dtype=dtype) if small else from_pool(shape, dtype)


def from_pool(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Out of the core's pool, which takes it back when the last tensor on it is gone.

    Allocated anew in each step, tens to hundreds of megabytes would cost more in page faults than the forward pass.
    """
    from fastmix import _core

    numel = math.prod(shape)
    if numel == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(_core.Workspace(numel * dtype.itemsize), dtype=dtype).view(shape)
