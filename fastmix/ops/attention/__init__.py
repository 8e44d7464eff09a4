"""`attention`: Qatten's mixing of utilities by attention over agents."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmix import backends
from fastmix.ops import _checks
from fastmix.ops._layers import Layers, Linear, check_layers
from fastmix.ops.attention import native, reference
from fastmix.ops.attention.types import AttentionOutput, AttentionParams

__all__ = ["AttentionOutput", "AttentionParams", "Layers", "Linear", "attention"]


def attention(
    agent_qs: Tensor,
    states: Tensor,
    params: AttentionParams,
    *,
    own_size: int,
    own_grad: bool = False,
    alive: Tensor | None = None,
    softmax: bool = True,
    return_weights: bool = False,
    return_statistics: bool = False,
    backend: str | None = None,
) -> AttentionOutput:
    r"""Joint value of the agents' utilities as their weighted sum, weighted by attention of the state to the agents.

    For each head ``h``, with ``o_a = states[a * own_size : (a + 1) * own_size]``, the features that are agent ``a``'s
    own (``[o_a | q_a]`` where the key's weight is one feature wider)::

        logit_ha = query_h(s) . (K_h o_a + k_h)        p_h = softmax_a(logit_h / sqrt(E))
        q_tot    = sum_h |head_h(s)| sum_a p_ha q_a + v(s)

    Rows are independent: NaN or infinity in one row's inputs reaches no other row of the result.

    Args:
        agent_qs: ``[..., A]``.
        states: ``[..., S]``, with the leading dimensions of ``agent_qs``; begins with the agents' own features.
        params: the networks' weights, see `AttentionParams`. Layers that are absent there (``()``) cost nothing.
        own_size: how many state features are an agent's own; ``A * own_size <= S``.
        own_grad: whether a gradient reaches ``states`` through ``o_a``, as in PyMARL's code and not in pymarl2's.
        alive: ``[..., A]``, nonzero where an agent is attended to, any dtype; None for all. Where no agent is, all are,
            equally.
        softmax: False takes the scaled logits themselves for ``p``, so that weights have any sign (ResZ's residual);
            ``alive`` and statistics are then not defined.
        return_weights: also return ``agent_weights`` and ``v``.
        return_statistics: also return ``logit_squares`` (their mean times a coefficient is Qatten's regulariser) and
            ``entropies``, for each row.
        backend: ``None`` for the automatic choice, or a name of `fastmix.backends.NAMES`.

    Returns:
        An `AttentionOutput`, differentiable once in ``agent_qs``, ``states`` and every parameter. Under autocast
        half-precision arguments are promoted to float32 and so is the result.

    Raises:
        ValueError, TypeError: an argument of wrong shape, dtype, device or value.

    Source: Yang et al. (2020), Qatten, section 4.
    """
    _check_types(agent_qs, states, params, alive, softmax, return_statistics)
    if _checks.autocast_enabled(agent_qs):
        agent_qs, states, params = _checks.upcast_nested((agent_qs, states, params))
        with torch.autocast(agent_qs.device.type, enabled=False):
            return attention(
                agent_qs, states, params, own_size=own_size, own_grad=own_grad, alive=alive, softmax=softmax,
                return_weights=return_weights, return_statistics=return_statistics, backend=backend,
            )  # fmt: skip
    _check_shapes(agent_qs, states, params, own_size, alive)

    leading, n_agents = agent_qs.shape[:-1], agent_qs.shape[-1]
    rows = leading.numel()
    if alive is not None:
        alive = (alive if alive.dtype is torch.bool else alive != 0).reshape(rows, n_agents).contiguous()
    chosen = backends.resolve("attention", agent_qs, backend)
    if chosen != "native" or len(leading) not in (1, 2):
        agent_qs, states = agent_qs.reshape(rows, n_agents), states.reshape(rows, states.shape[-1])
    run = reference.attention
    if chosen == "native":
        run = native.attention
    elif chosen == "triton":
        from fastmix.ops.attention import triton  # here, as it imports Triton

        run = triton.attention
    out = run(agent_qs, states, params, own_size, own_grad, alive, softmax, return_weights, return_statistics)
    if agent_qs.shape[:-1] == leading:
        return out
    return AttentionOutput._make(None if part is None else part.reshape(*leading, part.shape[-1]) for part in out)


def _check_types(
    agent_qs: Tensor,
    states: Tensor,
    params: AttentionParams,
    alive: Tensor | None,
    softmax: bool,
    return_statistics: bool,
) -> None:
    if not isinstance(params, AttentionParams):
        raise TypeError(f"params must be an AttentionParams, got {type(params).__name__}")
    if not isinstance(params.key, Linear):
        raise TypeError(f"params.key must be a Linear, got {type(params.key).__name__}")
    _checks.check_tensor("agent_qs", agent_qs)
    _checks.check_tensor("states", states)
    _checks.check_floating("agent_qs", agent_qs)
    if not softmax and (alive is not None or return_statistics):
        raise ValueError("softmax must be True where alive or return_statistics is given")


def _check_shapes(
    agent_qs: Tensor, states: Tensor, params: AttentionParams, own_size: int, alive: Tensor | None
) -> None:
    _checks.check_agent_qs(agent_qs)
    _checks.check_states(states, agent_qs, "agent_qs")
    A, S = agent_qs.shape[-1], states.shape[-1]
    if own_size < 1 or A * own_size > S:
        raise ValueError(f"own_size must be at least 1 and at most S // A = {S} // {A}, got {own_size!r}")
    if alive is not None:
        _checks.check_tensor("alive", alive)
        _checks.check_shape("alive", alive, agent_qs.shape, "[..., A]")
        if alive.device != agent_qs.device:
            raise ValueError(f"alive must be on the device of agent_qs ({agent_qs.device}), got {alive.device}")
    _checks.check_tensor("params.key.weight", params.key.weight)
    if params.key.weight.dim() != 3 or params.key.weight.shape[-1] not in (own_size, own_size + 1):
        raise ValueError(
            f"params.key.weight must have shape [H, E, u] = (any, any, {own_size} or {own_size + 1}),"
            f" got {tuple(params.key.weight.shape)}"
        )
    heads, embed, inputs = params.key.weight.shape
    check_layers("params.key", (params.key,), states, inputs, embed, groups=heads, bias_optional=True)
    check_layers("params.query", params.query, states, S, embed, groups=heads, bias_optional=True)
    if params.head != ():
        check_layers("params.head", params.head, states, S, heads)
    if params.v != ():
        check_layers("params.v", params.v, states, S, 1)
