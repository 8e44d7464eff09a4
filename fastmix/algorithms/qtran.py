"""QTRAN: a free joint value, and two losses that tie the sum of utilities to it."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastmix._parts import part
from fastmix.algorithms.base import GREEDY_KINDS, Algorithm
from fastmix.algorithms.batch import EpisodeBatch
from fastmix.algorithms.config import AlgorithmConfig
from fastmix.mixers import QTranBase
from fastmix.ops import select, td_loss
from fastmix.ops._checks import check_choice
from fastmix.ops.recurrent import RecurrentOutput


class QTRAN(Algorithm):
    """QTRAN-base (Son et al. 2019). With ``Q_jt(s, h, a)``, ``V(s)`` and the greedy joint action ``g``::

        td   = Q_jt(a) - y                             y from Q_jt^-(g)
        opt  = sum_i Q_i(g_i) + V - Q_jt(g)            Q_jt constant
        nopt = min(0, sum_i Q_i(a_i) + V - Q_jt(a))    Q_jt constant

    The loss is the mean over live transitions of ``td^2 + opt_loss opt^2 + nopt_min_loss nopt^2``.
    """

    defaults: ClassVar[dict[str, Any]] = {"mixer": "qtran_base", "mixing_embed_dim": 64}
    preset_overrides: ClassVar[dict[str, dict[str, Any]]] = {
        "pymarl2": {"agent": "rnn", "lr": 5e-4, "targets": "one_step", "loss_scale": 1.0}
    }
    mixer_kinds: ClassVar[tuple[str, ...]] = ("qtran_base",)

    def _build(self) -> dict[str, nn.Module]:
        return {"agent": self._make_agent(), "mixer": self._make_mixer(self.config.mixer)}

    @classmethod
    def check(cls, config: AlgorithmConfig) -> None:
        """See `Algorithm.check`."""
        super().check(config)
        check_choice("targets", config.targets, GREEDY_KINDS)

    def losses(self, batch: EpisodeBatch) -> dict[str, Tensor]:
        """See `Algorithm.losses`. ``q_tot`` is ``Q_jt``; also the three losses and what they are made of."""
        c, mask = self.config, batch.mask
        net, target_net = self.networks["mixer"], self.networks["target_mixer"]
        assert isinstance(net, QTranBase) and isinstance(target_net, QTranBase)
        with part("unrolls"):
            online, target = self._unroll(
                batch.obs, batch.last_actions, "agent", "target_agent", return_hidden_states=True,
                live=self._live(batch),
            )  # fmt: skip
            hidden, target_hidden = self._hidden_states(online, mask), self._hidden_states(target, mask)
        with part("select"):
            chosen = select(online.q, batch.avail_actions, actions=batch.actions)
            assert chosen.chosen_qs is not None
            greedy = chosen.greedy_actions
            best = greedy if c.double_q else select(target.q, batch.avail_actions).greedy_actions
        states, now = batch.states[:, :-1], hidden[:, :-1]
        with part("mixer"):
            joint_q = net.joint_q(states, now, batch.actions[:, :-1])
            value = net.value(states)

        with torch.no_grad(), part("targets"):
            greedy_joint_q = net.joint_q(states, now, greedy[:, :-1])
            target_joint_q = target_net.joint_q(batch.states, target_hidden, best)
            rewards, targets = self._returns(batch, target_joint_q)

        with part("loss"):
            opt_error = chosen.greedy_qs[:, :-1].sum(-1, keepdim=True) + value
            nopt_error = chosen.chosen_qs[:, :-1].sum(-1, keepdim=True) + value - joint_q.detach()
            under = nopt_error.clamp(max=0)
            td = td_loss(joint_q, targets, mask, weights=batch.weights, scale=c.loss_scale)
            opt = td_loss(opt_error, greedy_joint_q, mask, weights=batch.weights, scale=c.loss_scale)
            nopt = td_loss(under, torch.zeros_like(under), mask, weights=batch.weights, scale=c.loss_scale)
        return {
            "loss": td.loss + c.opt_loss * opt.loss + c.nopt_min_loss * nopt.loss,
            "td_loss": td.loss, "opt_loss": opt.loss, "nopt_loss": nopt.loss,
            "td_error": td.td_error, "opt_error": opt.td_error, "nopt_error": nopt.td_error,
            "q_tot": joint_q, "value": value, "targets": targets, "greedy_joint_q": greedy_joint_q,
            "target_q_tot": target_joint_q, "greedy_actions": greedy, "chosen_qs": chosen.chosen_qs,
            "hidden_states": hidden, "rewards": rewards,
        }  # fmt: skip

    @torch.inference_mode()
    def joint_values(
        self, obs: Tensor, last_actions: Tensor, avail_actions: Tensor, states: Tensor, actions: Tensor
    ) -> dict[str, Tensor]:
        """See `Algorithm.joint_values`: ``Q_tot = sum_i Q_i + V`` and ``Q_jt``."""
        net = self.networks["mixer"]
        assert isinstance(net, QTranBase)
        agent = self._unroll(obs, last_actions, "agent", return_hidden_states=True)[0]
        qs = select(agent.q, avail_actions, actions=actions).chosen_qs
        assert qs is not None and agent.hidden_states is not None
        joint_q = net.joint_q(states, agent.hidden_states, actions)
        return {"Q_tot": qs.sum(-1, keepdim=True) + net.value(states), "Q_jt": joint_q}

    def _hidden_states(self, agent: RecurrentOutput, mask: Tensor) -> Tensor:
        """``[B, T + 1, A, D]``; ``compat="released"`` shuffles them over time and agents, as pymarl2 does by mistake.

        There ``[T + 1, A]`` rows are read as if they were ``[A, T + 1]``, with ``T`` the longest episode of the batch.
        """
        hidden = agent.hidden_states
        assert hidden is not None
        if self.config.compat == "paper":
            return hidden
        steps, n_agents = hidden.shape[1:3]
        stored = (mask != 0).any(0).sum() + 1
        time = torch.arange(steps, device=mask.device).unsqueeze(-1)
        rows = torch.arange(n_agents, device=mask.device) * stored + time
        return hidden.flatten(1, 2).index_select(1, rows.clamp(max=steps * n_agents - 1).flatten()).view_as(hidden)
