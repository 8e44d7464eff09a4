"""Weights of transitions: which of them a monotonic joint value may fit, and which it had better leave alone."""

from __future__ import annotations

from torch import Tensor

from fastmix.algorithms.config import AlgorithmConfig


def weights(
    config: AlgorithmConfig, q_tot: Tensor, targets: Tensor, greedy_values: Tensor, all_greedy: Tensor
) -> Tensor:
    """``w_high`` where ``config.weighting`` favours a transition, ``w`` elsewhere: constant, ``[B, T, 1]``.

    * ``cw``, Rashid et al. (2020), equation 5: the joint action is greedy, or its target exceeds the greedy one's value
    * ``ow``, equation 6: the joint value is below its target
    * ``igm``, POWQMIX's ablation: the joint action is greedy

    Args:
        q_tot: ``[B, T, 1]``, the very values that enter the loss.
        targets: ``[B, T, 1]``.
        greedy_values: ``[B, T, 1]``, values of the greedy joint actions of the same steps.
        all_greedy: ``[B, T, 1]`` bool, every agent took its greedy action.
    """
    if config.weighting == "ow":
        return choose(config, q_tot < targets, q_tot)
    return choose(config, all_greedy if config.weighting == "igm" else all_greedy | (targets > greedy_values), q_tot)


def choose(config: AlgorithmConfig, favoured: Tensor, like: Tensor) -> Tensor:
    """``w_high`` where ``favoured``, ``w`` elsewhere, in the dtype of ``like``."""
    return like.detach().new_full(favoured.shape, config.w).masked_fill(favoured, config.w_high)


def times(weights: Tensor, importance: Tensor | None) -> Tensor:
    """With the importance weights of prioritised replay, if there are any."""
    return weights if importance is None else weights * importance
