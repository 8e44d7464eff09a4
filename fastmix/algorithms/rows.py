"""What a batch holds beside padding: networks need not see the steps that shorter episodes do not have."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmix.algorithms.batch import EpisodeBatch


def episode_lengths(batch: EpisodeBatch) -> Tensor | None:
    """``[B]`` int64: stored steps of each episode, one more than its transitions; None on CUDA or if all are equal.

    `fastmix.ops.recurrent` makes use of it on the CPU only.
    """
    live = batch.mask.squeeze(-1) != 0
    if live.device.type != "cpu" or live.all():
        return None
    return (live * torch.arange(1, live.shape[1] + 1)).amax(1) + 1


class Rows:
    """Transitions of a batch, or with ``bootstrap`` also the step after each episode's last.

    On the CPU only those that exist are rows, since a mixer's time is in proportion to its rows, and episodes of one
    batch differ in length. On CUDA, where no number may come to the host and shapes must stay, padded steps are rows
    too; likewise with ``everything``.
    """

    def __init__(self, batch: EpisodeBatch, *, bootstrap: bool = False, everything: bool = False) -> None:
        self._episodes, transitions = batch.mask.shape[:2]
        self._steps = transitions + bootstrap
        self._index: Tensor | None = None
        self._places: Tensor | None = None
        if everything or batch.mask.device.type != "cpu":
            return
        exists = batch.mask.squeeze(-1) != 0
        if bootstrap:
            exists = torch.cat([torch.ones_like(exists[:, :1]), exists], 1)
        if not exists.all():
            self._places = exists.flatten().nonzero().squeeze(-1)
            # A row of a tensor that has the step after the last.
            self._index = self._places if bootstrap else self._places + self._places // transitions

    def take(self, values: Tensor) -> Tensor:
        """Rows ``[N, ...]`` of ``[B, T + 1, ...]``; where padded steps are rows too, ``[B, T, ...]`` of it as it is."""
        if self._index is None:
            return values[:, : self._steps]
        return values.flatten(0, 1).index_select(0, self._index)

    def put(self, values: Tensor) -> Tensor:
        """What a mixer made of rows, ``[N, K]``, as ``[B, T, K]`` or ``[B, T + 1, K]``, zeros at padding."""
        if self._places is None:
            return values
        spread = values.new_zeros(self._episodes * self._steps, values.shape[-1])
        return spread.index_copy(0, self._places, values).unflatten(0, (self._episodes, self._steps))
