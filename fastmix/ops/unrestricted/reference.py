"""`unrestricted` in plain PyTorch: one network over everything side by side, and V(s)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmix.ops._layers import joint_one_hot, mlp
from fastmix.ops.unrestricted.types import UnrestrictedParams


def unrestricted(
    features: Tensor | None, states: Tensor, actions: Tensor | None, params: UnrestrictedParams, n_actions: int
) -> Tensor:
    """See `fastmix.ops.unrestricted`; arguments are already checked: ``[N, F]``, ``[N, S]`` and ``[N, A]``."""
    inputs = [states]
    if actions is not None:
        inputs.append(joint_one_hot(actions, n_actions, states.dtype))
    if features is not None:
        inputs.append(features)
    joint = mlp(torch.cat(inputs, -1) if len(inputs) > 1 else states, params.net)
    return joint + mlp(states, params.v) if params.v else joint
