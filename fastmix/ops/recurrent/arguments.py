"""What the arguments of `recurrent` must be."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmix.ops import _checks
from fastmix.ops.recurrent.types import RecurrentParams


def check_arguments(
    obs: Tensor,
    networks: Sequence[RecurrentParams],
    hidden: Sequence[Tensor | None],
    last_actions: Tensor | None,
    agent_ids: bool,
) -> None:
    """Raise unless the arguments of `recurrent` fit together, dtypes and devices of networks and states apart."""
    _checks.check_tensor("obs", obs)
    _checks.check_floating("obs", obs)
    _checks.check_shape("obs", obs, (None, None, None, None), "[B, T, A, O]")
    if len(hidden) != len(networks):
        raise ValueError(
            f"hidden must hold one state (or None) for each of {len(networks)} networks, got {len(hidden)}"
        )
    episodes, _, n_agents, n_obs = obs.shape
    if last_actions is not None:
        _checks.check_tensor("last_actions", last_actions)
        _checks.check_shape("last_actions", last_actions, tuple(obs.shape[:3]), "[B, T, A]")
        if last_actions.dtype != torch.int64:
            raise TypeError(f"last_actions must be int64, got {last_actions.dtype}")
        if last_actions.device != obs.device:
            raise ValueError(f"last_actions must be on the device of obs ({obs.device}), got {last_actions.device}")
    for index, (network, state) in enumerate(zip(networks, hidden, strict=True)):
        check_network(f"networks[{index}]", network)
        width = action_width(f"networks[{index}]", network, n_obs, n_agents if agent_ids else 0)
        if (width > 0) != (last_actions is not None):
            raise ValueError(
                f"networks[{index}].fc1_weight must leave room for last_actions beside obs and agent ids exactly where"
                f" they are given, got {width} features left"
            )
        if state is not None:
            _checks.check_tensor(f"hidden[{index}]", state)
            wanted = (episodes, n_agents, network.fc1_weight.shape[0])
            _checks.check_shape(f"hidden[{index}]", state, wanted, "[B, A, D]")


def check_lengths(obs: Tensor, lengths: Tensor | None) -> None:
    """Raise unless ``lengths`` is None or one int64 for each episode, on the device of ``obs``."""
    if lengths is None:
        return
    _checks.check_tensor("lengths", lengths)
    if lengths.dtype is not torch.int64:
        raise TypeError(f"lengths must have dtype torch.int64, got {lengths.dtype}")
    _checks.check_shape("lengths", lengths, (obs.shape[0],), "[B]")
    if lengths.device != obs.device:
        raise ValueError(f"lengths must be on the device of obs ({obs.device}), got {lengths.device}")


def action_width(name: str, network: RecurrentParams, n_obs: int, n_ids: int) -> int:
    """What the input layer leaves for the one-hot of the last action: nothing, or as much as there are actions.

    A network may have several outputs an action (central utilities do), so the width has to divide its outputs.
    """
    inputs, outputs = network.fc1_weight.shape[1], network.fc2_weight.shape[0]
    width: int = inputs - n_obs - n_ids
    if width < 0 or (width > 0 and outputs % width != 0):
        raise ValueError(
            f"{name}.fc1_weight must take {n_obs} features of obs, {n_ids} agent ids, and none or one for each of the"
            f" actions behind its {outputs} outputs, got {inputs} input features"
        )
    return width


def check_network(name: str, network: RecurrentParams) -> None:
    """Raise unless the shapes of a network's parameters agree; ``name`` is what messages call it."""
    if isinstance(network, RecurrentParams) and _agrees(network):
        return
    if not isinstance(network, RecurrentParams):
        raise TypeError(f"{name} must be a RecurrentParams, got {type(network).__name__}")
    if (network.norm_weight is None) != (network.norm_bias is None):
        raise ValueError(f"{name} must have both of norm_weight and norm_bias, or neither")
    for field, value in zip(network._fields, network, strict=True):
        if value is not None or not field.startswith("norm"):
            _checks.check_tensor(f"{name}.{field}", value)
    _checks.check_shape(f"{name}.fc1_weight", network.fc1_weight, (None, None), "[D, I]")
    _checks.check_shape(f"{name}.fc2_weight", network.fc2_weight, (None, None), "[U, D]")
    width, outputs = network.fc1_weight.shape[0], network.fc2_weight.shape[0]
    if width < 1 or outputs < 1:
        raise ValueError(f"{name} must have at least one hidden feature and one output, got {width} and {outputs}")
    for field, shape, meaning in (
        ("fc1_bias", (width,), "[D]"),
        ("weight_ih", (3 * width, width), "[3 D, D]"),
        ("weight_hh", (3 * width, width), "[3 D, D]"),
        ("bias_ih", (3 * width,), "[3 D]"),
        ("bias_hh", (3 * width,), "[3 D]"),
        ("norm_weight", (width,), "[D]"),
        ("norm_bias", (width,), "[D]"),
        ("fc2_weight", (outputs, width), "[U, D]"),
        ("fc2_bias", (outputs,), "[U]"),
    ):
        value = getattr(network, field)
        if value is not None:
            _checks.check_shape(f"{name}.{field}", value, shape, meaning)


def check_dtypes(obs: Tensor, network: RecurrentParams, hidden: Tensor | None, name: str, hidden_name: str) -> None:
    """Raise unless a network and its state have dtype and device of ``obs``."""
    dtype, device = obs.dtype, obs.device
    tensors = [t for t in (*network, hidden) if t is not None]
    if all(t.dtype is dtype for t in tensors) and all(t.device == device for t in tensors):
        return
    for field, value in zip(network._fields, network, strict=True):
        if value is not None:
            _checks.check_like(f"{name}.{field}", value, obs, "obs")
    if hidden is not None:
        _checks.check_like(hidden_name, hidden, obs, "obs")


def _agrees(network: RecurrentParams) -> bool:
    """Whether all shapes are right: the quick look of every call, before the one that finds words for what is wrong."""
    if not all(isinstance(p, Tensor) for p in network if p is not None) or network.fc1_weight is None:
        return False
    width, outputs = network.fc1_weight.shape[0], network.fc2_bias.shape[0] if network.fc2_bias is not None else 0
    norm = None if network.norm_weight is None else (width,)
    gates = (3 * width,)
    square = (3 * width, width)
    wanted = [(width,), square, square, gates, gates, norm, norm, (outputs, width), (outputs,)]
    shapes = [None if p is None else p.shape for p in network[1:]]
    return width >= 1 and outputs >= 1 and network.fc1_weight.dim() == 2 and shapes == wanted
