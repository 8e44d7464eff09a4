"""`monotonic` through the compiled core: hypernets, positivity and mix in one pass over blocks of rows."""

from __future__ import annotations

from functools import cache
from typing import Any, Final

import torch
from torch import Tensor

from fastmix.ops import _library
from fastmix.ops._rows import Rows, layout, with_dense_rows
from fastmix.ops.monotonic.arguments import INPUTS, POSITIVITY_CODES, dense_params, sizes_of
from fastmix.ops.monotonic.types import MonotonicParams

_ABS: Final = POSITIVITY_CODES["abs"]


def monotonic(agent_qs: Tensor, states: Tensor, params: MonotonicParams, positivity: str, beta: float) -> Tensor:
    """See `fastmix.ops.monotonic`; arguments are already checked.

    ``[N, A]`` and ``[N, S]`` give ``[N, 1]``, ``[B, N, A]`` and ``[B, N, S]`` give ``[B, N, 1]``. With one axis more
    ``agent_qs`` are Q quantiles of each agent, and this is `fastmix.ops.quantile_mix`: ``[N, A, Q]`` gives ``[N, Q]``,
    ``[B, N, A, Q]`` gives ``[B, N, Q]``.
    """
    training = _library.wants_grad((agent_qs, states, *params))
    q_tot: Tensor = _monotonic(agent_qs, states, *params, POSITIVITY_CODES[positivity], beta, training)[0]
    return q_tot


def _forward(agent_qs: Tensor, states: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """``q_tot``, and what backward needs: activations and signs, empty unless ``training``."""
    from fastmix import _core

    params, (positivity, beta, training) = rest[:14], rest[14:]
    sizes, states, (addresses, kept) = (
        sizes_of(states, params),
        with_dense_rows("monotonic", states),
        dense_params(params),
    )
    dtype, is_double = agent_qs.dtype, agent_qs.dtype == torch.float64
    agents, quantiles = _agents(agent_qs, states)
    q_tot = torch.empty((*states.shape[:-1], quantiles[0]), dtype=dtype)
    if not training:
        activations, signs = torch.empty(0, dtype=dtype), torch.empty(0, dtype=dtype)
    else:
        padded_rows, columns, sign_bytes = _saved(*sizes[:4], is_double)
        activations = torch.empty(padded_rows, columns, dtype=dtype)
        signs = torch.empty(padded_rows, sign_bytes if positivity == _ABS else 0, dtype=torch.uint8)
    _core.monotonic_forward(
        agents, quantiles, layout(states), addresses, q_tot.data_ptr(), activations.data_ptr(), signs.data_ptr(),
        sizes, positivity, beta, is_double, torch.get_num_threads(),
    )  # fmt: skip
    del kept
    return q_tot, activations, signs


def _backward_forward(grad_q_tot: Tensor, agent_qs: Tensor, states: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """Gradients of agent_qs, states and the 14 parameters; those not wanted are empty."""
    from fastmix import _core

    params, (activations, signs, positivity, beta, wants_qs, wants_states, wants_params) = rest[:14], rest[14:]
    grads = _empty_grads(agent_qs, states, params, wants_qs, wants_states, wants_params)
    sizes, states, (addresses, kept) = (
        sizes_of(states, params),
        with_dense_rows("monotonic", states),
        dense_params(params),
    )
    grad_q_tot, is_double = grad_q_tot.contiguous(), agent_qs.dtype == torch.float64
    grad_addresses = [grad.data_ptr() for grad in grads]
    _core.monotonic_backward(
        *_agents(agent_qs, states), layout(states), addresses, grad_q_tot.data_ptr(), activations.data_ptr(),
        signs.data_ptr(), grad_addresses[0], grad_addresses[1], grad_addresses[2:] if wants_params else None,
        sizes, positivity, beta, is_double, torch.get_num_threads(),
    )  # fmt: skip
    del kept
    return grads


def _agents(agent_qs: Tensor, states: Tensor) -> tuple[Rows, tuple[int, int]]:
    """Where the agents' values lie, or their first quantiles; how many there are, and their stride."""
    if agent_qs.dim() == states.dim():
        return layout(agent_qs), (1, 1)
    return layout(agent_qs.select(-1, 0)), (agent_qs.shape[-1], agent_qs.stride(-1))


@cache
def _layout(agents: int, embed: int, hidden: int, is_double: bool) -> tuple[int, int, int]:
    from fastmix import _core

    layout: tuple[int, int, int] = _core.monotonic_saved(agents, embed, hidden, is_double)
    return layout


def _saved(rows: int, agents: int, embed: int, hidden: int, is_double: bool) -> tuple[int, int, int]:
    """Rows that the saved tensors have, columns of the activations, bytes of signs in a row."""
    padding, columns, sign_bytes = _layout(int(agents), int(embed), int(hidden), is_double)
    return (rows + padding - 1) // padding * padding, columns, sign_bytes


def _empty_grads(
    agent_qs: Tensor,
    states: Tensor,
    params: tuple[Tensor | None, ...],
    wants_qs: bool,
    wants_states: bool,
    wants_params: bool,
) -> tuple[Tensor, ...]:
    return tuple(
        torch.empty_like(tensor, memory_format=torch.contiguous_format)
        if wants and tensor is not None
        else _nothing(agent_qs)
        for wants, tensor in zip(
            (wants_qs, wants_states, *[wants_params] * 14), (agent_qs, states, *params), strict=True
        )
    )


def _nothing(like: Tensor) -> Tensor:
    return torch.empty(0, dtype=like.dtype, device=like.device)


def _fake(agent_qs: Tensor, states: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    params, (positivity, _, training) = rest[:14], rest[14:]
    q_tot = agent_qs.new_empty((*states.shape[:-1], 1 if agent_qs.dim() == states.dim() else agent_qs.shape[-1]))
    if not training:
        return q_tot, agent_qs.new_empty(0), agent_qs.new_empty(0)
    padded_rows, columns, sign_bytes = _saved(*sizes_of(states, params)[:4], agent_qs.dtype == torch.float64)
    signs = agent_qs.new_empty(padded_rows, sign_bytes if positivity == _ABS else 0, dtype=torch.uint8)
    return q_tot, agent_qs.new_empty(padded_rows, columns), signs


def _backward_fake(grad_q_tot: Tensor, agent_qs: Tensor, states: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return _empty_grads(agent_qs, states, rest[:14], *rest[18:])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    tensors, (positivity, beta, training) = inputs[:16], inputs[16:]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1], output[2])
    if not training:
        return  # nothing was kept; _backward says so
    ctx.settings = (positivity, beta)
    ctx.wants = [tensor is not None and tensor.requires_grad for tensor in tensors]
    ctx.save_for_backward(*tensors, *output[1:])


def _backward(ctx: Any, grad_q_tot: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if not hasattr(ctx, "wants"):
        raise RuntimeError("fastmix::monotonic was called with training=False and cannot be differentiated")
    if grad_q_tot is None:
        return (None,) * 19
    wants = ctx.wants
    grads = _monotonic_backward(grad_q_tot, *ctx.saved_tensors, *ctx.settings, wants[0], wants[1], any(wants[2:]))
    return (*(grad if want else None for want, grad in zip(wants, grads, strict=True)), None, None, None)


_monotonic_backward = _library.define(
    "monotonic_backward",
    f"(Tensor grad_q_tot, {INPUTS}, Tensor activations, Tensor signs, int positivity, float beta, bool wants_qs,"
    " bool wants_states, bool wants_params) -> (" + ", ".join(["Tensor"] * 16) + ")",
    _backward_forward,
    _backward_fake,
)
_monotonic = _library.define(
    "monotonic",
    f"({INPUTS}, int positivity, float beta, bool training) -> (Tensor, Tensor, Tensor)",
    _forward,
    _fake,
    setup_context=_setup_context,
    backward=_backward,
)
