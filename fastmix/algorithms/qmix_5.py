"""QMIX-5: fine-tuned QMIX with a weight of 5 on every transition, an ablation of POWQMIX."""

from __future__ import annotations

from typing import Any, ClassVar

from fastmix.algorithms.qmix import QMIX


class QMIX5(QMIX):
    """POWQMIX's ablation of its larger weight (POWQMIX, section 5.3): the loss of QMIX times 5."""

    defaults: ClassVar[dict[str, Any]] = {"td_weight": 5.0}
