"""`recognise` through the compiled core: all networks in one pass over blocks of rows, no agent's weight is built."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from fastmix.ops import _library, _memory, _networks
from fastmix.ops._rows import layout, with_dense_rows
from fastmix.ops.duplex.types import RecogniserParams, Recognition

_run_forward, _run_backward = _library.CoreFunction("recognise_forward"), _library.CoreFunction("recognise_backward")


def recognise(
    agent_qs: Tensor, max_qs: Tensor, states: Tensor, actions: Tensor, params: RecogniserParams
) -> Recognition:
    """See `fastmix.ops.duplex.recognise`; arguments are already checked: ``[.., A]`` and ``[.., S]`` give ``[.., 1]``.

    ``..`` is one dimension or two.
    """
    tensors, depths = _networks.flatten(params)
    training = _library.wants_grad((states, *tensors))
    q_r, v, *_ = _recognise(agent_qs.detach(), max_qs.detach(), states, actions, depths, training, tensors)
    return Recognition(q_r, v)


def _forward(
    agent_qs: Tensor,
    max_qs: Tensor,
    states: Tensor,
    actions: Tensor,
    depths: list[int],
    training: bool,
    params: list[Tensor],
) -> tuple[Tensor, ...]:
    """``q_r`` and ``v``; and what backward needs, empty unless ``training``: features, sums over agents, signs."""
    shapes = _shapes(states, actions, depths, training, params)
    q_r, v, hidden, mixed = (_memory.kept(shape, states.dtype) for shape in shapes[:4])
    signs = _memory.kept(shapes[4], torch.uint8)
    states, params = with_dense_rows("recognise", states), _networks.dense(params)
    networks = _networks.split(params, depths)
    _run_forward(
        states, *_inputs(agent_qs, max_qs, states, actions, params), _specs(networks, networks, [False] * 3),
        (q_r.data_ptr(), v.data_ptr()), (hidden.data_ptr(), mixed.data_ptr(), signs.data_ptr()),
    )  # fmt: skip
    return q_r, v, hidden, mixed, signs


def _backward_forward(
    grad_q_r: Tensor | None,
    grad_v: Tensor | None,
    agent_qs: Tensor,
    max_qs: Tensor,
    states: Tensor,
    actions: Tensor,
    hidden: Tensor,
    mixed: Tensor,
    signs: Tensor,
    depths: list[int],
    wants: list[int],
    wants_states: bool,
    params: list[Tensor],
) -> tuple[Tensor, list[Tensor]]:
    """Gradients of states and the parameters; those not wanted are empty."""
    grad_states, grads = _empty_grads(states, depths, wants, wants_states, params)
    grad_q_r, grad_v = (None if grad is None else grad.contiguous() for grad in (grad_q_r, grad_v))
    states, params = with_dense_rows("recognise", states), _networks.dense(params)
    _run_backward(
        states, *_inputs(agent_qs, max_qs, states, actions, params),
        _specs(_networks.split(params, depths), grads, wants),
        tuple(0 if grad is None else grad.data_ptr() for grad in (grad_q_r, grad_v)),
        (hidden.data_ptr(), mixed.data_ptr(), signs.data_ptr()), grad_states.data_ptr(),
    )  # fmt: skip
    return grad_states, [grad for network in grads for grad in network]


def _inputs(agent_qs: Tensor, max_qs: Tensor, states: Tensor, actions: Tensor, params: list[Tensor]) -> tuple[Any, ...]:
    """Rows, state features, agents and actions; and where all rows lie."""
    state_dim, agents = states.shape[-1], actions.shape[-1]
    n_actions = (params[0].shape[-1] - state_dim) // agents
    sizes = (states.shape[:-1].numel(), state_dim, agents, n_actions)
    return sizes, *(layout(tensor) for tensor in (agent_qs, max_qs, states, actions))


def _specs(networks: list[list[Tensor]], grads: list[list[Tensor]], wants: Any) -> list[_networks.Spec]:
    return [
        _networks.spec(network, grad if want else None, reads_actions=reads_actions)
        for network, grad, want, reads_actions in zip(networks, grads, wants, (True, True, False), strict=True)
    ]


def _shapes(
    states: Tensor, actions: Tensor, depths: list[int], training: bool, params: list[Tensor]
) -> list[tuple[int, ...]]:
    """Of what forward returns."""
    one, none = (*states.shape[:-1], 1), (0,)
    if not training:
        return [one, one, none, none, none]
    rows, networks = states.shape[:-1].numel(), _networks.split(params, depths)
    embed = networks[1][-2].shape[0]
    blocks, columns, _ = _networks.kept_shape(rows, actions.shape[-1] * embed)
    return [
        one, one, _networks.kept_shape(rows, _networks.hidden_columns(networks)), _networks.kept_shape(rows, 2 * embed),
        (blocks, columns, _sign_bytes(states.dtype == torch.float64)),
    ]  # fmt: skip


@cache
def _sign_bytes(is_double: bool) -> int:
    from fastmix import _core

    return _core.recognise_sign_bytes(is_double)


def _empty_grads(
    states: Tensor, depths: list[int], wants: list[int], wants_states: bool, params: list[Tensor]
) -> tuple[Tensor, list[list[Tensor]]]:
    return (
        states.new_empty(states.shape if wants_states else (0,)),
        _networks.empty_grads(_networks.split(params, depths), map(bool, wants)),
    )


def _fake(agent_qs: Tensor, max_qs: Tensor, states: Tensor, actions: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    shapes = _shapes(states, actions, *rest)
    return (
        *(states.new_empty(shape) for shape in shapes[:4]), states.new_empty(shapes[4], dtype=torch.uint8),
    )  # fmt: skip


def _backward_fake(*args: Any) -> tuple[Tensor, list[Tensor]]:
    states, depths, wants, wants_states, params = args[4], *args[9:]
    grad_states, grads = _empty_grads(states, depths, wants, wants_states, params)
    return grad_states, [grad for network in grads for grad in network]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    agent_qs, max_qs, states, actions, depths, training, params = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[2:])
    if not training:
        return  # nothing was kept; _backward says so
    ctx.depths = list(depths)
    ctx.wants = _networks.wanted(_networks.split(params, depths))
    ctx.wants_states = states.requires_grad
    ctx.save_for_backward(agent_qs, max_qs, states, actions, *output[2:], *params)


def _backward(ctx: Any, grad_q_r: Tensor | None, grad_v: Tensor | None, *_: None) -> tuple[Any, ...]:
    if not hasattr(ctx, "wants"):
        raise RuntimeError("fastmix::recognise was called with training=False and cannot be differentiated")
    tensors, params = ctx.saved_tensors[:7], list(ctx.saved_tensors[7:])
    if grad_q_r is None and grad_v is None:
        return (*(None,) * 6, [None] * len(params))
    weighs = grad_q_r is not None
    wants = [ctx.wants[0] and weighs, ctx.wants[1] and weighs, ctx.wants[2]]
    grad_states, grads = _recognise_backward(
        grad_q_r, grad_v, *tensors, ctx.depths, [int(want) for want in wants], ctx.wants_states, params
    )
    grad_params = _networks.present(grads, params, ctx.depths, wants)
    return None, None, grad_states if ctx.wants_states else None, None, None, None, grad_params


_recognise_backward = _library.define(
    "recognise_backward",
    "(Tensor? grad_q_r, Tensor? grad_v, Tensor agent_qs, Tensor max_qs, Tensor states, Tensor actions, Tensor hidden,"
    " Tensor mixed, Tensor signs, int[] depths, int[] wants, bool wants_states, Tensor[] params) -> (Tensor, Tensor[])",
    _backward_forward,
    _backward_fake,
)
_recognise = _library.define(
    "recognise",
    "(Tensor agent_qs, Tensor max_qs, Tensor states, Tensor actions, int[] depths, bool training, Tensor[] params)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _fake,
    setup_context=_setup_context,
    backward=_backward,
)
