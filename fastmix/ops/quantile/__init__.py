"""`quantile`: distributions held as quantiles: their loss, their mean-shape mix, the fractions they are at."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from fastmix import backends
from fastmix.ops import _checks, _library
from fastmix.ops.monotonic import MonotonicParams, checked, monotonic
from fastmix.ops.quantile import native, reference
from fastmix.ops.quantile.types import MeanShape, QuantileLoss

__all__ = ["MeanShape", "QuantileLoss", "fractions", "mean_shape", "midpoints", "quantile_loss", "quantile_mix"]

FRACTION_DTYPES: Final = (torch.float32, torch.float64)
STREAMS: Final = 2**32
"""Streams of `fractions` are numbered from 0 up to this."""
MOST_FRACTIONS: Final = 2**34
"""Of one draw."""


def quantile_loss(
    theta: Tensor,
    targets: Tensor,
    fractions: Tensor,
    mask: Tensor,
    *,
    kappa: float = 1.0,
    weights: Tensor | None = None,
    scale: float = 1.0,
    normaliser: Tensor | float | None = None,
    backend: str | None = None,
) -> QuantileLoss:
    r"""Quantile Huber loss between every quantile and every target sample, masked.

    With ``u_ij = targets_j - theta_i`` and the Huber function ``H(u) = u^2 / 2`` where ``|u| < kappa``, else
    ``kappa (|u| - kappa / 2)``::

        row  = sum_i mean_j |fraction_i - [u_ij <= 0]| H(u_ij) / kappa
        loss = scale * sum(weights * mask * row) / normaliser

    The mean goes over the targets and the sum over the quantiles. Native kernels keep no pairs: memory is that of the
    arguments and of ``theta``'s gradient. Steps with mask 0 may hold NaN and inf, which reach neither the loss nor a
    gradient.

    Args:
        theta: ``[B, T, G, N]``, quantiles of a joint value (``G = 1``) or one set per agent; any strides.
        targets: ``[B, T, G, N']`` or ``[B, T, 1, N']``, samples of the target distribution, constant.
        fractions: broadcast to ``[B, T, G, N]``: where in the distribution each quantile is, in [0, 1]. ``[N]`` for
            fixed ones. Constant.
        mask: ``[B, T, G]`` or ``[B, T, 1]``, 1 on live steps; any dtype.
        kappa: where the loss turns from squares to absolute values, at least 0; at 0 it is ``|u|`` everywhere. The
            public trainers have 1 and do not divide by it.
        weights: constant factors, broadcast to ``[B, T, G]``. They must be finite on live steps.
        scale: factor of the loss.
        normaliser: number or 0-dim tensor in place of the mask's sum over ``[B, T, G]``. Without it a batch that has no
            live step has loss 0.
        backend: ``None`` for the automatic choice, or a name of `fastmix.backends.NAMES`.

    Returns:
        A `QuantileLoss`: the loss, differentiable once in ``theta``, and ``row``. Native sums over rows are made in
        double precision, in an order that depends on the number of threads only, on CUDA on the shape only.

    Raises:
        ValueError, TypeError: an argument of wrong shape, dtype, device or range.

    Source: Dabney et al. (2018b), IQN, equation 3; normalised as in the learners of DFAC (Sun et al. 2021) and ResZ.
    """
    if not 0 <= kappa < float("inf"):
        raise ValueError(f"kappa must be finite and not negative, got {kappa!r}")
    _check_loss_tensors(theta, targets, fractions, mask, weights)
    if _checks.autocast_enabled(theta):
        theta, targets, fractions = _checks.upcast(theta), _checks.upcast(targets), _checks.upcast(fractions)
        weights = _checks.upcast(weights)
    for name, tensor in (("targets", targets), ("fractions", fractions), ("weights", weights)):
        if tensor is not None and tensor.dtype is not theta.dtype:
            _checks.check_like(name, tensor, theta, "theta")
    if mask.dtype is not theta.dtype:
        mask = mask.to(theta.dtype)
    if normaliser is not None:
        normaliser = _checks.scalar_like("normaliser", normaliser, theta, "theta")
    run = native if backends.resolve("quantile", theta, backend) == "native" else reference
    return run.quantile_loss(theta, targets, fractions, mask, weights, kappa, scale, normaliser)


def mean_shape(quantiles: Tensor, *, backend: str | None = None) -> MeanShape:
    """Agents' distributions as their means and the sum of their shapes.

    ``means_a = mean_n quantiles_an`` and ``shape_n = sum_a (quantiles_an - means_a)``: a joint distribution
    ``mix(means) + shape`` has the mean that ``mix`` gives, whatever that is.

    Args:
        quantiles: ``[..., A, N]``; any strides.
        backend: ``None`` for the automatic choice, or a name of `fastmix.backends.NAMES`.

    Returns:
        A `MeanShape`, both parts differentiable once.

    Raises:
        ValueError, TypeError: ``quantiles`` of wrong shape or dtype.

    Source: Sun et al. (2021), DFAC, mean-shape decomposition (equations 10 to 12).
    """
    _check_quantiles(quantiles)
    if _checks.autocast_enabled(quantiles):
        quantiles = _checks.upcast(quantiles)
    run = native if backends.resolve("quantile", quantiles, backend) == "native" else reference
    return run.mean_shape(quantiles)


def quantile_mix(
    quantiles: Tensor,
    states: Tensor,
    params: MonotonicParams,
    *,
    positivity: str = "abs",
    beta: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    """DMIX: the agents' means mixed monotonically, their shapes added: ``monotonic(means, states) + shape``.

    On the CPU backend ``"native"`` makes it in one pass, forward and backward: neither means nor ``monotonic``'s result
    reach memory. Elsewhere it is that composition of `mean_shape` and `monotonic`.

    Args:
        quantiles: ``[..., A, N]``; any strides.
        states: ``[..., S]``, with the leading dimensions of ``quantiles``.
        params, positivity, beta, backend: see `fastmix.ops.monotonic`.

    Returns:
        ``[..., N]``, quantiles of the joint value; differentiable once in ``quantiles``, ``states`` and the parameters.

    Raises:
        ValueError, TypeError: an argument of wrong shape, dtype, device or value.

    Source: Sun et al. (2021), DFAC, section 3 (DMIX).
    """
    _check_quantiles(quantiles)
    if _checks.autocast_enabled(quantiles):
        quantiles = _checks.upcast(quantiles)
    if _library.on_cuda(quantiles) or backends.resolve("quantile", quantiles, backend) != "native":
        means, shape = mean_shape(quantiles, backend=backend)
        return monotonic(means, states, params, positivity=positivity, beta=beta, backend=backend) + shape
    _, states, params = checked(quantiles.select(-1, 0), states, params, positivity, beta)
    return native.quantile_mix(quantiles, states, params, positivity, beta)


def fractions(
    shape: Sequence[int],
    key: Tensor,
    *,
    stream: int = 0,
    dtype: torch.dtype = torch.float32,
    backend: str | None = None,
) -> Tensor:
    """Quantile fractions, uniform in [0, 1), that depend on nothing but ``key``, ``stream`` and their place.

    The numbers are multiples of 2^-24, equal bit by bit on every backend, device and dtype. Element ``i`` of the
    flattened result depends on ``i`` but not on ``shape``: whoever pads a batch along time draws ``[T, B, N]`` and
    transposes, and the padding changes no real step's fractions.

    Args:
        shape: of the result.
        key: int64 ``[2]``: a seed and the number of the draw; the result is on its device. Count the second up after
            each draw, on the device (``key[1] += 1``), so that a captured CUDA graph goes on counting.
        stream: draws of different streams (one for each network) have nothing in common.
        dtype: float32 or float64.
        backend: ``None`` for the automatic choice, or a name of `fastmix.backends.NAMES`.

    Returns:
        ``shape``, without gradient.

    Raises:
        ValueError, TypeError: an argument of wrong shape, dtype or range.

    Source: Salmon et al. (2011), Philox 4x32-10; the counter is the block of four numbers, the stream and the draw.
    """
    _checks.check_tensor("key", key)
    _checks.check_shape("key", key, (2,), "(seed, draw)")
    if key.dtype is not torch.int64:
        raise TypeError(f"key must have dtype torch.int64, got {key.dtype}")
    _checks.check_choice("dtype", dtype, FRACTION_DTYPES)
    if not 0 <= stream < STREAMS:
        raise ValueError(f"stream must lie in [0, {STREAMS}), got {stream!r}")
    if any(extent < 0 for extent in shape) or math.prod(shape) > MOST_FRACTIONS:
        raise ValueError(f"shape must hold 0 to 2^34 numbers, got {tuple(shape)}")
    run = native if backends.resolve("quantile", key.new_empty(0, dtype=dtype), backend) == "native" else reference
    return run.fractions(shape, key, stream, dtype)


def midpoints(n: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
    """Fixed fractions ``(2 i + 1) / (2 n)``, ``[n]``: the middles of ``n`` equal parts of [0, 1].

    Raises:
        ValueError: ``n`` below 1.

    Source: Dabney et al. (2018a), QR-DQN, lemma 2: the best places for ``n`` equally weighted quantiles.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n!r}")
    return (torch.arange(n, dtype=dtype, device=device) + 0.5) / n


def _check_quantiles(quantiles: Tensor) -> None:
    _checks.check_tensor("quantiles", quantiles)
    _checks.check_floating("quantiles", quantiles)
    if quantiles.dim() < 2 or quantiles.shape[-2] < 1 or quantiles.shape[-1] < 1:
        raise ValueError(
            "quantiles must have shape [..., A, N] with at least one agent and one quantile,"
            f" got {tuple(quantiles.shape)}"
        )


def _check_loss_tensors(
    theta: Tensor, targets: Tensor, fractions: Tensor, mask: Tensor, weights: Tensor | None
) -> None:
    _checks.check_tensor("theta", theta)
    _checks.check_floating("theta", theta)
    shape = theta.shape
    if len(shape) != 4 or shape[-1] < 1:
        raise ValueError(f"theta must have shape [B, T, G, N] with at least one quantile, got {tuple(shape)}")
    rows, column = shape[:3], (shape[0], shape[1], 1)
    tensors = {"targets": targets, "fractions": fractions, "mask": mask, "weights": weights}
    for name, tensor in tensors.items():
        if tensor is None and name == "weights":
            continue
        _checks.check_tensor(name, tensor)
        assert tensor is not None
        if tensor.device != theta.device:
            raise ValueError(f"{name} must be on the device of theta ({theta.device}), got {tensor.device}")
    if targets.dim() != 4 or targets.shape[:3] not in (rows, column) or targets.shape[-1] < 1:
        raise ValueError(
            f"targets must have shape [B, T, G, N'] or [B, T, 1, N'] with [B, T, G] = {tuple(rows)} and at least one"
            f" sample, got {tuple(targets.shape)}"
        )
    if mask.shape not in (rows, column):
        raise ValueError(
            f"mask must have shape [B, T, G] or [B, T, 1] with [B, T, G] = {tuple(rows)}, got {tuple(mask.shape)}"
        )
    if fractions.dim() < 1 or fractions.shape[-1] != shape[-1] or not _checks.broadcasts(fractions.shape, shape):
        raise ValueError(
            f"fractions must have a shape [..., N] that broadcasts to [B, T, G, N] = {tuple(shape)},"
            f" got {tuple(fractions.shape)}"
        )
    if weights is not None and not _checks.broadcasts(weights.shape, rows):
        raise ValueError(
            f"weights must have a shape that broadcasts to [B, T, G] = {tuple(rows)}, got {tuple(weights.shape)}"
        )
