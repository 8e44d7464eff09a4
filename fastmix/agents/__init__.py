"""Utility networks: what one agent sees to the value of its actions. `REGISTRY[kind]` is the class of a kind."""

from typing import Final

from fastmix.agents.base import Agent
from fastmix.agents.feed_forward import FFAgent
from fastmix.agents.iqn import IQNRNNAgent
from fastmix.agents.rnn import CentralRNNAgent, NRNNAgent, RNNAgent

REGISTRY: Final[dict[str, type[Agent]]] = {
    "rnn": RNNAgent,
    "n_rnn": NRNNAgent,
    "ff": FFAgent,
    "central_rnn": CentralRNNAgent,
    "iqn_rnn": IQNRNNAgent,
}

__all__ = ["REGISTRY", "Agent", "CentralRNNAgent", "FFAgent", "IQNRNNAgent", "NRNNAgent", "RNNAgent"]
