"""`implicit` in plain PyTorch: cosines of fractions through a linear layer, and their products with chosen actions."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from fastmix.ops.implicit.types import QuantileFeatures


def quantile_features(fractions: Tensor, weight: Tensor, bias: Tensor) -> QuantileFeatures:
    """See `fastmix.ops.quantile_features`; arguments are already checked."""
    j = torch.arange(weight.shape[1], dtype=fractions.dtype, device=fractions.device)
    values = F.relu(F.linear(torch.cos(fractions.unsqueeze(-1) * (math.pi * j)), weight, bias))
    return QuantileFeatures(values, values.mean(-2))


def chosen_quantiles(hidden: Tensor, features: Tensor, actions: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """See `fastmix.ops.chosen_quantiles`; arguments are already checked."""
    chosen = hidden * F.embedding(actions, weight)
    return chosen @ features.transpose(-1, -2) + F.embedding(actions, bias.unsqueeze(-1))
