"""Running standardisation of rewards, as in EPyMARL."""

from __future__ import annotations

import torch
from torch import Tensor


class RunningMoments:
    """Mean and variance of all rewards seen, padded ones (zeros) included; calling it updates them and standardises.

    Starts from mean 0, variance 1 and a count of 1e-4; batches are merged by Chan's formula with their unbiased
    variance. ``values`` holds mean, variance and count in float64.
    """

    def __init__(self, device: torch.device) -> None:
        self.values = torch.tensor([0.0, 1.0, 1e-4], dtype=torch.float64, device=device)

    def __call__(self, rewards: Tensor) -> Tensor:
        """``(rewards - mean) / sqrt(variance)`` with the moments that include ``rewards``."""
        mean, variance, count = self.values.unbind()
        batch = rewards.detach().double()
        size = batch.numel()
        delta = batch.mean() - mean
        total = count + size
        squares = variance * count + batch.var() * size + delta**2 * count * size / total
        self.values = torch.stack([mean + delta * size / total, squares / total, total])
        return ((rewards - self.values[0]) / self.values[1].sqrt()).to(rewards.dtype)
