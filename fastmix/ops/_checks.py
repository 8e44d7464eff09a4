"""Checks of arguments that all ops share; every message names the argument, what it was and what it must be."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def check_shape(name: str, tensor: Tensor, expected: Sequence[int | None], meaning: str) -> None:
    """Raise unless ``tensor`` has the shape ``expected`` (None matches any size); ``meaning`` is the shape in words."""
    shape = tuple(tensor.shape)
    if len(shape) != len(expected) or any(e is not None and s != e for s, e in zip(shape, expected, strict=True)):
        wanted = ", ".join("any" if e is None else str(e) for e in expected)
        raise ValueError(f"{name} must have shape {meaning} = ({wanted}), got {shape}")


def check_floating(name: str, tensor: Tensor) -> None:
    """Raise unless ``tensor`` holds floating-point numbers."""
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {tensor.dtype}")


def check_like(name: str, tensor: Tensor, like: Tensor, like_name: str) -> None:
    """Raise unless ``tensor`` has the device and dtype of ``like``."""
    if tensor.device != like.device:
        raise ValueError(f"{name} must be on the device of {like_name} ({like.device}), got {tensor.device}")
    if tensor.dtype != like.dtype:
        raise TypeError(f"{name} must have the dtype of {like_name} ({like.dtype}), got {tensor.dtype}")


def check_tensor(name: str, value: object) -> None:
    """Raise unless ``value`` is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """Raise unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Raise unless ``low <= value <= high``."""
    if not low <= value <= high:
        raise ValueError(f"{name} must lie in [{low}, {high}], got {value!r}")


def autocast_enabled(tensor: Tensor) -> bool:
    """Whether autocast is on for the device of ``tensor``."""
    device = tensor.device.type
    return device != "meta" and torch.is_autocast_enabled(device)  # which raises for devices that know no autocast


def upcast(tensor: Tensor | None) -> Tensor | None:
    """float32 version of a half-precision tensor: what ops compute in under autocast."""
    if tensor is not None and tensor.dtype in (torch.float16, torch.bfloat16):
        return tensor.float()
    return tensor
