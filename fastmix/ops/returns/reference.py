"""`returns` in plain PyTorch: the recursions of the spec, one Python step per time step."""

from __future__ import annotations

import torch
from torch import Tensor


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
    """See `fastmix.ops.returns`; arguments are checked, ``[B, T, K]`` (or ``[B, T, 1]``) and ``[B, T + 1, K]``."""
    if target_qs.shape[1] == 1:
        return target_qs[:, :0]
    if kind == "one_step":
        return rewards + gamma * _times(1 - terminated, target_qs[:, 1:])
    if kind == "n_step":
        return _n_step(rewards, terminated, mask, target_qs, gamma, n_step)
    if kind == "q_lambda":
        assert behaviour_qs is not None
        rewards = rewards + target_qs[:, :-1] - behaviour_qs[:, :-1]
    return _lambda(rewards, terminated, mask, target_qs, gamma, td_lambda)


def _lambda(rewards: Tensor, terminated: Tensor, mask: Tensor, qs: Tensor, gamma: float, td_lambda: float) -> Tensor:
    bootstraps = _times(1 - terminated, qs[:, 1:])
    one_step = rewards + (1 - td_lambda) * gamma * bootstraps
    # The trace stops with its episode, terminated or not, and with the data: there the next state counts in full.
    goes_on = torch.cat(
        [(mask[:, 1:] != 0) & (terminated[:, :-1] == 0), torch.zeros_like(mask[:, :1], dtype=torch.bool)], 1
    )
    value = torch.zeros_like(qs[:, 0])
    reversed_targets = []
    for t in reversed(range(rewards.shape[1])):
        rest = td_lambda * gamma * torch.where(goes_on[:, t], value, bootstraps[:, t])
        value = torch.where(mask[:, t] != 0, mask[:, t] * one_step[:, t] + rest, torch.zeros_like(value))
        reversed_targets.append(value)
    return torch.stack(reversed_targets[::-1], 1)


def _n_step(rewards: Tensor, terminated: Tensor, mask: Tensor, qs: Tensor, gamma: float, n_step: int) -> Tensor:
    steps = rewards.shape[1]
    targets = []
    for t in range(steps):
        # A window ends after n steps or with the episode; on padded steps, which every loss masks, it is one step long.
        window = mask[:, t:].sum(1).clamp(1, n_step)
        total = torch.zeros_like(qs[:, 0])
        for j in range(min(n_step, steps - t)):
            bootstrap = _times(1 - terminated[:, t + j], qs[:, t + j + 1])
            total = total + gamma**j * _times(mask[:, t + j], rewards[:, t + j].expand_as(total))
            total = total + gamma ** (j + 1) * _times((window == j + 1).to(qs.dtype), bootstrap)
        targets.append(total)
    return torch.stack(targets, 1)


def _times(factor: Tensor, value: Tensor) -> Tensor:
    """``factor * value`` where 0 wins over NaN and inf: padded steps may hold anything."""
    return torch.where(factor != 0, factor * value, torch.zeros_like(value))
