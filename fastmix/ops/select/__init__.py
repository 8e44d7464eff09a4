"""`select`: availability mask, argmax and everything gathered with it."""

from __future__ import annotations

from torch import Tensor

from fastmix.ops.select import reference
from fastmix.ops.select.types import UNAVAILABLE, Selection

__all__ = ["UNAVAILABLE", "Selection", "select"]


def select(
    agent_qs: Tensor,
    avail_actions: Tensor | None,
    *,
    actions: Tensor | None = None,
    target_qs: Tensor | None = None,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> Selection:
    """Greedy actions of every agent, and values gathered with them."""
    return reference.select(agent_qs, avail_actions, actions, target_qs)
