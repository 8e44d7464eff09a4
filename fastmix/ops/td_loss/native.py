"""`td_loss` through the compiled core: loss, error and gradient in one pass, which the backward pass only scales."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastmix.ops import _library
from fastmix.ops.td_loss.types import TDLoss


def td_loss(
    qs: Tensor,
    targets: Tensor,
    mask: Tensor,
    weights: Tensor | None,
    residual: Tensor | None,
    scale: float,
    normaliser: Tensor | None,
) -> TDLoss:
    """See `fastmix.ops.td_loss`; arguments are already checked."""
    differentiable = _library.wants_grad((qs, residual))
    loss, td_error, _ = _td_loss(qs, targets, mask, weights, residual, scale, normaliser, differentiable)
    return TDLoss(loss, td_error)


def _forward(
    qs: Tensor,
    targets: Tensor,
    mask: Tensor,
    weights: Tensor | None,
    residual: Tensor | None,
    scale: float,
    normaliser: Tensor | None,
    differentiable: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, error and (empty unless ``differentiable``) the gradient of ``qs``."""
    from fastmix import _core

    shape, dtype = qs.shape, qs.dtype
    loss, td_error = torch.empty((), dtype=dtype), torch.empty(shape, dtype=dtype)
    grad = torch.empty(shape if differentiable else 0, dtype=dtype)
    run = _core.td_loss_forward_float64 if dtype is torch.float64 else _core.td_loss_forward_float32
    run(
        shape, *_operand(qs, shape), *_operand(targets, shape), *_operand(mask, shape),
        *_operand(weights, shape), *_operand(residual, shape),
        scale, normaliser is not None, 0.0 if normaliser is None else normaliser.item(),
        loss.data_ptr(), td_error.data_ptr(), grad.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return loss, td_error, grad


def _operand(tensor: Tensor | None, shape: torch.Size) -> tuple[int, tuple[int, ...]]:
    """Address and strides of a tensor broadcast to ``shape``; any strides will do."""
    if tensor is None:
        return 0, ()
    return tensor.data_ptr(), tensor.stride() if tensor.shape == shape else tensor.expand(shape).stride()


def _fake(qs: Tensor, targets: Tensor, mask: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    differentiable = args[-1]
    return qs.new_empty(()), qs.new_empty(qs.shape), qs.new_empty(qs.shape if differentiable else 0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, td_error, grad = output
    ctx.has_residual = inputs[4] is not None
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(td_error, grad)
    ctx.save_for_backward(grad)


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    (grad,) = ctx.saved_tensors
    scaled = None if grad_loss is None else grad * grad_loss
    return scaled, None, None, None, scaled if ctx.has_residual else None, None, None, None


_td_loss = _library.define(
    "td_loss",
    "(Tensor qs, Tensor targets, Tensor mask, Tensor? weights, Tensor? residual, float scale, Tensor? normaliser,"
    " bool differentiable) -> (Tensor, Tensor, Tensor)",
    _forward,
    _fake,
    setup_context=_setup_context,
    backward=_backward,
)
