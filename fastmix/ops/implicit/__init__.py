"""`implicit`: the head of an implicit quantile network, for all steps and agents at once."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmix import backends
from fastmix.ops import _checks
from fastmix.ops.implicit import native, reference
from fastmix.ops.implicit.types import QuantileFeatures

__all__ = ["QuantileFeatures", "chosen_quantiles", "quantile_features"]


def quantile_features(
    fractions: Tensor, weight: Tensor, bias: Tensor, *, backend: str | None = None
) -> QuantileFeatures:
    r"""Features of fractions: ``relu(W cos(pi j f) + b)`` with ``j = 0 .. n - 1``, and their mean over fractions.

    The mean is what greedy actions need: with a linear layer behind the features, the mean of quantiles is the quantile
    of the mean feature.

    Args:
        fractions: ``[..., N]``.
        weight, bias: ``W [D, n]`` and ``b [D]``.
        backend: ``None`` for the automatic choice, or a name of `fastmix.backends.NAMES`.

    Returns:
        A `QuantileFeatures`, differentiable once in ``fractions``, ``weight`` and ``bias``. Under autocast
        half-precision arguments are promoted to float32 and so is the result.

    Raises:
        ValueError, TypeError: an argument of wrong shape, dtype or device.

    Source: Dabney et al. (2018), IQN, equation 4.
    """
    for name, tensor in (("fractions", fractions), ("weight", weight), ("bias", bias)):
        _checks.check_tensor(name, tensor)
    _checks.check_floating("fractions", fractions)
    if _checks.autocast_enabled(fractions):
        fractions, weight, bias = _checks.upcast_nested((fractions, weight, bias))
        with torch.autocast(fractions.device.type, enabled=False):
            return quantile_features(fractions, weight, bias, backend=backend)
    if fractions.dim() < 1 or fractions.shape[-1] < 1:
        raise ValueError(f"fractions must have shape [..., N], N at least 1, got {tuple(fractions.shape)}")
    if weight.dim() != 2 or weight.shape[0] < 1 or weight.shape[1] < 1:
        raise ValueError(f"weight must have shape [D, n], both at least 1, got {tuple(weight.shape)}")
    _checks.check_shape("bias", bias, (weight.shape[0],), "[D]")
    for name, tensor in (("weight", weight), ("bias", bias)):
        _checks.check_like(name, tensor, fractions, "fractions")
    if backends.resolve("implicit", fractions, backend) == "native":
        return native.quantile_features(fractions, weight, bias)
    return reference.quantile_features(fractions, weight, bias)


def chosen_quantiles(
    hidden: Tensor, features: Tensor, actions: Tensor, weight: Tensor, bias: Tensor, *, backend: str | None = None
) -> Tensor:
    r"""Quantiles of the actions taken, and of no other: ``z_ak = sum_d W[u_a, d] h_ad phi_kd + b[u_a]``.

    Args:
        hidden: ``h [..., A, D]``, of each agent.
        features: ``phi [..., N, D]``, of fractions that the ``A`` agents share.
        actions: ``u [..., A]`` int64.
        weight, bias: ``W [U, D]`` and ``b [U]``.
        backend: ``None`` for the automatic choice, or a name of `fastmix.backends.NAMES`.

    Returns:
        ``[..., A, N]``, differentiable once in ``hidden``, ``features``, ``weight`` and ``bias``. Under autocast
        half-precision arguments are promoted to float32 and so is the result.

    Raises:
        ValueError, TypeError: an argument of wrong shape, dtype or device; an action outside [0, U).

    Source: Dabney et al. (2018), IQN, section 3.1 (the product of state and fraction).
    """
    _check_chosen(hidden, features, actions, weight, bias)
    if _checks.autocast_enabled(hidden):
        hidden, features, weight, bias = _checks.upcast_nested((hidden, features, weight, bias))
        with torch.autocast(hidden.device.type, enabled=False):
            return chosen_quantiles(hidden, features, actions, weight, bias, backend=backend)
    for name, tensor in (("features", features), ("weight", weight), ("bias", bias)):
        _checks.check_like(name, tensor, hidden, "hidden")
    if backends.resolve("implicit", hidden, backend) == "native":
        return native.chosen_quantiles(hidden, features, actions, weight, bias)
    return reference.chosen_quantiles(hidden, features, actions, weight, bias)


def _check_chosen(hidden: Tensor, features: Tensor, actions: Tensor, weight: Tensor, bias: Tensor) -> None:
    named = {"hidden": hidden, "features": features, "actions": actions, "weight": weight, "bias": bias}
    for name, tensor in named.items():
        _checks.check_tensor(name, tensor)
    _checks.check_floating("hidden", hidden)
    if hidden.dim() < 2 or hidden.shape[-1] < 1 or hidden.shape[-2] < 1:
        raise ValueError(f"hidden must have shape [..., A, D], both at least 1, got {tuple(hidden.shape)}")
    lead, width = tuple(hidden.shape[:-2]), hidden.shape[-1]
    if features.dim() != hidden.dim() or features.shape[-2] < 1:
        raise ValueError(f"features must have shape [..., N, D] with N at least 1, got {tuple(features.shape)}")
    _checks.check_shape("features", features, (*lead, None, width), "[..., N, D]")
    _checks.check_actions(actions, tuple(hidden.shape[:-1]), hidden)
    if weight.dim() != 2 or weight.shape[0] < 1:
        raise ValueError(f"weight must have shape [U, D], U at least 1, got {tuple(weight.shape)}")
    _checks.check_shape("weight", weight, (None, width), "[U, D]")
    _checks.check_shape("bias", bias, (weight.shape[0],), "[U]")
