"""ResZ: ResQ of distributions. A residual that is 0 at the greedy joint action and negative elsewhere."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastmix._parts import part
from fastmix.algorithms.batch import EpisodeBatch
from fastmix.algorithms.config import AlgorithmConfig
from fastmix.algorithms.distributional import Distributional, errors, put
from fastmix.algorithms.rows import Rows
from fastmix.mixers import Mixer, ResZCentralFF
from fastmix.ops import midpoints, td_loss
from fastmix.ops._checks import check_choice


class ResZ(Distributional):
    """ResZ (Shen et al. 2022). ``Z_tot`` mixes the agents' distributions, ``Z_r = -|.|`` those of residual agents::

        Z_jt = Z_tot + w_r Z_r        w_r = 0 where the joint action is greedy by means, else 1

        QH(Z_jt, y) + central_loss QH(Z*, y)

    is the loss, with `fastmix.ops.quantile_loss` as ``QH``, times ``loss_scale``. Samples ``y`` of the target come from
    ``Z*``, the unrestricted mix of central agents, at the joint action that the agents (``double_q``) or the target
    central agents call greedy. Without ``residual_negative_abs`` the residual is free, and ``noopt_loss max(Z_r, 0)^2``
    is added to the loss. ``compat="released"`` compares the joint action with the greedy one of the *next* step, as
    the released code does.

    Agents and residual have ``n_quantiles``, the central networks, online and target, ``n_target_quantiles``.
    """

    defaults: ClassVar[dict[str, Any]] = {
        **Distributional.defaults, "mixer": "datten", "residual_mixer": "resz_central_atten",
        "central_mixer": "resz_central_ff", "central_mixing_embed_dim": 128,
    }  # fmt: skip
    preset_overrides: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {"lr": 1e-3, "targets": "td_lambda", "epsilon_anneal_time": 100_000}
    }
    mixer_kinds: ClassVar[tuple[str, ...]] = ("datten", "dmix", "ddn")

    @classmethod
    def check(cls, config: AlgorithmConfig) -> None:
        """See `Algorithm.check`."""
        super().check(config)
        residuals = ("resz_central_atten", "resz_central_ff", "dmix", "ddn")
        check_choice("residual_mixer", config.residual_mixer, residuals)
        check_choice("central_mixer", config.central_mixer, ("resz_central_ff",))
        check_choice("condition", config.condition, ("max_action", "none"))

    def _build(self) -> dict[str, nn.Module]:
        c = self.config
        agent = self._make_agent()
        return {
            "agent": agent,
            "residual_agent": copy.deepcopy(agent),
            "mixer": self._make_mixer(c.mixer),
            "residual_mixer": self._make_residual_mixer(),
            "central_agent": self._make_agent(),
            "central_mixer": self._make_mixer(c.central_mixer),
        }

    def _has_target(self, name: str) -> bool:
        return name in ("central_agent", "central_mixer")

    def _make_residual_mixer(self) -> Mixer:
        c, s = self.config, self.scheme
        if c.residual_mixer != "resz_central_ff":
            return self._make_mixer(c.residual_mixer)
        sizes = (c.n_quantiles, c.central_mixing_embed_dim)  # the registered form has as many as targets
        return ResZCentralFF(s.n_agents, s.state_dim, *sizes, use_orthogonal=c.use_orthogonal)

    def losses(self, batch: EpisodeBatch) -> dict[str, Tensor]:
        """See `Algorithm.losses`; ``q_tot`` is the mean of ``Z_jt``.

        Also the distributions ``z_tot``, ``z_res``, ``z_central [B, T, 1, N]``, ``z_targets [B, T, 1, N']`` and the
        bootstrap values ``target_z_tot [B, T + 1, 1, N']``, the mask ``w_r [B, T, 1]``, ``greedy_actions
        [B, T + 1, A]`` and ``rewards [B, T, 1]`` as used.
        """
        c = self.config
        names = ("agent", "residual_agent", "central_agent", "target_central_agent")
        live = self._live(batch)
        rows = Rows(live, bootstrap=True)
        states, avail, taken = rows.take(batch.states), rows.take(batch.avail_actions), rows.take(batch.actions)
        with part("unrolls"):
            outputs = self._trunks(batch.obs, batch.last_actions, *names, live=live)
            hidden = {name: rows.take(states_of) for name, states_of in zip(names, outputs, strict=True)}
        with part("quantiles"):
            fractions = {name: self.draw(name, *batch.obs.shape[:2]) for name in names}
            features = {name: self._agent(name).features(rows.take(fractions[name])) for name in names}
            main, residual, central = (
                self._agent(name).quantiles(hidden[name], features[name], taken) for name in names[:3]
            )
        with part("mixer"):
            z_tot, z_res, z_central = (
                put(rows, z)[:, :-1]
                for z in (
                    self._mix("mixer", main, states), self._residual(residual, states),
                    self._mix("central_mixer", central, states),
                )
            )  # fmt: skip

        with torch.no_grad():
            with part("select"):
                by = "agent" if c.double_q else "target_central_agent"
                greedy = self._greedy(by, hidden[by], features[by], avail)
                target = (hidden["target_central_agent"], features["target_central_agent"])
                target_zs = self._agent("target_central_agent").quantiles(*target, greedy)
                greedy = rows.put(greedy)
                masked = self._masked(greedy, batch.actions)
            with part("targets"):
                bootstraps = put(rows, self._mix("target_central_mixer", target_zs, states))
                rewards, targets = self._returns(batch, bootstraps)

        with part("loss"):
            z_jt = z_tot + z_res.masked_fill(masked.unsqueeze(-1), 0)
            # The released code weighs the central quantiles by the agents' fractions, for which they were not made.
            # Where they are of another number they have their own.
            central_at = fractions["agent" if c.n_quantiles == c.n_target_quantiles else "central_agent"][:, :-1]
            qmix_loss = self._loss(z_jt, targets, fractions["agent"][:, :-1], batch, c.w_high)
            central_loss = self._loss(z_central, targets, central_at, batch, c.central_loss)
            terms = errors(z_jt, targets, batch.mask) | {
                "loss": qmix_loss + central_loss, "qmix_loss": qmix_loss, "central_loss": central_loss,
                "z_tot": z_tot, "z_res": z_res, "z_central": z_central, "z_targets": targets,
                "target_z_tot": bootstraps, "w_r": masked.logical_not().to(z_tot.dtype), "greedy_actions": greedy,
                "rewards": rewards,
            }  # fmt: skip
            if not c.residual_negative_abs:
                above = z_res.squeeze(2).clamp(min=0)
                scale = c.loss_scale * c.noopt_loss
                noopt = td_loss(above, torch.zeros_like(above), batch.mask, weights=batch.weights, scale=scale).loss
                terms |= {"loss": terms["loss"] + noopt, "noopt_loss": noopt}
        return terms

    def midpoints(self) -> Tensor:
        """See `Distributional.midpoints`: as many as the residual mixer can take."""
        if self.config.residual_mixer != "resz_central_ff":
            return super().midpoints()
        weight = self._agent("agent").fc2.weight
        return midpoints(self.config.n_quantiles, dtype=weight.dtype, device=weight.device)

    @torch.inference_mode()
    def joint_quantiles(
        self, obs: Tensor, last_actions: Tensor, avail_actions: Tensor, states: Tensor, actions: Tensor
    ) -> dict[str, Tensor]:
        """See `Distributional.joint_quantiles`: ``Z_jt``, ``Z_tot``, ``w_r Z_r``; and ``Z*``, at fractions of its own.

        ``w_r`` is 0 at greedy actions.
        """
        names = ("agent", "residual_agent", "central_agent")
        hidden = self._trunks(obs, last_actions, *names)
        at = self.midpoints()
        central_at = midpoints(self.config.n_target_quantiles, dtype=at.dtype, device=at.device)
        main, residual, central = (
            self._agent(name).quantiles(states_of, where, actions)
            for name, states_of, where in zip(names, hidden, (at, at, central_at), strict=True)
        )
        qs = self._agent("agent").means(hidden[0], at)
        greedy = qs.masked_fill(avail_actions == 0, -torch.inf).argmax(-1)
        z_tot, z_res = self._mix("mixer", main, states), self._residual(residual, states)
        if self.config.condition != "none":
            z_res = z_res.masked_fill((greedy == actions).all(-1)[..., None, None], 0)
        z_star = self._mix("central_mixer", central, states)
        return {"Z_jt": z_tot + z_res, "Z_tot": z_tot, "w_r Z_r": z_res, "Z*": z_star}

    def _residual(self, residual_zs: Tensor, states: Tensor) -> Tensor:
        """``Z_r [..., 1, N]`` of the residual agents' quantiles ``[..., A, N]``."""
        z_res = self._mix("residual_mixer", residual_zs, states)
        return -z_res.abs() if self.config.residual_negative_abs else z_res

    def _masked(self, greedy: Tensor, actions: Tensor) -> Tensor:
        """``[B, T, 1]`` bool: where ``w_r`` is 0, of actions ``[B, T + 1, A]``."""
        if self.config.condition == "none":
            return torch.zeros_like(actions[:, :-1, :1], dtype=torch.bool)
        against = greedy[:, 1:] if self.config.compat == "released" else greedy[:, :-1]
        return (actions[:, :-1] == against).all(-1, keepdim=True)
