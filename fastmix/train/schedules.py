"""Epsilon of epsilon-greedy exploration as a function of environment steps (PyMARL's ``DecayThenFlatSchedule``)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Decay = Literal["linear", "exp"]


@dataclass(frozen=True)
class EpsilonSchedule:
    """``linear``: ``max(finish, start - (start - finish) t / anneal_time)``;
    ``exp``: ``min(start, max(finish, exp(-t / s)))`` with ``s = -anneal_time / ln(finish)``.

    ``t`` counts environment steps over all parallel copies. ``anneal_time`` 0 means ``finish`` from the first step on.
    """

    start: float
    finish: float
    anneal_time: int
    decay: Decay = "linear"

    def __post_init__(self) -> None:
        for name in ("start", "finish"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"epsilon_{name} is {getattr(self, name)}; it must be between 0 and 1")
        if self.finish > self.start:
            raise ValueError(f"epsilon_finish is {self.finish}; it must not exceed epsilon_start = {self.start}")
        if self.anneal_time < 0:
            raise ValueError(f"epsilon_anneal_time is {self.anneal_time}; it must be >= 0 environment steps")
        if self.decay not in ("linear", "exp"):
            raise ValueError(f"epsilon_decay is {self.decay!r}; it must be 'linear' or 'exp'")
        if self.decay == "exp" and self.finish == 0.0:
            raise ValueError("epsilon_finish is 0.0; an exponential decay never reaches it, choose a positive value")

    def __call__(self, t: int) -> float:
        """Epsilon after ``t`` environment steps."""
        if self.anneal_time == 0 or self.start == self.finish:
            return self.finish
        if self.decay == "linear":
            return max(self.finish, self.start - (self.start - self.finish) * t / self.anneal_time)
        scale = -self.anneal_time / math.log(self.finish)
        return min(self.start, max(self.finish, math.exp(-t / scale)))
