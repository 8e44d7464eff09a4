"""Rows of tensors as the compiled core takes them: where they lie, not a copy."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

logger = logging.getLogger("fastmix")

Rows = tuple[int, int, int, int, int]

NO_ROWS: Rows = (0, 1, 0, 0, 1)
"""Of an absent tensor"""


def layout(tensor: Tensor) -> Rows:
    """Address of ``[B, N, X]`` or ``[N, X]``, and how rows are found behind it: N, strides of B, N and X."""
    outer, inner, column = tensor.stride() if tensor.dim() == 3 else (0, *tensor.stride())
    return tensor.data_ptr(), tensor.shape[-2], outer, inner, column


def with_dense_rows(op: str, states: Tensor) -> Tensor:
    """``states``, or a copy where a row has gaps."""
    if states.stride(-1) == 1:
        return states
    logger.debug("%s copies states of shape %s and strides %s", op, tuple(states.shape), states.stride())
    return states.clone(memory_format=torch.contiguous_format)
