"""Parameters and results of duplex dueling."""

from __future__ import annotations

from typing import Final, NamedTuple

from torch import Tensor

from fastmix.ops._layers import Layers

PARTS: Final = ("both", "v", "adv")

POSITIVE: Final = 1e-10
"""Added to absolute values in the transform and in the importance weights, which keeps them above 0."""


class ImportanceParams(NamedTuple):
    """Weights of the importance network: ``K`` kernels of three small networks, grouped by kernel; see
    `fastmix.ops._layers` for the layers' types.

    ``A`` agents, ``U`` actions, ``S`` state features. The three have the same number of layers in the public code, here
    any.
    """

    key: Layers
    """``S`` to 1 feature"""
    agents: Layers
    """``S`` to ``A`` features"""
    action: Layers
    """``S + A * U`` to ``A`` features: the state, then the one-hots of the joint action, agent after agent"""


class DuplexParams(NamedTuple):
    """Weights of the whole duplex dueling network; see `fastmix.ops._layers` for the layers' types."""

    scale: Layers
    """``S`` to ``A`` features: scale of the utilities before its absolute value; ``()``, with ``shift``, for none."""
    shift: Layers
    """``S`` to ``A`` features"""
    importance: ImportanceParams


class RecogniserParams(NamedTuple):
    """Weights of POWQMIX's recogniser, with ``E`` features inside; see `fastmix.ops._layers` for the layers' types."""

    w1: Layers
    """``S + A * U`` to ``A * E`` features, row ``a * E + e``"""
    w2: Layers
    """``S + A * U`` to ``E`` features"""
    v: Layers
    """``S`` to 1 feature"""


class DuplexOutput(NamedTuple):
    """The joint value and its parts; ``...`` are the leading dimensions of ``agent_qs``."""

    q_tot: Tensor
    """``[..., 1]``: the sum of the parts asked for"""
    v_tot: Tensor | None
    """``[..., 1]``: sum of the transformed utilities"""
    adv_tot: Tensor | None
    """``[..., 1]``: sum of the weighted advantages"""


class Recognition(NamedTuple):
    """What the recogniser gives; ``...`` are the leading dimensions of ``agent_qs``."""

    q_r: Tensor
    """``[..., 1]``: estimate of the joint value"""
    v: Tensor
    """``[..., 1]``: its state's part, which is exactly ``q_r`` where every agent's utility is its largest"""
