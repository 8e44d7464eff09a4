"""The interfaces of mixers, and the shape rules they share."""

from __future__ import annotations

import abc
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from fastmix.ops._checks import check_floating, check_tensor

if TYPE_CHECKING:
    from typing_extensions import Self


class Mixer(nn.Module, abc.ABC):
    """What every kind of `fastmix.mixers.REGISTRY` has: it is built from a PyMARL namespace, and called as in PyMARL.

    `StateMixer` and `ActionMixer` say what the two large families take and give; QTRAN's networks and the recogniser
    have calls of their own.

    Weights are read at every call and nothing derived from them is kept, so parameter swapping
    (`torch.func.functional_call`), `deepcopy` and moving to another device need no care.
    """

    @classmethod
    @abc.abstractmethod
    def from_args(cls, args: Any) -> Self:
        """Build from a PyMARL namespace. Fields and their defaults are named by each mixer."""


class StateMixer(Mixer):
    """Combines the utilities of `n_agents` agents into one joint value, given the state.

    Call: `mixer(agent_qs [..., A], states [..., S]) -> q_tot [..., 1]` for any leading dimensions, usually `[B, T]`.
    `states` may keep the axes of a tuple `state_shape`: `[..., *state_shape]`. A 2-D call `[N, A]` gives `[N, 1]`.
    """

    @abc.abstractmethod
    def forward(self, agent_qs: Tensor, states: Tensor) -> Tensor:
        """`agent_qs [..., A]`, `states [..., S]` -> `q_tot [..., 1]`."""


class QuantileMixer(Mixer):
    """Combines the return distributions of `n_agents` agents into one, given the state.

    Call: `mixer(agent_qs [..., A, N], states [..., S]) -> z_tot [..., 1, N]` for any leading dimensions, usually
    `[B, T]`. `N` quantiles of each agent's return make as many of the joint one; `states` are those of `StateMixer`.
    PyMARL's third argument says which of two numbers of quantiles to expect: any will do here, and it is not read.
    """

    @abc.abstractmethod
    def forward(self, agent_qs: Tensor, states: Tensor, target: bool = False) -> Tensor:
        """`agent_qs [..., A, N]`, `states [..., S]` -> `z_tot [..., 1, N]`."""


class JointValue(NamedTuple):
    """What `ActionMixer.joint` gives; parts that a mixer does not have are None."""

    q_tot: Tensor
    """`[..., 1]`"""
    v_tot: Tensor | None = None
    """`[..., 1]`: the part of `q_tot` that is the sum of values (QPLEX)"""
    adv_tot: Tensor | None = None
    """`[..., 1]`: the part of `q_tot` that is the weighted sum of advantages (QPLEX)"""
    logit_squares: Tensor | None = None
    """`[..., H]`: each head's mean squared logit, which Qatten regularises by"""
    entropies: Tensor | None = None
    """`[..., H]`: entropy of each head's attention"""


class Attended(NamedTuple):
    """What PyMARL's attention mixers return."""

    q_tot: Tensor
    """`[..., 1]`"""
    attend_mag_regs: Tensor
    """Scalar to add to the loss: a coefficient times the mean squared logit, summed over heads"""
    head_entropies: list[Tensor]
    """One scalar a head: the mean entropy of its attention"""


class ActionMixer(Mixer):
    """A mixer whose joint value may also depend on the joint action beyond the utilities, or that gives more than it.

    `forward` is PyMARL's call, which differs from kind to kind; `joint` is the same for all and what learners use. It
    takes `n_agents` actions as indices or one-hots, see `joint_actions`.
    """

    @abc.abstractmethod
    def joint(self, agent_qs: Tensor, states: Tensor, actions: Tensor, max_qs: Tensor) -> JointValue:
        """Everything at once.

        `agent_qs [..., A]` are the utilities of `actions`, `max_qs [..., A]` each agent's largest one, `states
        [..., S]`.
        """


def attended(value: JointValue, q_tot: Tensor, coefficient: float) -> Attended:
    """PyMARL's view of attention statistics: means over all rows, padded ones included."""
    assert value.logit_squares is not None and value.entropies is not None
    squares, entropies = (x.reshape(-1, x.shape[-1]).mean(0) for x in (value.logit_squares, value.entropies))
    return Attended(q_tot, coefficient * squares.sum(), list(entropies.unbind()))


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


def check_agent_zs(agent_qs: Tensor, n_agents: int | None) -> None:
    """Raise unless `agent_qs` is a floating tensor `[..., A, N]` (with `A == n_agents` when that is given)."""
    check_tensor("agent_qs", agent_qs)
    check_floating("agent_qs", agent_qs)
    shape = tuple(agent_qs.shape)
    if len(shape) < 2 or shape[-1] < 1 or (n_agents is not None and shape[-2] != n_agents):
        known = "" if n_agents is None else f" with n_agents = {n_agents}"
        raise ValueError(f"agent_qs must be [..., n_agents, quantiles]{known}, got shape {shape}")


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


def joint_actions(actions: Tensor, lead: torch.Size, n_agents: int, n_actions: int) -> Tensor:
    """Joint actions as indices `[*lead, A]` int64, from any of the forms that trainers hold them in.

    Indices `[*lead, A]` or `[*lead, A, 1]`, or one-hots in a floating type: `[*lead, A, U]` or `[*lead, A * U]`. A
    one-hot of zeros, as in padded steps, becomes -1. An index has no gradient, so one-hots may not ask for one.
    """
    check_tensor("actions", actions)
    if actions.is_floating_point():
        if actions.requires_grad:
            raise ValueError("actions must not require a gradient, as one-hots are read as indices; got one that does")
        if actions.shape not in ((*lead, n_agents, n_actions), (*lead, n_agents * n_actions)):
            raise ValueError(
                f"actions must be one-hots [*{tuple(lead)}, {n_agents}, {n_actions}], got shape {tuple(actions.shape)}"
            )
        largest, index = actions.reshape(*lead, n_agents, n_actions).max(-1)
        return torch.where(largest > 0, index, -1)
    if actions.shape not in ((*lead, n_agents), (*lead, n_agents, 1)):
        raise ValueError(f"actions must be indices [*{tuple(lead)}, {n_agents}], got shape {tuple(actions.shape)}")
    return actions.reshape(*lead, n_agents)
