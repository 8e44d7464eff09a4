"""A mixer's layers as arguments of ops: read at every call, never copied where one network is concerned."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from fastmix.ops._layers import Layers, Linear


def layers(network: nn.Module) -> Layers:
    """The linear layers of a network: an `nn.Linear`, or an `nn.Sequential` with ReLU between its layers."""
    return tuple(Linear(layer.weight, layer.bias) for layer in _linear(network))


def grouped(networks: Iterable[nn.Module]) -> Layers:
    """The layers of several networks of one form, stacked layer by layer."""
    return tuple(
        Linear(
            torch.stack([layer.weight for layer in same]),
            None if same[0].bias is None else torch.stack([layer.bias for layer in same]),
        )
        for same in zip(*map(_linear, networks), strict=True)
    )


def _linear(network: nn.Module) -> list[nn.Linear]:
    if isinstance(network, nn.Linear):
        return [network]
    return [layer for layer in network.children() if isinstance(layer, nn.Linear)]
