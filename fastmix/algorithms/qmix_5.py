"""QMIX-5: fine-tuned QMIX with a weight of 5 on every transition, an ablation of POWQMIX."""

from __future__ import annotations

from typing import Any, ClassVar

from fastmix.algorithms.config import PRESETS
from fastmix.algorithms.qmix import QMIX


class QMIX5(QMIX):
    """POWQMIX's ablation of its larger weight (POWQMIX, section 5.3): the loss of QMIX times 5."""

    defaults: ClassVar[dict[str, Any]] = {"w_high": 5.0}
    preset_overrides: ClassVar[dict[str, dict[str, Any]]] = {
        **QMIX.preset_overrides,
        "paper": PRESETS["pymarl2"] | QMIX.preset_overrides["pymarl2"],
    }
