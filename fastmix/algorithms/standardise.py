"""Running standardisation of rewards, as in EPyMARL."""

from __future__ import annotations

import torch
from torch import Tensor


class RunningMoments:
    """Mean and variance of all rewards seen, with the zeros that pad them up to the longest episode of their batch.

    Starts from mean 0, variance 1 and a count of 1e-4; batches are merged by Chan's formula with their unbiased
    variance. ``values`` holds mean, variance and count in float64. The padding counts because EPyMARL, which cuts its
    batches to their longest episode, counts it; what pads a batch beyond that, up to its bucket, does not.
    """

    def __init__(self, device: torch.device) -> None:
        self.values = torch.tensor([0.0, 1.0, 1e-4], dtype=torch.float64, device=device)

    def __call__(self, rewards: Tensor, mask: Tensor) -> Tensor:
        """``(rewards - mean) / sqrt(variance)``, ``[B, T, 1]``, with the moments that include ``rewards``.

        Steps with ``mask [B, T, 1]`` 0 count as zero, whatever they hold. The moments are updated in place.
        """
        mean, variance, count = self.values.unbind()
        padding = mask == 0
        beyond = padding.all(0)
        batch = rewards.detach().double().masked_fill(padding, 0)
        size = (~beyond).sum().double() * len(rewards)
        batch_mean = batch.sum() / size
        deviations = ((batch - batch_mean) ** 2).masked_fill(beyond, 0).sum()
        delta = batch_mean - mean
        total = count + size
        squares = variance * count + deviations * size / (size - 1) + delta**2 * count * size / total
        self.values.copy_(torch.stack([mean + delta * size / total, squares / total, total]))
        return ((rewards - self.values[0]) / self.values[1].sqrt()).to(rewards.dtype)
