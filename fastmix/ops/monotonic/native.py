"""`monotonic` through the compiled core: hypernets, positivity and mix in one pass over blocks of rows."""

from __future__ import annotations

import logging
from functools import cache
from typing import Any, Final

import torch
from torch import Tensor

from fastmix.ops import _library
from fastmix.ops.monotonic.types import POSITIVITIES, MonotonicParams

logger = logging.getLogger("fastmix")

_POSITIVITIES: Final = {name: index for index, name in enumerate(POSITIVITIES)}
_ABS: Final = _POSITIVITIES["abs"]


def monotonic(agent_qs: Tensor, states: Tensor, params: MonotonicParams, positivity: str, beta: float) -> Tensor:
    """See `fastmix.ops.monotonic`; arguments are already checked, ``[(B,) N, A]`` and ``[(B,) N, S]``, the result ``[(B,) N, 1]``."""
    training = _library.wants_grad((agent_qs, states, *params))
    q_tot: Tensor = _monotonic(agent_qs, states, *params, _POSITIVITIES[positivity], beta, training)[0]
    return q_tot


def _forward(agent_qs: Tensor, states: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """``q_tot``, and what backward needs: activations and signs, empty unless ``training``."""
    from fastmix import _core

    params, (positivity, beta, training) = rest[:14], rest[14:]
    states, addresses, sizes, is_double, kept = _unpack(agent_qs, states, params)
    dtype = agent_qs.dtype
    q_tot = torch.empty((*agent_qs.shape[:-1], 1), dtype=dtype)
    activations = signs = torch.empty(0, dtype=dtype)
    if training:
        padded_rows, columns, sign_bytes = _saved(sizes[0], *sizes[1:4], is_double)
        activations = torch.empty(padded_rows, columns, dtype=dtype)
        signs = torch.empty(padded_rows, sign_bytes if positivity == _ABS else 0, dtype=torch.uint8)
    _core.monotonic_forward(
        _rows(agent_qs), _rows(states), addresses, q_tot.data_ptr(), activations.data_ptr(), signs.data_ptr(),
        sizes, positivity, beta, is_double, torch.get_num_threads(),
    )  # fmt: skip
    del kept
    return q_tot, activations, signs


def _backward_forward(grad_q_tot: Tensor, agent_qs: Tensor, states: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """Gradients of agent_qs, states and the 14 parameters; those not wanted are empty."""
    from fastmix import _core

    params, (activations, signs, positivity, beta, wants_qs, wants_states, wants_params) = rest[:14], rest[14:]
    grads = _empty_grads(agent_qs, states, params, wants_qs, wants_states, wants_params)
    states, addresses, sizes, is_double, kept = _unpack(agent_qs, states, params)
    grad_q_tot = grad_q_tot.contiguous()
    grad_addresses = [grad.data_ptr() for grad in grads]
    _core.monotonic_backward(
        _rows(agent_qs), _rows(states), addresses, grad_q_tot.data_ptr(), activations.data_ptr(), signs.data_ptr(),
        grad_addresses[0], grad_addresses[1], grad_addresses[2:] if wants_params else None,
        sizes, positivity, beta, is_double, torch.get_num_threads(),
    )  # fmt: skip
    del kept
    return grads


def _unpack(
    agent_qs: Tensor, states: Tensor, params: tuple[Tensor | None, ...]
) -> tuple[Tensor, list[int], tuple[int, int, int, int, int], bool, tuple[Tensor | None, ...]]:
    """States with dense rows, addresses of dense parameters, sizes as the core takes them, and what owns the addresses."""
    if states.stride(-1) != 1:
        logger.debug("monotonic copies states of shape %s and strides %s", tuple(states.shape), states.stride())
        states = states.clone(memory_format=torch.contiguous_format)
    addresses = []
    for index, param in enumerate(params):
        if param is not None and not param.is_contiguous():
            logger.debug("monotonic copies %s of strides %s", MonotonicParams._fields[index], param.stride())
            params = (*params[:index], param.contiguous(), *params[index + 1 :])
            param = params[index]
        addresses.append(0 if param is None else param.data_ptr())
    hidden, embed = params[1], params[9]
    assert embed is not None
    agents = agent_qs.shape[-1]
    sizes = (
        agent_qs.numel() // agents, agents, embed.shape[0], 0 if hidden is None else hidden.shape[0], states.shape[-1],
    )  # fmt: skip
    return states, addresses, sizes, agent_qs.dtype == torch.float64, params


def _rows(tensor: Tensor) -> tuple[int, int, int, int, int]:
    """Address of ``[B, N, X]`` or ``[N, X]``, and how rows are found behind it: N, strides of B, N and X."""
    stride = tensor.stride()
    if len(stride) == 3:
        return (tensor.data_ptr(), tensor.shape[1], *stride)
    return (tensor.data_ptr(), tensor.shape[0], 0, *stride)


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
    like = {"dtype": agent_qs.dtype, "device": agent_qs.device}
    wanted = [wants_qs, wants_states] + [wants_params and param is not None for param in params]
    return tuple(
        torch.empty(tensor.shape if wants and tensor is not None else 0, **like)
        for wants, tensor in zip(wanted, (agent_qs, states, *params), strict=True)
    )


def _fake(agent_qs: Tensor, states: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    params, (positivity, _, training) = rest[:14], rest[14:]
    q_tot = agent_qs.new_empty((*agent_qs.shape[:-1], 1))
    if not training:
        return q_tot, agent_qs.new_empty(0), agent_qs.new_empty(0)
    agents = agent_qs.shape[-1]
    hidden = 0 if params[1] is None else params[1].shape[0]
    padded_rows, columns, sign_bytes = _saved(
        agent_qs.numel() // agents, agents, params[9].shape[0], hidden, agent_qs.dtype == torch.float64
    )
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


_INPUTS: Final = "Tensor agent_qs, Tensor states, " + ", ".join(
    f"Tensor{'?' if 'hidden' in name and name[0] == 'w' else ''} {name}" for name in MonotonicParams._fields
)

_monotonic_backward = _library.define(
    "monotonic_backward",
    f"(Tensor grad_q_tot, {_INPUTS}, Tensor activations, Tensor signs, int positivity, float beta, bool wants_qs,"
    " bool wants_states, bool wants_params) -> (" + ", ".join(["Tensor"] * 16) + ")",
    _backward_forward,
    _backward_fake,
)
_monotonic = _library.define(
    "monotonic",
    f"({_INPUTS}, int positivity, float beta, bool training) -> (Tensor, Tensor, Tensor)",
    _forward,
    _fake,
    setup_context=_setup_context,
    backward=_backward,
)
