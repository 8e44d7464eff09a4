"""Cases of the operators that make a joint value of small networks: `attention`, `unrestricted`, `recognise`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastmix import ops
from fastmix.experiments.bench import baselines
from fastmix.experiments.bench.cases import FLOAT32, Case, Setting, _compilations, _passes
from fastmix.experiments.bench.parity import Results, compared, near_zero
from fastmix.ops._layers import Layers, Linear, joint_one_hot, mlp
from fastmix.ops.attention import AttentionParams
from fastmix.ops.duplex import RecogniserParams
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
    first: list[tuple[int, int]]
    """inputs and outputs of the first layers, those over the same inputs merged"""
    later: list[tuple[int, int]]
    """and of the others"""
    public: Callable[..., Tensor] = lambda module, *inputs: module(*inputs)
    """called with the module, as it is or compiled, and ``inputs``, to ``[rows, 1, 1]``"""
    idle: Callable[[Any], list[Tensor]] = lambda module: []
    """parameters of the module that do not move the value: their gradients are rounding, and are not compared"""


def attention(
    shape: str, rows: int, train: bool = True, setting: Setting = FLOAT32, compiled: Sequence[str] = ("compile",)
) -> Case:
    """Qatten with four weighted heads (queries 64, embed 32), an agent's own features being its share of the state."""
    sizes = SHAPES[shape]
    own, heads, embed, hidden = sizes.state_dim // sizes.n_agents, 4, 32, 64
    torch.manual_seed(_SEED)
    module = baselines.load("networks").Qatten(sizes.n_agents, sizes.state_dim, own, heads, embed, hidden)

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
        [(sizes.state_dim, (heads + 1) * hidden + embed)],
        [*[(hidden, embed), (embed, own)] * heads, (hidden, heads), (embed, 1)],
        idle=lambda module: [key.bias for key in module.key_embedding_layers],  # they move all logits of a head alike
    )
    return _case("attention", shape, rows, train, setting, compiled, problem)


def unrestricted(
    shape: str, rows: int, train: bool = True, setting: Setting = FLOAT32, compiled: Sequence[str] = ("compile",)
) -> Case:
    """WQMIX's central mixer: three hidden layers of 256 over state and utilities, and ``V(s)``."""
    sizes, width = SHAPES[shape], 256
    torch.manual_seed(_SEED)
    module = baselines.load("networks").CentralMixer(sizes.n_agents, sizes.state_dim, width)

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
        [(sizes.state_dim + sizes.n_agents, width), (sizes.state_dim, width)],
        [(width, width), (width, width), (width, 1), (width, 1)],
    )
    return _case("unrestricted", shape, rows, train, setting, compiled, problem)


def recognise(
    shape: str, rows: int, train: bool = True, setting: Setting = FLOAT32, compiled: Sequence[str] = ("compile",)
) -> Case:
    """POWQMIX's recogniser (embed 32, hypernet 64); in the products one-hots are multiplied like anything else."""
    sizes, embed, hypernet = SHAPES[shape], 32, 64
    torch.manual_seed(_SEED)
    module = baselines.load("networks").Recogniser(sizes.n_agents, sizes.n_actions, sizes.state_dim, embed, hypernet)
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
        [(sizes.state_dim + sizes.n_agents * sizes.n_actions, 2 * hypernet), (sizes.state_dim, embed)],
        [(hypernet, sizes.n_agents * embed), (hypernet, embed), (embed, 1)],
        lambda module, advantages, states, actions: module(advantages, states, one_hots)[0],
    )
    return _case("recognise", shape, rows, train, setting, compiled, problem)


def _case(
    op: str, shape: str, rows: int, train: bool, setting: Setting, compiled: Sequence[str], problem: Problem
) -> Case:
    module, inputs = problem.module, problem.inputs
    forwards: dict[str, Callable[[], Tensor]] = {
        "ours": partial(problem.ours, *inputs, module),
        **{
            name: partial(problem.public, call, *inputs)
            for name, call in {"eager": module, **_compilations(module, compiled)}.items()
        },
    }
    cotangent = setting.new(rows, 1, 1)
    contestants = _passes(forwards, _leaves(inputs, module), cotangent, train, setting)
    if train:
        contestants["products"] = baselines.load("operators").network_products(
            rows, problem.first, problem.later, dtype=setting.autocast or setting.dtype, device=setting.device
        )
    return Case(
        op,
        "forward+backward" if train else "forward",
        shape,
        {"rows": rows},
        contestants,
        _errors(problem, cotangent, setting),
        setting.tolerance,
        setting=setting,
        captured=("ours", "eager", "compile", "autotune", "products"),
    )


def _errors(problem: Problem, cotangent: Tensor, setting: Setting) -> Mapping[str, Callable[[], Any]]:
    exact, doubled = copy.deepcopy(problem.module).double(), tuple(map(_doubled, problem.inputs))

    @cache
    def upstream() -> Tensor:
        with torch.no_grad():
            arguments = problem.arguments(*(tensor.squeeze(1) for tensor in doubled), exact)
        return cotangent * ~near_zero(arguments).unsqueeze(1)

    def results(call: Callable[..., Tensor], inputs: tuple[Tensor, ...], module: nn.Module) -> Results:
        value, idle = call(*inputs), {id(tensor) for tensor in problem.idle(module)}
        leaves = [tensor for tensor in _leaves(inputs, module) if id(tensor) not in idle]
        return [value], torch.autograd.grad(value, leaves, upstream().to(value.dtype))

    ours = partial(results, lambda *inputs: problem.ours(*inputs, problem.module), problem.inputs, problem.module)
    public = partial(results, partial(problem.public, problem.module), problem.inputs, problem.module)
    return compared(
        {"ours": setting.entered(ours), "eager": setting.entered(public)},
        lambda: results(lambda *inputs: problem.ours(*inputs, exact, "reference"), doubled, exact),
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
