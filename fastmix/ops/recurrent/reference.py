"""`recurrent` in plain PyTorch: one GRU cell step after the other."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from fastmix.ops.recurrent.types import RecurrentOutput, RecurrentParams

NORM_EPS = 1e-5


def recurrent(
    obs: Tensor,
    network: RecurrentParams,
    hidden: Tensor | None,
    last_actions: Tensor | None,
    agent_ids: bool,
    return_hidden_states: bool,
) -> RecurrentOutput:
    """See `fastmix.ops.recurrent`, for one network; arguments are already checked. A missing hidden state is zero."""
    p = network
    episodes, _, n_agents, _ = obs.shape
    if hidden is None:
        hidden = obs.new_zeros(episodes, n_agents, p.weight_hh.shape[1])
    x = F.relu(F.linear(build_inputs(obs, p.fc1_weight.shape[1], last_actions, agent_ids), p.fc1_weight, p.fc1_bias))
    h = hidden.flatten(0, 1)
    states = []
    for step in x.unbind(1):
        h = torch.gru_cell(step.flatten(0, 1), h, p.weight_ih, p.weight_hh, p.bias_ih, p.bias_hh)
        states.append(h.view(hidden.shape))
    hidden_states = torch.stack(states, 1) if states else x
    features = hidden_states
    if p.norm_weight is not None:
        features = F.layer_norm(features, features.shape[-1:], p.norm_weight, p.norm_bias, NORM_EPS)
    q = F.linear(features, p.fc2_weight, p.fc2_bias)
    return RecurrentOutput(q, h.view(hidden.shape), hidden_states if return_hidden_states else None)


def build_inputs(obs: Tensor, n_inputs: int, last_actions: Tensor | None, agent_ids: bool) -> Tensor:
    """``[B, T, A, I]``: observation, one-hot of the last action (zeros for -1), one-hot agent id, as the flags ask."""
    episodes, steps, n_agents, n_obs = obs.shape
    parts = [obs]
    if last_actions is not None:
        n_actions = n_inputs - n_obs - (n_agents if agent_ids else 0)
        one_hot = last_actions.unsqueeze(-1) == torch.arange(n_actions, device=obs.device)
        parts.append(one_hot.to(obs.dtype))
    if agent_ids:
        identity = torch.eye(n_agents, dtype=obs.dtype, device=obs.device)
        parts.append(identity.expand(episodes, steps, n_agents, n_agents))
    return torch.cat(parts, -1) if len(parts) > 1 else obs
