"""Parameters of the monotonic mixing network."""

from __future__ import annotations

from typing import Final, NamedTuple

from torch import Tensor

POSITIVITIES: Final = ("abs", "softplus", "quadratic", "none")


class MonotonicParams(NamedTuple):
    """Weights of the four hypernetworks; the hidden layers of ``w1`` and ``w2`` are None for one-layer hypernets.

    ``A`` agents, ``E`` mixing embed, ``H`` hypernet embed, ``S`` state features; ``w1`` has row ``a * E + e``.
    """

    w1_hidden_weight: Tensor | None
    """``[H, S]``"""
    w1_hidden_bias: Tensor | None
    """``[H]``"""
    w1_weight: Tensor
    """``[A * E, H]``, or ``[A * E, S]`` without a hidden layer"""
    w1_bias: Tensor
    """``[A * E]``"""
    w2_hidden_weight: Tensor | None
    """``[H, S]``"""
    w2_hidden_bias: Tensor | None
    """``[H]``"""
    w2_weight: Tensor
    """``[E, H]``, or ``[E, S]`` without a hidden layer"""
    w2_bias: Tensor
    """``[E]``"""
    b1_weight: Tensor
    """``[E, S]``"""
    b1_bias: Tensor
    """``[E]``"""
    v_hidden_weight: Tensor
    """``[E, S]``"""
    v_hidden_bias: Tensor
    """``[E]``"""
    v_weight: Tensor
    """``[1, E]``"""
    v_bias: Tensor
    """``[1]``"""
