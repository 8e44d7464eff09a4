"""`recognise` on NVIDIA GPUs through Triton.

The networks are library products but for their first layers' actions (`fastmix.ops._joint_triton`). `weigh_kernel` puts
together what they give, `weigh_backward_kernel` gives the gradients, element by element; the weights of agents are not
formed. Every result is the same from run to run.

Names: ``A`` agents, ``E`` features inside, ``EP`` these padded, ``BM`` rows of a program.
"""

# Kernels are written in Triton's language, which has no type annotations.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmix.ops import _library
from fastmix.ops._joint_triton import joint_mlp
from fastmix.ops._layers import mlp
from fastmix.ops._triton import DISPATCH_KEY, launching, next_power
from fastmix.ops.duplex.types import RecogniserParams, Recognition


def recognise(
    agent_qs: Tensor, max_qs: Tensor, states: Tensor, actions: Tensor, params: RecogniserParams
) -> Recognition:
    """See `fastmix.ops.duplex.recognise`; arguments are already checked: ``[N, A]`` and ``[N, S]`` give ``[N, 1]``."""
    n_actions = (params.w1[0].weight.shape[-1] - states.shape[-1]) // actions.shape[-1]
    w1, w2 = (joint_mlp(states, actions, None, net, n_actions) for net in (params.w1, params.w2))
    v = mlp(states, params.v)
    summed = _weigh(agent_qs.detach(), max_qs.detach(), w1, w2)
    return Recognition(summed.unsqueeze(-1).to(v.dtype) + v, v)


# ---------------------------------------------------------------------------------------------------------- the kernels


@triton.jit
def below(q_ptr, max_ptr, live):
    """How far utilities are below their maximum, as a number that is not positive."""
    q = tl.load(q_ptr, mask=live, other=0.0).to(tl.float32)
    return q - tl.load(max_ptr, mask=live, other=0.0).to(tl.float32)


@triton.jit
def mixed(
    q_ptr, max_ptr, w1_ptr, row, e, live, inside, stride_q, stride_agent, stride_max, stride_max_agent,
    A: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """``[BM, EP]``: the sum over agents of ``|w1|`` times the utility's distance from its maximum."""
    total = tl.zeros((BM, EP), tl.float32)
    q = q_ptr + row * stride_q
    largest = max_ptr + row * stride_max
    w1 = w1_ptr + row[:, None] * (A * E) + e[None, :]
    for _ in range(A):
        distance = below(q, largest, live)
        total += tl.abs(tl.load(w1, mask=inside, other=0.0).to(tl.float32)) * distance[:, None]
        q += stride_agent
        largest += stride_max_agent
        w1 += E
    return total


@triton.jit(do_not_specialize=["rows"])
def weigh_kernel(
    q_ptr, max_ptr, w1_ptr, w2_ptr, out_ptr, rows, stride_q, stride_agent, stride_max, stride_max_agent,
    A: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """What the agents' advantages add to the state's value, for ``BM`` rows."""
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    e = tl.arange(0, EP)
    live = row < rows
    inside = live[:, None] & (e < E)[None, :]
    total = mixed(
        q_ptr, max_ptr, w1_ptr, row, e, live, inside, stride_q, stride_agent, stride_max, stride_max_agent, A, E, EP, BM
    )
    w2 = tl.load(w2_ptr + row[:, None] * E + e[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row, tl.sum(total * tl.abs(w2), 1), mask=live)


@triton.jit(do_not_specialize=["rows"])
def weigh_backward_kernel(
    q_ptr, max_ptr, w1_ptr, w2_ptr, grad_ptr, grad_w1_ptr, grad_w2_ptr,
    rows, stride_q, stride_agent, stride_max, stride_max_agent,
    A: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Gradients of both generated weights, before their absolute value, for ``BM`` rows."""
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    e = tl.arange(0, EP)
    live = row < rows
    inside = live[:, None] & (e < E)[None, :]
    total = mixed(
        q_ptr, max_ptr, w1_ptr, row, e, live, inside, stride_q, stride_agent, stride_max, stride_max_agent, A, E, EP, BM
    )
    grad = tl.load(grad_ptr + row, mask=live, other=0.0)
    w2 = tl.load(w2_ptr + row[:, None] * E + e[None, :], mask=inside, other=0.0).to(tl.float32)
    of_w2 = grad[:, None] * total
    of_w2 = tl.where(w2 > 0, of_w2, tl.where(w2 < 0, -of_w2, 0.0))
    tl.store(grad_w2_ptr + row[:, None] * E + e[None, :], of_w2, mask=inside)
    of_total = grad[:, None] * tl.abs(w2)
    q = q_ptr + row * stride_q
    largest = max_ptr + row * stride_max
    offset = row[:, None] * (A * E) + e[None, :]
    for _ in range(A):
        distance = below(q, largest, live)
        w1 = tl.load(w1_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        of_w1 = of_total * distance[:, None]
        of_w1 = tl.where(w1 > 0, of_w1, tl.where(w1 < 0, -of_w1, 0.0))
        tl.store(grad_w1_ptr + offset, of_w1, mask=inside)
        q += stride_agent
        largest += stride_max_agent
        offset += E


# ------------------------------------------------------------------------------------------------------------- the host


def _launch(agent_qs: Tensor, max_qs: Tensor, w2: Tensor) -> tuple[tuple[int, ...], dict[str, int]]:
    """Strides and constants: 1,024 numbers of each kind in a program, which four warps hold in registers."""
    padded = next_power(w2.shape[1], 1)
    rows = max(1, min(64, 1024 // padded))
    constants = {"A": agent_qs.shape[1], "E": w2.shape[1], "EP": padded, "BM": rows, "num_warps": 4}
    return (*agent_qs.stride(), *max_qs.stride()), constants


def _forward(agent_qs: Tensor, max_qs: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    rows = agent_qs.shape[0]
    out = agent_qs.new_empty(rows, dtype=torch.float32)
    if rows:
        strides, constants = _launch(agent_qs, max_qs, w2)
        with launching(agent_qs):
            weigh_kernel[(triton.cdiv(rows, constants["BM"]),)](
                agent_qs, max_qs, w1.contiguous(), w2.contiguous(), out, rows, *strides, **constants
            )
    return out


def _backward_forward(grad: Tensor, agent_qs: Tensor, max_qs: Tensor, w1: Tensor, w2: Tensor) -> tuple[Tensor, Tensor]:
    rows = agent_qs.shape[0]
    grad_w1, grad_w2 = w1.new_empty(w1.shape), w2.new_empty(w2.shape)
    if rows:
        strides, constants = _launch(agent_qs, max_qs, w2)
        with launching(agent_qs):
            weigh_backward_kernel[(triton.cdiv(rows, constants["BM"]),)](
                agent_qs, max_qs, w1.contiguous(), w2.contiguous(), grad.contiguous(), grad_w1, grad_w2,
                rows, *strides, **constants,
            )  # fmt: skip
    return grad_w1, grad_w2


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return None, None, *_weigh_backward(grad, *ctx.saved_tensors)


_weigh_backward = _library.define(
    "recognise_triton_backward",
    "(Tensor grad, Tensor agent_qs, Tensor max_qs, Tensor w1, Tensor w2) -> (Tensor, Tensor)",
    _backward_forward,
    lambda grad, agent_qs, max_qs, w1, w2: (w1.new_empty(w1.shape), w2.new_empty(w2.shape)),
    devices=(DISPATCH_KEY,),
)
_weigh = _library.define(
    "recognise_triton",
    "(Tensor agent_qs, Tensor max_qs, Tensor w1, Tensor w2) -> Tensor",
    _forward,
    lambda agent_qs, *_: agent_qs.new_empty(agent_qs.shape[0], dtype=torch.float32),
    setup_context=_setup_context,
    backward=_backward,
    devices=(DISPATCH_KEY,),
)
