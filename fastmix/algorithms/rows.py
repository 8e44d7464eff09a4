"""What a batch holds beside padding: networks need not see the steps that shorter episodes do not have."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmix.algorithms.batch import EpisodeBatch


def live_steps(batch: EpisodeBatch) -> Tensor | None:
    """``[B, T]`` bool: transitions that exist; None if all do. The host waits for the answer."""
    live = batch.mask.squeeze(-1) != 0
    return None if live.all() else live


def episode_lengths(live: Tensor | None) -> Tensor | None:
    """``[B]`` int64: stored steps of each episode, one more than its transitions; None if it is all of them."""
    if live is None:
        return None
    return (live * torch.arange(1, live.shape[1] + 1, device=live.device)).amax(1) + 1


class Rows:
    """The transitions of a batch that exist, or with ``bootstrap`` also the step after each episode's last, as rows.

    A mixer's time is in proportion to its rows. Where ``live`` is None every step is a row.
    """

    def __init__(self, live: Tensor | None, *, bootstrap: bool = False) -> None:
        self._end = None if bootstrap else -1
        self._exists = self._places = self._index = None
        if live is None:
            return
        self._exists = torch.cat([torch.ones_like(live[:, :1]), live], 1) if bootstrap else live
        self._places = self._exists.flatten().nonzero().squeeze(-1)
        # A row of a tensor that has the step after the last.
        self._index = self._places if bootstrap else self._places + self._places // live.shape[1]

    def take(self, values: Tensor) -> Tensor:
        """Rows ``[N, ...]`` of ``[B, T + 1, ...]``; where every step is one, ``[B, T, ...]`` of it as it is."""
        if self._index is None:
            return values[:, : self._end]
        return values.flatten(0, 1).index_select(0, self._index)

    def put(self, values: Tensor) -> Tensor:
        """What a mixer made of rows, ``[N, K]``, as ``[B, T, K]`` or ``[B, T + 1, K]``, zeros at padding."""
        if self._exists is None or self._places is None:
            return values
        spread = values.new_zeros(self._exists.numel(), values.shape[-1])
        return spread.index_copy(0, self._places, values).unflatten(0, self._exists.shape)
