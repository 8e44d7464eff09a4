"""QPLEX: values and advantages are factored apart, which represents every joint value that satisfies IGM."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from fastmix.algorithms.batch import EpisodeBatch
from fastmix.algorithms.q_learning import QLearning
from fastmix.algorithms.rows import Rows
from fastmix.ops import select
from fastmix.ops.select import Selection


class QPLEX(QLearning):
    """QPLEX (Wang et al. 2021): ``Q_tot = sum_i Q'_i + sum_i (lambda_i - 1) stop_gradient(Q'_i - M'_i)``.

    ``Q'_i = w_i(s) Q_i + b_i(s)``, ``M'_i`` the same of agent ``i``'s largest value, ``lambda_i(s, a) > 0``. The target
    is ``Q_tot^-`` at the online agents' greedy joint action, whose advantages under the target agents are not 0 where
    these would choose otherwise.
    """

    defaults: ClassVar[dict[str, Any]] = {"mixer": "qplex_dmaq"}
    preset_overrides: ClassVar[dict[str, dict[str, Any]]] = {
        "pymarl": {"num_kernel": 10, "adv_hypernet_layers": 3},
        "pymarl2": {"agent": "rnn"},
        "paper": {"adv_hypernet_layers": 1},
    }
    mixer_kinds: ClassVar[tuple[str, ...]] = ("qplex_dmaq", "qplex_dmaq_qatten")

    def _bootstrap(self, batch: EpisodeBatch, stored: Rows, target_qs: Tensor, chosen: Selection) -> Tensor:
        avail: Tensor | None = batch.avail_actions
        if self.config.compat == "released" and not self.config.double_q:
            avail = None  # where the public code takes the largest value of all actions, available or not
        best = select(target_qs, avail)
        qs, actions = best.greedy_qs, best.greedy_actions
        if self.config.double_q:
            assert chosen.target_qs is not None
            qs, actions = chosen.target_qs, chosen.greedy_actions
        return self._joint("target_mixer", stored, qs, batch.states, actions, best.greedy_qs).q_tot
