"""OW-QMIX-5: OW-QMIX with weights 5 and 0, an ablation of POWQMIX."""

from __future__ import annotations

from typing import Any, ClassVar

from fastmix.algorithms.config import PRESETS
from fastmix.algorithms.ow_qmix import OWQMIX


class OWQMIX5(OWQMIX):
    """POWQMIX's ablation of its larger weight (POWQMIX, section 5.3) under OW-QMIX's condition."""

    defaults: ClassVar[dict[str, Any]] = {**OWQMIX.defaults, "w_high": 5.0, "w": 0.0}
    preset_overrides: ClassVar[dict[str, dict[str, Any]]] = {
        **OWQMIX.preset_overrides,
        "paper": PRESETS["pymarl2"] | OWQMIX.preset_overrides["pymarl2"],
    }
