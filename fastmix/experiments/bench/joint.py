"""Cases of the operators that make a joint value of small networks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastmix import ops
from fastmix.experiments.bench import baselines, bounds
from fastmix.experiments.bench.bounds import Ceilings
from fastmix.experiments.bench.cases import (
    COMPILERS,
    FLOAT32,
    Case,
    Setting,
    _backends,
    _compilations,
    _passes,
    mixing_params,
)
from fastmix.experiments.bench.parity import Results, compared, near_zero
from fastmix.ops._layers import Layers, Linear, joint_one_hot, mlp
from fastmix.ops.attention import AttentionParams
from fastmix.ops.duplex import DuplexParams, ImportanceParams, RecogniserParams
from fastmix.ops.unrestricted import UnrestrictedParams
from fastmix.testing.shapes import SHAPES

_SEED = 0


class Problem(NamedTuple):
    """One computation in both ways, to the same numbers."""

    module: nn.Module
    """the public way"""
    inputs: tuple[Tensor, ...]
    """``[rows, 1, X]``, differentiable as in training"""
    ours: Callable[..., Tensor]
    """called with ``inputs``, the module and a backend, to ``[rows, 1, 1]``"""
    arguments: Callable[..., list[Tensor]]
    """called with ``inputs`` of ``[rows, X]`` and the module: what relu and abs are applied to"""
    products: Callable[..., Callable[[], None]]
    """called with dtype and device: the matrix products alone"""
    public: Callable[..., Tensor] = lambda module, *inputs: module(*inputs)
    """called with the module, as it is or compiled, and ``inputs``, to ``[rows, 1, 1]``"""
    idle: Callable[[Any], list[Tensor]] = lambda module: []
    """parameters of the module that do not move the value: their gradients are rounding, and are not compared"""
    floor: Callable[[Ceilings], float] | None = None
    quantiles: int | None = None
    """of the joint value, where it is a distribution: results are ``[rows, 1, quantiles]``"""
    choice: str | None = None
    """the entry of `fastmix.backends.TABLE` that decides, where it is not called as the operator is"""


def attention(
    shape: str, rows: int, train: bool = True, setting: Setting = FLOAT32, compiled: Sequence[str] = ("compile",)
) -> Case:
    """Qatten with four weighted heads (queries 64, embed 32), an agent's own features being its share of the state."""
    sizes = SHAPES[shape]
    own, heads, embed, hidden = sizes.state_dim // sizes.n_agents, 4, 32, 64
    torch.manual_seed(_SEED)
    module = baselines.load("mixers").Qatten(sizes.n_agents, sizes.state_dim, own, heads, embed, hidden)

    def ours(agent_qs: Tensor, states: Tensor, module: Any, backend: str | None = None) -> Tensor:
        params = AttentionParams(
            _grouped(module.query_embedding_layers),
            _grouped([[key] for key in module.key_embedding_layers])[0],
            _layers(module.head_embedding_layer),
            _layers(module.constrant_value_layer),
        )
        return ops.attention(agent_qs, states, params, own_size=own, backend=backend).q_tot

    def arguments(agent_qs: Tensor, states: Tensor, module: Any) -> list[Tensor]:
        head = module.head_embedding_layer
        return [net[0](states) for net in (*module.query_embedding_layers, head, module.constrant_value_layer)] + [
            head(states)
        ]

    problem = Problem(
        module.to(setting.device, setting.dtype),
        (setting.new(rows, 1, sizes.n_agents, requires_grad=True), setting.new(rows, 1, sizes.state_dim)),
        ours,
        arguments,
        partial(
            _products,
            rows,
            [(sizes.state_dim, (heads + 1) * hidden + embed)],
            [*[(hidden, embed), (embed, own)] * heads, (hidden, heads), (embed, 1)],
        ),
        idle=lambda module: [key.bias for key in module.key_embedding_layers],  # they move all logits of a head alike
    )
    return _case("attention", shape, rows, train, setting, compiled, problem)


def unrestricted(
    shape: str, rows: int, train: bool = True, setting: Setting = FLOAT32, compiled: Sequence[str] = ("compile",)
) -> Case:
    """WQMIX's central mixer: three hidden layers of 256 over state and utilities, and ``V(s)``."""
    sizes, width = SHAPES[shape], 256
    torch.manual_seed(_SEED)
    module = baselines.load("mixers").CentralMixer(sizes.n_agents, sizes.state_dim, width)

    def ours(agent_qs: Tensor, states: Tensor, module: Any, backend: str | None = None) -> Tensor:
        params = UnrestrictedParams(_layers(module.net), _layers(module.V))
        return ops.unrestricted(agent_qs, states, params, backend=backend)

    def arguments(agent_qs: Tensor, states: Tensor, module: Any) -> list[Tensor]:
        x, net = torch.cat([states, agent_qs], -1), _layers(module.net)
        return [mlp(x, net[: depth + 1]) for depth in range(len(net) - 1)] + [module.V[0](states)]

    problem = Problem(
        module.to(setting.device, setting.dtype),
        (setting.new(rows, 1, sizes.n_agents, requires_grad=True), setting.new(rows, 1, sizes.state_dim)),
        ours,
        arguments,
        partial(
            _products,
            rows,
            [(sizes.state_dim + sizes.n_agents, width), (sizes.state_dim, width)],
            [(width, width), (width, width), (width, 1), (width, 1)],
        ),
    )
    return _case("unrestricted", shape, rows, train, setting, compiled, problem)


def recognise(
    shape: str, rows: int, train: bool = True, setting: Setting = FLOAT32, compiled: Sequence[str] = ("compile",)
) -> Case:
    """POWQMIX's recogniser (embed 32, hypernet 64); in the products one-hots are multiplied like anything else."""
    sizes, embed, hypernet = SHAPES[shape], 32, 64
    torch.manual_seed(_SEED)
    module = baselines.load("mixers").Recogniser(sizes.n_agents, sizes.n_actions, sizes.state_dim, embed, hypernet)
    actions = torch.randint(sizes.n_actions, (rows, 1, sizes.n_agents), device=setting.device)
    greedy = setting.new(rows, 1, sizes.n_agents) * 0
    # A replay of the public trainers has the one-hots at hand.
    one_hots = joint_one_hot(actions, sizes.n_actions, setting.dtype)

    def ours(advantages: Tensor, states: Tensor, actions: Tensor, module: Any, backend: str | None = None) -> Tensor:
        params = RecogniserParams(_layers(module.hyper_w1), _layers(module.hyper_w2), _layers(module.V))
        return ops.recognise(advantages, greedy.to(states.dtype), states, actions, params, backend=backend).q_r

    def arguments(advantages: Tensor, states: Tensor, actions: Tensor, module: Any) -> list[Tensor]:
        x = torch.cat([states, joint_one_hot(actions, sizes.n_actions, states.dtype)], -1)
        hypernets = (module.hyper_w1, module.hyper_w2)
        return [net[0](x) for net in hypernets] + [net(x) for net in hypernets] + [module.V[0](states)]

    problem = Problem(
        module.to(setting.device, setting.dtype),
        (setting.new(rows, 1, sizes.n_agents), setting.new(rows, 1, sizes.state_dim), actions),
        ours,
        arguments,
        partial(
            _products,
            rows,
            [(sizes.state_dim + sizes.n_agents * sizes.n_actions, 2 * hypernet), (sizes.state_dim, embed)],
            [(hypernet, sizes.n_agents * embed), (hypernet, embed), (embed, 1)],
        ),
        lambda module, advantages, states, actions: module(advantages, states, one_hots)[0],
    )
    return _case("recognise", shape, rows, train, setting, compiled, problem)


def duplex(
    shape: str, rows: int, train: bool = True, setting: Setting = FLOAT32, compiled: Sequence[str] = ("compile",)
) -> Case:
    """QPLEX's mixer as in pymarl2 (four kernels of two layers, width 64), both of its parts."""
    sizes = SHAPES[shape]
    joint = (sizes.n_agents, sizes.n_actions, sizes.state_dim)
    torch.manual_seed(_SEED)
    module = baselines.load("mixers").DuplexMixer(*joint)
    agent_qs = setting.new(rows, 1, sizes.n_agents, requires_grad=True)
    max_qs = agent_qs.detach() + setting.new(rows, 1, sizes.n_agents).abs()
    actions = torch.randint(sizes.n_actions, (rows, 1, sizes.n_agents), device=setting.device)
    one_hots = joint_one_hot(actions, sizes.n_actions, setting.dtype)

    def ours(
        agent_qs: Tensor, states: Tensor, max_qs: Tensor, actions: Tensor, module: Any, backend: str | None = None
    ) -> Tensor:
        kernels = module.si_weight
        importance = (kernels.key_extractors, kernels.agents_extractors, kernels.action_extractors)
        params = DuplexParams(
            _layers(module.hyper_w_final), _layers(module.V), ImportanceParams(*map(_grouped, importance))
        )
        return ops.duplex(agent_qs, max_qs, states, actions, params, backend=backend).q_tot

    def public(module: Any, agent_qs: Tensor, states: Tensor, max_qs: Tensor, actions: Tensor) -> Tensor:
        value: Tensor = module(agent_qs, states, is_v=True) + module(agent_qs, states, one_hots, max_qs)
        return value

    def arguments(agent_qs: Tensor, states: Tensor, max_qs: Tensor, actions: Tensor, module: Any) -> list[Tensor]:
        both, kernels = torch.cat([states, joint_one_hot(actions, sizes.n_actions, states.dtype)], -1), module.si_weight
        reading_states = [module.hyper_w_final, module.V, *kernels.key_extractors, *kernels.agents_extractors]
        hidden = [net[0](states) for net in reading_states] + [net[0](both) for net in kernels.action_extractors]
        return [*hidden, *(net(states) for net in (module.hyper_w_final, *kernels.key_extractors))]

    problem = Problem(
        module.to(setting.device, setting.dtype),
        (agent_qs, setting.new(rows, 1, sizes.state_dim), max_qs, actions),
        ours,
        arguments,
        partial(baselines.load("operators").duplex_products, rows, *joint),
        public,
        floor=lambda ceilings: bounds.duplex(
            rows, *joint, train, ceilings.rate(setting.precision, setting.autocast), ceilings
        ),
    )
    return _case("duplex", shape, rows, train, setting, compiled, problem)


def quantile_mix(
    shape: str,
    rows: int,
    quantiles: int,
    train: bool = True,
    setting: Setting = FLOAT32,
    compiled: Sequence[str] = ("compile",),
) -> Case:
    """DMIX's mixer (embed 32, hypernet 64) of ``quantiles`` of each agent."""
    sizes = SHAPES[shape]
    torch.manual_seed(_SEED)
    module = baselines.load("distributional").MeanShapeMixer(sizes.n_agents, sizes.state_dim)

    def ours(agent_zs: Tensor, states: Tensor, module: Any, backend: str | None = None) -> Tensor:
        return ops.quantile_mix(agent_zs, states, mixing_params(module), backend=backend)

    def arguments(agent_zs: Tensor, states: Tensor, module: Any) -> list[Tensor]:
        generators = (module.hyper_w_1, module.hyper_w_final)
        return [net[0](states) for net in (*generators, module.V)] + [net(states) for net in generators]

    problem = Problem(
        module.to(setting.device, setting.dtype),
        (
            setting.new(rows, 1, sizes.n_agents, quantiles, requires_grad=True),
            setting.new(rows, 1, sizes.state_dim),
        ),
        ours,
        arguments,
        partial(baselines.load("operators").monotonic_products, rows, sizes.n_agents, sizes.state_dim),
        lambda module, agent_zs, states: module(agent_zs, states).squeeze(2),
        quantiles=quantiles,
        choice="quantile",
    )
    return _case("quantile_mix", shape, rows, train, setting, compiled, problem)


def _case(
    op: str, shape: str, rows: int, train: bool, setting: Setting, compiled: Sequence[str], problem: Problem
) -> Case:
    module, inputs = problem.module, problem.inputs
    cotangent = setting.new(rows, 1, problem.quantiles or 1)

    def passes(calls: Mapping[str, Callable[[], Tensor]]) -> dict[str, Callable[[], object]]:
        return _passes(calls, _leaves(inputs, module), cotangent, train, setting)

    def mine(backend: str | None = None) -> Callable[[], Tensor]:
        return partial(problem.ours, *inputs, module, backend=backend)

    able = _backends(problem.choice or op, setting, lambda backend: passes({"ours": mine(backend)})["ours"])
    public = {"eager": module, **_compilations(module, compiled)}
    contestants = passes(
        {"ours": mine(), **{name: mine(name) for name in able.others}}
        | {name: partial(problem.public, call, *inputs) for name, call in public.items()}
    )
    if train:
        contestants["products"] = problem.products(dtype=setting.autocast or setting.dtype, device=setting.device)
    return Case(
        op,
        "forward+backward" if train else "forward",
        shape,
        {"rows": rows} | ({} if problem.quantiles is None else {"quantiles": problem.quantiles}),
        contestants,
        _errors(problem, able.others, cotangent, setting),
        setting.tolerance,
        setting=setting,
        captured=("ours", *able.others, "eager", *COMPILERS, "products"),
        floor=problem.floor,
        absent=able.absent,
        backend=able.chosen,
    )


def _products(
    rows: int, first: list[tuple[int, int]], later: list[tuple[int, int]], dtype: torch.dtype, device: str
) -> Callable[[], None]:
    products: Callable[[], None] = baselines.load("operators").network_products(
        rows, first, later, dtype=dtype, device=device
    )
    return products


def _errors(
    problem: Problem, others: Sequence[str], cotangent: Tensor, setting: Setting
) -> Mapping[str, Callable[[], Any]]:
    module, exact = problem.module, copy.deepcopy(problem.module).double()
    doubled = tuple(map(_doubled, problem.inputs))

    @cache
    def upstream() -> Tensor:
        with torch.no_grad():
            arguments = problem.arguments(*(tensor.squeeze(1) for tensor in doubled), exact)
        return cotangent * ~near_zero(arguments).unsqueeze(1)

    def results(call: Callable[..., Tensor], inputs: tuple[Tensor, ...], module: nn.Module) -> Results:
        value, idle = call(*inputs), {id(tensor) for tensor in problem.idle(module)}
        leaves = [tensor for tensor in _leaves(inputs, module) if id(tensor) not in idle]
        return [value], torch.autograd.grad(value, leaves, upstream().to(value.dtype))

    def by(module: nn.Module, backend: str | None = None) -> Callable[..., Tensor]:
        return lambda *inputs: problem.ours(*inputs, module, backend)

    calls = {"ours": by(module), **{name: by(module, name) for name in others}}
    calls["eager"] = partial(problem.public, module)
    return compared(
        {name: setting.entered(partial(results, call, problem.inputs, module)) for name, call in calls.items()},
        lambda: results(by(exact, "reference"), doubled, exact),
    )


def _leaves(inputs: tuple[Tensor, ...], module: nn.Module) -> list[Tensor]:
    return [*(tensor for tensor in inputs if tensor.requires_grad), *module.parameters()]


def _doubled(tensor: Tensor) -> Tensor:
    return tensor.detach().double().requires_grad_(tensor.requires_grad) if tensor.is_floating_point() else tensor


def _layers(module: Any) -> Layers:
    return tuple(Linear(layer.weight, layer.bias) for layer in module if isinstance(layer, nn.Linear))


def _grouped(modules: Any) -> Layers:
    """One layer for each of those that ``modules`` have one after another, as fastmix's mixers make them."""
    return tuple(
        Linear(torch.stack([weight for weight, _ in same]), torch.stack([bias for _, bias in same if bias is not None]))
        for same in zip(*map(_layers, modules), strict=True)
    )
