"""ResQ: a residual that is 0 at the greedy joint action and negative elsewhere completes a monotonic joint value."""

from __future__ import annotations

import copy
from typing import Any, ClassVar, Final

import torch
from torch import Tensor, nn

from fastmix._parts import part
from fastmix.algorithms.batch import EpisodeBatch
from fastmix.algorithms.central import CentralCritic, at_actions
from fastmix.mixers import QMixerCentralFF
from fastmix.ops import select, td_loss
from fastmix.ops.td_loss import Favoured

MASKS: Final = {"max_action": "greedy", "max_larger": "greedy_or_above", "hysteretic": "not_below"}
"""``condition`` -> the rule of `fastmix.ops.td_loss` by which ``w_r`` is 0"""


class ResQ(CentralCritic):
    """ResQ (Shen et al. 2022). ``Q_tot`` mixes the agents' values, ``Q_r = -|.|`` those of residual agents::

        Q_jt = Q_tot + w_r Q_r        w_r = 0 where the joint action is greedy, else 1

        (Q_jt - y)^2 + central_loss (Q* - y)^2

    is the loss, times ``loss_scale``, as a mean over live transitions. ``condition`` has other masks ``w_r``. Without
    ``residual_negative_abs`` (ResQ-MSE) the residual is free, and ``noopt_loss max(Q_r, 0)^2`` is added to the loss.
    ``compat="released"`` leaves it free without that loss, as the released code does.
    """

    defaults: ClassVar[dict[str, Any]] = {"central_mixing_embed_dim": 128}
    preset_overrides: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {"lr": 1e-3, "targets": "td_lambda", "epsilon_anneal_time": 100_000}
    }
    mixer_kinds: ClassVar[tuple[str, ...]] = ("qmix", "vdn", "qatten_pymarl2", "nmix", "qmix_noabs")

    def _build(self) -> dict[str, nn.Module]:
        networks = super()._build()
        central_mixer = networks.pop("central_mixer")
        return {
            **networks,
            "residual_agent": copy.deepcopy(networks["agent"]),
            "central_mixer": central_mixer,
            "residual_mixer": self._make_mixer(self.config.residual_mixer),
        }

    def losses(self, batch: EpisodeBatch) -> dict[str, Tensor]:
        """See `Algorithm.losses`. Also ``q_res [B, T, 1]`` and the mask ``w_r``, the losses and what they are of."""
        c = self.config
        critique = self._criticise(batch, "residual_agent")
        (residual,), rows = critique.others, critique.rows
        assert critique.utilities.chosen_qs is not None
        with part("select"):
            residual_qs = at_actions(residual.q, batch.actions)
        with part("mixer"):
            q_tot = rows.put(self.networks["mixer"](rows.take(critique.utilities.chosen_qs), critique.states))
            q_res = rows.put(self._residual(rows.take(residual_qs), critique.states))
        with part("loss"):
            masked = None
            if c.condition in MASKS:
                masked = Favoured(MASKS[c.condition], critique.all_greedy, critique.greedy_values[:, :-1])
            td = td_loss(
                q_tot, critique.targets, batch.mask, residual=q_res, favoured=masked, weights=batch.weights,
                scale=c.loss_scale * c.w_high,
            )  # fmt: skip
            terms = critique.terms | {
                "loss": td.loss + critique.loss, "qmix_loss": td.loss, "td_error": td.td_error, "q_tot": q_tot,
                "q_res": q_res, "w_r": torch.ones_like(q_tot) if td.factors is None else td.factors,
            }  # fmt: skip
            if not c.residual_negative_abs:
                above = q_res.clamp(min=0)
                noopt = td_loss(
                    above, torch.zeros_like(above), batch.mask, weights=batch.weights,
                    scale=c.loss_scale * c.noopt_loss,
                ).loss  # fmt: skip
                terms |= {"loss": terms["loss"] + noopt, "noopt_loss": noopt}
        return terms

    def _residual(self, residual_qs: Tensor, states: Tensor) -> Tensor:
        """``Q_r [..., 1]`` of the residual agents' values ``[..., A]``."""
        mixer = self.networks["residual_mixer"]
        if isinstance(mixer, QMixerCentralFF) and mixer.action_embed > 1:
            residual_qs = residual_qs.unsqueeze(-1).expand(*residual_qs.shape, mixer.action_embed)
        q_res: Tensor = mixer(residual_qs, states)
        hard = self.config.residual_negative_abs and self.config.compat == "paper"
        return -q_res.abs() if hard else q_res

    @torch.inference_mode()
    def joint_values(
        self, obs: Tensor, last_actions: Tensor, avail_actions: Tensor, states: Tensor, actions: Tensor
    ) -> dict[str, Tensor]:
        """See `Algorithm.joint_values`: ``Q_tot``, ``Q_jt``, ``w_r Q_r`` and ``Q*``; ``w_r`` is 0 at greedy actions."""
        agent, residual = self._unroll(obs, last_actions, "agent", "residual_agent")
        taken = select(agent.q, avail_actions, actions=actions)
        assert taken.all_greedy is not None
        q_tot = self.networks["mixer"](taken.chosen_qs, states)
        q_res = self._residual(at_actions(residual.q, actions), states)
        if self.config.condition != "none":
            q_res = q_res.masked_fill(taken.all_greedy.unsqueeze(-1), 0)
        q_star = self._central_value(obs, last_actions, states, actions)
        return {"Q_tot": q_tot, "Q_jt": q_tot + q_res, "w_r Q_r": q_res, "Q*": q_star}
