"""`implicit` through the compiled core, on the CPU: cosines by recurrence in the cache, no product of all actions."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastmix.ops import _library
from fastmix.ops.implicit.types import QuantileFeatures

_run_features, _run_features_backward = (
    _library.CoreFunction("implicit_features"), _library.CoreFunction("implicit_features_backward")
)  # fmt: skip
_run_quantiles, _run_quantiles_backward = (
    _library.CoreFunction("implicit_quantiles"), _library.CoreFunction("implicit_quantiles_backward")
)  # fmt: skip


def quantile_features(fractions: Tensor, weight: Tensor, bias: Tensor) -> QuantileFeatures:
    """See `fastmix.ops.quantile_features`; arguments are already checked."""
    leading, n = fractions.shape[:-1], fractions.shape[-1]
    values, mean = _features(fractions.reshape(leading.numel(), n), weight, bias)
    width = weight.shape[0]
    return QuantileFeatures(values.reshape(*leading, n, width), mean.reshape(*leading, width))


def chosen_quantiles(hidden: Tensor, features: Tensor, actions: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """See `fastmix.ops.chosen_quantiles`; arguments are already checked."""
    leading = hidden.shape[:-2]
    rows, (n_agents, width), n = leading.numel(), hidden.shape[-2:], features.shape[-2]
    quantiles: Tensor = _quantiles(
        hidden.reshape(rows, n_agents, width), features.reshape(rows, n, width), actions.reshape(rows, n_agents),
        weight, bias,
    )  # fmt: skip
    return quantiles.reshape(*leading, n_agents, n)


# ------------------------------------------------------------------------------------------------------------- features


def _features_forward(fractions: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """``[rows, N]`` -> ``[rows, N, D]``, ``[rows, D]``."""
    fractions, weight, bias = fractions.contiguous(), weight.contiguous(), bias.contiguous()
    (rows, n), (width, n_cosines) = fractions.shape, weight.shape
    values, mean = fractions.new_empty(rows, n, width), fractions.new_empty(rows, width)
    _run_features(
        fractions, rows, n, n_cosines, width, fractions.data_ptr(), weight.data_ptr(), bias.data_ptr(),
        values.data_ptr(), mean.data_ptr(),
    )  # fmt: skip
    return values, mean


def _features_fake(fractions: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    (rows, n), width = fractions.shape, weight.shape[0]
    return fractions.new_empty(rows, n, width), fractions.new_empty(rows, width)


def _features_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    fractions, weight, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(fractions, output[0], weight)


def _features_backward(ctx: Any, grad_values: Tensor | None, grad_mean: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_values is None and grad_mean is None:
        return None, None, None
    fractions, values, weight = ctx.saved_tensors
    grad_fractions = None
    if ctx.needs_input_grad[0]:
        grad_fractions = _fractions_gradient(fractions, values, weight, grad_values, grad_mean)
    return grad_fractions, *_features_gradient(fractions, values, grad_values, grad_mean, weight.shape[1])


def _fractions_gradient(
    fractions: Tensor, values: Tensor, weight: Tensor, grad_values: Tensor | None, grad_mean: Tensor | None
) -> Tensor:
    """In plain PyTorch: nothing that learns asks for it."""
    grad = torch.zeros_like(values) if grad_values is None else grad_values
    if grad_mean is not None:
        grad = grad + grad_mean.unsqueeze(-2) / values.shape[1]
    angle = math.pi * torch.arange(weight.shape[1], dtype=values.dtype, device=values.device)
    slopes = -angle * torch.sin(fractions.unsqueeze(-1) * angle)
    return ((grad.masked_fill(values <= 0, 0) @ weight) * slopes).sum(-1)


def _gradient_forward(
    fractions: Tensor, values: Tensor, grad_values: Tensor | None, grad_mean: Tensor | None, n_cosines: int
) -> tuple[Tensor, Tensor]:
    fractions, values = fractions.contiguous(), values.contiguous()
    grads = [None if grad is None else grad.contiguous() for grad in (grad_values, grad_mean)]
    rows, n, width = values.shape
    grad_weight, grad_bias = values.new_empty(width, n_cosines), values.new_empty(width)
    _run_features_backward(
        values, rows, n, n_cosines, width, fractions.data_ptr(), values.data_ptr(),
        *(0 if grad is None else grad.data_ptr() for grad in grads), grad_weight.data_ptr(), grad_bias.data_ptr(),
    )  # fmt: skip
    return grad_weight, grad_bias


def _gradient_fake(
    fractions: Tensor, values: Tensor, grad_values: Tensor | None, grad_mean: Tensor | None, n_cosines: int
) -> tuple[Tensor, Tensor]:
    width = values.shape[2]
    return values.new_empty(width, n_cosines), values.new_empty(width)


_features_gradient = _library.define(
    "implicit_features_backward",
    "(Tensor fractions, Tensor values, Tensor? grad_values, Tensor? grad_mean, SymInt n_cosines) -> (Tensor, Tensor)",
    _gradient_forward,
    _gradient_fake,
)
_features = _library.define(
    "implicit_features",
    "(Tensor fractions, Tensor weight, Tensor bias) -> (Tensor, Tensor)",
    _features_forward,
    _features_fake,
    setup_context=_features_setup_context,
    backward=_features_backward,
)


# ------------------------------------------------------------------------------------------------------------ quantiles


def _quantiles_forward(hidden: Tensor, features: Tensor, actions: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``[rows, A, D]``, ``[rows, N, D]``, ``[rows, A]`` -> ``[rows, A, N]``."""
    hidden, features, actions, weight, bias = (x.contiguous() for x in (hidden, features, actions, weight, bias))
    (rows, n_agents, width), n, n_actions = hidden.shape, features.shape[1], weight.shape[0]
    quantiles = hidden.new_empty(rows, n_agents, n)
    wrong = _run_quantiles(
        hidden, rows, n_agents, n, width, n_actions, hidden.data_ptr(), features.data_ptr(), actions.data_ptr(),
        weight.data_ptr(), bias.data_ptr(), quantiles.data_ptr(),
    )  # fmt: skip
    if wrong >= 0:
        raise ValueError(f"actions must lie in [0, {n_actions}), got {int(actions.flatten()[wrong])}")
    return quantiles


def _quantiles_fake(hidden: Tensor, features: Tensor, actions: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return hidden.new_empty(hidden.shape[0], hidden.shape[1], features.shape[1])


def _quantiles_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    hidden, features, actions, weight, _ = inputs
    ctx.save_for_backward(hidden, features, actions, weight)


def _quantiles_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_hidden, grad_features, grad_weight, grad_bias = _quantiles_gradient(*ctx.saved_tensors, grad)
    return grad_hidden, grad_features, None, grad_weight, grad_bias


def _quantiles_gradient_forward(
    hidden: Tensor, features: Tensor, actions: Tensor, weight: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden, features, actions, weight, grad = (x.contiguous() for x in (hidden, features, actions, weight, grad))
    (rows, n_agents, width), n, n_actions = hidden.shape, features.shape[1], weight.shape[0]
    grads = torch.empty_like(hidden), torch.empty_like(features), torch.empty_like(weight), weight.new_empty(n_actions)
    _run_quantiles_backward(
        hidden, rows, n_agents, n, width, n_actions, hidden.data_ptr(), features.data_ptr(), actions.data_ptr(),
        weight.data_ptr(), grad.data_ptr(), *(g.data_ptr() for g in grads),
    )  # fmt: skip
    return grads


def _quantiles_gradient_fake(
    hidden: Tensor, features: Tensor, actions: Tensor, weight: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        hidden.new_empty(hidden.shape), features.new_empty(features.shape), weight.new_empty(weight.shape),
        weight.new_empty(weight.shape[0]),
    )  # fmt: skip


_quantiles_gradient = _library.define(
    "implicit_quantiles_backward",
    "(Tensor hidden, Tensor features, Tensor actions, Tensor weight, Tensor grad) -> (Tensor, Tensor, Tensor, Tensor)",
    _quantiles_gradient_forward,
    _quantiles_gradient_fake,
)
_quantiles = _library.define(
    "implicit_quantiles",
    "(Tensor hidden, Tensor features, Tensor actions, Tensor weight, Tensor bias) -> Tensor",
    _quantiles_forward,
    _quantiles_fake,
    setup_context=_quantiles_setup_context,
    backward=_quantiles_backward,
)
