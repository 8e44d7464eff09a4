"""`quantile` in plain PyTorch: the pairwise loss, the split into mean and shape, and the fractions' generator."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastmix.ops.quantile.types import MeanShape, QuantileLoss


def quantile_loss(
    theta: Tensor,
    targets: Tensor,
    fractions: Tensor,
    mask: Tensor,
    weights: Tensor | None,
    kappa: float,
    scale: float,
    normaliser: Tensor | None,
) -> QuantileLoss:
    """See `fastmix.ops.quantile_loss`; arguments are already checked."""
    mask = mask.expand(theta.shape[:-1])
    live = mask != 0
    # Selected before anything is computed: padded steps may hold NaN or inf, and neither may reach a gradient.
    theta = torch.where(live.unsqueeze(-1), theta, torch.zeros_like(theta))
    targets = torch.where(live.unsqueeze(-1), targets.detach(), targets.new_zeros(()))
    error = targets.unsqueeze(-2) - theta.unsqueeze(-1)  # [B, T, G, N, N']
    size = error.abs()
    small = size.clamp(max=kappa)
    huber = small * (size - small / 2) / kappa if kappa > 0 else size
    asymmetry = (fractions.detach().unsqueeze(-1) - (error.detach() <= 0).to(error.dtype)).abs()
    rows = torch.where(live, (asymmetry * huber).mean(-1).sum(-1), theta.new_zeros(()))
    weighted = mask * rows if weights is None else torch.where(live, weights.detach() * mask, 0) * rows
    if normaliser is not None:
        return QuantileLoss(scale * weighted.sum() / normaliser, rows.detach())
    total = mask.sum()
    nothing = total == 0  # a batch without a live step has no loss, not 0 / 0
    return QuantileLoss(scale * weighted.sum() / torch.where(nothing, torch.ones_like(total), total), rows.detach())


def mean_shape(quantiles: Tensor) -> MeanShape:
    """See `fastmix.ops.mean_shape`; arguments are already checked."""
    means = quantiles.mean(-1)
    return MeanShape(means, quantiles.sum(-2) - means.sum(-1, keepdim=True))


_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def fractions(shape: Sequence[int], key: Tensor, stream: int, dtype: torch.dtype) -> Tensor:
    """See `fastmix.ops.fractions`; arguments are already checked."""
    size = math.prod(shape)
    words = philox(torch.arange((size + 3) // 4, device=key.device), key, stream)
    bits = words.flatten()[:size] >> 8  # 24 of them, exact in float32
    return (bits.to(dtype) * 2.0**-24).reshape(tuple(shape))


def philox(block: Tensor, key: Tensor, stream: int) -> Tensor:
    """Philox 4x32-10: four words for each block of numbers ``[n]``, ``[n, 4]``; 64-bit integers hold 32-bit words."""
    seed, draw = key.unbind()
    words = [block, torch.full_like(block, stream), *((draw >> shift & _WORD).expand_as(block) for shift in (0, 32))]
    keys = [seed & _WORD, seed >> 32 & _WORD]
    for _ in range(_ROUNDS):
        (high0, low0), (high1, low1) = _multiply(_MULTIPLIERS[0], words[0]), _multiply(_MULTIPLIERS[1], words[2])
        words = [high1 ^ words[1] ^ keys[0], low1, high0 ^ words[3] ^ keys[1], low0]
        keys = [(k + step) & _WORD for k, step in zip(keys, _KEY_STEPS, strict=True)]
    return torch.stack(words, -1)


def _multiply(factor: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low word of a product of 32-bit words, without overflow of the signed 64 bits."""
    low = factor * (word & 0xFFFF)
    high = factor * (word >> 16) + (low >> 16)
    return high >> 16, (high & 0xFFFF) << 16 | low & 0xFFFF
