"""What the functions of `quantile` return."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class QuantileLoss(NamedTuple):
    """Loss, and what each row has in it."""

    loss: Tensor
    """0-dim; differentiable in ``theta``."""
    row_losses: Tensor
    """``[B, T, G]``, without gradient: a row's own loss before mask, weights and normaliser; zero where the mask is."""


class MeanShape(NamedTuple):
    """Agents' distributions, taken apart."""

    means: Tensor
    """``[..., A]``: each agent's mean over its quantiles."""
    shape: Tensor
    """``[..., N]``: the sum over agents of what is left beside the mean; its own mean is zero."""
