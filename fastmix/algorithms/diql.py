"""DIQL: every agent learns the distribution of the team's return by itself."""

from __future__ import annotations

from typing import Any, ClassVar

from fastmix.algorithms.quantile_learning import QuantileLearning


class DIQL(QuantileLearning):
    """DIQL (Sun et al. 2021): implicit quantile networks without a mixer; each agent draws fractions of its own."""

    defaults: ClassVar[dict[str, Any]] = {
        **QuantileLearning.defaults, "mixer": "none", "n_quantiles": 1, "n_target_quantiles": 1
    }  # fmt: skip
    mixer_kinds: ClassVar[tuple[str, ...]] = ("none",)
