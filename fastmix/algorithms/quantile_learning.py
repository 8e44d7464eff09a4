"""Q-learning on a joint return distribution: the step that DIQL, DDN and DMIX share."""

from __future__ import annotations

from typing import Any, ClassVar, Final

import torch
from torch import Tensor, nn

from fastmix._parts import part
from fastmix.algorithms.batch import EpisodeBatch
from fastmix.algorithms.distributional import Distributional, errors, put
from fastmix.algorithms.rows import Rows

DFAC: Final[dict[str, Any]] = {"optimizer": "adam", "lr": 5e-4, "optim_eps": 1e-5, "double_q": False}
"""What the public configurations of DFAC set over PyMARL's."""


class QuantileLearning(Distributional):
    """Unroll the agents, mix their distributions, learn towards a bootstrapped one (Sun et al. 2021, DFAC).

    ``Z_tot = mix(Z_i(a_i; f), s)`` and samples ``y`` of the target from ``mix^-(Z_i^-(g_i; f'), s)``, where ``g`` is
    greedy by means of the target agents' quantiles, or of the online ones' (``double_q``). The loss is
    `fastmix.ops.quantile_loss` of both, times ``loss_scale``, as a mean over live transitions (and agents, where
    nothing is mixed). Targets and fractions carry no gradient.
    """

    preset_overrides: ClassVar[dict[str, dict[str, Any]]] = {"pymarl": DFAC, "paper": DFAC}

    def _build(self) -> dict[str, nn.Module]:
        networks: dict[str, nn.Module] = {"agent": self._make_agent()}
        if self.config.mixer != "none":
            networks["mixer"] = self._make_mixer(self.config.mixer)
        return networks

    def losses(self, batch: EpisodeBatch) -> dict[str, Tensor]:
        """See `Algorithm.losses`.

        Also the distributions themselves, ``z_tot [B, T, K, N]`` and ``z_targets [B, T, K, N']``, the bootstrap values
        ``target_z_tot [B, T + 1, K, N']``, ``greedy_actions [B, T + 1, A]`` and ``rewards [B, T, 1]`` as used.
        """
        c, names = self.config, ("agent", "target_agent")
        live = self._live(batch)
        rows = Rows(live, bootstrap=True)
        states, avail = rows.take(batch.states), rows.take(batch.avail_actions)
        with part("unrolls"):
            hidden = self._trunks(batch.obs, batch.last_actions, *names, live=live)
            online, target = (rows.take(states_of) for states_of in hidden)
        agent, target_agent = self._agent("agent"), self._agent("target_agent")
        with part("quantiles"):
            fractions, target_fractions = (self.draw(name, *batch.obs.shape[:2]) for name in names)
            features = agent.features(rows.take(fractions))
            target_features = target_agent.features(rows.take(target_fractions))
            agent_zs = agent.quantiles(online, features, rows.take(batch.actions))
        with part("mixer"):
            z_tot = put(rows, self._mix("mixer", agent_zs, states))[:, :-1]

        with torch.no_grad():
            with part("select"):
                by = ("agent", online, features) if c.double_q else ("target_agent", target, target_features)
                greedy = self._greedy(*by, avail)
                target_zs = target_agent.quantiles(target, target_features, greedy)
            with part("targets"):
                bootstraps = put(rows, self._mix("target_mixer", target_zs, states))
                rewards, targets = self._returns(batch, bootstraps)

        with part("loss"):
            loss = self._loss(z_tot, targets, fractions[:, :-1], batch, c.w_high)
            terms = errors(z_tot, targets, batch.mask)
        return terms | {
            "loss": loss, "z_tot": z_tot, "z_targets": targets, "target_z_tot": bootstraps,
            "greedy_actions": rows.put(greedy), "rewards": rewards,
        }  # fmt: skip

    @torch.inference_mode()
    def joint_quantiles(
        self, obs: Tensor, last_actions: Tensor, avail_actions: Tensor, states: Tensor, actions: Tensor
    ) -> dict[str, Tensor]:
        """See `Distributional.joint_quantiles`: ``Z_jt``, or the sum of the agents' without a mixer."""
        (hidden,) = self._trunks(obs, last_actions, "agent")
        agent_zs = self._agent("agent").quantiles(hidden, self.midpoints(), actions)
        z_tot = self._mix("mixer", agent_zs, states)
        return {"Z_jt": z_tot} if "mixer" in self.networks else {"sum Z_i": z_tot.sum(-2, keepdim=True)}
