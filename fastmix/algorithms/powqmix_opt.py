"""POWQMIX-opt: only the greedy joint action is fitted, an ablation of POWQMIX that needs no recogniser."""

from __future__ import annotations

from typing import Any, ClassVar

from fastmix.algorithms.powqmix import TRAINING, WEIGHTS
from fastmix.algorithms.weighted_qmix import WeightedQMIX


class POWQMIXOpt(WeightedQMIX):
    """POWQMIX's ablation (section 5.3) with weights 5 and 0: 5 where every agent took its greedy action."""

    defaults: ClassVar[dict[str, Any]] = {**WEIGHTS, "weighting": "igm"}
    preset_overrides: ClassVar[dict[str, dict[str, Any]]] = TRAINING
