"""DMIX: QMIX of the means, and the sum of the shapes."""

from __future__ import annotations

from typing import Any, ClassVar

from fastmix.algorithms.quantile_learning import QuantileLearning


class DMIX(QuantileLearning):
    """DMIX (Sun et al. 2021): ``Z_jt = M(E[Z_1], ..., E[Z_A], s) + sum_i (Z_i - E[Z_i])`` with QMIX's ``M``."""

    defaults: ClassVar[dict[str, Any]] = {**QuantileLearning.defaults, "mixer": "dmix"}
    mixer_kinds: ClassVar[tuple[str, ...]] = ("dmix",)
