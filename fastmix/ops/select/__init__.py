"""`select`: availability mask, argmax and everything gathered with it."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmix import backends
from fastmix.ops import _checks
from fastmix.ops.select import native, reference
from fastmix.ops.select.types import UNAVAILABLE, Selection

__all__ = ["UNAVAILABLE", "Selection", "select"]


def select(
    agent_qs: Tensor,
    avail_actions: Tensor | None,
    *,
    actions: Tensor | None = None,
    target_qs: Tensor | None = None,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> Selection:
    """Greedy actions of every agent, and values gathered with them.

    The greedy action is the available one of highest value; the lowest index wins ties and, as in `torch.argmax`, NaN
    counts as the highest value. Values of actions that are not available may be anything, NaN and inf included.

    Args:
        agent_qs: ``[..., A, U]``, utilities of ``A`` agents and ``U`` actions; ``...`` are any leading dimensions.
        avail_actions: ``[..., A, U]``, nonzero where an action is available, any dtype; None when all always are.
        actions: ``[..., A]`` int64, the actions taken. Availability is not asked of them.
        target_qs: ``[..., A, U]``, utilities of the target network, to be read at the greedy actions.
        mask: ``[...]``, nonzero on live rows, any dtype: a live row in which an agent has no available action raises.
            On CUDA the check waits for the device; under ``torch.compile`` it is made by the native backend only.
            Without it nothing waits, and CUDA graphs can hold the call.
        backend: ``None`` for the automatic choice, or a name of `fastmix.backends.NAMES`.

    Returns:
        A `Selection`. Where an agent has no available action (padded steps) its action is 0, its values are
        `UNAVAILABLE` and they have no gradient. Gradients go to ``agent_qs``, from ``greedy_qs`` to the greedy entry
        and from ``chosen_qs`` to the entry of ``actions``.

    Raises:
        ValueError, TypeError: an argument of wrong shape, dtype or device; an action outside [0, U); a live row (named)
            in which an agent has no available action. On CUDA, where nothing waits, an action outside [0, U) is an
            assertion of the device instead, as in `torch.gather`; nothing outside ``agent_qs`` is read.

    Source: double Q-learning over decentralised agents, Rashid et al. (2018), section 4; constants as in PyMARL.
    """
    _check_tensors(agent_qs, avail_actions, actions, target_qs, mask)
    if _checks.autocast_enabled(agent_qs):
        agent_qs, target_qs = _checks.upcast(agent_qs), _checks.upcast(target_qs)
    if target_qs is not None:
        _checks.check_like("target_qs", target_qs, agent_qs, "agent_qs")
    live = None if mask is None or avail_actions is None else mask if mask.dtype is torch.bool else mask != 0
    if backends.resolve("select", agent_qs, backend) == "native":
        return native.select(agent_qs, avail_actions, actions, target_qs, live)
    _check_values(agent_qs, avail_actions, actions, live)
    return reference.select(agent_qs, avail_actions, actions, target_qs)


def _check_tensors(
    agent_qs: Tensor,
    avail_actions: Tensor | None,
    actions: Tensor | None,
    target_qs: Tensor | None,
    mask: Tensor | None,
) -> None:
    _checks.check_tensor("agent_qs", agent_qs)
    _checks.check_floating("agent_qs", agent_qs)
    shape = agent_qs.shape
    if len(shape) < 2 or shape[-1] < 1:
        raise ValueError(f"agent_qs must have shape [..., A, U] with at least one action, got {tuple(shape)}")
    for name, tensor, expected, meaning in (
        ("avail_actions", avail_actions, shape, "[..., A, U]"),
        ("target_qs", target_qs, shape, "[..., A, U]"),
        ("actions", actions, shape[:-1], "[..., A]"),
        ("mask", mask, shape[:-2], "[...]"),
    ):
        if tensor is None:
            continue
        _checks.check_tensor(name, tensor)
        if tensor.shape != expected:
            _checks.check_shape(name, tensor, tuple(expected), meaning)
        if tensor.device != agent_qs.device:
            raise ValueError(f"{name} must be on the device of agent_qs ({agent_qs.device}), got {tensor.device}")
    if actions is not None and actions.dtype is not torch.int64:
        raise TypeError(f"actions must have dtype torch.int64, got {actions.dtype}")


def _check_values(agent_qs: Tensor, avail_actions: Tensor | None, actions: Tensor | None, live: Tensor | None) -> None:
    """What the native pass checks on its way; on CUDA `torch.gather` itself asserts that actions exist."""
    if torch.compiler.is_compiling():
        return
    rows, n_actions = agent_qs.shape[:-2], agent_qs.shape[-1]
    if actions is not None and actions.device.type == "cpu":
        wrong = ((actions < 0) | (actions >= n_actions)).any(-1).flatten().nonzero()
        if len(wrong) > 0:
            native.raise_out_of_range(int(wrong[0]), rows, n_actions)
    if live is not None and avail_actions is not None:
        empty = (live & ~(avail_actions != 0).any(-1).all(-1)).flatten().nonzero()
        if len(empty) > 0:
            native.raise_nothing_available(int(empty[0]), rows)
