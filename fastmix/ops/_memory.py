"""Memory of what forward keeps for backward."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_LARGE = 4 << 20
"""bytes from which on a fresh tensor costs more in page faults than what is written into it"""


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Like `torch.empty` on the CPU; large tensors come from the core's pool of memory and return to it."""
    size = math.prod(shape)
    if size * dtype.itemsize < _LARGE:
        return torch.empty(shape, dtype=dtype)
    from fastmix import _core

    return torch.frombuffer(_core.WorkspaceBuffer(size * dtype.itemsize), dtype=dtype).view(shape)
