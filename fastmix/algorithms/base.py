"""What all algorithms share: networks and their targets, acting, the training step, state for exact resume."""

from __future__ import annotations

import abc
import copy
import dataclasses
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, ClassVar, Final

import torch
from torch import Tensor, nn

from fastmix import agents, mixers
from fastmix._parts import part
from fastmix.algorithms.batch import EpisodeBatch, Scheme
from fastmix.algorithms.config import AlgorithmConfig
from fastmix.algorithms.optimiser import Optimiser
from fastmix.algorithms.rows import episode_lengths, live_steps
from fastmix.algorithms.standardise import RunningMoments
from fastmix.ops import recurrent, returns, select
from fastmix.ops._checks import check_choice
from fastmix.ops.recurrent import RecurrentOutput, Stepper

GREEDY_KINDS: Final = ("one_step", "n_step", "td_lambda")
"""Kinds of targets that bootstrap from values of greedy actions only"""


class Algorithm(abc.ABC):
    """A learner of agents' utilities from whole episodes.

    A subclass names its networks in `_build` and computes its loss in `losses`, and says in `joint_values` what it has
    learnt of joint actions.

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
    mixer_kinds: ClassVar[tuple[str, ...]] = ()
    """Kinds of `fastmix.mixers.REGISTRY` that may mix its utilities."""
    agent_kinds: ClassVar[tuple[str, ...]] = ("rnn", "n_rnn", "ff")
    """Kinds of `fastmix.agents.REGISTRY` that may have them."""

    def __init__(
        self, scheme: Scheme, config: AlgorithmConfig, *, device: torch.device | str = "cpu", seed: int = 0
    ) -> None:
        self.scheme, self.config, self.device = scheme, config, torch.device(device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            online = self._build()
        self.networks: dict[str, nn.Module] = {name: network.to(self.device) for name, network in online.items()}
        self.online = tuple(online)
        self.targeted = tuple(name for name in online if self._has_target(name))
        for name in self.targeted:
            self.networks[f"target_{name}"] = copy.deepcopy(self.networks[name]).requires_grad_(False)
        # Padding is left out where the host may look at numbers and shapes may differ from step to step.
        self.skips_padding = self.device.type == "cpu"
        self.reward_moments = RunningMoments(self.device) if config.standardise_rewards else None
        self.optimiser = self._make_optimiser()
        self.updates = 0
        self._stepper: Stepper | None = None  # the acting agent's packed weights

    @abc.abstractmethod
    def _build(self) -> dict[str, nn.Module]:
        """The online networks, in the order of the optimiser's parameters."""

    def _has_target(self, name: str) -> bool:
        """Whether the online network ``name`` gets a target copy: only those that the loss reads are there."""
        return True

    @classmethod
    def check(cls, config: AlgorithmConfig) -> None:
        """Raise ValueError naming a hyper-parameter that this algorithm cannot have; `configure` calls it."""
        check_choice("mixer", config.mixer, cls.mixer_kinds)
        check_choice("agent", config.agent, cls.agent_kinds)

    @abc.abstractmethod
    def losses(self, batch: EpisodeBatch) -> dict[str, Tensor]:
        """The loss (``"loss"``, 0-dim, with gradient) and the tensors it was made of.

        Always there: ``td_error``, ``targets`` and ``q_tot``, each ``[B, T, K]``; ``K`` is 1, or ``A`` without a mixer.
        Other 0-dim tensors are the terms of the loss.
        """

    def step(self, batch: EpisodeBatch, *, detailed: bool = False) -> dict[str, Tensor]:
        """One training step on ``batch``: loss, gradients, joint clip, optimiser. Nothing waits for the device.

        Returns:
            0-dim tensors ``loss``, each of the terms it is the sum of, and ``grad_norm`` (before the clip); the masked
            ``td_error [B, T, K]`` and the ``mask [B, T, 1]``; with ``detailed`` also means over live transitions:
            ``td_error_abs``, ``q_tot_mean``, ``target_mean``.
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
        kept = {name: terms[name].detach() for name in ("td_error", "q_tot", "targets")}
        kept |= {name: term.detach() for name, term in terms.items() if term.dim() == 0}
        with part("optimiser"):
            grad_norm = self.optimiser.step()
        return kept | {"grad_norm": grad_norm, "mask": batch.mask}

    def finish(self, terms: dict[str, Tensor], *, detailed: bool = False) -> dict[str, Tensor]:
        """The part of `step` that is the host's: count it, and work out what is asked for from what `learn` returned.

        The ``detailed`` means are made here and not in `learn`, so that a captured step neither pays for them at every
        replay nor has to be captured a second time with them.
        """
        self.updates += 1
        result = {name: term for name, term in terms.items() if term.dim() == 0 or name in ("td_error", "mask")}
        if detailed:
            live = terms["mask"] != 0
            count = live.expand_as(terms["td_error"]).sum()
            for name, key in (("td_error_abs", "td_error"), ("q_tot_mean", "q_tot"), ("target_mean", "targets")):
                values = terms[key].abs() if key == "td_error" else terms[key]
                result[name] = values.masked_fill(~live, 0).sum() / count
        return result

    @torch.no_grad()
    def update_targets(self) -> None:
        """Copy every online network that has a target into it."""
        for name in self.targeted:
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
        q, hidden = self._utilities(obs, last_actions, hidden, generator)
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

    @abc.abstractmethod
    def joint_values(
        self, obs: Tensor, last_actions: Tensor, avail_actions: Tensor, states: Tensor, actions: Tensor
    ) -> dict[str, Tensor]:
        """What is learnt of joint actions, by the names that papers give it: each ``[N, T, 1]``.

        The first is what the greedy joint action is meant to be the best of.

        Args:
            obs, last_actions, avail_actions, states: as in an `EpisodeBatch` of ``N`` episodes and ``T`` stored steps.
            actions: ``[N, T, A]`` int64, the joint actions.
        """

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that decides the next step: networks, targets, optimiser, counters; flat, by name."""
        state = {f"{name}.{k}": v for name, network in self.networks.items() for k, v in network.state_dict().items()}
        state |= {f"optimiser.{k}": v for k, v in self.optimiser.state_dict().items()}
        if self.reward_moments is not None:
            state["reward_moments"] = self.reward_moments.values
        return state | {"updates": torch.tensor(self.updates)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over what `state_dict` gave.

        Raises:
            RuntimeError, ValueError: the state belongs to another algorithm, scheme or configuration.
        """
        for name, network in self.networks.items():
            network.load_state_dict(_under(f"{name}.", state))
        self.optimiser.load_state_dict(_under("optimiser.", state))
        if self.reward_moments is not None:
            self.reward_moments.values.copy_(state["reward_moments"])
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
        if c.agent == "iqn_rnn":
            options = {name: getattr(c, name) for name in ("n_quantiles", "n_target_quantiles", "n_approx_quantiles")}
            options |= {"quantile_embed_dim": c.quantile_embed_dim, "per_agent_fractions": c.mixer == "none"}
        elif c.agent != "ff":
            options = {"use_layer_norm": c.use_layer_norm, "use_rnn": c.use_rnn}
            options |= {"use_orthogonal": c.use_orthogonal, "gain": c.gain}
        return agents.REGISTRY[c.agent](inputs, s.n_actions, c.rnn_hidden_dim, **options)

    def _make_mixer(self, kind: str) -> mixers.Mixer:
        """A mixer of a kind of `fastmix.mixers.REGISTRY`; hyper-parameters have the names of PyMARL's namespaces."""
        c, s = self.config, self.scheme
        options: dict[str, Any] = {"mixing_embed_dim": c.mixing_embed_dim, "hypernet_embed": c.hypernet_embed}
        if kind in ("qmix", "nmix"):
            options |= {"positivity": c.qmix_pos_func, "beta": c.qmix_pos_func_beta}
        if kind in ("qmix", "qmix_noabs"):
            options["hypernet_layers"] = c.hypernet_layers
        if kind in ("qmix", "qmix_noabs", "nmix"):
            return mixers.REGISTRY[kind](s.n_agents, s.state_dim, use_orthogonal=c.use_orthogonal, **options)
        own = c.unit_dim or s.state_dim // s.n_agents
        sizes = {"n_agents": s.n_agents, "n_actions": s.n_actions, "state_shape": s.state_dim, "unit_dim": own}
        pymarl2 = {  # which has names of its own for these
            "agent_own_state_size": own, "n_attention_head": c.n_head, "n_head_embedding_layer2": c.n_head,
            "n_key_embedding_layer1": c.n_query_embedding_layer2, "type": "weighted" if c.weighted_head else "",
        }  # fmt: skip
        return mixers.REGISTRY[kind].from_args(SimpleNamespace(**(dataclasses.asdict(c) | sizes | pymarl2)))

    def _returns(
        self, batch: EpisodeBatch, bootstraps: Tensor, behaviour: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Rewards ``[B, T, 1]`` as used and the targets ``[B, T, K]`` they make with values ``[B, T + 1, K]``."""
        c = self.config
        rewards = batch.rewards if self.reward_moments is None else self.reward_moments(batch.rewards, batch.mask)
        targets = returns(
            rewards, batch.terminated, batch.mask, bootstraps, behaviour_qs=behaviour,
            gamma=c.gamma, kind=c.targets, td_lambda=c.td_lambda, n_step=c.n_step,
        )  # fmt: skip
        return rewards, targets

    def _unroll(
        self,
        obs: Tensor,
        last_actions: Tensor,
        *names: str,
        hidden: Tensor | None = None,
        return_hidden_states: bool = False,
        live: Tensor | None = None,
    ) -> list[RecurrentOutput]:
        """The agent networks ``names`` over whole sequences; all recurrent ones in one call.

        Beyond ``live`` transitions ``[B, T - 1]``, and the step after the last of them, nothing must be read.
        """
        networks = [self.networks[name] for name in names]
        gated = [n for n in networks if isinstance(n, agents.RNNAgent) and n.is_recurrent]
        if len(gated) < len(networks):
            actions, ids = last_actions if self.config.obs_last_action else None, self.config.obs_agent_id
            others = [n for n in networks if isinstance(n, agents.Agent)]
            return [n.unroll(obs, hidden, actions, ids, return_hidden_states) for n in others]
        outputs = self._recur(obs, last_actions, gated, hidden, return_hidden_states, live)
        return [n.finish(output) for n, output in zip(gated, outputs, strict=True)]

    def _recur(
        self,
        obs: Tensor,
        last_actions: Tensor,
        networks: Sequence[agents.RNNAgent | agents.IQNRNNAgent],
        hidden: Tensor | None = None,
        return_hidden_states: bool = False,
        live: Tensor | None = None,
    ) -> list[RecurrentOutput]:
        """What `fastmix.ops.recurrent` gives for networks over one input, in one call."""
        c = self.config
        return recurrent(
            obs, [n.params() for n in networks], None if hidden is None else [hidden] * len(networks),
            last_actions=last_actions if c.obs_last_action else None, agent_ids=c.obs_agent_id,
            return_hidden_states=return_hidden_states, lengths=episode_lengths(live),
        )  # fmt: skip

    def _live(self, batch: EpisodeBatch) -> Tensor | None:
        """``[B, T]`` bool, the only transitions to compute, or None for all: some released code reads padding."""
        skips = self.skips_padding and self.config.compat == "paper"
        return live_steps(batch) if skips else None

    def _utilities(
        self, obs: Tensor, last_actions: Tensor, hidden: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        """One acting step: ``[n, A, U]`` and the new hidden state; whatever is random in it is the generator's."""
        agent, c = self.networks["agent"], self.config
        if isinstance(agent, agents.IQNRNNAgent) or (isinstance(agent, agents.RNNAgent) and agent.is_recurrent):
            if self._stepper is None:
                ids = self.scheme.n_agents if c.obs_agent_id else 0
                self._stepper = Stepper(agent.params(), self.scheme.obs_dim, ids)
            return self._stepper(obs, hidden, last_actions if c.obs_last_action else None)
        output = self._unroll(obs.unsqueeze(1), last_actions.unsqueeze(1), "agent", hidden=hidden)[0]
        return output.q.squeeze(1), output.hidden


def _under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The entries of ``state`` whose names start with ``prefix``, without it."""
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
