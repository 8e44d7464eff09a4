"""The interface of every mixer, and the shape rules they share."""

from __future__ import annotations

import abc
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastmix.ops._checks import check_floating, check_tensor

if TYPE_CHECKING:
    from typing_extensions import Self


class Mixer(nn.Module, abc.ABC):
    """Combines the utilities of `n_agents` agents into one joint value.

    Call: `mixer(agent_qs [..., A], states [..., S]) -> q_tot [..., 1]` for any leading dimensions, usually `[B, T]`.
    `states` may keep the axes of a tuple `state_shape`: `[..., *state_shape]`. A 2-D call `[N, A]` gives `[N, 1]`.

    Weights are read at every call and nothing derived from them is kept, so parameter swapping
    (`torch.func.functional_call`), `deepcopy` and moving to another device need no care.
    """

    @classmethod
    @abc.abstractmethod
    def from_args(cls, args: Any) -> Self:
        """Build from a PyMARL namespace. Fields and their defaults are named by each mixer."""

    @abc.abstractmethod
    def forward(self, agent_qs: Tensor, states: Tensor) -> Tensor:
        """`agent_qs [..., A]`, `states [..., S]` -> `q_tot [..., 1]`."""


def check_agent_qs(agent_qs: Tensor, n_agents: int | None) -> None:
    """Raise unless `agent_qs` is a floating tensor `[..., A]` (with `A == n_agents` when that is given)."""
    check_tensor("agent_qs", agent_qs)
    check_floating("agent_qs", agent_qs)
    if agent_qs.dim() < 1:
        raise ValueError("agent_qs must be [..., n_agents], got a scalar")
    if n_agents is not None and agent_qs.shape[-1] != n_agents:
        raise ValueError(
            f"agent_qs must be [..., n_agents] with n_agents = {n_agents}, got shape {tuple(agent_qs.shape)}"
        )


def flat_states(states: Tensor, lead: torch.Size, state_dim: int) -> Tensor:
    """`states [*lead, *state_shape]` as `[*lead, state_dim]`; raises where the sizes do not agree."""
    check_tensor("states", states)
    rank = len(lead)
    if states.shape[:rank] != lead or math.prod(states.shape[rank:]) != state_dim:
        raise ValueError(
            f"states must be [*{tuple(lead)}, {state_dim}] (the leading sizes of agent_qs, then the state), "
            f"got shape {tuple(states.shape)}"
        )
    return states if states.dim() == rank + 1 else states.reshape(*lead, state_dim)
