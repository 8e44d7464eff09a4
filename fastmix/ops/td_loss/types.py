"""What `td_loss` takes and returns."""

from __future__ import annotations

from typing import Final, NamedTuple

from torch import Tensor

RULES: Final = ("greedy", "greedy_or_above", "below", "not_below", "recognised")


class Favoured(NamedTuple):
    """Which steps are favoured, decided by the very numbers that enter the loss. Nothing of it has a gradient.

    ============================  ====================================================================================
    rule                          favoured steps
    ============================  ====================================================================================
    ``"greedy"``                  ``all_greedy`` (POWQMIX's ablation; ResQ's mask)
    ``"greedy_or_above"``         ``all_greedy or targets > values`` (CW-QMIX, ``values`` of the greedy joint actions)
    ``"below"``                   ``qs < targets`` (OW-QMIX)
    ``"not_below"``               ``not qs < targets`` (ResQ's hysteretic mask)
    ``"recognised"``              ``values >= thresholds - tolerance`` (POWQMIX, ``Q_r`` and ``V``)
    ============================  ====================================================================================

    A residual is left out of favoured steps, as ResQ's. Without one the squared error of favoured steps is weighed by
    ``high`` and that of others by ``low``.
    """

    rule: str
    all_greedy: Tensor | None = None
    """``[B, T, K]`` or ``[B, T, 1]``, bool: every agent took its greedy action"""
    values: Tensor | None = None
    """``[B, T, K]`` or ``[B, T, 1]``"""
    thresholds: Tensor | None = None
    """``[B, T, K]`` or ``[B, T, 1]``"""
    tolerance: float = 0.0
    high: float = 1.0
    low: float = 0.0


class TDLoss(NamedTuple):
    """Loss and per-step error."""

    loss: Tensor
    """0-dim; differentiable in ``qs`` and ``residual``."""
    td_error: Tensor
    """``[B, T, K]``, without gradient; zero where the mask is zero."""
    factors: Tensor | None = None
    """``[B, T, K]``, without gradient: ``high`` or ``low``, or the residual's 0 or 1; only with ``favoured``."""
