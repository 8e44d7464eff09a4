"""Parameters and result of attention over agents."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fastmix.ops._layers import Layers, Linear


class AttentionParams(NamedTuple):
    """Weights of ``H`` attention heads with ``E`` features each; see `fastmix.ops._layers` for the layers' types.

    ``A`` agents, ``S`` state features, ``u`` state features that are an agent's own.
    """

    query: Layers
    """Grouped by head, ``S`` to ``E`` features; biases may be None."""
    key: Linear
    """Grouped by head: weight ``[H, E, u]``, or ``[H, E, u + 1]`` where the agent's utility is the last feature of its
    key; bias ``[H, E]`` or None."""
    head: Layers
    """``S`` to ``H`` features: weights of the heads before their absolute value; ``()`` for weights of one."""
    v: Layers
    """``S`` to 1 feature: the state's own value; ``()`` for none."""


class AttentionOutput(NamedTuple):
    """What attention gives; ``...`` are the leading dimensions of ``agent_qs``."""

    q_tot: Tensor
    """``[..., 1]``"""
    agent_weights: Tensor | None
    """``[..., A]``, on request: the weight of each agent's utility, all heads added."""
    v: Tensor | None
    """``[..., 1]``, on request and where there is a state's value: ``q_tot = sum_a agent_weights_a q_a + v``."""
    logit_squares: Tensor | None
    """``[..., H]``, on request: mean over agents of the squared logits, before scaling and before `alive`."""
    entropies: Tensor | None
    """``[..., H]``, on request: entropy of each head's attention over agents, ``-sum_a p_a log(p_a + 1e-8)``."""
