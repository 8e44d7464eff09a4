"""How each kind of golden file is rebuilt and compared. A file that neither `RULES` nor `PENDING` names is an error."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastmix
from fastmix import agents, backends, mixers
from fastmix.algorithms import Algorithm, AlgorithmConfig, EpisodeBatch, Scheme, make
from fastmix.ops import returns
from fastmix.testing import assert_close, poisoned_allocations, rms_ratio
from fastmix.testing.golden import Golden

TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-5}

PENDING: Mapping[str, str] = {
    "agent/central_rnn": "arrives with CW-QMIX and OW-QMIX",
    "central_ff": "arrives with CW-QMIX and OW-QMIX",
    "central_atten": "arrives with CW-QMIX and OW-QMIX",
    "learner/max_q_learner/*": "arrives with CW-QMIX and OW-QMIX",
    "qatten_pymarl2": "arrives with Qatten",
    "qatten_pymarl": "arrives with Qatten",
    "learner/*/qatten": "arrives with Qatten",
    "qtran_base": "arrives with QTRAN",
    "qtran_alt": "arrives with QTRAN",
    "learner/qtran_learner/*": "arrives with QTRAN",
    "qplex_*": "arrives with QPLEX",
    "learner/dmaq_qatten_learner/*": "arrives with QPLEX",
    "powqmix_composed": "arrives with POWQMIX",
    "resq.central_*": "arrives with ResQ",
    "resq.learner": "arrives with ResQ",
    "resq.qatten": "arrives with Qatten",
    "resz.*": "arrives with ResZ",
    "dfac.*": "arrives with DDN and DMIX",
    "refil.*": "arrives with REFIL",
    "env.stag_hunt": "arrives with predator-prey",
}
"""Kinds (as `label` names them) that are not implemented yet, and with what they come."""


@dataclass(frozen=True)
class Setting:
    """One way of running a case."""

    backend: str
    dtype: torch.dtype
    device: str
    allowance: Mapping[str, float] = field(default_factory=dict)
    """Name of a gradient -> RMS ratio accepted for it, where `TOLERANCES` asks for what cannot be; see `Rule.run`"""

    def close(self, actual: Tensor, expected: Tensor, name: str, mask: Tensor | None = None) -> None:
        """`assert_close` within the precision of the setting and of the stored value."""
        stored = 2.0**-24 if expected.dtype == torch.float32 else 0.0  # largest relative error of rounding to float32
        tolerance = max(TOLERANCES[self.dtype], self.allowance.get(name, 0.0)) + stored
        assert_close(actual, expected, tolerance, name=name, mask=mask)

    def tensor(self, value: Tensor) -> Tensor:
        """On the device; floating-point values in the dtype."""
        return value.to(self.device, self.dtype if value.is_floating_point() else value.dtype)

    def __str__(self) -> str:
        return f"{self.backend}-{str(self.dtype).removeprefix('torch.')}-{self.device}"


@dataclass(frozen=True)
class Shaken(Setting):
    """The reference in float64 on parameters and inputs that are off by float32 rounding. Asserts nothing.

    The first run is exact; later ones note how far each result moves from it.
    """

    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))
    exact: dict[str, Tensor] = field(default_factory=dict)
    moved: dict[str, float] = field(default_factory=dict)
    """Name -> largest RMS ratio to the exact run; empty during that run"""
    noise: float = 0.0

    def close(self, actual: Tensor, expected: Tensor, name: str, mask: Tensor | None = None) -> None:
        if mask is not None or not expected.is_floating_point():
            return
        if self.noise == 0:
            self.exact[name] = actual.detach().clone()
        else:
            self.moved[name] = max(self.moved.get(name, 0.0), rms_ratio(actual, self.exact[name]))

    def tensor(self, value: Tensor) -> Tensor:
        clean = super().tensor(value)
        if self.noise == 0 or not clean.is_floating_point():
            return clean
        shaken = clean * (1 + self.noise * torch.randn(clean.shape, generator=self.generator, dtype=clean.dtype))
        return torch.where(clean == clean.round(), clean, shaken)  # flags and counts are exact in any precision


@dataclass(frozen=True)
class Rule:
    """Rebuilds the files of a kind and compares; raises `AssertionError` where numbers differ."""

    check: Callable[[Golden, Setting], None]
    ops: tuple[str, ...]
    """The ops it runs, which decide the backends and devices it is run on; empty: one backend, as no op is involved"""
    dtypes: tuple[torch.dtype, ...] = tuple(TOLERANCES)

    def settings(self) -> Iterator[Setting]:
        """Every backend, precision and device of this machine."""
        devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
        for device in devices if self.ops else ["cpu"]:
            for backend in backends.NAMES:
                for dtype in self.dtypes:
                    if all(backend in backends.available(op, device, dtype) for op in self.ops) and (
                        self.ops or backend == "reference"
                    ):
                        yield Setting(backend, dtype, device)

    def run(self, golden: Golden, setting: Setting) -> None:
        """Compare under the setting's backend, which is never replaced by another one; memory starts as NaN.

        Gradients jump where a ReLU or an absolute value changes sign, and float32 may land on the other side. A float32
        run that misses is therefore compared again, gradients this time within twice what rounding of parameters and
        inputs to float32 does to the reference's float64 gradients of this file; without a kink that is far below the
        tolerance.
        """
        with fastmix.backend(setting.backend), poisoned_allocations():
            try:
                self.check(golden, setting)
            except backends.UnavailableError as reason:
                if setting.device == "cpu":
                    raise
                pytest.skip(str(reason))  # on CUDA native kernels do not take every network
            except AssertionError:
                if setting.dtype == torch.float64:
                    raise
                self.check(golden, replace(setting, allowance=self.kinks(golden)))

    def kinks(self, golden: Golden, draws: int = 32) -> dict[str, float]:
        """Gradient -> twice the largest RMS ratio by which float32 rounding moves it."""
        exact = Shaken("reference", torch.float64, "cpu")
        shaken = replace(exact, noise=2.0**-22)
        with fastmix.backend("reference"):
            for setting in (exact, *[shaken] * draws):
                self.check(golden, setting)
        gradients = ("grad/", "gradin/", "after/", "out/grad_norm")
        return {name: 2 * moved for name, moved in shaken.moved.items() if name.startswith(gradients)}


def label(golden: Golden) -> str:
    """The kind, and for agents and learners which one: `agent/rnn`, `learner/q_learner/qmix`."""
    config = golden.config
    if golden.kind == "agent":
        return f"agent/{config['agent']}"
    if golden.kind == "learner":
        return f"learner/{config['learner']}/{config['mixer']}"
    return golden.kind


def find_rule(golden: Golden) -> Rule | str:
    """The rule for a file, or the reason why there is none yet. Raises `LookupError` for an unknown kind."""
    name = label(golden)
    for pattern, rule in RULES.items():
        if fnmatchcase(name, pattern):
            return rule
    for pattern, reason in PENDING.items():
        if fnmatchcase(name, pattern):
            return f"{name} {reason}"
    raise LookupError(f"{golden.path}: no rule handles {name!r}")


# --------------------------------------------------------------------------------------------------------------- mixers


def check_mixer(golden: Golden, setting: Setting) -> None:
    args = mixer_args(golden)
    kind = golden.kind.removeprefix("resq.")
    if kind == "nmix":
        mixer: mixers.Mixer = mixers.NMixer.from_args(args, abs=golden.config.get("ctor_abs", True))
    else:
        mixer = mixers.REGISTRY["qmix" if kind == "qmixer" else kind].from_args(args)
    inputs = leaf_inputs(golden, setting)
    load(mixer, golden.params, setting)
    q_tot = mixer(inputs["agent_qs"], inputs.get("states"))
    compare(golden, setting, {"q_tot": q_tot}, mixer, inputs)


def mixer_args(golden: Golden) -> SimpleNamespace:
    """The PyMARL namespace a file describes."""
    config = dict(golden.config)
    if golden.kind.startswith("resq."):  # short names of sizes; the published yaml has two-layer hypernets
        config = {"hypernet_layers": 2, **config, "mixing_embed_dim": config["E"], "hypernet_embed": config["H"]}
    return SimpleNamespace(**config, n_agents=config["A"], n_actions=config["U"], state_shape=config["S"])


# --------------------------------------------------------------------------------------------------------------- agents


def check_agent(golden: Golden, setting: Setting) -> None:
    """The whole sequence at once, then step by step as PyMARL's controllers do."""
    config = golden.config
    args = SimpleNamespace(**config, n_agents=config["A"], n_actions=config["U"])
    agent = agents.REGISTRY[config["agent"]].from_args(config["in_dim"], args)
    load(agent, golden.params, setting)

    inputs = leaf_inputs(golden, setting)
    out = agent.unroll(inputs["x"].transpose(0, 1), return_hidden_states=True)
    assert out.hidden_states is not None
    assert torch.equal(out.hidden, out.hidden_states[:, -1])
    whole = {"q": out.q.transpose(0, 1), "h": out.hidden_states.transpose(0, 1)}
    compare(golden, setting, whole, agent, inputs)

    agent.zero_grad()
    inputs = leaf_inputs(golden, setting)
    steps, episodes, n_agents, _ = inputs["x"].shape
    hidden = agent.init_hidden().expand(episodes, n_agents, -1)
    qs, hs = [], []
    for x in inputs["x"]:
        q, hidden = agent(x if config["input_rank"] == 3 else x.flatten(0, 1), hidden)
        assert q.dim() == hidden.dim() == config["input_rank"]
        qs.append(q.view(episodes, n_agents, -1))
        hs.append(hidden.view(episodes, n_agents, -1))
    assert len(qs) == steps
    compare(golden, setting, {"q": torch.stack(qs), "h": torch.stack(hs)}, agent, inputs)


def check_agent_step(golden: Golden, setting: Setting) -> None:
    config = golden.config
    inputs = leaf_inputs(golden, setting)
    agent = agents.RNNAgent(inputs["inputs"].shape[-1], config["U"], config["R"])
    load(agent, golden.params, setting)
    q, h = agent(inputs["inputs"].flatten(0, 1), inputs["hidden"].flatten(0, 1))
    q, h = q.view(golden.outputs["q"].shape), h.view(golden.outputs["h"].shape)
    compare(golden, setting, {"q": q, "h": h}, agent, inputs)


# -------------------------------------------------------------------------------------------------------------- returns


def check_returns(golden: Golden, setting: Setting) -> None:
    config = golden.config
    inputs = leaf_inputs(golden, setting)
    targets = returns(
        inputs["rewards"],
        inputs["terminated"],
        inputs["mask"],
        inputs["target_qs"],
        gamma=config["gamma"],
        kind=config.get("fn", "td_lambda"),
        td_lambda=config["td_lambda"],
        behaviour_qs=inputs.get("qvals"),
    )
    compare(golden, setting, {"targets": targets}, None, inputs)


# ------------------------------------------------------------------------------------------------------ training steps

LEARNERS = ("q_learner", "nq_learner", "w_q_learner")
"""Public learners that `make_learner` knows: 1-step or n-step targets, TD(lambda) or Q(lambda), weighted"""

PRESET_OF = {"wqmix": "pymarl", "QPLEX": "pymarl", "dfac": "pymarl", "epymarl": "epymarl", "pymarl2": "pymarl2"}
"""Repository -> whose optimiser and loss factor its learners use."""

READ = frozenset(["A", "B", "O", "S", "T", "U", "repo", "learner", "mac", "hidden_dim", "hysteretic_qmix", "q_lambda"])
"""Fields of learner files that `make_learner` understands beside those of `AlgorithmConfig`; others are an error."""

NOT_COMPARED = {"loss/w_to_use": "a logged mean that counts padded rows; out/weights itself is compared on live rows"}


def check_learner(golden: Golden, setting: Setting) -> None:
    """Intermediate values and gradients of one training step, then the parameters after it."""
    batch = make_batch(golden, setting)
    algorithm = make_learner(golden, setting)
    compare_intermediate(golden, setting, algorithm, batch)

    algorithm = make_learner(golden, setting)
    targets = [p.clone() for p in _targets(algorithm)]
    result = algorithm.step(batch)
    networks = {name: dict(algorithm.networks[name].named_parameters()) for name in algorithm.online}
    params = {f"{name}.{key}": param for name, own in networks.items() for key, param in own.items()}
    compare_grads(golden, setting, params, golden.grads)
    setting.close(result["grad_norm"], golden.outputs["grad_norm"], "out/grad_norm")
    loss_name = next(name for name in ("loss/loss_td", "loss/loss") if name in golden.outputs)
    setting.close(result["loss"], golden.outputs[loss_name], f"out/{loss_name}")
    for key, expected in golden.after.items():
        setting.close(params[key], expected, f"after/{key}")
    assert not golden.after or golden.after.keys() == params.keys()
    assert all(torch.equal(now, before) for now, before in zip(_targets(algorithm), targets, strict=True))


def _targets(algorithm: Algorithm) -> list[Tensor]:
    return [p for name, net in algorithm.networks.items() if name.startswith("target_") for p in net.parameters()]


def make_learner(golden: Golden, setting: Setting) -> Algorithm:
    """The algorithm that a learner file describes, with its parameters."""
    config = golden.config
    shared = {field.name for field in dataclasses.fields(AlgorithmConfig)} & config.keys()
    unknown = config.keys() - shared - READ
    if unknown:
        raise LookupError(f"{golden.path}: hyper-parameters {sorted(unknown)} are not understood")
    learner, preset = config["learner"], PRESET_OF[config["repo"]]
    # pymarl2's nq_learner builds its "qmix" from the fine-tuned mixer's class.
    mixer = "nmix" if learner == "nq_learner" and config["mixer"] == "qmix" else config["mixer"]
    settings: dict[str, Any] = {
        "agent": "rnn",
        "lr": 5e-4,
        "optimizer": "adam" if preset == "epymarl" else "rmsprop",
        "use_rnn": True,
        "obs_last_action": True,
        "standardise_rewards": False,
        "hypernet_layers": 1 if mixer == "qmix" else 2,
        **{name: config[name] for name in shared},
        "mixer": mixer,
    }
    settings.setdefault("optim_eps", 1e-8 if settings["optimizer"] == "adam" else 1e-5)
    settings.setdefault("rnn_hidden_dim", config.get("hidden_dim", 64))
    if learner == "nq_learner":
        settings |= {"targets": "q_lambda" if config.get("q_lambda") else "td_lambda", "double_q": True}
    else:
        settings["targets"] = "n_step" if config.get("n_step", 1) > 1 else "one_step"
    if learner == "w_q_learner":
        settings["weighting"] = "ow" if config["hysteretic_qmix"] else "cw"

    scheme = Scheme(config["A"], config["U"], config["O"], config["S"], config["T"] - 1)
    name = "vdn" if mixer == "vdn" else "qmix"
    algorithm = make(name, scheme, preset=preset, device=setting.device, **settings)
    if setting.dtype == torch.float64:
        algorithm.double()
    networks = golden.networks(golden.params)
    for network, module in algorithm.networks.items():
        load(module, networks.pop(network, {}), setting)
    assert not networks, f"{golden.path}: networks {sorted(networks)} are not the algorithm's"
    return algorithm


def make_batch(golden: Golden, setting: Setting) -> EpisodeBatch:
    """The episodes of a learner file; mask and last actions follow from its other fields."""
    data = golden.inputs
    filled, terminated = data["filled"].double(), data["terminated"].double()
    mask = filled[:, :-1].clone()
    mask[:, 1:] *= 1 - terminated[:, :-2]
    one_hot = data["actions_onehot"]
    actions = torch.where(one_hot.any(-1), data["actions"].squeeze(-1).long(), -1)
    return EpisodeBatch(
        obs=setting.tensor(data["obs"]),
        states=setting.tensor(data["state"]),
        actions=data["actions"].squeeze(-1).long().to(setting.device),
        last_actions=torch.cat([torch.full_like(actions[:, :1], -1), actions[:, :-1]], 1).to(setting.device),
        avail_actions=(data["avail_actions"] != 0).to(setting.device),
        rewards=setting.tensor(data["reward"][:, :-1].double()),
        terminated=setting.tensor(terminated[:, :-1]),
        mask=setting.tensor(mask),
        weights=setting.tensor(data["per_weight"]).view(-1, 1, 1) if "per_weight" in data else None,
    )


def compare_intermediate(golden: Golden, setting: Setting, algorithm: Algorithm, batch: EpisodeBatch) -> None:
    """Every `out/` array, on the steps that are part of an episode."""
    ids, last = algorithm.config.obs_agent_id, batch.last_actions
    agent_q, target_agent_q = (
        algorithm.networks[name].unroll(batch.obs, last_actions=last, agent_ids=ids).q  # type: ignore[operator]
        for name in ("agent", "target_agent")
    )
    terms = algorithm.losses(batch)
    greedy = terms["greedy_actions"]
    target_now = terms["target_q_tot"][:, :-1]
    actual: dict[str, Tensor] = {
        "mask": batch.mask,
        "rewards_used": terms["rewards"],
        "agent_q": agent_q,
        "target_agent_q": target_agent_q,
        "online_argmax": greedy.unsqueeze(-1),
        "is_max_action": (greedy == batch.actions).all(-1, keepdim=True)[:, :-1].long(),
        "q_tot": terms["q_tot"],
        "target_q_tot": terms["target_q_tot"],
        "target_central_q_greedy": target_now,  # this learner has no central network: the target mixer stands in for it
        "qtot_larger": (terms["targets"] > target_now).long(),
        "targets": terms["targets"],
        "td_error": terms["td_error"],
        "weights": terms.get("weights", torch.ones_like(terms["q_tot"])),
        "loss/loss": terms["loss"],
        "loss/loss_td": terms["loss"],
    }
    mask, filled = golden.outputs["mask"], golden.inputs["filled"]
    steps = filled.shape[1]
    avail = golden.inputs["avail_actions"] != 0
    for name, expected in golden.outputs.items():
        if name in NOT_COMPARED or name == "grad_norm":  # the norm is known after the step
            continue
        value = actual[name]
        if expected.dim() == 0 or name in ("mask", "rewards_used"):
            setting.close(value.expand(expected.shape), expected, f"out/{name}")
            continue
        live = filled if expected.shape[1] == steps else mask[..., :1]
        if expected.shape[1] == steps - 1 and value.shape[1] == steps:
            value = value[:, 1:]  # public one-step learners keep only the steps that are bootstrapped from
        if name in ("agent_q", "target_agent_q"):  # public learners write a large negative number where unavailable
            live = live.unsqueeze(-1) * avail[:, steps - expected.shape[1] :]
        setting.close(value.expand(expected.shape), expected, f"out/{name}", mask=live)


# ------------------------------------------------------------------------------------------------------ trainer's parts


def check_replay_ring(golden: Golden, setting: Setting) -> None:
    from tests.train import golden_replay

    golden_replay.check(golden.arrays)


def check_epsilon_schedule(golden: Golden, setting: Setting) -> None:
    from tests.train import golden_epsilon

    golden_epsilon.check(golden.arrays)


# ------------------------------------------------------------------------------------------------------------- together


def load(module: nn.Module, params: Mapping[str, Tensor], setting: Setting) -> None:
    """Put the file's parameters into the module, every key of one being a key of the other."""
    module.to(setting.device, setting.dtype)
    module.load_state_dict({key: setting.tensor(value) for key, value in params.items()}, strict=True)


def leaf_inputs(golden: Golden, setting: Setting) -> dict[str, Tensor]:
    """The inputs as tensors that require a gradient where the file has one."""
    tensors = {name: setting.tensor(value).clone() for name, value in golden.inputs.items()}
    return {name: tensor.requires_grad_(name in golden.input_grads) for name, tensor in tensors.items()}


def compare(
    golden: Golden,
    setting: Setting,
    outputs: Mapping[str, Tensor],
    module: nn.Module | None,
    inputs: Mapping[str, Tensor],
) -> None:
    """Outputs, then the gradients of `sum(out * cotangent)` for every parameter and input the file has."""
    assert outputs.keys() == golden.outputs.keys()
    for name, expected in golden.outputs.items():
        setting.close(outputs[name], expected, f"out/{name}")
    if not golden.cotangents:
        assert not golden.grads and not golden.input_grads
        return
    terms = [(outputs[name] * setting.tensor(cotangent)).sum() for name, cotangent in golden.cotangents.items()]
    torch.stack(terms).sum().backward()
    params = {} if module is None else dict(module.named_parameters())
    compare_grads(golden, setting, params, golden.grads)
    for name, expected in golden.input_grads.items():
        grad = inputs[name].grad
        grad = torch.zeros_like(inputs[name]) if grad is None else grad
        setting.close(grad, expected, f"gradin/{name}")


def compare_grads(
    golden: Golden, setting: Setting, params: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> None:
    """Every gradient, and which of them are None where the file says so."""
    assert params.keys() == expected.keys()
    if golden.none_grads is not None:
        assert {name for name, param in params.items() if param.grad is None} == golden.none_grads
    for name, param in params.items():
        grad = torch.zeros_like(param) if param.grad is None else param.grad
        setting.close(grad, expected[name], f"grad/{name}")


def _rule(check: Callable[[Golden, Setting], Any], *ops: str) -> Rule:
    return Rule(check, ops)


_LEARNER = _rule(check_learner, "select", "returns", "recurrent", "monotonic", "td_loss", "optimise")

RULES: Mapping[str, Rule] = {
    "vdn": _rule(check_mixer),
    "resq.vdn": _rule(check_mixer),
    "qmix": _rule(check_mixer, "monotonic"),
    "qmix_noabs": _rule(check_mixer, "monotonic"),
    "nmix": _rule(check_mixer, "monotonic"),
    "resq.qmixer": _rule(check_mixer, "monotonic"),
    "agent/rnn": _rule(check_agent, "recurrent"),
    "agent/n_rnn": _rule(check_agent, "recurrent"),
    "agent/ff": _rule(check_agent),
    "resq.rnn_agent": _rule(check_agent_step, "recurrent"),
    "returns": _rule(check_returns, "returns"),
    "returns_q": _rule(check_returns, "returns"),
    "common.td_lambda": _rule(check_returns, "returns"),
    **{f"learner/{learner}/{mixer}": _LEARNER for learner in LEARNERS for mixer in ("vdn", "qmix")},
    "replay_ring": Rule(check_replay_ring, (), (torch.float64,)),
    "epsilon_schedule": Rule(check_epsilon_schedule, (), (torch.float64,)),
}
"""Kind (as `label` names it) -> how it is checked."""
