"""`td_loss` in plain PyTorch: mask, weight, residual, squared error, normaliser."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmix.ops.td_loss.types import Favoured, TDLoss


def td_loss(
    qs: Tensor,
    targets: Tensor,
    mask: Tensor,
    weights: Tensor | None,
    residual: Tensor | None,
    favoured: Favoured | None,
    scale: float,
    normaliser: Tensor | None,
) -> TDLoss:
    """See `fastmix.ops.td_loss`; arguments are already checked."""
    factors = None
    if favoured is not None:
        is_favoured = _decide(qs.detach(), targets.detach(), favoured).expand_as(qs)
        if residual is None:
            factors = torch.full_like(qs, favoured.low).masked_fill(is_favoured, favoured.high).detach()
            weights = factors if weights is None else factors * weights.detach()
        else:
            factors = is_favoured.logical_not().to(qs.dtype)
            residual = residual.masked_fill(is_favoured, 0)
    td = qs - targets.detach() if residual is None else qs + residual - targets.detach()
    mask = mask.expand_as(td)
    # where, not a product: padded steps may hold NaN or inf, and neither may reach the loss or a gradient.
    td = torch.where(mask != 0, td, torch.zeros_like(td)) * mask
    squares = td**2 if weights is None else weights.detach() * td**2
    squares = torch.where(mask != 0, squares, torch.zeros_like(squares))
    if normaliser is not None:
        return TDLoss(scale * squares.sum() / normaliser, td.detach(), factors)
    total = mask.sum()
    nothing = total == 0  # a batch without a live step has no loss, not 0 / 0
    return TDLoss(scale * squares.sum() / torch.where(nothing, torch.ones_like(total), total), td.detach(), factors)


def _decide(qs: Tensor, targets: Tensor, favoured: Favoured) -> Tensor:
    rule, all_greedy, values, thresholds = favoured[:4]
    if rule in ("below", "not_below"):
        below = qs < targets
        return below if rule == "below" else ~below
    if rule == "recognised":
        assert values is not None and thresholds is not None
        return values.detach() >= thresholds.detach() - favoured.tolerance
    assert all_greedy is not None
    if rule == "greedy":
        return all_greedy
    assert values is not None
    return all_greedy | (targets > values.detach())
