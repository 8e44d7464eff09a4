"""What algorithms with a central critic share: its networks, its loss, and the targets it gives to everything else."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastmix import agents
from fastmix._parts import part
from fastmix.algorithms.base import GREEDY_KINDS, Algorithm
from fastmix.algorithms.batch import EpisodeBatch
from fastmix.algorithms.config import AlgorithmConfig
from fastmix.algorithms.rows import Rows
from fastmix.ops import select, td_loss
from fastmix.ops._checks import check_choice
from fastmix.ops.recurrent import RecurrentOutput
from fastmix.ops.select import Selection


class Critique(NamedTuple):
    """One batch as the central critic sees it. Only ``utilities`` and ``loss`` carry gradients."""

    utilities: Selection
    """Of the agents, over ``T + 1`` steps, at the actions taken"""
    all_greedy: Tensor
    """``[B, T, 1]`` bool: the joint action taken is greedy"""
    targets: Tensor
    """``[B, T, 1]``"""
    greedy_values: Tensor
    """``[B, T + 1, 1]``: the target critic's value of the greedy joint actions"""
    loss: Tensor
    """0-dim: the critic's own, with its factors"""
    rows: Rows
    """What mixers are asked for"""
    states: Tensor
    """Those rows of the states"""
    others: list[RecurrentOutput]
    """Further networks over the same input, as asked for"""
    terms: dict[str, Tensor]
    """For `Algorithm.losses` to return"""


class CentralCritic(Algorithm):
    """Utilities ``C_i`` of their own, mixed without constraint: ``Q*(s, a) = central(C_1(a_1), ..., s)``.

    All targets are ``y`` from ``Q*^-`` at the greedy joint action of the decentralised agents, which the online ones
    choose (``double_q``) or the target ones. ``Q*`` regresses on ``y`` by ``loss_scale * central_loss * (Q* - y)^2``.
    """

    def _build(self) -> dict[str, nn.Module]:
        return {
            "agent": self._make_agent(),
            "mixer": self._make_mixer(self.config.mixer),
            "central_agent": self._make_central_agent(),
            "central_mixer": self._make_mixer(self.config.central_mixer),
        }

    @classmethod
    def check(cls, config: AlgorithmConfig) -> None:
        """See `Algorithm.check`."""
        super().check(config)
        check_choice("targets", config.targets, GREEDY_KINDS)
        check_choice("central_mixer", config.central_mixer, ("central_ff", "central_atten", "qmix_noabs", "vdn"))

    def _has_target(self, name: str) -> bool:
        return name in ("central_agent", "central_mixer") or (name == "agent" and not self.config.double_q)

    def _make_central_agent(self) -> agents.Agent:
        c, s = self.config, self.scheme
        inputs = s.obs_dim + s.n_actions * c.obs_last_action + s.n_agents * c.obs_agent_id
        return agents.CentralRNNAgent(inputs, s.n_actions, c.rnn_hidden_dim, c.central_action_embed)

    def _criticise(self, batch: EpisodeBatch, *others: str) -> Critique:
        """Everything that does not depend on how the agents' values are mixed; ``others`` are unrolled alongside."""
        c = self.config
        names = ["agent", "central_agent", "target_central_agent", *others, *([] if c.double_q else ["target_agent"])]
        live = self._live(batch)
        with part("unrolls"):
            agent, central, target_central, *rest = self._unroll(batch.obs, batch.last_actions, *names, live=live)
        with part("select"):
            chosen = select(agent.q, batch.avail_actions, actions=batch.actions)
            assert chosen.all_greedy is not None
            greedy = chosen.greedy_actions
            best = greedy if c.double_q else select(rest.pop().q, batch.avail_actions).greedy_actions
            central_qs = at_actions(central.q, batch.actions)
        with part("mixer"):
            rows = Rows(live)
            states = rows.take(batch.states)
            q_star = rows.put(self.networks["central_mixer"](rows.take(central_qs), states))
        with torch.no_grad(), part("targets"):
            stored, target_qs = Rows(live, bootstrap=True), at_actions(target_central.q, best)
            target_mixer = self.networks["target_central_mixer"]
            greedy_values = stored.put(target_mixer(stored.take(target_qs), stored.take(batch.states)))
            rewards, targets = self._returns(batch, greedy_values)
        with part("loss"):
            loss = td_loss(q_star, targets, batch.mask, weights=batch.weights, scale=c.loss_scale * c.central_loss).loss
        terms = {
            "central_loss": loss, "q_central": q_star, "targets": targets, "target_q_tot": greedy_values,
            "greedy_actions": greedy, "rewards": rewards,
        }  # fmt: skip
        all_greedy = chosen.all_greedy[:, :-1].unsqueeze(-1)
        return Critique(chosen, all_greedy, targets, greedy_values, loss, rows, states, rest, terms)

    def _central_value(self, obs: Tensor, last_actions: Tensor, states: Tensor, actions: Tensor) -> Tensor:
        """``Q*`` of joint actions, for `joint_values`."""
        central = self._unroll(obs, last_actions, "central_agent")[0]
        value: Tensor = self.networks["central_mixer"](at_actions(central.q, actions), states)
        return value


def at_actions(utilities: Tensor, actions: Tensor) -> Tensor:
    """``utilities [..., A, U]`` or ``[..., A, U, c]`` at ``actions [..., A]``: ``[..., A]``, or ``[..., A, c > 1]``."""
    if utilities.dim() > actions.dim() + 1 and utilities.shape[-1] == 1:
        utilities = utilities.squeeze(-1)
    index, *embed = actions.unsqueeze(-1), *utilities.shape[actions.dim() + 1 :]
    if embed:
        index = index.unsqueeze(-1).expand(*actions.shape, 1, *embed)
    return utilities.gather(actions.dim(), index).squeeze(actions.dim())
