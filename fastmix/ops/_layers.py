"""Small multilayer perceptrons as arguments of ops: their type, the checks of their shapes, and their plain form."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastmix.ops import _checks


class Linear(NamedTuple):
    """One affine layer, or one of each of ``G`` networks that read the same input (a grouped layer)."""

    weight: Tensor
    """``[out, in]``; grouped: ``[G, out, in]``"""
    bias: Tensor | None
    """``[out]``; grouped: ``[G, out]``"""


Layers = tuple[Linear, ...]
"""A network: its layers in order, ReLU between them and none at the end."""


def mlp(x: Tensor, layers: Layers) -> Tensor:
    """``[N, in]`` to ``[N, out]``; grouped layers give ``[G, N, out]``."""
    for i, (weight, bias) in enumerate(layers):
        x = F.relu(x) if i > 0 else x
        if weight.dim() == 2:
            x = F.linear(x, weight, bias)
        elif i == 0:  # all networks read the same: one product
            x = F.linear(x, weight.flatten(0, 1), None if bias is None else bias.flatten())
            x = x.unflatten(-1, weight.shape[:2]).transpose(0, 1)
        elif bias is None:
            x = torch.bmm(x, weight.mT)
        else:
            x = torch.baddbmm(bias.unsqueeze(1), x, weight.mT)
    return x


def joint_one_hot(actions: Tensor, n_actions: int, dtype: torch.dtype) -> Tensor:
    """``[N, A]`` int64 to ``[N, A * U]``: the agents' one-hots side by side, zeros for -1."""
    one_hot = actions.unsqueeze(-1) == torch.arange(n_actions, device=actions.device)
    return one_hot.flatten(-2).to(dtype)


def action_width(name: str, layers: Layers, others: int, n_agents: int) -> int:
    """How many actions the first of ``layers`` leaves for each agent beside ``others`` features; raises for none."""
    _check_types(name, layers)
    inputs = layers[0].weight.shape[-1] if layers[0].weight.dim() > 0 else 0
    n_actions = (inputs - others) // n_agents
    if n_actions < 1 or n_actions * n_agents != inputs - others:
        raise ValueError(
            f"{name}[0].weight must take {others} features and as many one-hots of one width as there are agents"
            f" ({n_agents}), got {inputs} input features"
        )
    return n_actions


def check_layers(
    name: str,
    layers: Layers,
    states: Tensor,
    inputs: int,
    outputs: int | None,
    *,
    groups: int | None = None,
    bias_optional: bool = False,
) -> None:
    """Raise unless ``layers`` lead from ``inputs`` to ``outputs`` features (None: any).

    Dtype and device must be those of ``states``. ``groups`` is how many networks each layer is grouped of, None for
    plain layers.
    """
    _check_types(name, layers)
    group = () if groups is None else (groups,)
    for i, (weight, bias) in enumerate(layers):
        where = f"{name}[{i}]"
        if bias is not None or not bias_optional:
            _checks.check_tensor(f"{where}.bias", bias)
        rank = len(group) + 2
        width = weight.shape[-2] if weight.dim() == rank else None
        if i == len(layers) - 1 and outputs is not None:
            width = outputs
        wanted = (*group, width, inputs)
        if width is None or width < 1 or weight.shape != wanted:
            shape, meaning = tuple(weight.shape), "[out, in]" if groups is None else "[G, out, in]"
            sizes = ", ".join("any" if size is None else str(size) for size in wanted)
            raise ValueError(f"{where}.weight must have shape {meaning} = ({sizes}), out at least 1, got {shape}")
        _checks.check_like(f"{where}.weight", weight, states, "states")
        if bias is not None:
            if bias.shape != wanted[:-1]:
                meaning = "[out]" if groups is None else "[G, out]"
                _checks.check_shape(f"{where}.bias", bias, wanted[:-1], meaning)
            _checks.check_like(f"{where}.bias", bias, states, "states")
        inputs = width


def _check_types(name: str, layers: Layers) -> None:
    if not isinstance(layers, tuple) or isinstance(layers, Linear) or not layers:
        raise TypeError(
            f"{name} must be a tuple of one or more Linear, got {layers if layers == () else type(layers).__name__}"
        )
    for i, layer in enumerate(layers):
        if not isinstance(layer, Linear):
            raise TypeError(f"{name}[{i}] must be a Linear, got {type(layer).__name__}")
        _checks.check_tensor(f"{name}[{i}].weight", layer.weight)
