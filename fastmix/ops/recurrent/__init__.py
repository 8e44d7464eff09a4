"""`recurrent`: input layer, GRU over the whole sequence, output layer, for several networks over one input."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmix import backends
from fastmix.ops import _checks
from fastmix.ops.recurrent import native, reference
from fastmix.ops.recurrent.types import RecurrentOutput, RecurrentParams

__all__ = ["RecurrentOutput", "RecurrentParams", "recurrent"]


def recurrent(
    obs: Tensor,
    networks: Sequence[RecurrentParams],
    hidden: Sequence[Tensor | None] | None = None,
    *,
    last_actions: Tensor | None = None,
    agent_ids: bool = False,
    return_hidden_states: bool = False,
    backend: str | None = None,
) -> list[RecurrentOutput]:
    r"""Unroll recurrent utility networks over whole sequences.

    With ``s_t = [obs_t | one-hot last action | one-hot agent id]`` (the last two as asked for), per episode and agent:

    * ``x_t = relu(W1 s_t + b1)``
    * ``r_t = sigmoid(W_ir x_t + b_ir + W_hr h_{t-1} + b_hr)``, ``z_t`` alike
    * ``n_t = tanh(W_in x_t + b_in + r_t * (W_hn h_{t-1} + b_hn))``
    * ``h_t = (1 - z_t) * n_t + z_t * h_{t-1}``
    * ``q_t = W2 h_t + b2``, or of ``LayerNorm(h_t)`` (eps 1e-5) where the network has one; ``h_t`` itself is carried on.

    Args:
        obs: ``[B, T, A, O]``, strides of any kind; a copy is made only where the last axis is not contiguous.
        networks: one or more networks over the same input; hidden and output sizes may differ.
        hidden: for each network its state before the first step, ``[B, A, D]``, or None for zeros.
        last_actions: ``[B, T, A]`` int64, the action before each step; -1 gives a one-hot of zeros. The width of the
            one-hot is what ``W1`` leaves beside observation and agent id.
        agent_ids: whether the input ends with the one-hot of the agent, ``A`` wide.
        return_hidden_states: also return the state after every step.
        backend: ``None`` for the automatic choice, or a name of `fastmix.backends.NAMES`.

    Returns:
        A `RecurrentOutput` for each network, differentiable in every parameter, ``hidden`` and ``obs``. Where nothing
        of a network wants a gradient, nothing is kept for one.

    Raises:
        ValueError, TypeError: an argument of wrong shape, dtype, device or range.

    Source: Rashid et al. (2018), section 6.2 (the network); Cho et al. (2014) (the GRU, in PyTorch's form).
    """
    start = [None] * len(networks) if hidden is None else list(hidden)
    _check(obs, networks, start, last_actions, agent_ids)
    if _checks.autocast_enabled(obs):
        with torch.autocast(obs.device.type, enabled=False):
            obs = _checks.upcast(obs)
            networks = [RecurrentParams(*map(_checks.upcast, network)) for network in networks]
            start = [_checks.upcast(state) for state in start]
            return _dispatch(obs, networks, start, last_actions, agent_ids, return_hidden_states, backend)
    return _dispatch(obs, networks, start, last_actions, agent_ids, return_hidden_states, backend)


def _dispatch(
    obs: Tensor,
    networks: Sequence[RecurrentParams],
    hidden: Sequence[Tensor | None],
    last_actions: Tensor | None,
    agent_ids: bool,
    return_hidden_states: bool,
    backend: str | None,
) -> list[RecurrentOutput]:
    for index, (network, state) in enumerate(zip(networks, hidden, strict=True)):
        _check_dtypes(obs, network, state, f"networks[{index}]", f"hidden[{index}]")
    run = native.recurrent if backends.resolve("recurrent", obs, backend) == "native" else reference.recurrent
    return [
        run(obs, network, state, last_actions, agent_ids, return_hidden_states)
        for network, state in zip(networks, hidden, strict=True)
    ]


def _check(
    obs: Tensor,
    networks: Sequence[RecurrentParams],
    hidden: Sequence[Tensor | None],
    last_actions: Tensor | None,
    agent_ids: bool,
) -> None:
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
        _check_network(f"networks[{index}]", network)
        inputs, given = network.fc1_weight.shape[1], n_obs + (n_agents if agent_ids else 0)
        if last_actions is None and inputs != given:
            parts = f"{n_obs} of obs" + (f" and {n_agents} agent ids" if agent_ids else "")
            raise ValueError(f"networks[{index}].fc1_weight must take {given} features ({parts}), got {inputs}")
        if last_actions is not None and inputs <= given:
            raise ValueError(
                f"networks[{index}].fc1_weight must take more than {given} features, to leave some for last_actions, got {inputs}"
            )
        if state is not None:
            _checks.check_tensor(f"hidden[{index}]", state)
            wanted = (episodes, n_agents, network.fc1_weight.shape[0])
            _checks.check_shape(f"hidden[{index}]", state, wanted, "[B, A, D]")


def _check_network(name: str, network: RecurrentParams) -> None:
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


def _check_dtypes(obs: Tensor, network: RecurrentParams, hidden: Tensor | None, name: str, hidden_name: str) -> None:
    for field, value in zip(network._fields, network, strict=True):
        if value is not None:
            _checks.check_like(f"{name}.{field}", value, obs, "obs")
    if hidden is not None:
        _checks.check_like(hidden_name, hidden, obs, "obs")
