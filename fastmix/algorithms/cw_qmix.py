"""CW-QMIX: centrally weighted QMIX."""

from __future__ import annotations

from typing import Any, ClassVar

from fastmix.algorithms.weighted_qmix import WeightedQMIX


class CWQMIX(WeightedQMIX):
    """CW-QMIX (Rashid et al. 2020, equation 5): full weight at greedy joint actions and larger targets."""

    defaults: ClassVar[dict[str, Any]] = {**WeightedQMIX.defaults, "weighting": "cw"}
