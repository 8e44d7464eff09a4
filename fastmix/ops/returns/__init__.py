"""`returns`: TD(lambda), Q(lambda), one-step and n-step targets as one scan over time."""

from __future__ import annotations

import math
from typing import Final

from torch import Tensor

from fastmix import backends
from fastmix.ops import _checks
from fastmix.ops.returns import native, reference

KINDS: Final = ("td_lambda", "q_lambda", "one_step", "n_step")


def returns(
    rewards: Tensor,
    terminated: Tensor,
    mask: Tensor,
    target_qs: Tensor,
    *,
    gamma: float,
    kind: str = "td_lambda",
    td_lambda: float = 0.0,
    n_step: int = 1,
    behaviour_qs: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Learning targets of whole episodes.

    With ``Q`` the bootstrap values, ``d`` the terminal flags and ``m`` the mask of live transitions:

    * ``"one_step"``: ``y_t = r_t + gamma (1 - d_t) Q_{t+1}``
    * ``"td_lambda"``: ``y_t = lambda gamma z_{t+1} + m_t (r_t + (1 - lambda) gamma (1 - d_t) Q_{t+1})``, where
      ``z_{t+1}`` is ``y_{t+1}``, or ``(1 - d_t) Q_{t+1}`` where the episode ends; with greedy bootstraps this is Peng's
      Q(lambda). An episode ends at a terminal, at its last live step and at the last step of the batch. The public
      trainers know the first and the last of these only, and let an episode that was truncated earlier bootstrap from
      its padding.
    * ``"q_lambda"``: the same with ``r_t + Q_t - Qb_t`` in place of ``r_t`` (pymarl2's form, not the published
    corrected return).
    * ``"n_step"``: ``n`` discounted live rewards and the bootstrap at the end of the window, or of the episode.

    Padded steps may hold anything, NaN and inf included: no live target and no gradient of one depends on them. Targets
    of padded steps are 0 in the lambda forms and of no meaning in the others.

    Args:
        rewards: ``[B, T, 1]`` or ``[B, T, *E]``.
        terminated: ``[B, T, 1]``, 1 where the episode truly ended (at most once an episode); any dtype.
        mask: ``[B, T, 1]``, 1 on live transitions; any dtype.
        target_qs: ``[B, T + 1, *E]``; ``E`` is 1, the agents, or (1, quantiles): each entry is its own return.
        gamma: discount, in [0, 1].
        kind: one of `KINDS`.
        td_lambda: trace decay of the two lambda forms, in [0, 1].
        n_step: window of ``"n_step"``, at least 1.
        behaviour_qs: ``[B, T + 1, *E]``, value of the taken actions, for ``"q_lambda"`` only.
        backend: ``None`` for the automatic choice, or a name of `fastmix.backends.NAMES`.

    Returns:
        ``[B, T, *E]``, differentiable in ``rewards``, ``target_qs`` and ``behaviour_qs``.

    Raises:
        ValueError, TypeError: an argument of wrong shape, dtype, device or range.

    Source: Sutton and Barto (2018), section 12; Peng and Williams (1996); POWQMIX, table 2; ResQ, appendix A.2.
    """
    _checks.check_choice("kind", kind, KINDS)
    _checks.check_range("gamma", gamma, 0.0, 1.0)
    _checks.check_range("td_lambda", td_lambda, 0.0, 1.0)
    if n_step < 1:
        raise ValueError(f"n_step must be at least 1, got {n_step}")
    if (behaviour_qs is None) == (kind == "q_lambda"):
        raise ValueError(f"behaviour_qs belongs to kind 'q_lambda' and to no other, got kind {kind!r}")
    _check_tensors(rewards, terminated, mask, target_qs, behaviour_qs)
    if _checks.autocast_enabled(target_qs):
        rewards, target_qs = _checks.upcast(rewards), _checks.upcast(target_qs)
        behaviour_qs = _checks.upcast(behaviour_qs)
    _checks.check_like("rewards", rewards, target_qs, "target_qs")
    if behaviour_qs is not None:
        _checks.check_like("behaviour_qs", behaviour_qs, target_qs, "target_qs")

    shape = target_qs.shape
    episodes, steps = rewards.shape[:2]
    if len(shape) > 3:
        target_qs = target_qs.reshape(episodes, steps + 1, math.prod(shape[2:]))
        behaviour_qs = None if behaviour_qs is None else behaviour_qs.reshape(target_qs.shape)
        rewards = rewards.reshape(episodes, steps, math.prod(rewards.shape[2:]))
    terminated, mask = terminated.to(target_qs.dtype), mask.to(target_qs.dtype)
    run = native.returns if backends.resolve("returns", target_qs, backend) == "native" else reference.returns
    targets = run(rewards, terminated, mask, target_qs, behaviour_qs, gamma, kind, td_lambda, n_step)
    return targets.reshape(episodes, steps, *shape[2:]) if len(shape) > 3 else targets


def _check_tensors(
    rewards: Tensor, terminated: Tensor, mask: Tensor, target_qs: Tensor, behaviour_qs: Tensor | None
) -> None:
    for name, tensor in (("rewards", rewards), ("terminated", terminated), ("mask", mask), ("target_qs", target_qs)):
        _checks.check_tensor(name, tensor)
    _checks.check_floating("target_qs", target_qs)
    if target_qs.dim() < 3 or target_qs.shape[1] < 1:
        raise ValueError(
            f"target_qs must have shape [B, T + 1, ...] with at least 3 dimensions, got {tuple(target_qs.shape)}"
        )
    episodes, steps = target_qs.shape[0], target_qs.shape[1] - 1
    trailing = tuple(target_qs.shape[2:])
    if tuple(rewards.shape) not in ((episodes, steps, 1), (episodes, steps, *trailing)):
        wanted = f"[B, T, 1] = {(episodes, steps, 1)} or [B, T, ...] = {(episodes, steps, *trailing)}"
        raise ValueError(f"rewards must have shape {wanted}, got {tuple(rewards.shape)}")
    _checks.check_floating("rewards", rewards)
    for name, flag in (("terminated", terminated), ("mask", mask)):
        _checks.check_shape(name, flag, (episodes, steps, 1), "[B, T, 1]")
        if flag.device != target_qs.device:
            raise ValueError(f"{name} must be on the device of target_qs ({target_qs.device}), got {flag.device}")
    if behaviour_qs is not None:
        _checks.check_tensor("behaviour_qs", behaviour_qs)
        _checks.check_shape("behaviour_qs", behaviour_qs, tuple(target_qs.shape), "of target_qs")
