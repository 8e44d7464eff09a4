"""Weighted QMIX: a monotonic joint value that fits some transitions more than others."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from fastmix._parts import part
from fastmix.algorithms import weighting
from fastmix.algorithms.batch import EpisodeBatch
from fastmix.algorithms.central import CentralCritic, Critique
from fastmix.algorithms.config import AlgorithmConfig
from fastmix.ops import select, td_loss
from fastmix.ops._checks import check_choice
from fastmix.ops.td_loss import Favoured


class WeightedQMIX(CentralCritic):
    """WQMIX (Rashid et al. 2020): ``w (Q_tot - y)^2 + loss_scale central_loss (Q* - y)^2``, as a mean over transitions.

    The first term has no ``loss_scale``, as in pymarl2. ``w`` is ``w_high`` or ``config.w``, see
    `fastmix.algorithms.weighting`.
    """

    defaults: ClassVar[dict[str, Any]] = {"w": 0.1}
    preset_overrides: ClassVar[dict[str, dict[str, Any]]] = {"pymarl2": {"agent": "rnn"}}
    mixer_kinds: ClassVar[tuple[str, ...]] = ("qmix", "qmix_noabs", "nmix", "vdn", "qatten_pymarl2")
    weightings: ClassVar[tuple[str, ...]] = ("cw", "ow", "igm")

    @classmethod
    def check(cls, config: AlgorithmConfig) -> None:
        """See `Algorithm.check`."""
        super().check(config)
        check_choice("weighting", config.weighting, cls.weightings)

    def losses(self, batch: EpisodeBatch) -> dict[str, Tensor]:
        """See `Algorithm.losses`. Also ``weights``, the partial losses and what they are made of."""
        critique = self._criticise(batch)
        return self._weighted(batch, critique, self._favoured(critique))

    def _favoured(self, critique: Critique) -> Favoured:
        return weighting.favoured(self.config, critique.greedy_values[:, :-1], critique.all_greedy)

    def _weighted(self, batch: EpisodeBatch, critique: Critique, favoured: Favoured) -> dict[str, Tensor]:
        """The loss of ``Q_tot`` and of the critic, and all terms so far."""
        assert critique.utilities.chosen_qs is not None
        with part("mixer"):
            rows = critique.rows
            q_tot = rows.put(self.networks["mixer"](rows.take(critique.utilities.chosen_qs), critique.states))
        with part("loss"):
            td = td_loss(q_tot, critique.targets, batch.mask, weights=batch.weights, favoured=favoured)
        assert td.factors is not None
        return critique.terms | {
            "loss": td.loss + critique.loss, "qmix_loss": td.loss, "td_error": td.td_error, "q_tot": q_tot,
            "weights": td.factors,
        }  # fmt: skip

    @torch.inference_mode()
    def joint_values(
        self, obs: Tensor, last_actions: Tensor, avail_actions: Tensor, states: Tensor, actions: Tensor
    ) -> dict[str, Tensor]:
        """See `Algorithm.joint_values`: ``Q_tot`` and ``Q*``."""
        qs = select(self._unroll(obs, last_actions, "agent")[0].q, avail_actions, actions=actions).chosen_qs
        q_star = self._central_value(obs, last_actions, states, actions)
        return {"Q_tot": self.networks["mixer"](qs, states), "Q*": q_star}
