"""`returns` through the compiled core: one reverse scan, and its transpose for the gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastmix.ops import _library

_KINDS = {"td_lambda": 0, "q_lambda": 1, "one_step": 2, "n_step": 3}
_run_forward, _run_backward = _library.CoreFunction("returns_forward"), _library.CoreFunction("returns_backward")


def returns(
    rewards: Tensor,
    terminated: Tensor,
    mask: Tensor,
    target_qs: Tensor,
    behaviour_qs: Tensor | None,
    gamma: float,
    kind: str,
    td_lambda: float,
    n_step: int,
) -> Tensor:
    """See `fastmix.ops.returns`; arguments are already checked, ``[B, T, K]`` (or ``[B, T, 1]``), ``[B, T+1, K]``."""
    targets: Tensor = _returns(
        rewards, terminated, mask, target_qs, behaviour_qs, gamma, _KINDS[kind], td_lambda, n_step
    )
    return targets


def _forward(
    rewards: Tensor,
    terminated: Tensor,
    mask: Tensor,
    target_qs: Tensor,
    behaviour_qs: Tensor | None,
    gamma: float,
    kind: int,
    td_lambda: float,
    n_step: int,
) -> Tensor:
    rewards, terminated, mask, target_qs = (
        rewards.contiguous(),
        terminated.contiguous(),
        mask.contiguous(),
        target_qs.contiguous(),
    )
    behaviour_qs = None if behaviour_qs is None else behaviour_qs.contiguous()
    episodes, steps, reward_columns = rewards.shape
    columns = target_qs.shape[2]
    targets = torch.empty((episodes, steps, columns), dtype=target_qs.dtype, device=target_qs.device)
    _run_forward(
        targets,
        rewards.data_ptr(), terminated.data_ptr(), mask.data_ptr(), target_qs.data_ptr(),
        0 if behaviour_qs is None else behaviour_qs.data_ptr(), targets.data_ptr(),
        episodes, steps, columns, reward_columns, gamma, kind, td_lambda, n_step,
    )  # fmt: skip
    return targets


def _backward_forward(
    grad_targets: Tensor,
    terminated: Tensor,
    mask: Tensor,
    reward_columns: int,
    gamma: float,
    kind: int,
    td_lambda: float,
    n_step: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of rewards, target_qs and behaviour_qs (empty where the kind has none)."""
    grad_targets, terminated, mask = grad_targets.contiguous(), terminated.contiguous(), mask.contiguous()
    episodes, steps, columns = grad_targets.shape
    dtype, device = grad_targets.dtype, grad_targets.device
    grad_rewards = torch.empty((episodes, steps, reward_columns), dtype=dtype, device=device)
    grad_qs = torch.empty((episodes, steps + 1, columns), dtype=dtype, device=device)
    behaviour_steps = steps + 1 if kind == _KINDS["q_lambda"] else 0
    grad_behaviour = torch.empty((episodes, behaviour_steps, columns), dtype=dtype, device=device)
    _run_backward(
        grad_qs,
        grad_targets.data_ptr(), terminated.data_ptr(), mask.data_ptr(),
        grad_rewards.data_ptr(), grad_qs.data_ptr(), grad_behaviour.data_ptr(),
        episodes, steps, columns, reward_columns, gamma, kind, td_lambda, n_step,
    )  # fmt: skip
    return grad_rewards, grad_qs, grad_behaviour


def _backward_fake(
    grad_targets: Tensor, terminated: Tensor, mask: Tensor, reward_columns: int, gamma: float, kind: int, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    episodes, steps, columns = grad_targets.shape
    behaviour_steps = steps + 1 if kind == _KINDS["q_lambda"] else 0
    return (
        grad_targets.new_empty(episodes, steps, reward_columns),
        grad_targets.new_empty(episodes, steps + 1, columns),
        grad_targets.new_empty(episodes, behaviour_steps, columns),
    )


def _fake(rewards: Tensor, terminated: Tensor, mask: Tensor, target_qs: Tensor, *_: Any) -> Tensor:
    return target_qs.new_empty(rewards.shape[0], rewards.shape[1], target_qs.shape[2])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rewards, terminated, mask, _, behaviour_qs, *ctx.settings = inputs
    ctx.reward_columns, ctx.has_behaviour = rewards.shape[2], behaviour_qs is not None
    ctx.save_for_backward(terminated, mask)


def _backward(ctx: Any, grad_targets: Tensor) -> tuple[Tensor | None, ...]:
    terminated, mask = ctx.saved_tensors
    grad_rewards, grad_qs, grad_behaviour = _returns_backward(
        grad_targets, terminated, mask, ctx.reward_columns, *ctx.settings
    )
    return (grad_rewards, None, None, grad_qs, grad_behaviour if ctx.has_behaviour else None, None, None, None, None)


_returns_backward = _library.define(
    "returns_backward",
    "(Tensor grad_targets, Tensor terminated, Tensor mask, int reward_columns, float gamma, int kind, float td_lambda,"
    " int n_step) -> (Tensor, Tensor, Tensor)",
    _backward_forward,
    _backward_fake,
    devices=("CPU", "CUDA"),
)
_returns = _library.define(
    "returns",
    "(Tensor rewards, Tensor terminated, Tensor mask, Tensor target_qs, Tensor? behaviour_qs, float gamma, int kind,"
    " float td_lambda, int n_step) -> Tensor",
    _forward,
    _fake,
    setup_context=_setup_context,
    backward=_backward,
    devices=("CPU", "CUDA"),
)
