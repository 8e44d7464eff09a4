"""Whole learner steps: ours, and the same step the public way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn

from fastmix import mixers
from fastmix.agents import RNNAgent
from fastmix.algorithms import Algorithm, AlgorithmConfig, EpisodeBatch, Scheme, make
from fastmix.algorithms.central import CentralCritic
from fastmix.algorithms.q_learning import QLearning
from fastmix.algorithms.qatten import Qatten
from fastmix.algorithms.qplex import QPLEX
from fastmix.algorithms.resq import ResQ
from fastmix.algorithms.weighted_qmix import WeightedQMIX
from fastmix.experiments.bench import baselines
from fastmix.experiments.bench.cases import (
    COMPILERS,
    FLOAT32,
    Case,
    Setting,
    mixing_params,
    ragged_mask,
)
from fastmix.experiments.bench.parity import Error, largest
from fastmix.testing import rms_ratio
from fastmix.testing.bench import Graphed, graphed
from fastmix.testing.shapes import SHAPES
from fastmix.train.learner import Delivery, Learner

WHOLE: Final = "whole"
WITH_BASELINE: Final = (
    "iql", "vdn", "qmix", "qmix_5", "qplex", "cw_qmix", "ow_qmix", "cw_qmix_5", "ow_qmix_5", "resq", "resq_mse",
    "resq_vdn", "resq_vdn_mse", "powqmix", "powqmix_opt",
)  # fmt: skip
"""Algorithms whose public step is written in `fastmix.baselines`"""

BASELINES: Final = ("eager", *COMPILERS, WHOLE)
"""What `step` compares with; `WHOLE` is the public step with all of its loss compiled, which takes minutes."""
NOTES: Final = {
    "compile": "compile: the agent's cell and the mixer are compiled; loops over time and the optimiser are not",
    "autotune": "autotune: the same cell and mixer with the kernels that measure best",
    WHOLE: "whole: the loss is compiled as one graph over all time steps, with its backward pass",
}

_TOLERANCE: Final = Error(1e-9)
_DEVICE_TOLERANCE: Final = {"highest": Error(1e-4), "high": Error(5e-3)}
"""of loss and gradient norm in float32 on a CUDA device"""
_SEED: Final = 0


def step(
    algo: str,
    shape: str,
    batch_size: int | None = None,
    steps: int | None = None,
    against: tuple[str, ...] = ("eager", "compile"),
    preset: str = "pymarl2",
    setting: Setting = FLOAT32,
) -> Case:
    """One training step of ``algo`` on a batch of random episodes, the longest with ``steps`` transitions.

    The errors of the case compare steps of ours and of the public way from the same weights on a small batch: in
    float64 loss, gradient norm and every parameter afterwards; on a CUDA device loss and gradient norm of either in
    float32 with those of the public way in float64. There ``ours graph`` is what `fastmix.train` does, and what the
    public step, which is launched call by call, is compared with. ``eager graph`` and its like are the public step
    captured whole, with the optimiser's capturable form.

    Raises:
        ValueError: an unknown baseline, or an algorithm whose public form is not among the baselines.
    """
    unknown = set(against) - set(BASELINES)
    if unknown:
        raise ValueError(f"baseline must be one of {', '.join(BASELINES)}, got {', '.join(sorted(unknown))}")
    sizes = SHAPES[shape]
    batch_size, steps = batch_size or sizes.batch_size, steps or sizes.steps
    scheme = Scheme(sizes.n_agents, sizes.n_actions, sizes.obs_dim, sizes.state_dim, steps)
    on_device = setting.device == "cuda"
    with default_dtype(setting.dtype):
        build = partial(make, algo, scheme, preset=preset, seed=_SEED, device=setting.device)
        ours = build()
        batch = random_batch(scheme, batch_size).to(setting.device)
        contestants: dict[str, Callable[[], object]] = {"ours": setting.entered(lambda: ours.step(batch))}
        if on_device:
            contestants["ours graph"] = setting.entered(_replayed(build(), batch))
        if set(against) - {"eager"}:
            torch.compiler.reset()
        for name in against:
            contestants |= _public_steps(name, ours, batch, setting)
    small = Scheme(*scheme_sizes(scheme), episode_limit=min(steps, 8))
    errors = {"ours": partial(_step_error, algo, small, preset, setting)}
    if on_device:
        errors["eager"] = partial(_step_error, algo, small, preset, setting, public=True)
    return Case(
        f"step {algo}",
        "step",
        shape,
        {"episodes": batch_size, "steps": steps},
        contestants,
        errors,
        _DEVICE_TOLERANCE[setting.precision] if on_device else _TOLERANCE,
        "; ".join([f"preset {preset}", *(NOTES[name] for name in against if name in NOTES)]),
        setting=setting,
        main="ours graph" if on_device else "ours",
    )


class Captured:
    """A call that is captured in a CUDA graph when it is made for the first time, and replayed from then on."""

    def __init__(self, call: Callable[[], object]) -> None:
        self._call = call
        self._graph: Graphed | None = None

    def __call__(self) -> None:
        """Capture or replay."""
        if self._graph is None:
            self._graph = graphed(self._call)
        self._graph()


def step_error(
    algo: str,
    scheme: Scheme,
    preset: str,
    batch_size: int = 4,
    setting: Setting = FLOAT32,
    public: bool = False,
) -> float:
    """Largest deviation between our step and the public one, over two steps from the same weights; see `step`.

    With ``public``, on a CUDA device, of the public step there.
    """
    with default_dtype(torch.float64):
        ours = make(algo, scheme, preset=preset, seed=_SEED)
        perturb_targets(ours)
        learner = public_learner(ours, scheme)
        batch = random_batch(scheme, batch_size)
        episodes = public_batch(batch, scheme.n_actions)
        weights = {name: network.state_dict() for name, network in ours.networks.items()}
        weights = {name: {key: value.clone() for key, value in state.items()} for name, state in weights.items()}
        if setting.device == "cuda":
            torch.set_default_dtype(torch.float32)
            ours = make(algo, scheme, preset=preset, seed=_SEED, device=setting.device)
            for name, network in ours.networks.items():
                network.load_state_dict(weights[name])
            batch = _rounded(batch).to(setting.device)
        tested: Callable[[], Mapping[str, Tensor]] = partial(ours.step, batch)
        if public:
            tested = partial(public_learner(ours, scheme).step, public_batch(batch, scheme.n_actions))
        errors = []
        for _ in range(2):
            logged, expected = setting.entered(tested)(), learner.step(episodes)
            errors += [rms_ratio(logged[name], expected[name]) for name in ("loss", "grad_norm")]
        if setting.device == "cpu":
            errors += [rms_ratio(a, b) for a, b in parameter_pairs(ours, learner)]
    return largest(errors)


def _step_error(algo: str, scheme: Scheme, preset: str, setting: Setting, public: bool = False) -> Error:
    return Error(step_error(algo, scheme, preset, setting=setting, public=public))


def _public_steps(name: str, ours: Algorithm, batch: EpisodeBatch, setting: Setting) -> dict[str, Callable[[], object]]:
    """The public step as ``name`` of `BASELINES` says, on a CUDA device also captured whole."""
    episodes = public_batch(batch, ours.scheme.n_actions)

    def build(capturable: bool) -> Callable[[], object]:
        learner = public_learner(ours, ours.scheme)
        for group in learner.optimizer.param_groups:
            group["capturable"] = capturable
        if name in COMPILERS:
            learner.compile(COMPILERS[name])
        elif name == WHOLE:
            learner.compile_loss()
        return setting.entered(lambda: learner.step(episodes))

    if setting.device != "cuda":
        return {name: build(False)}
    if name == WHOLE:  # compiled once
        call = build(True)
        return {name: call, f"{name} graph": Captured(call)}
    return {name: build(False), f"{name} graph": Captured(build(True))}


def _rounded(batch: EpisodeBatch) -> EpisodeBatch:
    """The batch with its float64 tensors in float32."""
    tensors = {f.name: getattr(batch, f.name) for f in fields(batch)}
    return replace(batch, **{name: t.float() for name, t in tensors.items() if t is not None and t.is_floating_point()})


def _replayed(algorithm: Algorithm, batch: EpisodeBatch) -> Callable[[], object]:
    """A training step as `fastmix.train` makes it on a CUDA device: captured once, then replayed.

    The episodes lie ready on the device, as they do for the public way.
    """
    learner, delivery = Learner(algorithm, graphs=True), Delivery("batch", lambda: batch)
    return lambda: learner.step(delivery)


def public_learner(ours: Algorithm, scheme: Scheme) -> Any:
    """The public way's learner with copies of the weights of ``ours``.

    Raises:
        ValueError: ``ours`` has a setting that the baselines do not know.
    """
    learner, settings = _public_form(ours)
    config = baselines.load("learner").PublicConfig(**settings)
    built = learner(config, {name: _public_network(ours.networks[name], ours.config, scheme) for name in ours.online})
    with torch.no_grad():
        for mine, public in parameter_pairs(ours, built):
            public.copy_(mine)
    return built


def parameter_pairs(ours: Algorithm, learner: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Every parameter of ours with its counterpart, online and target networks."""
    for name, network in ours.networks.items():
        public = learner.networks[name]
        if isinstance(network, mixers.NMixer):  # the same network under other names
            for a, b in zip(network.params(), mixing_params(public), strict=True):
                assert a is not None and b is not None  # both layers of its hypernetworks are always there
                yield a, b
        else:
            theirs = dict(public.named_parameters())
            for key, parameter in network.named_parameters():
                yield parameter, theirs[key]


def random_batch(scheme: Scheme, batch_size: int) -> EpisodeBatch:
    """Ragged random episodes in the default dtype, the longest as long as the episode limit.

    Padded steps are as replay hands them out: zeros, and no action available.
    """
    generator_state = torch.get_rng_state()
    torch.manual_seed(_SEED)
    B, T = batch_size, scheme.episode_limit
    A, U = scheme.n_agents, scheme.n_actions
    mask, terminated = ragged_mask(B, T, Setting(dtype=torch.get_default_dtype()))
    actions = torch.randint(U, (B, T + 1, A))
    last_actions = torch.full_like(actions, -1)
    last_actions[:, 1:] = actions[:, :-1]
    avail_actions = (torch.rand(B, T + 1, A, U) < 0.6).scatter_(-1, actions.unsqueeze(-1), True)
    stored = torch.cat([torch.ones(B, 1, 1), mask], 1)  # the step after the last transition is stored too
    batch = EpisodeBatch(
        obs=torch.randn(B, T + 1, A, scheme.obs_dim) * stored.unsqueeze(-1),
        states=torch.randn(B, T + 1, scheme.state_dim) * stored,
        actions=actions * stored.long(),
        last_actions=last_actions,
        avail_actions=avail_actions & stored.bool().unsqueeze(-1),
        rewards=torch.randn(B, T, 1) * mask,
        terminated=terminated,
        mask=mask,
    )
    torch.set_rng_state(generator_state)
    return batch


def public_batch(batch: EpisodeBatch, n_actions: int) -> Any:
    """The same episodes as a public replay buffer stores them."""

    def one_hot(actions: Tensor) -> Tensor:
        return (actions.unsqueeze(-1) == torch.arange(n_actions, device=actions.device)).to(batch.obs.dtype)

    return baselines.load("learner").PublicBatch(
        obs=batch.obs,
        state=batch.states,
        actions=batch.actions.unsqueeze(-1),
        actions_onehot=one_hot(batch.actions),
        last_actions_onehot=one_hot(batch.last_actions),
        avail_actions=batch.avail_actions.int(),
        reward=batch.rewards,
        terminated=batch.terminated,
        mask=batch.mask,
    )


@torch.no_grad()
def perturb_targets(ours: Algorithm) -> None:
    """Make the target networks differ from the online ones, as they do in training."""
    for name, network in ours.networks.items():
        if name.startswith("target_"):
            for parameter in network.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))


def scheme_sizes(scheme: Scheme) -> tuple[int, int, int, int]:
    """All of the scheme but the episode limit, in order."""
    return scheme.n_agents, scheme.n_actions, scheme.obs_dim, scheme.state_dim


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """New tensors and parameters have ``dtype`` inside the block."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(previous)


def _public_form(ours: Algorithm) -> tuple[Any, dict[str, Any]]:
    """The public learner's class and its settings."""
    config = ours.config
    learner, central = baselines.load("learner"), baselines.load("central")
    forms: dict[type[Algorithm], Any] = {
        ResQ: central.ResidualLearner, WeightedQMIX: central.WeightedLearner, QPLEX: learner.DuplexLearner,
        Qatten: None, QLearning: learner.PublicLearner,
    }  # fmt: skip
    form = next((form for kind, form in forms.items() if isinstance(ours, kind)), None)
    if form is None:
        raise ValueError(f"no baseline is written for {type(ours).__name__}; try qmix")
    supported = {
        "agent": config.agent in ("rnn", "n_rnn") and config.use_rnn,
        "targets": config.targets in ("one_step", "td_lambda"),
        "double_q": config.double_q or form is learner.PublicLearner,
        "weighting": config.weighting == "none" or form is central.WeightedLearner,
        "central_action_embed": config.central_action_embed == 1 or not isinstance(ours, CentralCritic),
        "condition": config.condition == "max_action" or not isinstance(ours, ResQ),
        "recogniser_target": not config.recogniser_target,
        "compat": config.compat == "paper" or not isinstance(ours, ResQ),
        "standardise_rewards": not config.standardise_rewards,
        "weight_decay": config.weight_decay == 0,
    }
    for name, known in supported.items():
        if not known:
            raise ValueError(f"no baseline is written for {name} = {getattr(config, name)!r}; try another preset")
    settings = {
        "td_lambda": config.td_lambda if config.targets == "td_lambda" else None,
        "loss_scale": config.loss_scale * (1.0 if form is central.WeightedLearner else config.w_high),
        "optimizer_eps": config.optim_eps,
        "rmsprop_alpha": config.optim_alpha,
    }
    same = (
        "gamma", "double_q", "weighting", "w_high", "w", "central_loss", "recogniser_loss", "tolerance",
        "residual_negative_abs", "noopt_loss", "optimizer", "lr", "grad_norm_clip", "obs_last_action", "obs_agent_id",
    )  # fmt: skip
    return form, settings | {name: getattr(config, name) for name in same}


def _public_network(network: nn.Module, config: AlgorithmConfig, scheme: Scheme) -> nn.Module:
    """The public form of one of our networks, on its device."""
    form = baselines.load("networks")
    agents, actions, states = scheme.n_agents, scheme.n_actions, scheme.state_dim
    built: nn.Module
    match network:
        case RNNAgent():
            norm = network.layer_norm is not None
            built = form.CellAgent(network.input_dim, network.fc2.out_features, network.hidden_dim, norm)
        case mixers.VDNMixer():
            return form.VDNMixer()  # without parameters
        case mixers.QMixer() | mixers.NMixer() if network.positivity == "abs":
            layers = 2 if isinstance(network, mixers.NMixer) else config.hypernet_layers
            built = form.QMixer(agents, states, config.mixing_embed_dim, layers, config.hypernet_embed)
        case mixers.DMAQer():
            built = form.DuplexMixer(
                agents, actions, states, config.hypernet_embed, config.num_kernel, config.adv_hypernet_layers,
                config.adv_hypernet_embed, network.weighted_head, network.is_minus_one,
            )  # fmt: skip
        case mixers.QMixerCentralFF():
            built = form.CentralMixer(agents, states, config.central_mixing_embed_dim)
        case mixers.Recogniser():
            sizes = config.recogniser_embed_dim, config.recogniser_hypernet_embed
            built = form.Recogniser(agents, actions, states, *sizes)
        case _:
            setting = f" with qmix_pos_func = {config.qmix_pos_func!r}" if hasattr(network, "positivity") else ""
            raise ValueError(f"no baseline is written for {type(network).__name__}{setting}; try another preset")
    return built.to(next(network.parameters()).device)
