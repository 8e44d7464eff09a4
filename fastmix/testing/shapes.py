"""The problem sizes that tests and benchmarks draw from."""

from __future__ import annotations

from types import MappingProxyType
from typing import Final, NamedTuple


class Shape(NamedTuple):
    """Sizes of one environment, and the learner batch it is usually trained with."""

    n_agents: int
    n_actions: int
    state_dim: int
    obs_dim: int
    batch_size: int = 32
    """episodes of a training batch"""
    steps: int = 60
    """transitions of its longest episode"""


SHAPES: Final = MappingProxyType(
    {
        "matrix": Shape(2, 3, 5, 5, batch_size=128, steps=1),
        "3m": Shape(3, 9, 48, 30),
        "5m_vs_6m": Shape(5, 12, 98, 55),
        "prey": Shape(8, 6, 300, 75, steps=120),
        "MMM2": Shape(10, 18, 322, 176, steps=120),
        "27m_vs_30m": Shape(27, 36, 1170, 285, steps=180),
    }
)
"""name -> sizes: a matrix game, three SMAC maps from small to large, predator-prey, and the largest SMAC map."""
