"""`quantile` through the compiled core: the loss with its gradient in one pass, and no tensor of pairs.

The gradient still lacks the factor with the normaliser: when it is written, the mask's sum is not known, and on CUDA
the host does not wait for it. The backward pass multiplies by it together with the gradient of the loss.

On the CPU the mean-shape mix is the op `monotonic` itself, which takes distributions, too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastmix.ops import _library
from fastmix.ops.monotonic.native import monotonic
from fastmix.ops.monotonic.types import MonotonicParams
from fastmix.ops.quantile.types import MeanShape, QuantileLoss

_run_loss, _run_fractions = _library.CoreFunction("quantile_loss"), _library.CoreFunction("fractions")
_run_split, _run_split_backward = _library.CoreFunction("mean_shape"), _library.CoreFunction("mean_shape_backward")
_PARTS = 2048
"""Partial sums of the loss on CUDA, two for each block"""


def quantile_loss(
    theta: Tensor,
    targets: Tensor,
    fractions: Tensor,
    mask: Tensor,
    weights: Tensor | None,
    kappa: float,
    scale: float,
    normaliser: Tensor | None,
) -> QuantileLoss:
    """See `fastmix.ops.quantile_loss`; arguments are already checked."""
    differentiable = _library.wants_grad((theta,))
    loss, row_losses, *_ = _quantile_loss(
        theta, targets, fractions, mask, weights, kappa, scale, normaliser, differentiable
    )
    return QuantileLoss(loss, row_losses)


def mean_shape(quantiles: Tensor) -> MeanShape:
    """See `fastmix.ops.mean_shape`; arguments are already checked."""
    leading = quantiles.shape[:-2]
    if len(leading) != 2:
        quantiles = quantiles.reshape(1, leading.numel(), *quantiles.shape[-2:])
    means, shape = _mean_shape(quantiles)
    if len(leading) != 2:
        means, shape = means.reshape(*leading, means.shape[-1]), shape.reshape(*leading, shape.shape[-1])
    return MeanShape(means, shape)


def quantile_mix(quantiles: Tensor, states: Tensor, params: MonotonicParams, positivity: str, beta: float) -> Tensor:
    """See `fastmix.ops.quantile_mix`; arguments are already checked, and on the CPU."""
    leading = quantiles.shape[:-2]
    if len(leading) not in (1, 2):
        rows = leading.numel()
        quantiles, states = quantiles.reshape(rows, *quantiles.shape[-2:]), states.reshape(rows, states.shape[-1])
    mixed = monotonic(quantiles, states, params, positivity, beta)
    return mixed if mixed.dim() == len(leading) + 1 else mixed.reshape(*leading, mixed.shape[-1])


def fractions(shape: Sequence[int], key: Tensor, stream: int, dtype: torch.dtype) -> Tensor:
    """See `fastmix.ops.fractions`; arguments are already checked."""
    drawn: Tensor = _fractions(key, list(shape), stream, dtype)
    return drawn


# ------------------------------------------------------------------------------------------------------------- the loss


def _loss_forward(
    theta: Tensor,
    targets: Tensor,
    fractions: Tensor,
    mask: Tensor,
    weights: Tensor | None,
    kappa: float,
    scale: float,
    normaliser: Tensor | None,
    differentiable: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, rows' losses, (empty unless ``differentiable``) the gradient of ``theta``, and the factor it lacks."""
    shape, dtype, device = theta.shape, theta.dtype, theta.device
    rows, n_targets = shape[:3], targets.shape[3]
    loss = torch.empty((), dtype=dtype, device=device)
    row_losses = torch.empty(rows, dtype=dtype, device=device)
    grad = torch.empty(shape if differentiable else 0, dtype=dtype, device=device)
    slope = torch.empty((), dtype=dtype, device=device)
    args = (
        rows, shape[3], n_targets, theta.data_ptr(), theta.stride(), *_operand(targets, (*rows, n_targets)),
        *_operand(fractions, shape), *_operand(mask, rows), *_operand(weights, rows),
        kappa, scale, 0 if normaliser is None else normaliser.data_ptr(),
        loss.data_ptr(), row_losses.data_ptr(), grad.data_ptr(), slope.data_ptr(),
    )  # fmt: skip
    if _library.on_cuda(theta):
        parts = torch.empty(_PARTS, dtype=torch.float64, device=device)
        _run_loss(theta, *args, parts.data_ptr(), _PARTS)
    else:
        _run_loss(theta, *args)
    return loss, row_losses, grad, slope


def _operand(tensor: Tensor | None, shape: Sequence[int]) -> tuple[int, tuple[int, ...]]:
    """Address and strides of a tensor broadcast to ``shape``; any strides will do."""
    if tensor is None:
        return 0, ()
    return tensor.data_ptr(), tensor.stride() if tensor.shape == shape else tensor.expand(*shape).stride()


def _loss_fake(theta: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad = theta.new_empty(theta.shape if args[-1] else 0)
    return theta.new_empty(()), theta.new_empty(theta.shape[:3]), grad, theta.new_empty(())


def _loss_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, row_losses, grad, slope = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(row_losses, grad, slope)
    ctx.save_for_backward(grad, slope)


def _loss_backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    grad, slope = ctx.saved_tensors
    return (None if grad_loss is None else grad * (slope * grad_loss), *[None] * 8)


_quantile_loss = _library.define(
    "quantile_loss",
    "(Tensor theta, Tensor targets, Tensor fractions, Tensor mask, Tensor? weights, float kappa, float scale,"
    " Tensor? normaliser, bool differentiable) -> (Tensor, Tensor, Tensor, Tensor)",
    _loss_forward,
    _loss_fake,
    setup_context=_loss_setup_context,
    backward=_loss_backward,
    devices=("CPU", "CUDA"),
)


# ------------------------------------------------------------------------------------------------------ means and shape


def _split_forward(quantiles: Tensor) -> tuple[Tensor, Tensor]:
    """``[B, T, A, N]`` -> ``[B, T, A]``, ``[B, T, N]``."""
    outer, inner, n_agents, n = quantiles.shape
    means = torch.empty((outer, inner, n_agents), dtype=quantiles.dtype, device=quantiles.device)
    shape = torch.empty((outer, inner, n), dtype=quantiles.dtype, device=quantiles.device)
    _run_split(quantiles, quantiles.shape, quantiles.data_ptr(), quantiles.stride(), means.data_ptr(), shape.data_ptr())
    return means, shape


def _split_fake(quantiles: Tensor) -> tuple[Tensor, Tensor]:
    outer, inner, n_agents, n = quantiles.shape
    return quantiles.new_empty(outer, inner, n_agents), quantiles.new_empty(outer, inner, n)


def _split_backward_forward(grad_means: Tensor, grad_shape: Tensor) -> Tensor:
    grad_means, grad_shape = grad_means.contiguous(), grad_shape.contiguous()
    outer, inner, n_agents = grad_means.shape
    n = grad_shape.shape[2]
    grad = torch.empty((outer, inner, n_agents, n), dtype=grad_means.dtype, device=grad_means.device)
    _run_split_backward(grad, outer * inner, n_agents, n, grad_means.data_ptr(), grad_shape.data_ptr(), grad.data_ptr())
    return grad


def _split_backward_fake(grad_means: Tensor, grad_shape: Tensor) -> Tensor:
    return grad_means.new_empty(*grad_means.shape, grad_shape.shape[2])


def _split_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Nothing is kept: the split is linear."""


def _split_backward(ctx: Any, grad_means: Tensor, grad_shape: Tensor) -> Tensor:
    grad: Tensor = _mean_shape_backward(grad_means, grad_shape)
    return grad


_mean_shape_backward = _library.define(
    "mean_shape_backward",
    "(Tensor grad_means, Tensor grad_shape) -> Tensor",
    _split_backward_forward,
    _split_backward_fake,
    devices=("CPU", "CUDA"),
)
_mean_shape = _library.define(
    "mean_shape",
    "(Tensor quantiles) -> (Tensor, Tensor)",
    _split_forward,
    _split_fake,
    setup_context=_split_setup_context,
    backward=_split_backward,
    devices=("CPU", "CUDA"),
)


# ------------------------------------------------------------------------------------------------------------ fractions


def _fractions_forward(key: Tensor, shape: list[int], stream: int, dtype: torch.dtype) -> Tensor:
    key = key.contiguous()
    drawn = torch.empty(shape, dtype=dtype, device=key.device)
    _run_fractions(drawn, math.prod(shape), key.data_ptr(), stream, drawn.data_ptr())
    return drawn


def _fractions_fake(key: Tensor, shape: list[int], stream: int, dtype: torch.dtype) -> Tensor:
    return key.new_empty(shape, dtype=dtype)


_fractions = _library.define(
    "fractions",
    "(Tensor key, SymInt[] shape, int stream, ScalarType dtype) -> Tensor",
    _fractions_forward,
    _fractions_fake,
    devices=("CPU", "CUDA"),
)
