"""Qatten: attention of the state to the agents mixes their values."""

from __future__ import annotations

from typing import Any, ClassVar

from fastmix.algorithms.q_learning import QLearning


class Qatten(QLearning):
    """Qatten (Yang et al. 2020): ``Q_tot = sum_h w_h(s) sum_i p_hi Q_i + c(s)``.

    The mixer ``qatten_pymarl2`` is pymarl2's; ``qatten_pymarl`` is PyMARL's, whose loss also has the regulariser
    ``attend_reg_coef * sum_h mean(logit_h^2)``.
    """

    defaults: ClassVar[dict[str, Any]] = {"mixer": "qatten_pymarl2"}
    preset_overrides: ClassVar[dict[str, dict[str, Any]]] = {"pymarl": {"mixer": "qatten_pymarl"}}
    mixer_kinds: ClassVar[tuple[str, ...]] = ("qatten_pymarl2", "qatten_pymarl")
