"""What all algorithms share: networks and their targets, acting, the training step, state for exact resume."""

from __future__ import annotations

import abc
import copy
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastmix import agents, mixers
from fastmix._parts import part
from fastmix.algorithms.batch import EpisodeBatch, Scheme
from fastmix.algorithms.config import AlgorithmConfig
from fastmix.algorithms.optimiser import Optimiser
from fastmix.ops import recurrent, select
from fastmix.ops.recurrent import RecurrentOutput, Stepper


class Algorithm(abc.ABC):
    """A learner of agents' utilities from whole episodes.

    A subclass names its networks in `_build` and computes its loss in `losses`; nothing else.

    Args:
        scheme: sizes of the environment.
        config: hyper-parameters.
        device: where networks live and train.
        seed: decides the initial weights; the global random state is left alone.
    """

    defaults: ClassVar[dict[str, Any]] = {}
    """What this algorithm sets over every preset."""
    preset_overrides: ClassVar[dict[str, dict[str, Any]]] = {}
    """Preset name -> what this algorithm sets over that preset."""

    def __init__(
        self, scheme: Scheme, config: AlgorithmConfig, *, device: torch.device | str = "cpu", seed: int = 0
    ) -> None:
        self.scheme, self.config, self.device = scheme, config, torch.device(device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            online = self._build()
        self.networks: dict[str, nn.Module] = {name: network.to(self.device) for name, network in online.items()}
        self.online = tuple(online)
        for name in online:
            self.networks[f"target_{name}"] = copy.deepcopy(self.networks[name]).requires_grad_(False)
        self.optimiser = self._make_optimiser()
        self.updates = 0
        self._stepper: Stepper | None = None  # the acting agent's packed weights

    @abc.abstractmethod
    def _build(self) -> dict[str, nn.Module]:
        """The online networks, in the order of the optimiser's parameters; each gets a target copy."""

    @abc.abstractmethod
    def losses(self, batch: EpisodeBatch) -> dict[str, Tensor]:
        """The loss (``"loss"``, 0-dim, with gradient) and the tensors it was made of.

        Always there: ``td_error``, ``targets`` and ``q_tot``, each ``[B, T, K]``; ``K`` is 1, or ``A`` without a mixer.
        """

    def step(self, batch: EpisodeBatch, *, detailed: bool = False) -> dict[str, Tensor]:
        """One training step on ``batch``: loss, gradients, joint clip, optimiser. Nothing waits for the device.

        Returns:
            0-dim tensors ``loss`` and ``grad_norm`` (before the clip), the masked ``td_error [B, T, K]`` and the
            ``mask [B, T, 1]``; with ``detailed`` also means over live transitions: ``td_error_abs``, ``q_tot_mean``,
            ``target_mean``.
        """
        return self.finish(self.learn(batch), detailed=detailed)

    def learn(self, batch: EpisodeBatch) -> dict[str, Tensor]:
        """The part of `step` that happens on the device alone, from the unrolls to the optimiser.

        All it reads and writes are tensors that stay where they are, none of it looks at a value or at a count kept by
        the host, so a CUDA graph can hold it (`fastmix.train.learner`). Returns what `finish` takes.
        """
        self.optimiser.zero_grad()
        terms = self.losses(batch)
        terms["loss"].backward()
        kept = {name: terms[name].detach() for name in ("loss", "td_error", "q_tot", "targets")}
        with part("optimiser"):
            grad_norm = self.optimiser.step()
        return kept | {"grad_norm": grad_norm, "mask": batch.mask}

    def finish(self, terms: dict[str, Tensor], *, detailed: bool = False) -> dict[str, Tensor]:
        """The part of `step` that is the host's: count it, and work out what is asked for from what `learn` returned.

        The ``detailed`` means are made here and not in `learn`, so that a captured step neither pays for them at every
        replay nor has to be captured a second time with them.
        """
        self.updates += 1
        result = {name: terms[name] for name in ("loss", "grad_norm", "td_error", "mask")}
        if detailed:
            live = terms["mask"] != 0
            count = live.expand_as(terms["td_error"]).sum()
            for name, key in (("td_error_abs", "td_error"), ("q_tot_mean", "q_tot"), ("target_mean", "targets")):
                values = terms[key].abs() if key == "td_error" else terms[key]
                result[name] = values.masked_fill(~live, 0).sum() / count
        return result

    @torch.no_grad()
    def update_targets(self) -> None:
        """Copy every online network into its target."""
        for name in self.online:
            source: list[Tensor] = [*self.networks[name].parameters()]
            if source:
                torch._foreach_copy_([*self.networks[f"target_{name}"].parameters()], source)

    def initial_hidden(self, n: int) -> Tensor:
        """Zero hidden state of ``n`` environments, ``[n, A, D]``."""
        return torch.zeros(n, self.scheme.n_agents, self.config.rnn_hidden_dim, device=self.device)

    @torch.inference_mode()
    def act(
        self,
        obs: Tensor,
        last_actions: Tensor,
        avail_actions: Tensor,
        hidden: Tensor,
        *,
        epsilon: float,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Epsilon-greedy actions of all agents in ``n`` environments.

        Each agent, independently, takes a uniformly drawn available action with probability ``epsilon``, else its
        greedy one.

        Args:
            obs: ``[n, A, O]``.
            last_actions: ``[n, A]`` int64, -1 before the first action.
            avail_actions: ``[n, A, U]``, nonzero where available; every agent needs at least one.
            hidden: ``[n, A, D]``, from `initial_hidden` or the last call.
            epsilon: exploration, in [0, 1].
            generator: source of randomness; None uses torch's global one.

        Returns:
            actions ``[n, A]`` int64 and the new hidden state.
        """
        q, hidden = self._utilities(obs, last_actions, hidden)
        actions = select(q, avail_actions).greedy_actions
        if epsilon > 0:
            explore = torch.rand(actions.shape, generator=generator, device=self.device) < epsilon
            # The draw of torch.multinomial, whose checks of its arguments would make the host wait for the device.
            clocks = torch.empty(avail_actions.shape, device=self.device).exponential_(generator=generator)
            actions = torch.where(explore, (avail_actions != 0).div(clocks).argmax(-1), actions)
        return actions, hidden

    @torch.inference_mode()
    def utilities(self, obs: Tensor, last_actions: Tensor | None = None) -> Tensor:
        """Values of every action of every agent over whole sequences from a zero hidden state: ``[B, T, A, U]``.

        Args:
            obs: ``[B, T, A, O]``.
            last_actions: ``[B, T, A]`` int64, -1 for none; None means none at any step.
        """
        if last_actions is None:
            last_actions = torch.full(obs.shape[:3], -1, dtype=torch.int64, device=obs.device)
        return self._unroll(obs, last_actions, "agent")[0].q

    @torch.inference_mode()
    def mix(self, agent_qs: Tensor, states: Tensor) -> Tensor:
        """Joint value ``[..., 1]`` of values ``[..., A]`` in ``states [..., S]``; the sum without a mixer."""
        mixer = self.networks.get("mixer")
        joint: Tensor = agent_qs.sum(-1, keepdim=True) if mixer is None else mixer(agent_qs, states)
        return joint

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that decides the next step: networks, targets, optimiser, counters; flat, by name."""
        state = {f"{name}.{k}": v for name, network in self.networks.items() for k, v in network.state_dict().items()}
        state |= {f"optimiser.{k}": v for k, v in self.optimiser.state_dict().items()}
        return state | {"updates": torch.tensor(self.updates)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over what `state_dict` gave.

        Raises:
            RuntimeError, ValueError: the state belongs to another algorithm, scheme or configuration.
        """
        for name, network in self.networks.items():
            network.load_state_dict(_under(f"{name}.", state))
        self.optimiser.load_state_dict(_under("optimiser.", state))
        self.updates = int(state["updates"])

    def double(self) -> Algorithm:
        """Networks and optimiser state in float64, for tests of exactness; returns self."""
        for network in self.networks.values():
            network.double()
        self.optimiser = self._make_optimiser()
        self._stepper = None
        return self

    def _make_optimiser(self) -> Optimiser:
        c = self.config
        parameters = [p for name in self.online for p in self.networks[name].parameters()]
        return Optimiser(
            parameters,
            kind=c.optimizer,
            lr=c.lr,
            alpha=c.optim_alpha,
            eps=c.optim_eps,
            weight_decay=c.weight_decay,
            clip=c.grad_norm_clip,
        )

    def _make_agent(self) -> agents.Agent:
        c, s = self.config, self.scheme
        inputs = s.obs_dim + s.n_actions * c.obs_last_action + s.n_agents * c.obs_agent_id
        options: dict[str, Any] = {}
        if c.agent != "ff":
            options = {"use_layer_norm": c.use_layer_norm, "use_rnn": c.use_rnn}
            options |= {"use_orthogonal": c.use_orthogonal, "gain": c.gain}
        return agents.REGISTRY[c.agent](inputs, s.n_actions, c.rnn_hidden_dim, **options)

    def _make_mixer(self) -> mixers.Mixer:
        c, s = self.config, self.scheme
        if c.mixer == "vdn":
            return mixers.VDNMixer()
        options: dict[str, Any] = {"mixing_embed_dim": c.mixing_embed_dim, "hypernet_embed": c.hypernet_embed}
        if c.mixer != "nmix":
            options["hypernet_layers"] = c.hypernet_layers
        if c.mixer != "qmix_noabs":
            options |= {"positivity": c.qmix_pos_func, "beta": c.qmix_pos_func_beta}
        return mixers.REGISTRY[c.mixer](s.n_agents, s.state_dim, use_orthogonal=c.use_orthogonal, **options)

    def _unroll(
        self, obs: Tensor, last_actions: Tensor, *names: str, hidden: Tensor | None = None
    ) -> list[RecurrentOutput]:
        """The agent networks ``names`` over whole sequences; all recurrent ones in one call."""
        networks = [self.networks[name] for name in names]
        actions, ids = last_actions if self.config.obs_last_action else None, self.config.obs_agent_id
        parameters = [n.params() for n in networks if isinstance(n, agents.RNNAgent) and n.is_recurrent]
        if len(parameters) == len(networks):
            start = None if hidden is None else [hidden] * len(networks)
            return recurrent(obs, parameters, start, last_actions=actions, agent_ids=ids)
        return [n.unroll(obs, hidden, actions, ids) for n in networks if isinstance(n, agents.Agent)]

    def _utilities(self, obs: Tensor, last_actions: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """One acting step: ``[n, A, U]`` and the new hidden state."""
        agent, c = self.networks["agent"], self.config
        if isinstance(agent, agents.RNNAgent) and agent.is_recurrent:
            if self._stepper is None:
                ids = self.scheme.n_agents if c.obs_agent_id else 0
                self._stepper = Stepper(agent.params(), self.scheme.obs_dim, ids)
            return self._stepper(obs, hidden, last_actions if c.obs_last_action else None)
        output = self._unroll(obs.unsqueeze(1), last_actions.unsqueeze(1), "agent", hidden=hidden)[0]
        return output.q.squeeze(1), output.hidden


def _under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The entries of ``state`` whose names start with ``prefix``, without it."""
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
