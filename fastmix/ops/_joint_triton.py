"""First layer of a network over state and joint action on NVIDIA GPUs, through Triton.

State and features are library products. The one-hots are never built: `gather_kernel` adds the columns of
the weights that the actions stand for, `columns_gradient_kernel` sums the gradients of the rows with each action, as a
product with one-hots that exist in registers only. Every result is the same from run to run.

Names: ``A`` agents, ``U`` actions, ``F`` outputs; ``BM`` rows and ``BF`` outputs at once.
"""

# Kernels are written in Triton's language, which has no type annotations.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from fastmix.ops import _library
from fastmix.ops._layers import Layers, mlp
from fastmix.ops._triton import DISPATCH_KEY, dot, dot_precision, launching, multiprocessors, next_power, operand


def joint_mlp(states: Tensor, actions: Tensor, extras: Tensor | None, layers: Layers, n_actions: int) -> Tensor:
    """`fastmix.ops._layers.mlp` of ``[states | one-hots of actions | extras]``, each ``[N, ..]``."""
    (weight, bias), *rest = layers
    S, one_hots = states.shape[1], actions.shape[1] * n_actions
    base = F.linear(states, weight[:, :S], bias)
    if extras is not None:
        base = base + F.linear(extras, weight[:, S + one_hots :])
    hidden: Tensor = _gather(base, weight[:, S : S + one_hots].t(), actions, n_actions, bool(rest))
    return mlp(hidden, tuple(rest)) if rest else hidden


# ---------------------------------------------------------------------------------------------------------- the kernels


@triton.jit(do_not_specialize=["rows"])
def gather_kernel(
    base_ptr, columns_ptr, actions_ptr, out_ptr, rows, stride_base, stride_row, stride_agent,
    A: tl.constexpr, U: tl.constexpr, F: tl.constexpr, BM: tl.constexpr, BF: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    """``base`` plus the columns (rows of ``columns``, ``[A * U, F]``) of the actions, for ``BM`` rows."""
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    f = tl.program_id(1) * BF + tl.arange(0, BF)
    live = row < rows
    inside = live[:, None] & (f < F)[None, :]
    total = tl.load(base_ptr + row[:, None] * stride_base + f[None, :], mask=inside, other=0.0).to(tl.float32)
    action_ptr = actions_ptr + row * stride_row
    for a in range(A):
        action = tl.load(action_ptr, mask=live, other=-1)
        action_ptr += stride_agent
        known = (action >= 0) & (action < U)
        column = columns_ptr + (a * U + action)[:, None] * F + f[None, :]
        total += tl.load(column, mask=inside & known[:, None], other=0.0).to(tl.float32)
    if RELU:
        total = tl.where(total <= 0, 0.0, total)
    tl.store(out_ptr + row[:, None] * F + f[None, :], total, mask=inside)


@triton.jit(do_not_specialize=["rows"])
def columns_gradient_kernel(
    grad_ptr, actions_ptr, parts_ptr, rows, stride_row, stride_agent,
    A: tl.constexpr, U: tl.constexpr, F: tl.constexpr, UP: tl.constexpr, BM: tl.constexpr, BF: tl.constexpr,
    BLOCKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of one agent's columns, summed over ``BLOCKS * BM`` rows."""
    DTYPE: tl.constexpr = grad_ptr.dtype.element_ty
    a = tl.program_id(0)
    f = tl.program_id(1) * BF + tl.arange(0, BF)
    part = tl.program_id(2)
    u = tl.arange(0, UP)
    total = tl.zeros((UP, BF), tl.float32)
    for block in range(BLOCKS):
        row = (part.to(tl.int64) * BLOCKS + block) * BM + tl.arange(0, BM)
        live = row < rows
        action = tl.load(actions_ptr + row * stride_row + a * stride_agent, mask=live, other=-1)
        one_hot = (action[None, :] == u[:, None]).to(DTYPE)
        inside = live[:, None] & (f < F)[None, :]
        grad = tl.load(grad_ptr + row[:, None] * F + f[None, :], mask=inside, other=0.0)
        total = dot(one_hot, operand(grad, PRECISION, DTYPE), total, PRECISION)
    out = parts_ptr + ((part * A + a).to(tl.int64) * U + u)[:, None] * F + f[None, :]
    tl.store(out, total, mask=(u < U)[:, None] & (f < F)[None, :])


# ------------------------------------------------------------------------------------------------------------- the host

_BM, _BF = 32, 32
_GRADIENT_BM, _GRADIENT_BF = 32, 64


def _forward(base: Tensor, columns: Tensor, actions: Tensor, n_actions: int, with_relu: bool) -> Tensor:
    rows, outputs = base.shape
    out = base.new_empty(rows, outputs)
    if rows:
        base, columns = base if base.stride(1) == 1 else base.contiguous(), columns.contiguous()
        with launching(base):
            gather_kernel[(triton.cdiv(rows, _BM), triton.cdiv(outputs, _BF))](
                base, columns, actions, out, rows, base.stride(0), *actions.stride(),
                A=actions.shape[1], U=n_actions, F=outputs, BM=_BM, BF=_BF, RELU=with_relu, num_warps=4,
            )  # fmt: skip
    return out


def _columns_gradient(grad: Tensor, actions: Tensor, n_actions: int) -> Tensor:
    """``[A * U, F]``: partial sums over fixed pieces of the rows, then their sum."""
    (rows, outputs), n_agents = grad.shape, actions.shape[1]
    if not rows:
        return grad.new_zeros(n_agents * n_actions, outputs)
    grad = grad.contiguous()
    wide = triton.cdiv(outputs, _GRADIENT_BF)
    blocks = triton.cdiv(rows, _GRADIENT_BM)
    wanted = max(1, 4 * multiprocessors(grad.device) // (n_agents * wide))
    per_part = min(64, next_power(triton.cdiv(blocks, wanted), 1))  # a power of two, to compile it rarely
    parts = grad.new_empty(triton.cdiv(blocks, per_part), n_agents * n_actions, outputs, dtype=torch.float32)
    with launching(grad):
        columns_gradient_kernel[(n_agents, wide, parts.shape[0])](
            grad, actions, parts, rows, *actions.stride(),
            A=n_agents, U=n_actions, F=outputs, UP=next_power(n_actions), BM=_GRADIENT_BM, BF=_GRADIENT_BF,
            BLOCKS=per_part, PRECISION=dot_precision(grad.dtype), num_warps=4,
        )  # fmt: skip
    return parts.sum(0).to(grad.dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, columns, actions, ctx.n_actions, ctx.with_relu = inputs
    ctx.save_for_backward(actions, output if ctx.with_relu else columns.new_empty(0))


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    actions, output = ctx.saved_tensors
    if ctx.with_relu:
        grad = torch.ops.aten.threshold_backward(grad, output, 0)
    wants_columns = ctx.needs_input_grad[1]
    columns = _gather_backward(grad, actions, ctx.n_actions) if wants_columns else None
    return grad, columns, None, None, None


_gather_backward = _library.define(
    "joint_columns_triton_backward",
    "(Tensor grad, Tensor actions, int n_actions) -> Tensor",
    _columns_gradient,
    lambda grad, actions, n_actions: grad.new_empty(actions.shape[1] * n_actions, grad.shape[1]),
    devices=(DISPATCH_KEY,),
)
_gather = _library.define(
    "joint_columns_triton",
    "(Tensor base, Tensor columns, Tensor actions, int n_actions, bool with_relu) -> Tensor",
    _forward,
    lambda base, *_: base.new_empty(base.shape),
    setup_context=_setup_context,
    backward=_backward,
    devices=(DISPATCH_KEY,),
)
