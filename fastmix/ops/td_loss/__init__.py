"""`td_loss`: mask, weights, residual, squared error and normaliser in one pass."""

from __future__ import annotations

from torch import Tensor

from fastmix.ops.td_loss import reference
from fastmix.ops.td_loss.types import TDLoss

__all__ = ["TDLoss", "td_loss"]


def td_loss(
    qs: Tensor,
    targets: Tensor,
    mask: Tensor,
    *,
    weights: Tensor | None = None,
    residual: Tensor | None = None,
    scale: float = 1.0,
    normaliser: Tensor | None = None,
    backend: str | None = None,
) -> TDLoss:
    """Masked, weighted squared temporal-difference loss."""
    return reference.td_loss(qs, targets, mask, weights, residual, scale, normaliser)
