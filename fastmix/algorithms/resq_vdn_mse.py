"""ResQ-VDN-MSE: both variants of ResQ together."""

from __future__ import annotations

from typing import Any, ClassVar

from fastmix.algorithms.resq_mse import ResQMSE


class ResQVDNMSE(ResQMSE):
    """ResQ appendix, "Qtot-VDN-MSE"."""

    defaults: ClassVar[dict[str, Any]] = {**ResQMSE.defaults, "mixer": "vdn"}
