"""How each kind of golden file is rebuilt and compared. A file that neither `RULES` nor `PENDING` names is an error."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
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
from fastmix.mixers.base import attended
from fastmix.ops import returns
from fastmix.testing import assert_close, poisoned_allocations, rms_ratio
from fastmix.testing.compare import ZERO
from fastmix.testing.golden import Golden
from tests.prey_golden import check_stag_hunt

TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-5}

PENDING: Mapping[str, str] = {
    "resz.*": "arrives with ResZ",
    **{f"dfac.{kind}": "arrives with DDN and DMIX" for kind in ("ddn", "dmix", "learner")},
    "refil.*": "arrives with REFIL",
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
        # cuDNN multiplies in tf32 by default, whatever other products do.
        cudnn = torch.backends.cudnn
        exact = cudnn.flags(enabled=True, allow_tf32=False) if setting.device == "cuda" else nullcontext()
        with fastmix.backend(setting.backend), poisoned_allocations(), exact:
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


RESQ_KINDS = {"qmixer": "qmix", "qatten": "qatten_pymarl2"}
"""ResQ's name of a mixer -> its kind, where they differ"""


def make_mixer(golden: Golden, setting: Setting) -> mixers.Mixer:
    """The mixer a file describes, with its parameters."""
    args = mixer_args(golden)
    kind = golden.kind.removeprefix("resq.")
    if kind == "nmix":
        mixer: mixers.Mixer = mixers.NMixer.from_args(args, abs=golden.config.get("ctor_abs", True))
    else:
        mixer = mixers.REGISTRY[RESQ_KINDS.get(kind, kind)].from_args(args)
    load(mixer, golden.params, setting)
    return mixer


def check_mixer(golden: Golden, setting: Setting) -> None:
    mixer, inputs = make_mixer(golden, setting), leaf_inputs(golden, setting)
    q_tot = mixer(inputs["agent_qs"], inputs.get("states"))
    compare(golden, setting, {"q_tot": q_tot}, mixer, inputs)


def check_qatten(golden: Golden, setting: Setting) -> None:
    mixer, inputs = make_mixer(golden, setting), leaf_inputs(golden, setting)
    q_tot, regulariser, entropies = mixer(inputs["agent_qs"], inputs["states"], inputs["actions"])
    outputs = {"q_tot": q_tot, "attend_mag_regs": regulariser, "head_entropies": torch.stack(entropies)}
    compare(golden, setting, outputs, mixer, inputs)


def check_qtran_base(golden: Golden, setting: Setting) -> None:
    mixer, inputs = make_mixer(golden, setting), leaf_inputs(golden, setting)
    q, v = mixer(inputs, inputs["hidden_states"])
    q_given, v_again = mixer(inputs, inputs["hidden_states"], inputs["other_actions_onehot"])
    assert torch.equal(v, v_again)
    compare(golden, setting, {"q_batch_actions": q, "v": v, "q_given_actions": q_given}, mixer, inputs)


def check_qtran_alt(golden: Golden, setting: Setting) -> None:
    mixer, inputs = make_mixer(golden, setting), leaf_inputs(golden, setting)
    counter_qs, v = mixer(inputs)
    compare(golden, setting, {"counter_qs": counter_qs, "v": v}, mixer, inputs)


def check_qplex(golden: Golden, setting: Setting) -> None:
    """PyMARL's calls, and for their sum also the one call of this package."""
    mixer, call = make_mixer(golden, setting), golden.config["call"]
    assert isinstance(mixer, mixers.DMAQer | mixers.DMAQQattenMixer)

    def compare_with(value: Any, inputs: Mapping[str, Tensor]) -> None:
        outputs = {{"v": "v_tot", "adv": "adv_tot", "sum": "q_tot"}[call]: value}
        if isinstance(value, mixers.Attended):
            outputs = {name: value.q_tot for name in outputs}
            if call != "adv":
                entropies = torch.stack(value.head_entropies)
                outputs |= {"attend_mag_regs": value.attend_mag_regs, "head_entropies": entropies}
        compare(golden, setting, outputs, mixer, inputs)

    inputs = leaf_inputs(golden, setting)
    rest = (inputs["actions"], inputs["max_q_i"])
    if call != "sum":
        compare_with(mixer(inputs["agent_qs"], inputs["states"], *rest, is_v=call == "v"), inputs)
        return
    v, adv = (mixer(inputs["agent_qs"], inputs["states"], *rest, is_v=is_v) for is_v in (True, False))
    compare_with(v._replace(q_tot=v.q_tot + adv.q_tot) if isinstance(v, mixers.Attended) else v + adv, inputs)

    mixer.zero_grad()
    inputs = leaf_inputs(golden, setting)
    value = mixer.joint(inputs["agent_qs"], inputs["states"], inputs["actions"].argmax(-1), inputs["max_q_i"])
    assert value.v_tot is not None and value.adv_tot is not None
    setting.close(value.v_tot + value.adv_tot, golden.outputs["q_tot"], "out/q_tot")
    if isinstance(mixer, mixers.DMAQQattenMixer):
        compare_with(attended(value, value.q_tot, mixer.attend_reg_coef), inputs)
    else:
        compare_with(value.q_tot, inputs)


def check_qplex_lambda(golden: Golden, setting: Setting) -> None:
    mixer, inputs = make_mixer(golden, setting), leaf_inputs(golden, setting)
    compare(golden, setting, {"lambda": mixer(inputs["states"], inputs["actions"])}, mixer, inputs)


def mixer_args(golden: Golden) -> SimpleNamespace:
    """The PyMARL namespace a file describes."""
    config = dict(golden.config)
    if golden.kind.startswith("resq."):  # short names of sizes; the published yaml has two-layer hypernets
        config = {"hypernet_layers": 2, **config, "mixing_embed_dim": config["E"], "hypernet_embed": config["H"]}
        config = {"central_action_embed": 1, **config, "central_mixing_embed_dim": config["C"]}
        for name in ("n_query_embedding_layer1", "n_head_embedding_layer1"):
            config[name] = config["att"][0]
        for name in ("n_query_embedding_layer2", "n_key_embedding_layer1", "n_constrant_value"):
            config[name] = config["att"][1]
        config |= {"n_attention_head": 4, "n_head_embedding_layer2": 4, "type": "weighted"}
        config["agent_own_state_size"] = config["own"]
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
        assert q.dim() - golden.outputs["q"].dim() + 4 == hidden.dim() == config["input_rank"]
        qs.append(q.view(golden.outputs["q"].shape[1:]))
        hs.append(hidden.view(episodes, n_agents, -1))
    assert len(qs) == steps
    compare(golden, setting, {"q": torch.stack(qs), "h": torch.stack(hs)}, agent, inputs)


def check_agent_step(golden: Golden, setting: Setting) -> None:
    config = golden.config
    inputs = leaf_inputs(golden, setting)
    args = SimpleNamespace(
        n_actions=config["U"], rnn_hidden_dim=config["R"], central_action_embed=config.get("central_action_embed", 1)
    )
    kind = golden.kind.removeprefix("resq.").removesuffix("_agent")
    agent = agents.REGISTRY[kind].from_args(inputs["inputs"].shape[-1], args)
    load(agent, golden.params, setting)
    q, h = agent(*(inputs[name].reshape(-1, inputs[name].shape[-1]) for name in ("inputs", "hidden")))
    q, h = q.view(golden.outputs["q"].shape), h.view(golden.outputs["h"].shape)
    compare(golden, setting, {"q": q, "h": h}, agent, inputs)


def check_iqn_agent(golden: Golden, setting: Setting) -> None:
    from tests import golden_quantile

    golden_quantile.check_agent(golden, setting)


def check_quantile_loss(golden: Golden, setting: Setting) -> None:
    from tests import golden_quantile

    golden_quantile.check_loss(golden, setting)


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

PRESET_OF = {
    "wqmix": "pymarl", "QPLEX": "pymarl", "qplex": "pymarl", "dfac": "pymarl", "epymarl": "epymarl",
    "pymarl2": "pymarl2",
}  # fmt: skip
"""Repository -> whose optimiser and loss factor its learners use."""

ALGORITHM_OF = {
    "q_learner": "qmix", "nq_learner": "qmix", "w_q_learner": "qmix", "qatten_learner": "qatten",
    "qtran_learner": "qtran", "dmaq_qatten_learner": "qplex", "max_q_learner": "cw_qmix",
}  # fmt: skip
"""Public learner -> the algorithm that is its step, unless its mixer says more"""

OPTIMISES_BY_ADAM = ("qtran_learner", "dmaq_qatten_learner", "max_q_learner")
"""pymarl2's learners that are not asked by their configuration"""

NAMED: Mapping[str, str] = {
    "agent_own_state_size": "unit_dim", "n_attention_head": "n_head", "hidden_dim": "rnn_hidden_dim",
    "qmix_loss": "w_high", "C": "tolerance", "w_low": "w",
}  # fmt: skip
"""Hyper-parameter of a file -> field of `AlgorithmConfig`, where it has another name"""

READ = frozenset(
    ["A", "B", "O", "S", "T", "U", "repo", "learner", "mac", "hysteretic_qmix", "q_lambda", "type", "weighting",
     "n_key_embedding_layer1", "n_head_embedding_layer2"]  # the last two equal others by construction
)  # fmt: skip
"""Fields of learner files that `make_learner` understands beside those of `AlgorithmConfig`; others are an error."""

NOT_COMPARED = {
    "loss/w_to_use": "a logged mean that counts padded rows; out/weights itself is compared on live rows",
    "grad_norm": "known after the step",
}

Outputs = dict[str, Tensor]


def check_learner(golden: Golden, setting: Setting) -> None:
    """Intermediate values and gradients of one training step, then the parameters after it."""
    batch = make_batch(golden, setting)
    compare_intermediate(golden, setting, make_learner(golden, setting), batch)
    check_step(golden, setting, make_learner(golden, setting), batch)


def check_step(golden: Golden, setting: Setting, algorithm: Algorithm, batch: EpisodeBatch) -> None:
    """Loss, gradients and their norm, and what the optimiser makes of them, of one training step."""
    targets = [p.clone() for p in _targets(algorithm)]
    result = algorithm.step(batch)
    networks = {name: dict(algorithm.networks[name].named_parameters()) for name in algorithm.online}
    params = {f"{name}.{key}": param for name, own in networks.items() for key, param in own.items()}
    compare_grads(golden, setting, params, by_name(golden, golden.grads))
    outputs = golden.outputs
    if "grad_norm" in outputs:
        setting.close(result["grad_norm"], outputs["grad_norm"], "out/grad_norm")
    loss_name = next((name for name in ("loss/loss_td", "loss/loss", "loss") if name in outputs), None)
    if loss_name is not None:
        setting.close(result["loss"], outputs[loss_name], f"out/{loss_name}")
    after, grads = by_name(golden, golden.after), by_name(golden, golden.grads)
    for key, expected in after.items():
        if setting.dtype == torch.float32 and grads[key].abs().max() < ZERO:
            # Adam makes of the rounding of a gradient that cancels what it makes of any other: a step of up to lr.
            assert (params[key].cpu() - expected).abs().max() <= 2 * algorithm.config.lr, f"after/{key}"
            continue
        setting.close(params[key], expected, f"after/{key}")
    assert not after or after.keys() == params.keys()
    assert all(torch.equal(now, before) for now, before in zip(_targets(algorithm), targets, strict=True))


def _targets(algorithm: Algorithm) -> list[Tensor]:
    return [p for name in algorithm.targeted for p in algorithm.networks[f"target_{name}"].parameters()]


def make_learner(golden: Golden, setting: Setting) -> Algorithm:
    """The algorithm that a learner file describes, with its parameters."""
    config = golden.config
    given = {NAMED.get(name, name): value for name, value in config.items() if name not in READ}
    unknown = given.keys() - {field.name for field in dataclasses.fields(AlgorithmConfig)}
    if unknown:
        raise LookupError(f"{golden.path}: hyper-parameters {sorted(unknown)} are not understood")
    learner, preset = config["learner"], PRESET_OF[config["repo"]]
    optimism = "ow" if config.get("hysteretic_qmix") else "cw"
    name = {"vdn": "vdn", "qatten": "qatten"}.get(config["mixer"], ALGORITHM_OF[learner])
    mixer = {
        # pymarl2's nq_learner builds its "qmix" from the fine-tuned mixer's class.
        "qmix": "nmix" if learner == "nq_learner" else "qmix",
        "qatten": "qatten_pymarl2" if preset == "pymarl2" else "qatten_pymarl",
        "dmaq": "qplex_dmaq", "dmaq_qatten": "qplex_dmaq_qatten",
    }.get(config["mixer"], config["mixer"])  # fmt: skip
    adam = preset == "epymarl" or (preset == "pymarl2" and learner in OPTIMISES_BY_ADAM)
    settings: dict[str, Any] = {
        "agent": "rnn",
        "lr": 5e-4,
        "optimizer": "adam" if adam else "rmsprop",
        "use_rnn": True,
        "obs_last_action": True,
        "standardise_rewards": False,
        "hypernet_layers": 1 if mixer == "qmix" else 2,
        "targets": "one_step",
        **given,
        "mixer": mixer,
    }
    settings.setdefault("optim_eps", 1e-8 if settings["optimizer"] == "adam" else 1e-5)
    settings.setdefault("rnn_hidden_dim", 64)
    if learner == "nq_learner":
        settings |= {"targets": "q_lambda" if config.get("q_lambda") else "td_lambda", "double_q": True}
    elif config.get("n_step", 1) > 1:
        settings["targets"] = "n_step"
    if learner == "w_q_learner":
        settings["weighting"] = optimism
    elif learner == "max_q_learner":
        name = f"{optimism}_qmix"
        settings["central_mixer"] = {"ff": "central_ff"}[config["central_mixer"]]
    if learner in ("max_q_learner", "dmaq_qatten_learner") and preset == "pymarl2":
        settings["targets"] = "td_lambda"
    if "type" in config:
        settings["weighted_head"] = config["type"] == "weighted"
    # Padded rows in a mean, the largest value of unavailable actions, shuffled hidden states: what the released code
    # does, and the papers do not.
    settings["compat"] = "paper" if (learner, preset) == ("qtran_learner", "pymarl") else "released"
    return _built(golden, setting, name, preset, settings, golden.config["T"] - 1)


def _built(
    golden: Golden, setting: Setting, name: str, preset: str, settings: Mapping[str, Any], episode_limit: int
) -> Algorithm:
    config = golden.config
    scheme = Scheme(config["A"], config["U"], config["O"], config["S"], episode_limit)
    algorithm = make(name, scheme, preset=preset, device=setting.device, **settings)
    if setting.dtype == torch.float64:
        algorithm.double()
    params = by_name(golden, golden.params)
    for network, module in algorithm.networks.items():
        own = {key: value for key, value in params.items() if key.startswith(f"{network}.")}
        load(module, {key.removeprefix(f"{network}."): value for key, value in own.items()}, setting)
        params = {key: value for key, value in params.items() if key not in own}
    # Public learners with a central critic have targets of everything, and read those of the critic only.
    unread = ("target_agent.", "target_mixer.") if "central_agent" in algorithm.networks else ()
    left = [key for key in params if not key.startswith(unread)]
    assert not left, f"{golden.path}: {left} are not the algorithm's"
    return algorithm


NETWORKS = {"mac": "agent", "rest_mac": "residual_agent", "rest_mixer": "residual_mixer"}
NETWORKS |= {"central_mac": "central_agent", "target_central_mac": "target_central_agent"}
"""ResQ's name of a network -> ours"""


def by_name(golden: Golden, section: dict[str, Tensor]) -> dict[str, Tensor]:
    """A learner's parameters, or what belongs to them, by `network.key`."""
    networks = golden.networks(section)
    return {f"{NETWORKS.get(name, name)}.{key}": t for name, own in networks.items() for key, t in own.items()}


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
    unrolled: Outputs = {}
    for name in ("agent", "target_agent"):
        if name in algorithm.networks:
            agent = algorithm.networks[name]
            unrolled[f"{name}_q"] = agent.unroll(batch.obs, last_actions=last, agent_ids=ids).q  # type: ignore[operator]
    terms = algorithm.losses(batch)
    greedy = terms["greedy_actions"]
    target_now = terms["target_q_tot"][:, :-1]
    per_agent = (greedy == batch.actions)[:, :-1]
    hit = per_agent.to(batch.mask.dtype).mean(-1, keepdim=True) * batch.mask
    actual: Outputs = {
        **terms,
        **unrolled,
        **{f"loss/{name}": term for name, term in terms.items() if term.dim() == 0},
        "rewards_used": terms["rewards"],
        "mask": batch.mask,
        "online_argmax": greedy.unsqueeze(-1),
        "is_max_action": per_agent.all(-1, keepdim=True).long(),
        # Without a central network the target mixer stands in for it.
        "target_central_q_greedy": target_now,
        "qtot_larger": (terms["targets"] > target_now).long(),
        "weights": terms.get("weights", torch.ones_like(terms["q_tot"])),
        "loss/loss_td": terms["loss"],
        "loss/hit_prob": hit.sum() / batch.mask.sum(),
    }
    more = {"qtran_learner": _qtran_outputs, "dmaq_qatten_learner": _qplex_outputs, "powqmix": _powqmix_outputs}
    add = more.get(golden.config.get("learner", "powqmix" if golden.kind == "powqmix_composed" else ""))
    if add is not None:
        actual |= add(algorithm, batch, actual)
    if "max_q_i" in golden.outputs:
        actual |= {
            "max_q_i": _largest(unrolled["agent_q"], batch)[:, :-1],
            "is_max_action": per_agent.long().unsqueeze(-1),
        }
    if "target_agent" in algorithm.networks:
        compare_live(golden, setting, actual)
    else:
        compare_live(golden, setting, actual, absent=UNROLLED_FOR_NOTHING)


UNROLLED_FOR_NOTHING = ("target_agent_q",)
"""What public learners with a central critic compute and do not use"""


def compare_live(golden: Golden, setting: Setting, actual: Outputs, absent: Sequence[str] = ()) -> None:
    """Every `out/` array that is not `absent`, where there is something to compare."""
    mask, filled = golden.outputs["mask"], golden.inputs["filled"]
    steps = filled.shape[1]
    avail = golden.inputs["avail_actions"] != 0
    for name, expected in golden.outputs.items():
        if name in NOT_COMPARED or name in absent:
            continue
        value = actual[name]
        if expected.dim() == 0 or name in ("mask", "rewards_used"):
            setting.close(value.expand(expected.shape), expected, f"out/{name}")
            continue
        if expected.dim() == 2:  # QTRAN's values, one row a step
            expected = expected.view(len(mask), -1, 1)
        live = filled if expected.shape[1] == steps else mask[..., :1]
        if expected.shape[1] == steps - 1 and value.shape[1] == steps:
            value = value[:, 1:]  # public one-step learners keep only the steps that are bootstrapped from
        if name in ("agent_q", "target_agent_q"):  # public learners write a large negative number where unavailable
            live = live.unsqueeze(-1) * avail[:, steps - expected.shape[1] :]
        setting.close(value.expand(expected.shape), expected, f"out/{name}", mask=live)


def _largest(qs: Tensor, batch: EpisodeBatch) -> Tensor:
    return qs.masked_fill(~batch.avail_actions, -9999999).amax(-1)


def _qtran_outputs(algorithm: Algorithm, batch: EpisodeBatch, terms: Outputs) -> Outputs:
    return {
        "q_tot": terms["chosen_qs"][:, :-1], "qtran_joint_q": terms["q_tot"], "qtran_v": terms["value"],
        "qtran_target_joint_q": terms["target_q_tot"], "qtran_joint_q_greedy": terms["greedy_joint_q"],
        "qtran_opt_error": terms["opt_error"], "qtran_nopt_error": terms["nopt_error"],
    }  # fmt: skip


def _qplex_outputs(algorithm: Algorithm, batch: EpisodeBatch, terms: Outputs) -> Outputs:
    """The mixers' parts, which a step does not keep."""
    best, target_best = (_largest(terms[name], batch) for name in ("agent_q", "target_agent_q"))
    greedy = terms["greedy_actions"]

    def parts(name: str, qs: Tensor, actions: Tensor, largest: Tensor) -> mixers.JointValue:
        mixer = algorithm.networks[name]
        assert isinstance(mixer, mixers.ActionMixer)
        return mixer.joint(qs.gather(-1, actions.unsqueeze(-1)).squeeze(-1), batch.states, actions, largest)

    online = parts("mixer", terms["agent_q"], batch.actions, best)
    masked = terms["target_agent_q"].masked_fill(~batch.avail_actions, -9999999)
    target = parts("target_mixer", masked, greedy, target_best)
    assert online.v_tot is not None and online.adv_tot is not None
    assert target.v_tot is not None and target.adv_tot is not None
    return {
        "qplex_v": online.v_tot[:, :-1], "qplex_adv": online.adv_tot[:, :-1],
        "qplex_target_v": target.v_tot, "qplex_target_adv": target.adv_tot,
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- POWQMIX


def check_powqmix(golden: Golden, setting: Setting) -> None:
    """A step composed by this package's reading of the paper; its ablations are run with the recogniser beside them."""
    config = golden.config
    weighting = {"powqmix": "pow", "powqmix_opt": "igm"}.get(config["weighting"], config["weighting"])
    settings = {NAMED.get(name, name): value for name, value in config.items() if name not in READ}
    settings |= {"weighting": weighting, "recogniser_embed_dim": config["mixing_embed_dim"]}
    settings["recogniser_hypernet_embed"] = config["hypernet_embed"]

    def built() -> Algorithm:
        return _built(golden, setting, "powqmix", "paper", settings, config["T"] - 1)

    batch = make_batch(golden, setting)
    compare_intermediate(golden, setting, built(), batch)
    check_step(golden, setting, built(), batch)
    if weighting == "pow":
        return
    # The ablation itself has no recogniser, and is the same step otherwise.
    name = {"cw": "cw_qmix_5", "ow": "ow_qmix_5", "igm": "powqmix_opt"}[weighting]
    kept = {key: value for key, value in golden.params.items() if not key.startswith("recogniser")}
    settings |= {"mixer": "nmix", "agent": "n_rnn"}
    alone = _built(replace(golden, params=kept), setting, name, "paper", settings, config["T"] - 1)
    result = alone.step(batch)
    setting.close(result["qmix_loss"], golden.outputs["loss/q_tot"], "out/loss/q_tot")
    setting.close(result["central_loss"], golden.outputs["loss/central"], "out/loss/central")
    for network in alone.online:
        for key, param in alone.networks[network].named_parameters():
            assert param.grad is not None
            setting.close(param.grad, golden.grads[f"{network}.{key}"], f"grad/{network}.{key}")


def _powqmix_outputs(algorithm: Algorithm, batch: EpisodeBatch, terms: Outputs) -> Outputs:
    recogniser = algorithm.networks["recogniser"]
    assert isinstance(recogniser, mixers.Recogniser)
    taken = terms["agent_q"].gather(-1, batch.actions.unsqueeze(-1)).squeeze(-1)
    return {
        "advantages": (taken - _largest(terms["agent_q"], batch))[:, :-1],
        "lambda": recogniser.importance(batch.states, batch.actions)[:, :-1],
        "potentially_optimal": (terms["q_r"] >= terms["v_r"] - algorithm.config.tolerance).long(),
        "loss/q_tot": terms["qmix_loss"], "loss/central": terms["central_loss"],
        "loss/recogniser": terms["recogniser_loss"],
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------- ResQ


def check_resq(golden: Golden, setting: Setting) -> None:
    """The released step, and the paper's (`signed`)."""
    batch, algorithm = make_batch(golden, setting), make_resq(golden, setting)
    terms = algorithm.losses(batch)
    free, c = terms["q_res"], algorithm.config
    losses = {name: terms.get(name, torch.zeros(())) for name in ("qmix_loss", "central_loss", "noopt_loss")}
    factors = {"qmix_loss": c.w_high, "central_loss": c.central_loss, "noopt_loss": c.noopt_loss}
    actual: Outputs = {
        **terms,
        **{name: losses[name] / factor for name, factor in factors.items()},  # the files have them without
        "mask": batch.mask,
        "q_res_raw": free,
        "q_res_for_noopt": -free.abs() if c.residual_negative_abs else free,
        "target_max_qvals": terms["target_q_tot"],
    }
    compare_live(golden, setting, actual)
    check_step(golden, setting, make_resq(golden, setting), batch)


def make_resq(golden: Golden, setting: Setting) -> Algorithm:
    """The ResQ that a file describes, released or (`signed`) the paper's, with its parameters."""
    config = golden.config
    over: dict[str, Any] = dict(config.get("over", {}))
    settings: dict[str, Any] = {
        "rnn_hidden_dim": config["R"], "mixing_embed_dim": config["E"], "hypernet_embed": config["H"],
        "central_mixing_embed_dim": config["C"], "unit_dim": config["own"],
        "compat": "paper" if config.get("signed") else "released",
    }  # fmt: skip
    for name in ("n_query_embedding_layer1", "n_head_embedding_layer1"):
        settings[name] = config["att"][0]
    for name in ("n_query_embedding_layer2", "n_constrant_value"):
        settings[name] = config["att"][1]
    for ours, theirs in (("mixer", "mixer"), ("residual_mixer", "rest_mixer")):
        if theirs in over:
            kind = over.pop(theirs)
            settings[ours] = RESQ_KINDS.get(kind, kind)
    if over.pop("nomask", False):
        settings["condition"] = "none"
    if over.pop("hysteretic_qmix", False):
        settings["condition"] = "hysteretic"
    settings |= {NAMED.get(name, name): value for name, value in over.items()}
    return _built(golden, setting, "resq", "paper", settings, config["T"])


# ------------------------------------------------------------------------------------------------------ trainer's parts


def check_replay_ring(golden: Golden, setting: Setting) -> None:
    from tests.train import golden_replay

    golden_replay.check(golden.arrays)


def check_epsilon_schedule(golden: Golden, setting: Setting) -> None:
    from tests.train import golden_epsilon

    golden_epsilon.check(golden.arrays)


# ------------------------------------------------------------------------------------------------------------- together


BY_INDEX = ("actions", "actions_onehot")
"""One-hots whose gradient public code has and nothing uses: here joint actions are read as indices"""


def load(module: nn.Module, params: Mapping[str, Tensor], setting: Setting) -> None:
    """Put the file's parameters into the module, every key of one being a key of the other."""
    module.to(setting.device, setting.dtype)
    module.load_state_dict({key: setting.tensor(value) for key, value in params.items()}, strict=True)


def leaf_inputs(golden: Golden, setting: Setting) -> dict[str, Tensor]:
    """The inputs as tensors that require a gradient where the file has one."""
    tensors = {name: setting.tensor(value).clone() for name, value in golden.inputs.items()}
    return {name: t.requires_grad_(name in golden.input_grads and name not in BY_INDEX) for name, t in tensors.items()}


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
        if name in BY_INDEX:
            continue
        grad = inputs[name].grad
        assert golden.none_input_grads is None or (grad is None) == (name in golden.none_input_grads)
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


_STEP = ("select", "returns", "recurrent", "td_loss", "optimise")


def _learner(*ops: str) -> Rule:
    return _rule(check_learner, *_STEP, *ops)


RULES: Mapping[str, Rule] = {
    "vdn": _rule(check_mixer),
    "resq.vdn": _rule(check_mixer),
    "qmix": _rule(check_mixer, "monotonic"),
    "qmix_noabs": _rule(check_mixer, "monotonic"),
    "nmix": _rule(check_mixer, "monotonic"),
    "resq.qmixer": _rule(check_mixer, "monotonic"),
    "qatten_pymarl2": _rule(check_mixer, "attention"),
    "resq.qatten": _rule(check_mixer, "attention"),
    "qatten_pymarl": _rule(check_qatten, "attention"),
    "qtran_base": _rule(check_qtran_base, "unrestricted"),
    "qtran_alt": _rule(check_qtran_alt, "unrestricted"),
    "qplex_dmaq": _rule(check_qplex, "duplex"),
    "qplex_dmaq_qatten": _rule(check_qplex, "attention", "duplex"),
    "qplex_lambda": _rule(check_qplex_lambda, "importance"),
    "central_ff": _rule(check_mixer, "unrestricted"),
    "central_atten": _rule(check_mixer, "unrestricted"),
    "resq.central_ff": _rule(check_mixer, "unrestricted"),
    "agent/rnn": _rule(check_agent, "recurrent"),
    "agent/n_rnn": _rule(check_agent, "recurrent"),
    "agent/central_rnn": _rule(check_agent, "recurrent"),
    "agent/ff": _rule(check_agent),
    "resq.rnn_agent": _rule(check_agent_step, "recurrent"),
    "resq.central_rnn_agent": _rule(check_agent_step, "recurrent"),
    "dfac.iqn_agent": _rule(check_iqn_agent, "recurrent"),
    "dfac.quantile_huber": _rule(check_quantile_loss, "quantile"),
    "returns": _rule(check_returns, "returns"),
    "returns_q": _rule(check_returns, "returns"),
    "common.td_lambda": _rule(check_returns, "returns"),
    "learner/*q_learner/vdn": _learner("monotonic"),
    "learner/q_learner/qmix": _learner("monotonic"),
    "learner/nq_learner/qmix": _learner("monotonic"),
    "learner/w_q_learner/qmix": _learner("monotonic"),
    "learner/*/qatten": _learner("attention"),
    "learner/qtran_learner/qtran_base": _learner("unrestricted"),
    "learner/dmaq_qatten_learner/dmaq": _learner("duplex"),
    "learner/dmaq_qatten_learner/dmaq_qatten": _learner("attention", "duplex"),
    "learner/max_q_learner/qmix": _learner("monotonic", "unrestricted"),
    "powqmix_composed": _rule(check_powqmix, *_STEP, "monotonic", "unrestricted", "recognise"),
    "resq.learner": _rule(check_resq, *_STEP, "monotonic", "unrestricted", "attention"),
    "replay_ring": Rule(check_replay_ring, (), (torch.float64,)),
    "epsilon_schedule": Rule(check_epsilon_schedule, (), (torch.float64,)),
    "env.stag_hunt": Rule(check_stag_hunt, (), (torch.float64,)),
}
"""Kind (as `label` names it) -> how it is checked."""
