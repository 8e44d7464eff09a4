"""`unrestricted` on NVIDIA GPUs: library products, and where it reads actions a first layer through Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmix.ops._joint_triton import joint_mlp
from fastmix.ops._layers import mlp
from fastmix.ops.unrestricted.types import UnrestrictedParams


def unrestricted(
    features: Tensor | None, states: Tensor, actions: Tensor | None, params: UnrestrictedParams, n_actions: int
) -> Tensor:
    """See `fastmix.ops.unrestricted`; arguments are already checked: ``[N, F]``, ``[N, S]`` and ``[N, A]``."""
    if actions is not None:
        joint = joint_mlp(states, actions, features, params.net, n_actions)
    else:
        joint = mlp(states if features is None else torch.cat([states, features], -1), params.net)
    return joint + mlp(states, params.v) if params.v else joint
