"""DDN: the joint distribution is the sum of the agents' quantiles."""

from __future__ import annotations

from typing import Any, ClassVar

from fastmix.algorithms.quantile_learning import QuantileLearning


class DDN(QuantileLearning):
    """DDN (Sun et al. 2021): VDN of distributions, ``Z_jt = sum_i Z_i``, quantile by quantile."""

    defaults: ClassVar[dict[str, Any]] = {
        **QuantileLearning.defaults, "mixer": "ddn", "n_quantiles": 1, "n_target_quantiles": 1
    }  # fmt: skip
    mixer_kinds: ClassVar[tuple[str, ...]] = ("ddn",)
