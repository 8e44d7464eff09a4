"""`td_loss` through the compiled core: loss, error and gradient in one pass, which the backward pass only scales.

On CUDA the gradient still lacks the factor with the normaliser: when it is written, the mask's sum is not known, and
the host does not wait for it. The backward pass multiplies by it together with the gradient of the loss.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastmix.ops import _library
from fastmix.ops.td_loss.types import RULES, Favoured, TDLoss

_run_forward, _run_backward = _library.CoreFunction("td_loss_forward"), _library.CoreFunction("td_loss_backward")
_PARTS = 2048
"""Partial sums on CUDA, two for each block of 1,024 elements or more"""


def td_loss(
    qs: Tensor,
    targets: Tensor,
    mask: Tensor,
    weights: Tensor | None,
    residual: Tensor | None,
    favoured: Favoured | None,
    scale: float,
    normaliser: Tensor | None,
) -> TDLoss:
    """See `fastmix.ops.td_loss`; arguments are already checked."""
    differentiable = _library.wants_grad((qs, residual))
    rule, *decided = (None, None, None, None, 0.0, 1.0, 1.0) if favoured is None else favoured
    loss, td_error, factors, *_ = _td_loss(
        qs, targets, mask, weights, residual, rule, *decided, scale, normaliser, differentiable
    )
    return TDLoss(loss, td_error, None if favoured is None else factors)


def _forward(
    qs: Tensor,
    targets: Tensor,
    mask: Tensor,
    weights: Tensor | None,
    residual: Tensor | None,
    rule: str | None,
    all_greedy: Tensor | None,
    values: Tensor | None,
    thresholds: Tensor | None,
    tolerance: float,
    high: float,
    low: float,
    scale: float,
    normaliser: Tensor | None,
    differentiable: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, error, factors, the gradient of ``qs``, and the factor that it lacks.

    What is not asked for is empty: factors without a ``rule``, the gradient unless ``differentiable``, and the factor
    except on CUDA.
    """
    shape, dtype, device = qs.shape, qs.dtype, qs.device
    on_cuda = _library.on_cuda(qs)
    loss = torch.empty((), dtype=dtype, device=device)
    td_error = torch.empty(shape, dtype=dtype, device=device)
    factors = torch.empty(0 if rule is None else shape, dtype=dtype, device=device)
    grad = torch.empty(shape if differentiable else 0, dtype=dtype, device=device)
    slope = torch.empty(() if on_cuda else 0, dtype=dtype, device=device)
    args = (
        shape, *_operand(qs, shape), *_operand(targets, shape), *_operand(mask, shape),
        *_operand(weights, shape), *_operand(residual, shape),
        0 if rule is None else 1 + RULES.index(rule),
        *_operand(all_greedy, shape), *_operand(values, shape), *_operand(thresholds, shape), tolerance, high, low,
        scale, 0 if normaliser is None else normaliser.data_ptr(),
        loss.data_ptr(), td_error.data_ptr(), factors.data_ptr(), grad.data_ptr(),
    )  # fmt: skip
    if on_cuda:
        parts = torch.empty(_PARTS, dtype=torch.float64, device=device)
        _run_forward(qs, *args, slope.data_ptr(), parts.data_ptr(), _PARTS)
    else:
        _run_forward(qs, *args)
    return loss, td_error, factors, grad, slope


def _operand(tensor: Tensor | None, shape: torch.Size) -> tuple[int, tuple[int, ...]]:
    """Address and strides of a tensor broadcast to ``shape``; any strides will do."""
    if tensor is None:
        return 0, ()
    return tensor.data_ptr(), tensor.stride() if tensor.shape == shape else tensor.expand(shape).stride()


def _fake(qs: Tensor, targets: Tensor, mask: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rule, differentiable = args[2], args[-1]
    factors = qs.new_empty(0 if rule is None else qs.shape)
    grad, slope = qs.new_empty(qs.shape if differentiable else 0), qs.new_empty(() if _library.on_cuda(qs) else 0)
    return qs.new_empty(()), qs.new_empty(qs.shape), factors, grad, slope


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, td_error, factors, grad, slope = output
    ctx.has_residual, ctx.is_masked = inputs[4] is not None, inputs[5] is not None
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(td_error, factors, grad, slope)
    ctx.save_for_backward(grad, slope, factors if ctx.has_residual else None)


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    grad, slope, factors = ctx.saved_tensors
    scaled = of_residual = None
    if grad_loss is not None:
        scaled = _td_loss_backward(grad, slope, grad_loss) if slope.numel() > 0 else grad * grad_loss
        if ctx.has_residual:
            of_residual = scaled * factors if ctx.is_masked else scaled
    return scaled, None, None, None, of_residual, *[None] * 10


def _backward_forward(grad: Tensor, slope: Tensor, grad_loss: Tensor) -> Tensor:
    """``grad * slope * grad_loss``, the numbers of the two scalars staying on the device."""
    grad_qs = torch.empty_like(grad)
    _run_backward(grad, grad.numel(), grad.data_ptr(), slope.data_ptr(), grad_loss.data_ptr(), grad_qs.data_ptr())
    return grad_qs


_td_loss_backward = _library.define(
    "td_loss_backward",
    "(Tensor grad, Tensor slope, Tensor grad_loss) -> Tensor",
    _backward_forward,
    lambda grad, *_: torch.empty_like(grad),
    devices=("CUDA",),
)
_td_loss = _library.define(
    "td_loss",
    "(Tensor qs, Tensor targets, Tensor mask, Tensor? weights, Tensor? residual, str? rule, Tensor? all_greedy,"
    " Tensor? values, Tensor? thresholds, float tolerance, float high, float low, float scale, Tensor? normaliser,"
    " bool differentiable) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _fake,
    setup_context=_setup_context,
    backward=_backward,
    devices=("CPU", "CUDA"),
)
