"""`td_loss`: mask, weights, residual, squared error and normaliser in one pass."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from fastmix import backends
from fastmix.ops import _checks
from fastmix.ops.td_loss import native, reference
from fastmix.ops.td_loss.types import RULES, Favoured, TDLoss

__all__ = ["Favoured", "TDLoss", "td_loss"]


def td_loss(
    qs: Tensor,
    targets: Tensor,
    mask: Tensor,
    *,
    weights: Tensor | None = None,
    residual: Tensor | None = None,
    favoured: Favoured | None = None,
    scale: float = 1.0,
    normaliser: Tensor | float | None = None,
    backend: str | None = None,
) -> TDLoss:
    """Masked, weighted squared temporal-difference loss.

    ``td = qs + residual - targets`` and ``loss = scale * sum(weights * (mask * td)^2) / normaliser``. Steps with mask 0
    may hold NaN and inf, which reach neither the loss nor a gradient.

    Args:
        qs: ``[B, T, K]``, joint values (``K = 1``) or one per agent; any strides, slices are not copied.
        targets: ``[B, T, K]`` or ``[B, T, 1]``, constant.
        mask: ``[B, T, K]`` or ``[B, T, 1]``, 1 on live steps; any dtype.
        weights: constant factors, broadcast to ``[B, T, K]``: a weighting function, or ``[B, 1, 1]`` importance
            weights. They must be finite on live steps.
        residual: ``[B, T, K]``, added to ``qs``.
        favoured: which steps go without the residual, or, where there is none, which ones have another weight.
        scale: factor of the loss.
        normaliser: number or 0-dim tensor in place of the mask's sum over ``[B, T, K]``. Without it a batch that has no
            live step has loss 0.
        backend: ``None`` for the automatic choice, or a name of `fastmix.backends.NAMES`.

    Returns:
        A `TDLoss`: the loss, differentiable in ``qs`` and ``residual``, and without gradient ``mask * td`` and what
        ``favoured`` came to. Native sums are made in double precision, in an order that depends on the number of
        threads only, on CUDA on the shape only.

    Raises:
        ValueError, TypeError: an argument of wrong shape, dtype or device.

    Source: the loss of all PyMARL learners; weights as in Rashid et al. (2020) and POWQMIX, equation 11, residual as in
    ResQ, equation 8.
    """
    _check_tensors(qs, targets, mask, weights, residual)
    if _checks.autocast_enabled(qs):
        qs, targets = _checks.upcast(qs), _checks.upcast(targets)
        weights, residual = _checks.upcast(weights), _checks.upcast(residual)
    for name, tensor in (("targets", targets), ("weights", weights), ("residual", residual)):
        if tensor is not None and tensor.dtype is not qs.dtype:
            _checks.check_like(name, tensor, qs, "qs")
    if favoured is not None:
        favoured = _checked(favoured, qs)
    if mask.dtype is not qs.dtype:
        mask = mask.to(qs.dtype)
    if normaliser is not None:
        normaliser = _checks.scalar_like("normaliser", normaliser, qs, "qs")
    run = native.td_loss if backends.resolve("td_loss", qs, backend) == "native" else reference.td_loss
    return run(qs, targets, mask, weights, residual, favoured, scale, normaliser)


_READ_BY: Final = {
    "greedy": ("all_greedy",),
    "greedy_or_above": ("all_greedy", "values"),
    "recognised": ("values", "thresholds"),
}
"""Rule -> the fields of `Favoured` that it reads"""


def _checked(favoured: Favoured, qs: Tensor) -> Favoured:
    """``favoured`` with what its rule reads and nothing else, in the dtype that the loss is computed in."""
    _checks.check_choice("favoured.rule", favoured.rule, RULES)
    shapes = qs.shape, (*qs.shape[:2], 1)
    read: dict[str, Tensor | None] = dict.fromkeys(("all_greedy", "values", "thresholds"))
    for name in _READ_BY.get(favoured.rule, ()):
        tensor = getattr(favoured, name)
        _checks.check_tensor(f"favoured.{name}", tensor)
        if tensor.shape not in shapes or tensor.device != qs.device:
            raise ValueError(
                f"favoured.{name} must have shape [B, T, K] or [B, T, 1] with [B, T, K] = {tuple(qs.shape)} on"
                f" {qs.device}, got {tuple(tensor.shape)} on {tensor.device}"
            )
        if name == "all_greedy":
            if tensor.dtype is not torch.bool:
                raise TypeError(f"favoured.all_greedy must have dtype torch.bool, got {tensor.dtype}")
        else:
            tensor = _checks.upcast(tensor) if _checks.autocast_enabled(qs) else tensor
            _checks.check_like(f"favoured.{name}", tensor, qs, "qs")
        read[name] = tensor.detach() if tensor.requires_grad else tensor
    return Favoured(
        favoured.rule, read["all_greedy"], read["values"], read["thresholds"], favoured.tolerance, favoured.high,
        favoured.low,
    )  # fmt: skip


def _check_tensors(qs: Tensor, targets: Tensor, mask: Tensor, weights: Tensor | None, residual: Tensor | None) -> None:
    _checks.check_tensor("qs", qs)
    _checks.check_floating("qs", qs)
    shape, device = qs.shape, qs.device
    if len(shape) != 3:
        raise ValueError(f"qs must have shape [B, T, K], got {tuple(shape)}")
    column = (shape[0], shape[1], 1)
    for name, tensor in (("targets", targets), ("mask", mask), ("weights", weights), ("residual", residual)):
        if tensor is None and name in ("weights", "residual"):
            continue
        _checks.check_tensor(name, tensor)
        assert tensor is not None
        if tensor.device != device:
            raise ValueError(f"{name} must be on the device of qs ({device}), got {tensor.device}")
        if tensor.shape == shape or (tensor.shape == column and name != "residual"):
            continue
        if name == "weights" and _checks.broadcasts(tensor.shape, shape):
            continue
        wanted = {"weights": "a shape that broadcasts to [B, T, K]", "residual": "shape [B, T, K]"}
        meaning = wanted.get(name, "shape [B, T, K] or [B, T, 1]")
        raise ValueError(f"{name} must have {meaning} with [B, T, K] = {tuple(shape)}, got {tuple(tensor.shape)}")
