"""CW-QMIX-5: CW-QMIX with weights 5 and 0, an ablation of POWQMIX."""

from __future__ import annotations

from typing import Any, ClassVar

from fastmix.algorithms.config import PRESETS
from fastmix.algorithms.cw_qmix import CWQMIX


class CWQMIX5(CWQMIX):
    """POWQMIX's ablation of its larger weight (POWQMIX, section 5.3) under CW-QMIX's condition."""

    defaults: ClassVar[dict[str, Any]] = {**CWQMIX.defaults, "w_high": 5.0, "w": 0.0}
    preset_overrides: ClassVar[dict[str, dict[str, Any]]] = {
        **CWQMIX.preset_overrides,
        "paper": PRESETS["pymarl2"] | CWQMIX.preset_overrides["pymarl2"],
    }
