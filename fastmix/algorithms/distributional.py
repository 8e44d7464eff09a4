"""What algorithms share whose agents hold the return's distribution: fractions, acting by means, joint quantiles."""

from __future__ import annotations

import abc
from typing import Any, ClassVar, Final

import torch
from torch import Tensor

from fastmix import agents, mixers
from fastmix.algorithms.base import GREEDY_KINDS, Algorithm
from fastmix.algorithms.batch import EpisodeBatch, Scheme
from fastmix.algorithms.config import AlgorithmConfig
from fastmix.algorithms.rows import Rows
from fastmix.ops import quantile_loss, select
from fastmix.ops._checks import check_choice
from fastmix.ops.implicit import QuantileFeatures

PURPOSES: Final = {
    "agent": "policy", "residual_agent": "policy", "central_agent": "target", "target_agent": "target",
    "target_central_agent": "target",
}  # fmt: skip
"""Network -> what its quantiles are for, which decides their number; each has a stream of fractions of its own."""


class Distributional(Algorithm):
    """Agents are implicit quantile networks: ``Z_i(a; f)`` is the quantile of the return at the fraction ``f``.

    Every network draws fractions of its own at every stored step, which all agents share where they are mixed, from
    a counter that is part of the algorithm's state: a resumed run draws what the run would have drawn. Actions are
    chosen by means over quantiles. A loss never needs the quantiles of all actions: those of the action taken, and
    the means of all, which are linear in the fractions' features.
    """

    defaults: ClassVar[dict[str, Any]] = {"agent": "iqn_rnn", "use_rnn": True, "loss_scale": 1.0}
    agent_kinds: ClassVar[tuple[str, ...]] = ("iqn_rnn",)

    def __init__(
        self, scheme: Scheme, config: AlgorithmConfig, *, device: torch.device | str = "cpu", seed: int = 0
    ) -> None:
        super().__init__(scheme, config, device=device, seed=seed)
        # Key and number of the draw: on the device, so that a captured step draws anew at every replay.
        self.draws = torch.tensor([seed, 0], dtype=torch.int64, device=self.device)

    @classmethod
    def check(cls, config: AlgorithmConfig) -> None:
        """See `Algorithm.check`."""
        super().check(config)
        check_choice("targets", config.targets, GREEDY_KINDS)
        check_choice("weighting", config.weighting, ("none",))

    def learn(self, batch: EpisodeBatch) -> dict[str, Tensor]:
        """See `Algorithm.learn`; the next call draws other fractions."""
        terms = super().learn(batch)
        self.draws[1].add_(1)
        return terms

    def state_dict(self) -> dict[str, Tensor]:
        """See `Algorithm.state_dict`."""
        return super().state_dict() | {"draws": self.draws}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """See `Algorithm.load_state_dict`."""
        super().load_state_dict(state)
        self.draws.copy_(state["draws"])

    @torch.inference_mode()
    def utilities(self, obs: Tensor, last_actions: Tensor | None = None) -> Tensor:
        """See `Algorithm.utilities`: means over the quantiles at the fractions that `joint_quantiles` has."""
        if last_actions is None:
            last_actions = torch.full(obs.shape[:3], -1, dtype=torch.int64, device=obs.device)
        (hidden,) = self._trunks(obs, last_actions, "agent")
        return self._agent("agent").means(hidden, self.midpoints())

    @torch.inference_mode()
    def joint_values(
        self, obs: Tensor, last_actions: Tensor, avail_actions: Tensor, states: Tensor, actions: Tensor
    ) -> dict[str, Tensor]:
        """See `Algorithm.joint_values`: means of `joint_quantiles`, by names such as ``E[Z_jt]``."""
        quantiles = self.joint_quantiles(obs, last_actions, avail_actions, states, actions)
        return {f"E[{name}]": z.mean(-1) for name, z in quantiles.items()}

    @abc.abstractmethod
    def joint_quantiles(
        self, obs: Tensor, last_actions: Tensor, avail_actions: Tensor, states: Tensor, actions: Tensor
    ) -> dict[str, Tensor]:
        """The learnt distributions of joint actions, as quantiles at `midpoints`: each ``[N, T, 1, K]``.

        The first is that of the return; arguments are those of `joint_values`.
        """

    def draw(self, name: str, episodes: int, steps: int, draws: Tensor | None = None) -> Tensor:
        """Fractions of the network ``name`` at every stored step: ``[B, T + 1, N]``, or ``[B, T + 1, A, N]``.

        Args:
            name: an agent network.
            episodes, steps: ``B`` and ``T + 1``.
            draws: key and number of the draw; None for those of the next step.
        """
        key, stream = self.draws if draws is None else draws, list(PURPOSES).index(name)
        return self._agent(name).draw(PURPOSES[name], key, episodes, steps, self.scheme.n_agents, stream=stream)

    def midpoints(self) -> Tensor:
        """The fixed fractions ``[K]`` at which what has been learnt is looked at."""
        return self._agent("agent").midpoints("approx")

    def _utilities(
        self, obs: Tensor, last_actions: Tensor, hidden: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        _, hidden = super()._utilities(obs, last_actions, hidden, generator)
        agent = self._agent("agent")
        if self.config.acting_fractions == "midpoints":
            fractions = agent.midpoints("approx")
        else:
            own = hidden.shape[:2] if agent.per_agent_fractions else hidden.shape[:1]
            size = (*own, self.config.n_approx_quantiles)
            fractions = torch.rand(size, generator=generator, dtype=hidden.dtype, device=self.device)
        return agent.means(hidden, fractions), hidden

    def _agent(self, name: str) -> agents.IQNRNNAgent:
        agent = self.networks[name]
        assert isinstance(agent, agents.IQNRNNAgent)
        return agent

    def _trunks(self, obs: Tensor, last_actions: Tensor, *names: str, live: Tensor | None = None) -> list[Tensor]:
        """Hidden states ``[B, T, A, D]`` of the agent networks ``names``, in one call; see `Algorithm._unroll`."""
        networks = [self._agent(name) for name in names]
        outputs = self._recur(obs, last_actions, networks, return_hidden_states=True, live=live)
        states = [output.hidden_states for output in outputs]
        return [hidden for hidden in states if hidden is not None]

    def _greedy(self, name: str, hidden: Tensor, features: QuantileFeatures, avail_actions: Tensor) -> Tensor:
        """``[..., A]``: the actions whose mean over quantiles is largest by the network ``name``."""
        return select(self._agent(name).means(hidden, features), avail_actions).greedy_actions

    def _loss(self, z: Tensor, targets: Tensor, fractions: Tensor, batch: EpisodeBatch, factor: float) -> Tensor:
        """The quantile loss of ``z [B, T, K, N]`` at fractions ``[B, T, N]``, or ``[B, T, A, N]``; 0-dim."""
        c = self.config
        at = fractions if fractions.dim() == 4 else fractions.unsqueeze(2)
        return quantile_loss(
            z, targets, at, batch.mask, kappa=c.kappa, weights=batch.weights, scale=c.loss_scale * factor
        ).loss

    def _mix(self, name: str, agent_zs: Tensor, states: Tensor) -> Tensor:
        """``[..., 1, N]`` of the agents' ``[..., A, N]``; themselves where there is no mixer."""
        mixer = self.networks.get(name)
        if mixer is None:
            return agent_zs
        assert isinstance(mixer, mixers.QuantileMixer)
        z_tot: Tensor = mixer(agent_zs, states)
        return z_tot


def put(rows: Rows, z: Tensor) -> Tensor:
    """`Rows.put` of distributions ``[N, K, quantiles]``: ``[B, T, K, quantiles]``."""
    return rows.put(z.flatten(-2)).unflatten(-1, z.shape[-2:])


def errors(z_tot: Tensor, targets: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """What `Algorithm.losses` always has, of distributions ``[B, T, K, N]`` and ``[B, T, K, N']``: their means."""
    with torch.no_grad():
        q_tot, target_means = z_tot.mean(-1), targets.mean(-1)
        td_error = (mask * (q_tot - target_means)).masked_fill(mask == 0, 0)
    return {"q_tot": q_tot, "targets": target_means, "td_error": td_error}
