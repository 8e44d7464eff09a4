"""Q-learning on a joint value: the step that IQL, VDN, QMIX, Qatten and QPLEX share."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from fastmix._parts import part
from fastmix.algorithms import weighting
from fastmix.algorithms.base import Algorithm
from fastmix.algorithms.batch import EpisodeBatch
from fastmix.algorithms.config import AlgorithmConfig
from fastmix.algorithms.rows import Rows
from fastmix.mixers import ActionMixer, JointValue
from fastmix.ops import select, td_loss
from fastmix.ops._checks import check_choice
from fastmix.ops.select import Selection


class QLearning(Algorithm):
    """Unroll the agents, mix their values, learn towards a bootstrapped target.

    ``Q_tot = mix(Q_i(a_i), s)`` and ``y`` from ``mix^-(Q_i^-(argmax Q_i), s)``; the loss is the mean over live
    transitions of ``loss_scale * w * (Q_tot - y)^2``. Targets and weights carry no gradient.
    """

    mixer_kinds: ClassVar[tuple[str, ...]] = ("none", "vdn", "qmix", "qmix_noabs", "nmix")

    def _build(self) -> dict[str, nn.Module]:
        networks: dict[str, nn.Module] = {"agent": self._make_agent()}
        if self.config.mixer != "none":
            networks["mixer"] = self._make_mixer(self.config.mixer)
        return networks

    @classmethod
    def check(cls, config: AlgorithmConfig) -> None:
        """See `Algorithm.check`."""
        super().check(config)
        check_choice("weighting", config.weighting, ("none", "cw", "ow", "igm"))

    def losses(self, batch: EpisodeBatch) -> dict[str, Tensor]:
        """See `Algorithm.losses`.

        Also ``target_q_tot [B, T + 1, K]``, ``greedy_actions [B, T + 1, A]``, ``rewards [B, T, 1]`` as used, and
        with a weighting ``weights [B, T, 1]``.
        """
        c = self.config
        live = self._live(batch)
        with part("unrolls"):
            online, target = self._unroll(batch.obs, batch.last_actions, "agent", "target_agent", live=live)
        with part("select"):
            chosen = select(online.q, batch.avail_actions, actions=batch.actions, target_qs=target.q)
            assert chosen.chosen_qs is not None and chosen.all_greedy is not None
        rows, stored = self._rows(live)
        value = self._joint("mixer", rows, chosen.chosen_qs, batch.states, batch.actions, chosen.greedy_qs.detach())
        q_tot = value.q_tot

        with torch.no_grad(), part("targets"):
            target_q_tot = self._bootstrap(batch, stored, target.q, chosen)
            behaviour = self._behaviour(batch, stored, target.q) if c.targets == "q_lambda" else None
            rewards, targets = self._returns(batch, target_q_tot, behaviour)

        favoured, scale = None, c.loss_scale
        if c.weighting == "none":
            scale *= c.w_high
        else:
            favoured = weighting.favoured(c, target_q_tot[:, :-1], chosen.all_greedy[:, :-1].unsqueeze(-1))
        with part("loss"):
            td = td_loss(q_tot, targets, batch.mask, weights=batch.weights, favoured=favoured, scale=scale)
        terms = {
            "loss": td.loss, "td_error": td.td_error, "q_tot": q_tot, "targets": targets, "rewards": rewards,
            "target_q_tot": target_q_tot, "greedy_actions": chosen.greedy_actions,
        }  # fmt: skip
        if value.logit_squares is not None:
            terms["attend_mag_regs"] = self._regulariser(value.logit_squares, batch.mask)
            terms["loss"] = td.loss + terms["attend_mag_regs"]
        return terms if td.factors is None else terms | {"weights": td.factors}

    @torch.inference_mode()
    def joint_values(
        self, obs: Tensor, last_actions: Tensor, avail_actions: Tensor, states: Tensor, actions: Tensor
    ) -> dict[str, Tensor]:
        """See `Algorithm.joint_values`: ``Q_tot``, or the sum of utilities without a mixer."""
        taken = select(self._unroll(obs, last_actions, "agent")[0].q, avail_actions, actions=actions)
        assert taken.chosen_qs is not None
        value = self._joint("mixer", None, taken.chosen_qs, states, actions, taken.greedy_qs).q_tot
        return {"Q_tot": value} if "mixer" in self.networks else {"sum Q_i": value.sum(-1, keepdim=True)}

    def _joint(
        self, name: str, rows: Rows | None, agent_qs: Tensor, states: Tensor, actions: Tensor, max_qs: Tensor
    ) -> JointValue:
        """What the mixer ``name`` makes of utilities ``[B, T + 1, A]`` in ``rows``, None for all steps.

        Without a mixer these are the utilities themselves.
        """
        mixer = self.networks.get(name)
        with part("mixer"):
            if rows is not None:
                agent_qs = rows.take(agent_qs)
            if mixer is None:
                return JointValue(agent_qs)
            if rows is not None:
                states = rows.take(states)
            if isinstance(mixer, ActionMixer):
                if rows is not None:
                    actions, max_qs = rows.take(actions), rows.take(max_qs)
                value = mixer.joint(agent_qs, states, actions, max_qs)
            else:
                value = JointValue(mixer(agent_qs, states))
            if rows is None:
                return value
            q_tot, *others = value
            return JointValue(rows.put(q_tot), *(None if of is None else rows.put(of) for of in others))

    def _rows(self, live: Tensor | None) -> tuple[Rows, Rows]:
        """What the mixer is asked for, and its target; for a sum of utilities it is not worth the while."""
        live = None if self.config.mixer in ("none", "vdn") else live
        return Rows(live), Rows(live, bootstrap=True)

    def _bootstrap(self, batch: EpisodeBatch, stored: Rows, target_qs: Tensor, chosen: Selection) -> Tensor:
        """``[B, T + 1, K]``: the target networks' value of the greedy joint actions."""
        if self.config.double_q:
            assert chosen.target_qs is not None
            qs, actions = chosen.target_qs, chosen.greedy_actions
        else:
            best = select(target_qs, batch.avail_actions)
            qs, actions = best.greedy_qs, best.greedy_actions
        return self._joint("target_mixer", stored, qs, batch.states, actions, qs).q_tot

    def _behaviour(self, batch: EpisodeBatch, stored: Rows, target_qs: Tensor) -> Tensor:
        """``[B, T + 1, K]``: the target networks' value of the joint actions taken."""
        taken = select(target_qs, batch.avail_actions, actions=batch.actions)
        assert taken.chosen_qs is not None
        qs, best = taken.chosen_qs, taken.greedy_qs
        return self._joint("target_mixer", stored, qs, batch.states, batch.actions, best).q_tot

    def _regulariser(self, logit_squares: Tensor, mask: Tensor) -> Tensor:
        """Mean of squared logits ``[B, T, H]``, summed over heads, times a coefficient; PyMARL counts padded steps."""
        counted = mask != 0
        if self.config.compat == "released":  # all that its batches hold, which end with their longest episode
            counted = counted.any(0, keepdim=True).expand_as(mask)
        live = logit_squares.masked_fill(~counted, 0)
        return self.config.attend_reg_coef * live.sum() / counted.sum().clamp(min=1)
