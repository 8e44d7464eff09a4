"""`attention` in plain PyTorch: state queries, keys of the agents' own features, softmax over agents, head weights."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmix.ops._layers import mlp
from fastmix.ops.attention.types import AttentionOutput, AttentionParams

DEAD = -99999999.0
"""Scaled logit of an agent that is not alive (eight nines, as in the public code)."""

LOG_EPS = 1e-8


def attention(
    agent_qs: Tensor,
    states: Tensor,
    params: AttentionParams,
    own_size: int,
    own_grad: bool,
    alive: Tensor | None,
    softmax: bool,
    return_weights: bool,
    return_statistics: bool,
) -> AttentionOutput:
    """See `fastmix.ops.attention`; arguments are already checked: ``[N, A]``, ``[N, S]``, and bool ``[N, A]``."""
    rows, n_agents = agent_qs.shape
    own = states if own_grad else states.detach()
    own = own[:, : n_agents * own_size].reshape(rows, n_agents, own_size)
    if params.key.weight.shape[-1] > own_size:
        own = torch.cat([own, agent_qs.unsqueeze(-1)], -1)
    # query . (K o + k) as (K^T query) . o + query . k, so that no key is built.
    query = mlp(states, params.query)
    logits = torch.einsum("hnu,nau->hna", torch.bmm(query, params.key.weight), own)
    if params.key.bias is not None:
        logits = logits + torch.bmm(query, params.key.bias.unsqueeze(-1))
    attended = logits * query.shape[-1] ** -0.5
    if alive is not None:
        attended = attended.masked_fill(~alive, DEAD)
    if softmax:
        attended = attended.softmax(-1)
    agent_weights = (mlp(states, params.head).abs().T.unsqueeze(-1) * attended if params.head else attended).sum(0)
    q_tot = (agent_weights * agent_qs).sum(-1, keepdim=True)
    v = mlp(states, params.v) if params.v else None
    return AttentionOutput(
        q_tot if v is None else q_tot + v,
        agent_weights if return_weights else None,
        v if return_weights else None,
        logits.square().mean(-1).T if return_statistics else None,
        -(attended * (attended + LOG_EPS).log()).sum(-1).T if return_statistics else None,
    )
