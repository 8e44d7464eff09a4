"""`recurrent`: input layer, GRU over the whole sequence, output layer, for several networks over one input."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastmix.ops.recurrent import reference
from fastmix.ops.recurrent.types import RecurrentOutput, RecurrentParams

__all__ = ["RecurrentOutput", "RecurrentParams", "recurrent"]


def recurrent(
    obs: Tensor,
    networks: Sequence[RecurrentParams],
    hidden: Sequence[Tensor | None] | None = None,
    *,
    last_actions: Tensor | None = None,
    agent_ids: bool = False,
    return_hidden_states: bool = False,
    backend: str | None = None,
) -> list[RecurrentOutput]:
    """Unroll each network over the whole sequence."""
    outputs = []
    for index, network in enumerate(networks):
        start = None if hidden is None else hidden[index]
        if start is None:
            start = obs.new_zeros(obs.shape[0], obs.shape[2], network.weight_hh.shape[1])
        outputs.append(reference.recurrent(obs, network, start, last_actions, agent_ids, return_hidden_states))
    return outputs
