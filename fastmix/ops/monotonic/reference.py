"""`monotonic` in plain PyTorch: state hypernets, positivity, two-layer mix, V(s)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from fastmix.ops.monotonic.types import MonotonicParams


def monotonic(agent_qs: Tensor, states: Tensor, params: MonotonicParams, positivity: str, beta: float) -> Tensor:
    """See `fastmix.ops.monotonic`; arguments are already checked, ``[N, A]`` and ``[N, S]``, and the result is ``[N]``."""
    rows, n_agents = agent_qs.shape
    p = params
    h1 = _hidden(states, p.w1_hidden_weight, p.w1_hidden_bias)
    h2 = _hidden(states, p.w2_hidden_weight, p.w2_hidden_bias)
    w1 = positive(F.linear(h1, p.w1_weight, p.w1_bias), positivity, beta).view(rows, n_agents, p.b1_bias.shape[0])
    w2 = positive(F.linear(h2, p.w2_weight, p.w2_bias), positivity, beta)
    b1 = F.linear(states, p.b1_weight, p.b1_bias)
    v = F.linear(F.relu(F.linear(states, p.v_hidden_weight, p.v_hidden_bias)), p.v_weight, p.v_bias)
    hidden = F.elu(torch.bmm(agent_qs.unsqueeze(1), w1).squeeze(1) + b1)
    return (hidden * w2).sum(-1) + v.squeeze(-1)


def positive(weights: Tensor, positivity: str, beta: float) -> Tensor:
    """Make generated weights non-negative: ``abs``, ``softplus`` (sharpness ``beta``), ``quadratic`` (half the square), ``none``."""
    if positivity == "abs":
        return weights.abs()
    if positivity == "softplus":
        return F.softplus(weights, beta=beta)
    if positivity == "quadratic":
        return 0.5 * weights**2
    return weights


def _hidden(states: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    return states if weight is None else F.relu(F.linear(states, weight, bias))
