"""`recurrent` with cuDNN's GRU over the whole sequence; input and output layer are one product each over all steps.

On CPU tensors PyTorch's own GRU takes cuDNN's place, for tests.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastmix.ops import _library
from fastmix.ops.recurrent.reference import NORM_EPS, build_inputs
from fastmix.ops.recurrent.types import RecurrentOutput, RecurrentParams

_GRU_MODE = 3  # cudnnRNNMode_t


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
    width = p.weight_hh.shape[1]
    if hidden is None:
        hidden = obs.new_zeros(episodes, n_agents, width)
    # Time first, as cuDNN walks it; building the inputs copies them anyway.
    last_actions = None if last_actions is None else last_actions.transpose(0, 1)
    inputs = build_inputs(obs.transpose(0, 1), p.fc1_weight.shape[1], last_actions, agent_ids)
    x = F.relu(F.linear(inputs, p.fc1_weight, p.fc1_bias))
    states, last = x, hidden
    if x.numel() > 0:
        gru = _gru if torch.compiler.is_compiling() else _gru_forward
        states, last = gru(x.flatten(1, 2), hidden.flatten(0, 1), p.weight_ih, p.weight_hh, p.bias_ih, p.bias_hh)
        states, last = states.view(x.shape), last.view(hidden.shape)
    features = states
    if p.norm_weight is not None:
        features = F.layer_norm(features, (width,), p.norm_weight, p.norm_bias, NORM_EPS)
    q = F.linear(features, p.fc2_weight, p.fc2_bias)
    return RecurrentOutput(q.transpose(0, 1), last, states.transpose(0, 1) if return_hidden_states else None)


def _gru_forward(x: Tensor, start: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
    """``x [T, R, D]`` and ``start [R, D]`` -> states ``[T, R, D]`` and the last one."""
    start = start.contiguous().unsqueeze(0)
    if not x.is_cuda:
        states, last = torch.gru(x, start, weights, True, 1, 0.0, False, False, False)
        return states, last.squeeze(0)
    # cuDNN takes its weights in one piece, and PyTorch warns where it has to make that itself. What the call below
    # `torch.gru` keeps for a backward pass it keeps only in training.
    train, width = _library.wants_grad((x, start, *weights)), start.shape[-1]
    with torch.no_grad():
        copies = [weight.detach().clone() for weight in weights]  # which become views of the piece
        piece = torch._cudnn_rnn_flatten_weight(copies, 4, x.shape[-1], _GRU_MODE, width, 0, 1, False, False)
    states, last, *_ = torch._cudnn_rnn(
        x, weights, 4, piece, start, None, _GRU_MODE, width, 0, 1, False, 0.0, train, False, [], None
    )
    return states, last.squeeze(0)


def _gru_fake(x: Tensor, start: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(start)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_states: Tensor, grad_last: Tensor) -> tuple[Tensor, ...]:
    return tuple(_gru_backward(*ctx.saved_tensors, grad_states, grad_last))


def _backward_forward(*args: Tensor) -> tuple[Tensor, ...]:
    inputs, grads = [arg.detach().requires_grad_() for arg in args[:-2]], args[-2:]
    with torch.enable_grad():
        outputs = _gru_forward(*inputs)
    return torch.autograd.grad(outputs, inputs, grads)


def _backward_fake(*args: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(arg) for arg in args[:-2])


# For compiled code: cuDNN keeps memory for its backward pass whose size only cuDNN knows, so no traced graph can hold
# it. There the backward pass runs the forward pass again.
_INPUTS = "Tensor x, Tensor start, Tensor weight_ih, Tensor weight_hh, Tensor bias_ih, Tensor bias_hh"
_gru_backward = _library.define(
    "recurrent_gru_backward",
    f"({_INPUTS}, Tensor grad_states, Tensor grad_last) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_forward,
    _backward_fake,
    devices=("CPU", "CUDA"),
)
_gru = _library.define(
    "recurrent_gru",
    f"({_INPUTS}) -> (Tensor, Tensor)",
    _gru_forward,
    _gru_fake,
    setup_context=_setup_context,
    backward=_backward,
    devices=("CPU", "CUDA"),
)
