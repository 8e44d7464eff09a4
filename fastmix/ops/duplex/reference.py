"""`duplex`, its importance weights and `recognise` in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmix.ops._layers import joint_one_hot, mlp
from fastmix.ops.duplex.types import (
    POSITIVE,
    DuplexOutput,
    DuplexParams,
    ImportanceParams,
    RecogniserParams,
    Recognition,
)


def duplex(
    agent_qs: Tensor,
    max_qs: Tensor | None,
    states: Tensor,
    actions: Tensor | None,
    params: DuplexParams,
    minus_one: bool,
    part: str,
) -> DuplexOutput:
    """See `fastmix.ops.duplex`; arguments are already checked: ``[N, A]`` and ``[N, S]`` give ``[N, 1]``."""
    scale = mlp(states, params.scale).abs() + POSITIVE if params.scale else torch.ones_like(agent_qs)
    v_tot = adv_tot = None
    if part != "adv":
        shifted = scale * agent_qs + mlp(states, params.shift) if params.scale else agent_qs
        v_tot = shifted.sum(-1, keepdim=True)
    if part != "v":
        assert max_qs is not None and actions is not None
        advantages = (scale * (agent_qs - max_qs)).detach()  # the shift cancels
        weights = importance(states, actions, params.importance)
        adv_tot = (advantages * (weights - 1 if minus_one else weights)).sum(-1, keepdim=True)
    parts = [tensor for tensor in (v_tot, adv_tot) if tensor is not None]
    return DuplexOutput(parts[0] if len(parts) == 1 else parts[0] + parts[1], v_tot, adv_tot)


def importance(states: Tensor, actions: Tensor, params: ImportanceParams) -> Tensor:
    """See `fastmix.ops.duplex.importance`: ``[N, S]`` and ``[N, A]`` give ``[N, A]``."""
    n_actions = (params.action[0].weight.shape[-1] - states.shape[-1]) // actions.shape[-1]
    both = torch.cat([states, joint_one_hot(actions, n_actions, states.dtype)], -1)
    key = mlp(states, params.key).abs() + POSITIVE
    return (key * mlp(states, params.agents).sigmoid() * mlp(both, params.action).sigmoid()).sum(0)


def recognise(
    agent_qs: Tensor, max_qs: Tensor, states: Tensor, actions: Tensor, params: RecogniserParams
) -> Recognition:
    """See `fastmix.ops.duplex.recognise`; arguments are already checked: ``[N, A]`` and ``[N, S]`` give ``[N, 1]``."""
    v = mlp(states, params.v)
    advantages = (agent_qs - max_qs).detach()
    return Recognition((recogniser_weights(states, actions, params) * advantages).sum(-1, keepdim=True) + v, v)


def recogniser_weights(states: Tensor, actions: Tensor, params: RecogniserParams) -> Tensor:
    """``lambda`` of `fastmix.ops.duplex.recognise`: ``[N, S]`` and ``[N, A]`` give ``[N, A]``."""
    n_actions = (params.w1[0].weight.shape[-1] - states.shape[-1]) // actions.shape[-1]
    both = torch.cat([states, joint_one_hot(actions, n_actions, states.dtype)], -1)
    w1, w2 = mlp(both, params.w1).abs(), mlp(both, params.w2).abs()
    return torch.bmm(w1.view(*actions.shape, w2.shape[-1]), w2.unsqueeze(-1)).squeeze(-1)
