"""VDN: the joint value is the sum of the agents' values."""

from __future__ import annotations

from typing import Any, ClassVar

from fastmix.algorithms.q_learning import QLearning


class VDN(QLearning):
    """Value decomposition networks (Sunehag et al. 2018): ``Q_tot = sum_i Q_i``."""

    defaults: ClassVar[dict[str, Any]] = {"mixer": "vdn"}
