"""Weights of transitions: which of them a monotonic joint value may fit, and which it had better leave alone."""

from __future__ import annotations

from torch import Tensor

from fastmix.algorithms.config import AlgorithmConfig
from fastmix.ops.td_loss import Favoured


def favoured(config: AlgorithmConfig, greedy_values: Tensor, all_greedy: Tensor) -> Favoured:
    """What ``config.weighting`` favours by the weight ``w_high``, while the other transitions get ``w``.

    * ``cw``, Rashid et al. (2020), equation 5: the joint action is greedy, or its target exceeds the greedy one's value
    * ``ow``, equation 6: the joint value is below its target
    * ``igm``, POWQMIX's ablation: the joint action is greedy

    Args:
        greedy_values: ``[B, T, 1]``, values of the greedy joint actions of the same steps.
        all_greedy: ``[B, T, 1]`` bool, every agent took its greedy action.
    """
    rule = {"cw": "greedy_or_above", "ow": "below", "igm": "greedy"}[config.weighting]
    return Favoured(rule, all_greedy, greedy_values, high=config.w_high, low=config.w)
