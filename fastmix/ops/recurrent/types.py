"""Parameters and results of recurrent utility networks."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class RecurrentParams(NamedTuple):
    """One network: input layer, GRU cell (gates stacked reset, update, new), optional layer norm, output layer.

    ``I`` input features, ``D`` hidden size, ``U`` outputs.
    """

    fc1_weight: Tensor
    """``[D, I]``"""
    fc1_bias: Tensor
    """``[D]``"""
    weight_ih: Tensor
    """``[3 D, D]``"""
    weight_hh: Tensor
    """``[3 D, D]``"""
    bias_ih: Tensor
    """``[3 D]``"""
    bias_hh: Tensor
    """``[3 D]``"""
    norm_weight: Tensor | None
    """``[D]``"""
    norm_bias: Tensor | None
    """``[D]``"""
    fc2_weight: Tensor
    """``[U, D]``"""
    fc2_bias: Tensor
    """``[U]``"""


class RecurrentOutput(NamedTuple):
    """What one network gives for a whole sequence."""

    q: Tensor
    """``[B, T, A, U]``"""
    hidden: Tensor
    """``[B, A, D]``: the (un-normalised) state after the last step."""
    hidden_states: Tensor | None
    """``[B, T, A, D]``: the state after every step, when asked for."""
