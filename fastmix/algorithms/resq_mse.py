"""ResQ-MSE: ResQ whose residual is kept negative by a loss."""

from __future__ import annotations

from typing import Any, ClassVar

from fastmix.algorithms.resq import ResQ


class ResQMSE(ResQ):
    """ResQ appendix: the residual is free, and a loss pushes it below 0."""

    defaults: ClassVar[dict[str, Any]] = {**ResQ.defaults, "residual_negative_abs": False}
