"""Memory of what forward keeps for backward."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_SMALL = 1 << 20
"""bytes up to which the allocator of the C library keeps memory for the next call by itself"""


def kept(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Uninitialised memory on the CPU; much of it comes out of the core's pool, which takes it back in the end.

    Allocated anew in each step, tens to hundreds of megabytes would cost more in page faults than the forward pass.
    """
    numel = math.prod(shape)
    if numel * dtype.itemsize <= _SMALL:
        return torch.empty(shape, dtype=dtype)
    from fastmix import _core

    return torch.frombuffer(_core.Workspace(numel * dtype.itemsize), dtype=dtype).view(shape)
