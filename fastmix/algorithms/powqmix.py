"""POWQMIX: a recogniser finds the joint actions that may be optimal, and the monotonic joint value fits only these."""

from __future__ import annotations

from typing import Any, ClassVar, Final

import torch
from torch import Tensor, nn

from fastmix._parts import part
from fastmix.algorithms.batch import EpisodeBatch
from fastmix.algorithms.config import PRESETS
from fastmix.algorithms.rows import Rows
from fastmix.algorithms.weighted_qmix import WeightedQMIX
from fastmix.mixers import ImportanceRecogniser, Recogniser
from fastmix.ops import select, td_loss
from fastmix.ops.duplex import Recognition
from fastmix.ops.select import UNAVAILABLE
from fastmix.ops.td_loss import Favoured

WEIGHTS: Final[dict[str, Any]] = {"w_high": 5.0, "w": 0.0}
TRAINING: Final[dict[str, dict[str, Any]]] = {
    "pymarl2": {"mixer": "nmix"}, "paper": PRESETS["pymarl2"] | {"mixer": "nmix"},
}  # fmt: skip
"""The paper builds on pymarl2, whose settings it keeps."""


class POWQMIX(WeightedQMIX):
    """POWQMIX (equations 5 and 11 to 15). With constant advantages ``adv_i = Q_i(a_i) - max_u Q_i(u)``::

        Q_r = sum_i lambda_i(s, a) adv_i + V(s)        lambda_i >= 0
        w   = w_high where Q_r >= V - C, else w_low

        w (Q_tot - y)^2 + loss_scale [central_loss (Q* - y)^2 + recogniser_loss (Q_r - y)^2]

    is the loss, as a mean over live transitions. ``V`` is ``Q_r`` of the greedy joint action, and ``C`` the
    ``tolerance``. Under another ``weighting`` the recogniser learns and decides nothing.
    """

    defaults: ClassVar[dict[str, Any]] = {**WEIGHTS, "weighting": "pow"}
    preset_overrides: ClassVar[dict[str, dict[str, Any]]] = TRAINING
    weightings: ClassVar[tuple[str, ...]] = ("pow", "cw", "ow", "igm")

    def _build(self) -> dict[str, nn.Module]:
        c, s = self.config, self.scheme
        kind = Recogniser if c.recogniser_weights == "two_layer" else ImportanceRecogniser
        recogniser = kind(
            s.n_agents, s.n_actions, s.state_dim, c.recogniser_embed_dim, c.recogniser_hypernet_embed,
            use_orthogonal=c.use_orthogonal,
        )  # fmt: skip
        return {**super()._build(), "recogniser": recogniser}

    def _has_target(self, name: str) -> bool:
        return super()._has_target(name) or (name == "recogniser" and self.config.recogniser_target)

    def losses(self, batch: EpisodeBatch) -> dict[str, Tensor]:
        """See `Algorithm.losses`. Also what `WeightedQMIX.losses` has, and ``q_r`` and ``v_r``."""
        c = self.config
        critique = self._criticise(batch)
        chosen_qs, max_qs = critique.utilities.chosen_qs, critique.utilities.greedy_qs
        assert chosen_qs is not None
        rows = critique.rows
        with part("mixer"):
            taken, best = rows.take(chosen_qs.detach()), rows.take(max_qs.detach())
            # Padded steps have no available action and so no largest utility; their advantages are 0.
            arguments = taken, critique.states, rows.take(batch.actions), torch.where(best == UNAVAILABLE, taken, best)
            recognition = self._recognise("recogniser", rows, *arguments)
            judge = recognition
            if c.recogniser_target:
                judge = self._recognise("target_recogniser", rows, *arguments)
        favoured = Favoured("recognised", None, judge.q_r, judge.v, c.tolerance, high=c.w_high, low=c.w)
        terms = self._weighted(batch, critique, favoured if c.weighting == "pow" else self._favoured(critique))
        with part("loss"):
            loss = td_loss(
                recognition.q_r, critique.targets, batch.mask, weights=batch.weights,
                scale=c.loss_scale * c.recogniser_loss,
            ).loss  # fmt: skip
        return terms | {
            "loss": terms["loss"] + loss, "recogniser_loss": loss, "q_r": recognition.q_r, "v_r": recognition.v,
        }  # fmt: skip

    def _recognise(self, name: str, rows: Rows, *arguments: Tensor) -> Recognition:
        recognition: Recognition = self.networks[name](*arguments)
        return Recognition(*map(rows.put, recognition))

    @torch.inference_mode()
    def joint_values(
        self, obs: Tensor, last_actions: Tensor, avail_actions: Tensor, states: Tensor, actions: Tensor
    ) -> dict[str, Tensor]:
        """See `Algorithm.joint_values`: ``Q_tot``, ``Q_r`` and ``Q*``."""
        taken = select(self._unroll(obs, last_actions, "agent")[0].q, avail_actions, actions=actions)
        values = super().joint_values(obs, last_actions, avail_actions, states, actions)
        q_r = self.networks["recogniser"](taken.chosen_qs, states, actions, taken.greedy_qs).q_r
        return {"Q_tot": values["Q_tot"], "Q_r": q_r, "Q*": values["Q*"]}
