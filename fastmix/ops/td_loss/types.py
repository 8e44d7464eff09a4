"""What `td_loss` returns."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class TDLoss(NamedTuple):
    """Loss and per-step error."""

    loss: Tensor
    """0-dim; differentiable in ``qs`` and ``residual``."""
    td_error: Tensor
    """``[B, T, K]``, without gradient; zero where the mask is zero."""
