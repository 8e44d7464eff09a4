"""Parameters and results of the head of an implicit quantile network."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class QuantileFeatures(NamedTuple):
    """Features of fractions, ``N`` of them in each row."""

    values: Tensor
    """``[..., N, D]``"""
    mean: Tensor
    """``[..., D]``: over the ``N``."""
