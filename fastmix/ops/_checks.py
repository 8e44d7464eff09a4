"""Checks of arguments that all ops share; every message names the argument, what it was and what it must be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

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


def check_agent_qs(agent_qs: Tensor) -> None:
    """Raise unless ``agent_qs`` is ``[..., A]`` with at least one agent."""
    if agent_qs.dim() < 1 or agent_qs.shape[-1] < 1:
        raise ValueError(f"agent_qs must have shape [..., A] with at least one agent, got {tuple(agent_qs.shape)}")


def check_states(states: Tensor, like: Tensor, like_name: str) -> None:
    """Raise unless ``states`` is ``[..., S]`` with leading dimensions, dtype and device of ``like``."""
    leading = like.shape[:-1]
    if states.dim() < 1 or states.shape[:-1] != leading or states.shape[-1] < 1:
        wanted = ", ".join(map(str, (*leading, "S")))
        raise ValueError(
            f"states must have shape [..., S] = ({wanted}), with the leading dimensions of {like_name},"
            f" got {tuple(states.shape)}"
        )
    check_like("states", states, like, like_name)


def check_actions(actions: Tensor, shape: Sequence[int | None], states: Tensor) -> None:
    """Raise unless ``actions`` is int64 of the shape ``[..., A]`` on the device of ``states``; not what it holds."""
    check_tensor("actions", actions)
    check_shape("actions", actions, shape, "[..., A]")
    if actions.shape[-1] < 1:
        raise ValueError(f"actions must have shape [..., A] with at least one agent, got {tuple(actions.shape)}")
    if actions.dtype is not torch.int64:
        raise TypeError(f"actions must have dtype torch.int64, got {actions.dtype}")
    if actions.device != states.device:
        raise ValueError(f"actions must be on the device of states ({states.device}), got {actions.device}")


def check_action_range(actions: Tensor, n_actions: int) -> None:
    """Raise unless actions lie in ``[-1, n_actions)``, -1 being none; only on the CPU, where looking costs no wait."""
    if torch.compiler.is_compiling() or actions.device.type != "cpu" or actions.numel() == 0:
        return
    low, high = (int(end) for end in torch.aminmax(actions))
    if low < -1 or high >= n_actions:
        raise ValueError(f"actions must lie in [-1, {n_actions}), got {low if low < -1 else high}")


def broadcasts(shape: Sequence[int], to: Sequence[int]) -> bool:
    """Whether a tensor of ``shape`` can be expanded to ``to``."""
    aligned = (1,) * (len(to) - len(shape)) + tuple(shape)
    return len(aligned) == len(to) and all(size in (1, whole) for size, whole in zip(aligned, to, strict=True))


def scalar_like(name: str, value: Tensor | float, like: Tensor, like_name: str) -> Tensor:
    """``value`` as a 0-dim constant in the dtype and on the device of ``like``; raise where a tensor is not that."""
    if not isinstance(value, Tensor):
        return torch.full((), float(value), dtype=like.dtype, device=like.device)  # filled there, not copied there
    if value.numel() != 1 or value.device != like.device:
        raise ValueError(
            f"{name} must be a number or a tensor of one number on the device of {like_name} ({like.device}),"
            f" got shape {tuple(value.shape)} on {value.device}"
        )
    return value.detach().reshape(()).to(like.dtype)


def autocast_enabled(tensor: Tensor) -> bool:
    """Whether autocast is on for the device of ``tensor``."""
    device = tensor.device.type
    return device != "meta" and torch.is_autocast_enabled(device)  # which raises for devices that know no autocast


@overload
def upcast(tensor: Tensor) -> Tensor: ...
@overload
def upcast(tensor: Tensor | None) -> Tensor | None: ...
def upcast(tensor: Tensor | None) -> Tensor | None:
    """float32 version of a half-precision tensor: what ops compute in under autocast."""
    if tensor is not None and tensor.dtype in (torch.float16, torch.bfloat16):
        return tensor.float()
    return tensor


def upcast_nested(value: Any) -> Any:
    """`upcast` of every tensor in nested tuples, which keep their types."""
    if isinstance(value, tuple):
        parts = [upcast_nested(part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return upcast(value)
