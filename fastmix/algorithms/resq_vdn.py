"""ResQ-VDN: ResQ whose main joint value is a sum."""

from __future__ import annotations

from typing import Any, ClassVar

from fastmix.algorithms.resq import ResQ


class ResQVDN(ResQ):
    """ResQ appendix, "Qtot-VDN": the main joint value is the sum of utilities."""

    defaults: ClassVar[dict[str, Any]] = {**ResQ.defaults, "mixer": "vdn"}
