"""Q-learning on a joint value: the step that IQL, VDN, QMIX and fine-tuned QMIX share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastmix._parts import part
from fastmix.algorithms.base import Algorithm
from fastmix.algorithms.batch import EpisodeBatch
from fastmix.algorithms.standardise import RunningMoments
from fastmix.ops import returns, select, td_loss


class QLearning(Algorithm):
    """Unroll the agents, mix their values, learn towards a bootstrapped target.

    ``Q_tot = mix(Q_i(a_i), s)`` and ``y`` from ``mix^-(Q_i^-(argmax Q_i), s)``; the loss is the mean over
    live transitions of ``loss_scale * td_weight * w * (Q_tot - y)^2``. Targets and weights carry no gradient.
    """

    def _build(self) -> dict[str, nn.Module]:
        networks: dict[str, nn.Module] = {"agent": self._make_agent()}
        if self.config.mixer != "none":
            networks["mixer"] = self._make_mixer()
        self.reward_moments = RunningMoments(self.device) if self.config.standardise_rewards else None
        return networks

    def losses(self, batch: EpisodeBatch) -> dict[str, Tensor]:
        """See `Algorithm.losses`.

        Also ``target_q_tot [B, T + 1, K]``, ``greedy_actions [B, T + 1, A]``, ``rewards [B, T, 1]`` as used, and
        ``weights``.
        """
        c = self.config
        with part("unrolls"):
            online, target = self._unroll(batch.obs, batch.last_actions, "agent", "target_agent")
        with part("select"):
            chosen = select(online.q, batch.avail_actions, actions=batch.actions, target_qs=target.q)
            assert chosen.chosen_qs is not None and chosen.target_qs is not None and chosen.all_greedy is not None
            chosen_qs = chosen.chosen_qs[:, :-1]
        q_tot = self._joint("mixer", chosen_qs, batch.states[:, :-1])

        with torch.no_grad(), part("targets"):
            bootstrap = chosen.target_qs if c.double_q else select(target.q, batch.avail_actions).greedy_qs
            target_q_tot = self._joint("target_mixer", bootstrap, batch.states)
            behaviour = None
            if c.targets == "q_lambda":
                taken = select(target.q, batch.avail_actions, actions=batch.actions).chosen_qs
                assert taken is not None
                behaviour = self._joint("target_mixer", taken, batch.states)
            rewards = batch.rewards if self.reward_moments is None else self.reward_moments(batch.rewards, batch.mask)
            targets = returns(
                rewards, batch.terminated, batch.mask, target_q_tot, behaviour_qs=behaviour,
                gamma=c.gamma, kind=c.targets, td_lambda=c.td_lambda, n_step=c.n_step,
            )  # fmt: skip
            weights = self._weights(batch, q_tot, targets, target_q_tot, chosen.all_greedy)

        with part("loss"):
            loss = td_loss(q_tot, targets, batch.mask, weights=weights, scale=c.loss_scale * c.td_weight)
        terms = {
            "loss": loss.loss, "td_error": loss.td_error, "q_tot": q_tot, "targets": targets, "rewards": rewards,
            "target_q_tot": target_q_tot, "greedy_actions": chosen.greedy_actions,
        }  # fmt: skip
        return terms if weights is None else terms | {"weights": weights}

    def state_dict(self) -> dict[str, Tensor]:
        """See `Algorithm.state_dict`."""
        moments = {} if self.reward_moments is None else {"reward_moments": self.reward_moments.values}
        return super().state_dict() | moments

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """See `Algorithm.load_state_dict`."""
        super().load_state_dict(state)
        if self.reward_moments is not None:
            self.reward_moments.values.copy_(state["reward_moments"])

    def _joint(self, name: str, agent_qs: Tensor, states: Tensor) -> Tensor:
        """``[B, T, 1]`` from the mixer ``name``, or the agents' own values ``[B, T, A]`` without a mixer."""
        mixer = self.networks.get(name)
        with part("mixer"):
            joint: Tensor = agent_qs if mixer is None else mixer(agent_qs, states)
        return joint

    def _weights(
        self, batch: EpisodeBatch, q_tot: Tensor, targets: Tensor, target_q_tot: Tensor, all_greedy: Tensor
    ) -> Tensor | None:
        """Weights of transitions: Rashid et al. 2020 (WQMIX), equations 5 (cw) and 6 (ow), without a central critic."""
        if self.config.weighting == "none":
            return batch.weights
        if self.config.weighting == "ow":
            full = q_tot < targets
        else:
            full = all_greedy[:, :-1].unsqueeze(-1) | (targets > target_q_tot[:, :-1])
        weights = torch.where(full, 1.0, self.config.w).to(q_tot.dtype)
        return weights if batch.weights is None else weights * batch.weights
