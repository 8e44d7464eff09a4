"""What an algorithm sees of an environment: its sizes, and batches of whole episodes."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Scheme:
    """Sizes of an environment."""

    n_agents: int
    n_actions: int
    obs_dim: int
    state_dim: int
    episode_limit: int

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value < 1:
                raise ValueError(f"Scheme.{field.name} must be at least 1, got {value}")


@dataclass
class EpisodeBatch:
    """Whole episodes of ``T`` transitions (``T + 1`` stored steps), padded to one length.

    ``B`` episodes, ``A`` agents, ``U`` actions, ``O`` observation and ``S`` state features. Padded steps hold finite
    numbers that no result depends on.
    """

    obs: Tensor
    """``[B, T + 1, A, O]``"""
    states: Tensor
    """``[B, T + 1, S]``"""
    actions: Tensor
    """``[B, T + 1, A]`` int64"""
    last_actions: Tensor
    """``[B, T + 1, A]`` int64: ``actions`` one step earlier, -1 at the first step."""
    avail_actions: Tensor
    """``[B, T + 1, A, U]`` bool"""
    rewards: Tensor
    """``[B, T, 1]``, of the team."""
    terminated: Tensor
    """``[B, T, 1]``: 1 where the episode truly ended, not where its time limit cut it."""
    mask: Tensor
    """``[B, T, 1]``: 1 on live transitions."""
    weights: Tensor | None = None
    """``[B, 1, 1]``: importance weights of prioritised replay."""

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> EpisodeBatch:
        """The batch on ``device``."""
        moved: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            moved[field.name] = None if value is None else value.to(device, non_blocking=non_blocking)
        return EpisodeBatch(**moved)
