"""One learner step of CW- and OW-QMIX, POWQMIX and ResQ as the public trainers write it.

All have a central critic with agents of its own. The released learners also unroll target copies of agents that no
loss reads; so do these. POWQMIX has no public code: its step is pymarl2's learner of CW-QMIX, its paper's base,
with the recogniser beside it. ResQ has the paper's residual, ``-|.|``, where its released code forgets the sign.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .learner import NEG, PublicBatch, PublicLearner, gather_actions, masked_mean


class CentralLearner(PublicLearner):
    """``agent``, ``mixer``, ``central_agent`` and ``central_mixer``; the critic gives the targets of everything."""

    def _criticise(self, agent_qs: Tensor, batch: PublicBatch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Targets, the target critic's greedy values, the critic's loss, and which joint actions are greedy.

        All but the loss are ``[B, T, 1]``; ``agent_qs [B, T + 1, A, U]`` are the decentralised agents'.
        """
        config = self.config
        central_qs = gather_actions(self._unroll("central_agent", batch)[:, :-1], batch.actions[:, :-1])
        q_star = self.calls["central_mixer"](central_qs, batch.state[:, :-1])
        with torch.no_grad():
            self._unroll("target_agent", batch)
            target_qs = self._unroll("target_central_agent", batch)
            unavailable = batch.avail_actions == 0
            target_qs[unavailable] = NEG
            online = agent_qs.detach().clone()
            online[unavailable] = NEG
            greedy = online.max(dim=3, keepdim=True)[1]
            values = self.calls["target_central_mixer"](gather_actions(target_qs, greedy), batch.state)
            targets = self._returns(values if config.td_lambda is not None else values[:, 1:], batch)
            is_greedy = (batch.actions == greedy).long().min(dim=2)[0][:, :-1] == 1
        loss = config.loss_scale * config.central_loss * masked_mean((q_star - targets) ** 2, batch.mask)
        return targets, values[:, :-1], loss, is_greedy


class WeightedLearner(CentralLearner):
    """CW- and OW-QMIX (Rashid et al. 2020); with a network ``recogniser``, POWQMIX."""

    def loss(self, batch: PublicBatch) -> Tensor:
        """The weighted loss of the monotonic value, the critic's, and the recogniser's."""
        config = self.config
        agent_qs = self._unroll("agent", batch)
        chosen_qs = gather_actions(agent_qs[:, :-1], batch.actions[:, :-1])
        targets, greedy_values, loss, is_greedy = self._criticise(agent_qs, batch)
        td_error = self.calls["mixer"](chosen_qs, batch.state[:, :-1]) - targets
        if "recogniser" in self.networks:
            q_r, v = self._recognise(chosen_qs.detach(), agent_qs.detach(), batch)
            loss = loss + config.loss_scale * config.recogniser_loss * masked_mean((q_r - targets) ** 2, batch.mask)
        if config.weighting == "ow":
            favoured = td_error < 0
        elif config.weighting == "cw":
            favoured = is_greedy | (targets > greedy_values)
        elif config.weighting == "igm":
            favoured = is_greedy
        else:
            favoured = q_r >= v - config.tolerance
        weights = torch.where(favoured, torch.ones_like(td_error) * config.w_high, torch.ones_like(td_error) * config.w)
        return loss + masked_mean(weights.detach() * td_error**2, batch.mask)

    def _recognise(self, chosen_qs: Tensor, agent_qs: Tensor, batch: PublicBatch) -> tuple[Tensor, Tensor]:
        online = agent_qs.clone()
        online[batch.avail_actions == 0] = NEG
        advantages = (chosen_qs - online[:, :-1].max(dim=3)[0]) * batch.mask
        q_r, v = self.calls["recogniser"](advantages, batch.state[:, :-1], batch.actions_onehot[:, :-1])
        return q_r, v


class ResidualLearner(CentralLearner):
    """ResQ (Shen et al. 2022): also ``residual_agent`` and ``residual_mixer``; six unrolls, as released."""

    def loss(self, batch: PublicBatch) -> Tensor:
        """The loss of the masked sum, the critic's, and that of residuals above 0."""
        config = self.config
        states, actions = batch.state[:, :-1], batch.actions[:, :-1]
        agent_qs = self._unroll("agent", batch)
        q_tot = self.calls["mixer"](gather_actions(agent_qs[:, :-1], actions), states)
        residual_qs = gather_actions(self._unroll("residual_agent", batch)[:, :-1], actions)
        q_res = self.calls["residual_mixer"](residual_qs, states)
        with torch.no_grad():
            self._unroll("target_residual_agent", batch)
        targets, _, loss, is_greedy = self._criticise(agent_qs, batch)
        if config.residual_negative_abs:
            q_res = -torch.abs(q_res)
        w_r = torch.where(is_greedy, torch.zeros_like(q_tot), torch.ones_like(q_tot)).detach()
        td_error = q_tot + w_r * q_res - targets
        noopt = config.noopt_loss * masked_mean(torch.clamp(q_res, min=0) ** 2, batch.mask)
        return loss + config.loss_scale * (masked_mean(td_error**2, batch.mask) + noopt)
