"""A first layer over state and joint action on NVIDIA GPUs, through Triton.

State and features are library products. One-hots are never built: `gather_kernel` adds the weights of the joint action,
`scatter_kernel` sums the gradients of the rows that took each action, as a product with one-hots in registers
only. Every result is the same from run to run.

Names: ``A`` agents, ``U`` actions, ``C`` features of the layer; ``BM`` rows and ``BC`` features at once.
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


def gather(base: Tensor, actions: Tensor, table: Tensor) -> Tensor:
    """``base [N, C]`` plus, for each agent, the row of ``table [A * U, C]`` that its action in ``[N, A]`` names.

    An action outside ``[0, U)`` adds nothing. Differentiable in ``base`` and ``table``.
    """
    total: Tensor = _gather(base, actions, table)
    return total


def joint_mlp(states: Tensor, actions: Tensor, extras: Tensor | None, layers: Layers, n_actions: int) -> Tensor:
    """`fastmix.ops._layers.mlp` of ``[states | one-hots of actions | extras]``, each ``[N, ..]``."""
    (weight, bias), *rest = layers
    S, one_hots = states.shape[1], actions.shape[1] * n_actions
    base = F.linear(states, weight[:, :S], bias)
    if extras is not None:
        base = base + F.linear(extras, weight[:, S + one_hots :])
    hidden = gather(base, actions, weight[:, S : S + one_hots].t())
    return mlp(F.relu(hidden, inplace=True), tuple(rest)) if rest else hidden


# ---------------------------------------------------------------------------------------------------------- the kernels


@triton.jit(do_not_specialize=["rows"])
def gather_kernel(
    base_ptr, actions_ptr, table_ptr, out_ptr, rows, stride_base, stride_action_row, stride_action_agent,
    A: tl.constexpr, U: tl.constexpr, C: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """``base + sum over agents of table[action]`` for ``BM`` rows and ``BC`` features."""
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    live = row < rows
    inside = (c < C)[None, :]
    mask = live[:, None] & inside
    total = tl.load(base_ptr + row[:, None] * stride_base + c[None, :], mask=mask, other=0.0).to(tl.float32)
    for a in range(A):
        action = tl.load(actions_ptr + row * stride_action_row + a * stride_action_agent, mask=live, other=-1)
        known = (action >= 0) & (action < U)
        unit = table_ptr + (a * U + action)[:, None] * C + c[None, :]
        total += tl.load(unit, mask=known[:, None] & inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row[:, None] * C + c[None, :], total, mask=mask)


@triton.jit(do_not_specialize=["rows"])
def scatter_kernel(
    grad_ptr, actions_ptr, part_ptr, rows, stride_grad_row, stride_grad_column, stride_action_row, stride_action_agent,
    A: tl.constexpr, U: tl.constexpr, C: tl.constexpr, BM: tl.constexpr, BU: tl.constexpr, BC: tl.constexpr,
    ROW_BLOCKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums of the gradients of the rows that took each action, over one part of the rows: a product with one-hots.

    Programs: ``BU`` actions of agents, ``BC`` features, parts.
    """
    DTYPE: tl.constexpr = grad_ptr.dtype.element_ty
    unit = tl.program_id(0) * BU + tl.arange(0, BU)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    part = tl.program_id(2)
    agent = unit // U
    action = (unit - agent * U)[:, None]
    total = tl.zeros((BU, BC), tl.float32)
    for i in range(ROW_BLOCKS):
        row = (part * ROW_BLOCKS + i).to(tl.int64) * BM + tl.arange(0, BM)
        live = row < rows
        taken_ptr = actions_ptr + row[None, :] * stride_action_row + agent[:, None] * stride_action_agent
        taken = tl.load(taken_ptr, mask=live[None, :] & (unit < A * U)[:, None], other=-1)
        one_hot = tl.where(taken == action, 1.0, 0.0)
        grad = grad_ptr + row[:, None] * stride_grad_row + c[None, :] * stride_grad_column
        grads = tl.load(grad, mask=live[:, None] & (c < C)[None, :], other=0.0)
        total = dot(one_hot.to(DTYPE), operand(grads, PRECISION, DTYPE), total, PRECISION)
    out = part_ptr + part.to(tl.int64) * (A * U * C) + unit[:, None] * C + c[None, :]
    tl.store(out, total, mask=(unit < A * U)[:, None] & (c < C)[None, :])


# ------------------------------------------------------------------------------------------------------------- the host


def _gather_forward(base: Tensor, actions: Tensor, table: Tensor) -> Tensor:
    rows, C = base.shape
    A, base = actions.shape[1], base if base.stride(-1) == 1 else base.contiguous()
    out = base.new_empty(rows, C)
    BC = min(next_power(C), 128)
    BM = max(1, 2048 // BC)
    if rows:
        with launching(base):
            gather_kernel[(triton.cdiv(rows, BM), triton.cdiv(C, BC))](
                base, actions, table.contiguous(), out,
                rows, base.stride(0), actions.stride(0), actions.stride(1),
                A=A, U=table.shape[0] // A, C=C, BM=BM, BC=BC, num_warps=4,
            )  # fmt: skip
    return out


def _scatter_forward(grad: Tensor, actions: Tensor, n_units: int) -> Tensor:
    """The gradient of the table, ``[A * U, C]``."""
    rows, C = grad.shape
    A, precision = actions.shape[1], dot_precision(grad.dtype)
    BM, BU, BC = 32, 32, min(next_power(C), 64)
    programs = triton.cdiv(n_units, BU) * triton.cdiv(C, BC)
    wanted_parts = max(1, 4 * multiprocessors(grad.device) // programs)
    row_blocks = min(64, next_power(-(-triton.cdiv(rows, BM) // wanted_parts), 1))  # few values: it is a constant
    parts = grad.new_empty(triton.cdiv(rows, BM * row_blocks), n_units, C, dtype=torch.float32)
    if rows:
        with launching(grad):
            scatter_kernel[(triton.cdiv(n_units, BU), triton.cdiv(C, BC), parts.shape[0])](
                grad, actions, parts, rows, grad.stride(0), grad.stride(1), actions.stride(0), actions.stride(1),
                A=A, U=n_units // A, C=C, BM=BM, BU=BU, BC=BC, ROW_BLOCKS=row_blocks, PRECISION=precision, num_warps=4,
            )  # fmt: skip
    return parts.sum(0).to(grad.dtype)


def _gather_setup(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    base, actions, table = inputs
    ctx.n_units = table.shape[0]
    ctx.wants = (base.requires_grad, table.requires_grad)
    ctx.save_for_backward(actions)


def _gather_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
    (actions,) = ctx.saved_tensors
    table = _scatter(grad, actions, ctx.n_units) if ctx.wants[1] else None
    return grad if ctx.wants[0] else None, None, table


_scatter = _library.define(
    "joint_scatter_triton",
    "(Tensor grad, Tensor actions, int n_units) -> Tensor",
    _scatter_forward,
    lambda grad, actions, n_units: grad.new_empty(n_units, grad.shape[1]),
    devices=(DISPATCH_KEY,),
)
_gather = _library.define(
    "joint_gather_triton",
    "(Tensor base, Tensor actions, Tensor table) -> Tensor",
    _gather_forward,
    lambda base, actions, table: base.new_empty(base.shape),
    setup_context=_gather_setup,
    backward=_gather_backward,
    devices=(DISPATCH_KEY,),
)
