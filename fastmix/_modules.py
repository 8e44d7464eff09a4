"""What mixers and agents share as torch modules: reading a PyMARL namespace and the fine-tuned initialisation."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, SupportsIndex

from torch import nn

_REQUIRED: Any = object()


def read_arg(args: Any, name: str, default: Any = _REQUIRED) -> Any:
    """Field `name` of a PyMARL namespace (`argparse.Namespace`, `SimpleNamespace`, sacred's config object ...).

    Raises `ValueError` naming the field when it is absent and has no default.
    """
    value = getattr(args, name, default)
    if value is _REQUIRED:
        raise ValueError(f"args has no field {name!r}, which this module needs")
    return value


def flat_size(shape: int | Sequence[int]) -> int:
    """Size of a PyMARL shape field, which is an int or a tuple (`state_shape`, `input_shape`)."""
    if isinstance(shape, Sequence):
        return math.prod(operator.index(size) for size in shape)
    return operator.index(shape)


def orthogonal_init_(module: nn.Module, gain: float = 1.0) -> None:
    """Orthogonal weights and zero biases in every linear layer under `module` (pymarl2's `use_orthogonal`)."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.orthogonal_(layer.weight, gain=gain)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def mlp(*sizes: int, last_bias: bool = True) -> nn.Sequential:
    """Linear layers of `sizes`, input first, with ReLU between them: keys `0`, `2`, `4` and so on."""
    layers: list[nn.Module] = []
    for i, (inputs, outputs) in enumerate(pairwise(sizes)):
        last = i == len(sizes) - 2
        layers += [nn.Linear(inputs, outputs, bias=last_bias or not last), *([] if last else [nn.ReLU()])]
    return nn.Sequential(*layers)


def check_positive(**sizes: int) -> None:
    """Raise `ValueError` for the first keyword whose value is not a positive integer (NumPy's are fine)."""
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, SupportsIndex) or operator.index(value) < 1:
            raise ValueError(f"{name} must be a positive int, got {value!r}")
