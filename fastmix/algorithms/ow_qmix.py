"""OW-QMIX: optimistically weighted QMIX."""

from __future__ import annotations

from typing import Any, ClassVar

from fastmix.algorithms.weighted_qmix import WeightedQMIX


class OWQMIX(WeightedQMIX):
    """OW-QMIX (Rashid et al. 2020, equation 6): full weight where the joint value is underestimated."""

    defaults: ClassVar[dict[str, Any]] = {**WeightedQMIX.defaults, "weighting": "ow"}
