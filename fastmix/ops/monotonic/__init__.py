"""`monotonic`: QMIX's mixing network with its hypernetworks."""

from __future__ import annotations

from torch import Tensor

from fastmix.ops.monotonic import reference
from fastmix.ops.monotonic.types import POSITIVITIES, MonotonicParams

__all__ = ["POSITIVITIES", "MonotonicParams", "monotonic"]


def monotonic(
    agent_qs: Tensor,
    states: Tensor,
    params: MonotonicParams,
    *,
    positivity: str = "abs",
    beta: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    """Joint value of the agents' values under a monotonic mixing network."""
    leading = agent_qs.shape[:-1]
    flat = reference.monotonic(
        agent_qs.reshape(-1, agent_qs.shape[-1]), states.reshape(-1, states.shape[-1]), params, positivity, beta
    )
    return flat.reshape(*leading, 1)
