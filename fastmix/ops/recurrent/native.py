"""`recurrent` through the compiled core: one walk over time per block of rows, forward and backward."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from fastmix.ops import _library, _memory
from fastmix.ops.recurrent.types import RecurrentOutput, RecurrentParams

logger = logging.getLogger("fastmix")

_PARAMS = len(RecurrentParams._fields)


def recurrent(
    obs: Tensor,
    network: RecurrentParams,
    hidden: Tensor | None,
    last_actions: Tensor | None,
    agent_ids: bool,
    return_hidden_states: bool,
    lengths: Tensor | None,
) -> RecurrentOutput:
    """See `fastmix.ops.recurrent`, for one network; arguments are already checked. A missing hidden state is zero."""
    save = _library.wants_grad((obs, hidden, *network))
    lengths = None if lengths is None else lengths.contiguous()
    q, after, states, _ = _recurrent(
        obs, last_actions, hidden, *network, agent_ids, return_hidden_states, save, lengths
    )
    return RecurrentOutput(q, after, states if return_hidden_states else None)


def sizes_of(obs: Tensor, last_actions: Tensor | None, network: Any, agent_ids: bool) -> tuple[int, ...]:
    """Episodes, steps, agents, features of an observation, one-hot actions, one-hot ids, hidden size, outputs."""
    episodes, steps, n_agents, n_obs = obs.shape
    ids = n_agents if agent_ids else 0
    actions = 0 if last_actions is None else network[0].shape[1] - n_obs - ids
    return (episodes, steps, n_agents, n_obs, actions, ids, network[0].shape[0], network[8].shape[0])


def saved_size(obs: Tensor, network: Any) -> int:
    """How many numbers the core keeps from forward to backward: states, inputs and gates, padded to cache lines."""
    episodes, steps, n_agents, _ = obs.shape
    line = 64 // obs.element_size()
    padded = (network[0].shape[0] + line - 1) // line * line
    return episodes * n_agents * padded * (6 * steps + 1)


def readable(obs: Tensor) -> Tensor:
    """``obs`` with contiguous features: a copy where they are not."""
    if obs.stride(-1) == 1 or obs.shape[-1] <= 1:
        return obs
    logger.debug("recurrent copies obs: its last axis has stride %d", obs.stride(-1))
    return obs.contiguous()


def _forward(
    obs: Tensor, last_actions: Tensor | None, hidden: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from fastmix import _core

    network, (agent_ids, return_hidden_states, save, lengths) = rest[:_PARAMS], rest[_PARAMS:]
    sizes = sizes_of(obs, last_actions, network, agent_ids)
    episodes, steps, n_agents, _, _, _, width, outputs = sizes
    obs = readable(obs)
    network = tuple(None if p is None else p.contiguous() for p in network)
    hidden = None if hidden is None else hidden.contiguous()
    is_double = obs.dtype == torch.float64
    q = obs.new_empty((episodes, steps, n_agents, outputs))
    after = obs.new_empty((episodes, n_agents, width))
    states = obs.new_empty((episodes, steps, n_agents, width) if return_hidden_states else (0,))
    saved = _memory.from_pool((saved_size(obs, network) if save else 0,), obs.dtype)
    if after.numel() > 0:
        _core.recurrent_forward(
            obs.data_ptr(), _address(last_actions), _address(hidden), [_address(p) for p in network], q.data_ptr(),
            after.data_ptr(), _address(states), _address(saved), sizes, obs.stride()[:3],
            (0, 0, 0) if last_actions is None else last_actions.stride(), _address(lengths), is_double,
            torch.get_num_threads(),
        )  # fmt: skip
    return q, after, states, saved


def _fake(
    obs: Tensor, last_actions: Tensor | None, hidden: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    network, (agent_ids, return_hidden_states, save) = rest[:_PARAMS], rest[_PARAMS : _PARAMS + 3]
    episodes, steps, n_agents, _, _, _, width, outputs = sizes_of(obs, last_actions, network, agent_ids)
    return (
        obs.new_empty((episodes, steps, n_agents, outputs)),
        obs.new_empty((episodes, n_agents, width)),
        obs.new_empty((episodes, steps, n_agents, width) if return_hidden_states else (0,)),
        obs.new_empty((saved_size(obs, network) if save else 0,)),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.agent_ids, ctx.return_hidden_states, save, lengths = inputs
    if not save:
        raise RuntimeError("fastmix::recurrent was called with save=False on tensors that need gradients")
    ctx.mark_non_differentiable(output[3])
    ctx.set_materialize_grads(False)  # zeros as large as the workspace
    ctx.save_for_backward(*tensors, output[3], lengths)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, saved, lengths = ctx.saved_tensors
    wants_obs, wants_hidden = ctx.needs_input_grad[0], ctx.needs_input_grad[2]
    states = grads[2] if ctx.return_hidden_states else None
    grad_obs, grad_hidden, *grad_network = _recurrent_backward(
        *tensors, saved, grads[0], grads[1], states, ctx.agent_ids, wants_obs, wants_hidden, lengths
    )
    norm = tensors[3 + 6] is not None
    return (
        grad_obs if wants_obs else None,
        None,
        grad_hidden if wants_hidden else None,
        *(g if norm or i not in (6, 7) else None for i, g in enumerate(grad_network)),
        None,
        None,
        None,
        None,
    )


def _backward_forward(
    obs: Tensor, last_actions: Tensor | None, hidden: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    """Gradients of obs and hidden (empty where not wanted) and of every parameter (norm's empty without one)."""
    from fastmix import _core

    network, saved, cotangents = rest[:_PARAMS], rest[_PARAMS], rest[_PARAMS + 1 : _PARAMS + 4]
    agent_ids, lengths = rest[_PARAMS + 4], rest[_PARAMS + 7]
    sizes = sizes_of(obs, last_actions, network, agent_ids)
    outputs = _backward_fake(obs, last_actions, hidden, *rest)
    grad_obs, grad_hidden, *grads = outputs
    if sizes[0] * sizes[2] == 0:
        for grad in outputs:
            grad.zero_()
        return outputs
    obs = readable(obs)
    network = tuple(None if p is None else p.contiguous() for p in network)
    grad_q, grad_after, grad_states = (None if g is None else g.contiguous() for g in cotangents)
    _core.recurrent_backward(
        obs.data_ptr(), _address(last_actions), hidden is None, [_address(p) for p in network],
        saved.data_ptr(), _address(grad_q), _address(grad_after), _address(grad_states), [_address(g) for g in grads],
        _address(grad_obs), _address(grad_hidden), sizes, obs.stride()[:3],
        (0, 0, 0) if last_actions is None else last_actions.stride(), _address(lengths),
        obs.dtype == torch.float64, torch.get_num_threads(),
    )  # fmt: skip
    return outputs


def _backward_fake(obs: Tensor, last_actions: Tensor | None, hidden: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    network, (wants_obs, wants_hidden) = rest[:_PARAMS], rest[_PARAMS + 5 : _PARAMS + 7]
    episodes, _, n_agents, _ = obs.shape
    return (
        obs.new_empty(obs.shape if wants_obs else (0,)),
        obs.new_empty((episodes, n_agents, network[0].shape[0]) if wants_hidden else (0,)),
        *(
            obs.new_empty(0) if p is None else torch.empty_like(p, memory_format=torch.contiguous_format)
            for p in network
        ),
    )


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


_WEIGHTS = ", ".join(f"Tensor{'?' if field.startswith('norm') else ''} {field}" for field in RecurrentParams._fields)
_recurrent_backward = _library.define(
    "recurrent_backward",
    f"(Tensor obs, Tensor? last_actions, Tensor? hidden, {_WEIGHTS}, Tensor saved, Tensor? grad_q, Tensor? grad_hidden,"
    " Tensor? grad_hidden_states, bool agent_ids, bool wants_obs, bool wants_hidden, Tensor? lengths)"
    f" -> ({', '.join(['Tensor'] * (2 + _PARAMS))})",
    _backward_forward,
    _backward_fake,
)
_recurrent = _library.define(
    "recurrent",
    f"(Tensor obs, Tensor? last_actions, Tensor? hidden, {_WEIGHTS}, bool agent_ids, bool return_hidden_states,"
    " bool save, Tensor? lengths) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _fake,
    setup_context=_setup_context,
    backward=_backward,
)
