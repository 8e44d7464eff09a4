"""`td_loss` in plain PyTorch: mask, weight, residual, squared error, normaliser."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmix.ops.td_loss.types import TDLoss


def td_loss(
    qs: Tensor,
    targets: Tensor,
    mask: Tensor,
    weights: Tensor | None,
    residual: Tensor | None,
    scale: float,
    normaliser: Tensor | None,
) -> TDLoss:
    """See `fastmix.ops.td_loss`; arguments are already checked."""
    td = qs - targets.detach() if residual is None else qs + residual - targets.detach()
    mask = mask.expand_as(td)
    # where, not a product: padded steps may hold NaN or inf, and neither may reach the loss or a gradient.
    td = torch.where(mask != 0, td, torch.zeros_like(td)) * mask
    squares = td**2 if weights is None else weights.detach() * td**2
    squares = torch.where(mask != 0, squares, torch.zeros_like(squares))
    if normaliser is not None:
        return TDLoss(scale * squares.sum() / normaliser, td.detach())
    total = mask.sum()
    nothing = total == 0  # a batch without a live step has no loss, not 0 / 0
    return TDLoss(scale * squares.sum() / torch.where(nothing, torch.ones_like(total), total), td.detach())
