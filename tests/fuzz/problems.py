"""One random problem of each op: odd sizes, any strides, padded steps that hold NaN, float32 and float64.

A problem is a function of a `Draw`; it runs the op with both backends and compares every output and every gradient. The
game in the core is a problem, too.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fastmix import ops
from fastmix.ops._layers import Layers, Linear
from fastmix.ops._networks import flatten as _flatten
from fastmix.ops.attention import AttentionParams
from fastmix.ops.duplex import PARTS, DuplexParams, ImportanceParams, RecogniserParams
from fastmix.ops.monotonic import POSITIVITIES, MonotonicParams
from fastmix.ops.recurrent import RecurrentParams
from fastmix.ops.returns import KINDS
from fastmix.ops.td_loss import Favoured
from fastmix.ops.td_loss.types import RULES
from fastmix.ops.unrestricted import UnrestrictedParams
from fastmix.testing import assert_close, poisoned_allocations
from tests.prey_problem import play_beside_reference, random_rules

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}
"""RMS ratio. Looser in float32 than the tests of the ops: random problems include ones whose sums nearly cancel."""


class Draw:
    """Random sizes and tensors from one seed; ``log`` tells what was drawn."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = self.random.choice([torch.float32, torch.float64])
        self.log: dict[str, Any] = {"dtype": self.dtype}

    def size(self, name: str, high: int, low: int = 1) -> int:
        """A size in [low, high]; small ones and those beside a power of two come more often."""
        edges = [n for n in (0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65) if low <= n <= high]
        value = self.random.choice(edges) if self.random.random() < 0.5 else self.random.randint(low, high)
        self.log[name] = value
        return value

    def flag(self, name: str, chance: float = 0.5) -> bool:
        self.log[name] = value = self.random.random() < chance
        return value

    def choice(self, name: str, options: Sequence[Any]) -> Any:
        self.log[name] = value = self.random.choice(options)
        return value

    def tensor(self, *shape: int, scale: float = 1.0, grad: bool = False) -> Tensor:
        """Normal numbers, laid out contiguously, with gaps, transposed, or as an expanded dimension."""
        layout = self.random.choice(["contiguous", "contiguous", "gaps", "transposed", "expanded"])
        if layout == "gaps" and shape:
            wide = self._normal((*shape[:-1], 2 * shape[-1] + 1), scale)
            result = wide[..., 1::2]
        elif layout == "transposed" and len(shape) > 1:
            result = self._normal((shape[1], shape[0], *shape[2:]), scale).transpose(0, 1)
        elif layout == "expanded" and not grad and shape and shape[0] > 1:
            result = self._normal((1, *shape[1:]), scale).expand(shape)
        else:
            result = self._normal(shape, scale)
        return result.requires_grad_() if grad else result

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """Integers in [low, high)."""
        return torch.randint(low, high, shape, generator=self.generator)

    def live(self, episodes: int, steps: int) -> tuple[Tensor, Tensor]:
        """Mask and terminal flags ``[B, T, 1]`` of episodes of random length."""
        lengths = self.integers(0, steps + 1, episodes, 1)
        time = torch.arange(steps).expand(episodes, steps)
        ended = self.integers(0, 2, episodes, 1)
        mask, terminated = time < lengths, (time == lengths - 1) & (ended == 1)
        return mask.unsqueeze(-1).to(self.dtype), terminated.unsqueeze(-1).to(self.dtype)

    def _normal(self, shape: Sequence[int], scale: float) -> Tensor:
        return scale * torch.randn(tuple(shape), generator=self.generator, dtype=self.dtype)


def select(draw: Draw) -> None:
    """Availability of any type, ties, rows where nothing is available."""
    leading = [draw.size(f"dim{i}", 9, 0) for i in range(draw.size("dims", 3, 0))]
    agents, actions = draw.size("agents", 9), draw.size("actions", 40)
    shape = (*leading, agents, actions)
    qs = draw.tensor(*shape)
    if draw.flag("ties", 0.3):
        qs = qs.round()
    qs = qs.detach().requires_grad_(draw.flag("gradient", 0.8))
    avail: Tensor | None = draw.integers(0, 2, *shape) != 0
    if avail is not None and draw.flag("masked", 0.8):
        avail = avail.to(draw.choice("avail_dtype", [torch.bool, torch.uint8, torch.int32, torch.int64, torch.float32]))
    else:
        avail = None
    taken = draw.integers(0, actions, *shape[:-1]) if draw.flag("actions_given") else None
    target_qs = draw.tensor(*shape) if draw.flag("targets_given") else None
    _compare(draw, [qs], lambda backend: ops.select(qs, avail, actions=taken, target_qs=target_qs, backend=backend))


def returns(draw: Draw) -> None:
    """Every kind, with and without a trailing axis of rewards; only live steps are compared."""
    episodes, steps = draw.size("episodes", 9, 0), draw.size("steps", 70, 0)
    trailing = [draw.size(f"trailing{i}", 34) for i in range(draw.size("trailing", 2))]
    kind = draw.choice("kind", KINDS)
    mask, terminated = draw.live(episodes, steps)
    rewards = draw.tensor(episodes, steps, *(trailing if draw.flag("wide_rewards") else [1]), grad=True)
    target_qs = draw.tensor(episodes, steps + 1, *trailing, grad=True)
    behaviour = draw.tensor(episodes, steps + 1, *trailing, grad=True) if kind == "q_lambda" else None
    gamma, td_lambda, n_step = draw.random.random(), draw.random.random(), draw.size("n_step", 9)

    def run(backend: str) -> Any:
        return ops.returns(
            rewards, terminated, mask, target_qs, gamma=gamma, kind=kind, td_lambda=td_lambda, n_step=n_step,
            behaviour_qs=behaviour, backend=backend,
        )  # fmt: skip

    _compare(draw, [rewards, target_qs, *([] if behaviour is None else [behaviour])], run, mask)


def monotonic(draw: Draw) -> None:
    """Values or distributions, one and two hypernet layers, any leading dimensions; gradients of a random subset."""
    leading = [draw.size("rows", 150, 0)] if draw.flag("flat") else [draw.size("episodes", 9, 0), draw.size("steps", 9)]
    agents, embed, state = draw.size("agents", 27), draw.size("embed", 66), draw.size("state", 130)
    hyper = draw.size("hyper", 70) if draw.flag("two_layers") else None
    inner = state if hyper is None else hyper
    every = draw.flag("all_gradients", 0.6)

    def parameter(*shape: int) -> Tensor:
        return draw.tensor(*shape, scale=shape[-1] ** -0.5, grad=every or draw.random.random() < 0.5)

    params = MonotonicParams(
        w1_hidden_weight=parameter(hyper, state) if hyper else None,
        w1_hidden_bias=parameter(hyper) if hyper else None,
        w1_weight=parameter(agents * embed, inner),
        w1_bias=parameter(agents * embed),
        w2_hidden_weight=parameter(hyper, state) if hyper else None,
        w2_hidden_bias=parameter(hyper) if hyper else None,
        w2_weight=parameter(embed, inner),
        w2_bias=parameter(embed),
        b1_weight=parameter(embed, state),
        b1_bias=parameter(embed),
        v_hidden_weight=parameter(embed, state),
        v_hidden_bias=parameter(embed),
        v_weight=parameter(1, embed),
        v_bias=parameter(1),
    )
    distribution = [draw.size("quantiles", 40)] if draw.flag("distributions", 0.3) else []
    op = ops.quantile_mix if distribution else ops.monotonic
    agent_qs = draw.tensor(*leading, agents, *distribution, grad=draw.flag("gradient_of_qs", 0.8))
    states = draw.tensor(*leading, state, grad=draw.flag("gradient_of_states", 0.3))
    positivity, beta = draw.choice("positivity", POSITIVITIES), draw.choice("beta", [1.0, 0.3, 4.0])

    def run(backend: str) -> Any:
        return op(agent_qs, states, params, positivity=positivity, beta=beta, backend=backend)

    _compare(draw, [agent_qs, states, *(p for p in params if p is not None)], run)


def duplex(draw: Draw) -> None:
    """Both parts or one, with and without transform; any kernels, widths and depths; some gradients."""
    leading, agents, _, state, taken, networks = _joint(draw)
    depth = draw.size("transform_layers", 3, 0)
    scale, shift = (_layers(draw, f"transform{i}", state, agents, depth) if depth else () for i in range(2))
    params = DuplexParams(scale, shift, networks)
    agent_qs = draw.tensor(*leading, agents, grad=draw.flag("gradient_of_qs", 0.8))
    max_qs = draw.tensor(*leading, agents)
    states = draw.tensor(*leading, state, grad=draw.flag("gradient_of_states", 0.3))
    options = {"part": draw.choice("part", PARTS), "minus_one": draw.flag("minus_one")}

    def run(backend: str) -> Any:
        return ops.duplex(agent_qs, max_qs, states, taken, params, **options, backend=backend)

    _compare(draw, [agent_qs, states, *_flatten((scale, shift, *networks))[0]], run)


def importance(draw: Draw) -> None:
    """QPLEX's importance weights alone."""
    leading, _, _, state, taken, networks = _joint(draw)
    states = draw.tensor(*leading, state, grad=draw.flag("gradient_of_states", 0.3))
    inputs = [states, *_flatten(networks)[0]]
    _compare(draw, inputs, lambda backend: ops.importance(states, taken, networks, backend=backend))


def attention(draw: Draw) -> None:
    """All options and results; any heads, widths and depths; nobody alive in some rows; some gradients."""
    leading = _leading(draw)
    agents, own, heads, embed = draw.size("agents", 12), draw.size("own", 20), draw.size("heads", 5), draw.size("e", 40)
    state, reads_qs = agents * own + draw.size("rest", 60, 0), draw.flag("keys_read_qs", 0.3)
    query = _layers(draw, "query", state, embed, draw.size("query_layers", 3), heads)
    (key,) = _layers(draw, "key", own + reads_qs, embed, 1, heads)
    if draw.flag("no_biases", 0.3):
        query, key = (*query[:-1], query[-1]._replace(bias=None)), key._replace(bias=None)
    head = _layers(draw, "head", state, heads, draw.size("head_layers", 3)) if draw.flag("weighted") else ()
    v = _layers(draw, "v", state, 1, draw.size("v_layers", 3)) if draw.flag("constant") else ()
    params, softmax = AttentionParams(query, key, head, v), draw.flag("softmax", 0.8)
    agent_qs = draw.tensor(*leading, agents, grad=draw.flag("gradient_of_qs", 0.8))
    states = draw.tensor(*leading, state, grad=draw.flag("gradient_of_states", 0.3))
    options: dict[str, Any] = {"own_size": own, "own_grad": draw.flag("own_grad"), "softmax": softmax}
    options["alive"] = draw.integers(0, 2, *leading, agents) if softmax and draw.flag("dead") else None
    options["return_weights"] = draw.flag("weights")
    options["return_statistics"] = softmax and draw.flag("statistics")

    def run(backend: str) -> Any:
        return ops.attention(agent_qs, states, params, **options, backend=backend)

    _compare(draw, [agent_qs, states, *_flatten((query, (key,), head, v))[0]], run)


def unrestricted(draw: Draw) -> None:
    """State with and without joint action and features, with and without V(s)."""
    leading = _leading(draw)
    agents, actions, state = draw.size("agents", 12), draw.size("actions", 20), draw.size("state", 130)
    features = draw.size("features", 40) if draw.flag("with_features") else 0
    taken = draw.integers(-1, actions, *leading, agents) if draw.flag("with_actions") else None
    inputs = state + features + (0 if taken is None else agents * actions)
    net = _layers(draw, "net", inputs, draw.size("outputs", 9), draw.size("layers", 4))
    v = _layers(draw, "v", state, 1, draw.size("v_layers", 3)) if draw.flag("constant") else ()
    states = draw.tensor(*leading, state, grad=draw.flag("gradient_of_states", 0.3))
    given = draw.tensor(*leading, features, grad=draw.flag("gradient_of_features", 0.7)) if features else None

    def run(backend: str) -> Any:
        return ops.unrestricted(given, states, UnrestrictedParams(net, v), actions=taken, backend=backend)

    _compare(draw, [states, *([] if given is None else [given]), *_flatten((net, v))[0]], run)


def recognise(draw: Draw) -> None:
    """Any widths and depths; some agents greedy; some gradients."""
    leading = _leading(draw)
    agents, actions, state = draw.size("agents", 12), draw.size("actions", 20), draw.size("state", 130)
    embed, inputs = draw.size("embed", 40), state + agents * actions
    params = RecogniserParams(
        _layers(draw, "w1", inputs, agents * embed, draw.size("w1_layers", 3)),
        _layers(draw, "w2", inputs, embed, draw.size("w2_layers", 3)),
        _layers(draw, "v", state, 1, draw.size("v_layers", 3)),
    )
    agent_qs, taken = draw.tensor(*leading, agents), draw.integers(-1, actions, *leading, agents)
    max_qs = agent_qs + draw.tensor(*leading, agents).relu()
    states = draw.tensor(*leading, state, grad=draw.flag("gradient_of_states", 0.3))

    def run(backend: str) -> Any:
        return ops.recognise(agent_qs, max_qs, states, taken, params, backend=backend)

    _compare(draw, [states, *_flatten(params)[0]], run)


def recurrent(draw: Draw) -> None:
    """One to three networks, with and without initial state, last actions, agent ids, layer norm, gradients."""
    episodes, steps, agents = draw.size("episodes", 9, 0), draw.size("steps", 12), draw.size("agents", 9)
    features, actions = draw.size("obs", 80), draw.size("actions", 20)
    with_actions, with_ids = draw.flag("last_actions"), draw.flag("agent_ids")
    inputs = features + (actions if with_actions else 0) + (agents if with_ids else 0)
    networks, hidden = [], []
    for index in range(draw.size("networks", 3)):
        width, trained = draw.size(f"width{index}", 66), draw.flag(f"trained{index}", 0.7)
        networks.append(_network(draw, inputs, width, actions, trained))
        started = draw.flag(f"hidden{index}")
        hidden.append(draw.tensor(episodes, agents, width, grad=draw.flag("hidden_gradient")) if started else None)
    obs = draw.tensor(episodes, steps, agents, features, grad=draw.flag("gradient_of_obs", 0.3))
    last = draw.integers(-1, actions, episodes, steps, agents) if with_actions else None
    states = draw.flag("return_hidden_states")

    def run(backend: str) -> Any:
        outputs = ops.recurrent(
            obs, networks, hidden, last_actions=last, agent_ids=with_ids, return_hidden_states=states, backend=backend
        )
        return [tensor for output in outputs for tensor in output]

    parameters = [p for network in networks for p in network if p is not None]
    _compare(draw, [obs, *(h for h in hidden if h is not None), *parameters], run)


def td_loss(draw: Draw) -> None:
    """Weights, residual, favoured steps, normaliser; masked steps may hold NaN or infinity."""
    episodes, steps, width = draw.size("episodes", 9), draw.size("steps", 40), draw.size("width", 9)
    mask, _ = draw.live(episodes, steps)
    mask[0, 0] = 1  # the mean over nothing is not a number
    qs = draw.tensor(episodes, steps, width).clone()
    if draw.flag("poisoned_padding"):
        qs = torch.where(mask != 0, qs, draw.choice("poison", [float("nan"), float("inf")]))
    qs.requires_grad_()
    residual = draw.tensor(episodes, steps, width, grad=True) if draw.flag("residual") else None
    targets = draw.tensor(episodes, steps, draw.choice("target_width", [1, width]))
    weights = draw.tensor(
        *draw.choice("weights", [(episodes, 1, 1), (episodes, steps, 1), (episodes, steps, width)])
    ).abs()
    normaliser = draw.tensor().abs() + 1 if draw.flag("normaliser") else None
    wide_mask = mask.expand(-1, -1, width) if draw.flag("wide_mask") else mask
    weighted, scale = draw.flag("weighted"), draw.choice("scale", [1.0, 0.5])
    favoured = None
    if draw.flag("favoured"):
        columns = draw.choice("favoured_width", [1, width])
        greedy, values, thresholds = (draw.tensor(episodes, steps, columns) for _ in range(3))
        favoured = Favoured(draw.choice("rule", RULES), greedy > 0, values, thresholds, 0.3, 5.0, 0.1)

    def run(backend: str) -> Any:
        return ops.td_loss(
            qs, targets, wide_mask, weights=weights if weighted else None, residual=residual,
            favoured=favoured, scale=scale, normaliser=normaliser, backend=backend,
        )  # fmt: skip

    _compare(draw, [qs, *([] if residual is None else [residual])], run)


def quantile(draw: Draw) -> None:
    """The loss with any kappa, weights and broadcast fractions; the split of agents' distributions; fractions."""
    episodes, steps, groups = draw.size("episodes", 9), draw.size("steps", 20), draw.size("groups", 4)
    n, n_targets = draw.size("quantiles", 40), draw.size("targets", 40)
    mask, _ = draw.live(episodes, steps)
    mask[0, 0] = 1
    theta = draw.tensor(episodes, steps, groups, n).clone()
    targets = draw.tensor(episodes, steps, draw.choice("target_groups", [1, groups]), n_targets)
    if draw.flag("poisoned_padding"):
        poison = draw.choice("poison", [float("nan"), float("inf")])
        theta, targets = (torch.where(mask.unsqueeze(-1) != 0, tensor, poison) for tensor in (theta, targets))
    theta.requires_grad_()
    taus = torch.sigmoid(draw.tensor(*draw.choice("fractions", [(n,), (steps, 1, n), (episodes, steps, groups, n)])))
    weights = draw.tensor(*draw.choice("weights", [(groups,), (episodes, 1, 1), (episodes, steps, groups)])).abs()
    weighted, kappa = draw.flag("weighted"), draw.choice("kappa", [1.0, 0.0, 0.1, 3.0])
    wide_mask = mask.expand(-1, -1, groups) if draw.flag("wide_mask") else mask
    normaliser = draw.tensor().abs() + 1 if draw.flag("normaliser") else None
    agents = draw.tensor(*[draw.size(f"dim{i}", 7, 0) for i in range(draw.size("dims", 3, 0))], groups, n, grad=True)
    key, stream = draw.integers(-(2**62), 2**62, 2), draw.size("stream", 99, 0)

    def run(backend: str) -> Any:
        loss = ops.quantile_loss(
            theta, targets, taus, wide_mask, kappa=kappa, weights=weights if weighted else None, normaliser=normaliser,
            backend=backend,
        )  # fmt: skip
        drawn = ops.fractions((steps, n), key, stream=stream, dtype=draw.dtype, backend=backend)
        return [*loss, *ops.mean_shape(agents, backend=backend), drawn]

    _compare(draw, [theta, agents], run)


def implicit(draw: Draw) -> None:
    """Features of fractions, their mean, and the quantiles of chosen actions."""
    lead = [draw.size(f"dim{i}", 9, 0) for i in range(draw.size("dims", 2, 0))]
    n_agents, n, width = draw.size("agents", 12), draw.size("quantiles", 40), draw.size("width", 80)
    # The reference rounds its angles to float32, the core does not: there, cosines of 0 only.
    n_cosines, n_actions = draw.size("cosines", 70 if draw.dtype == torch.float64 else 1), draw.size("actions", 20)
    taus = torch.sigmoid(draw.tensor(*lead, n))
    hidden = draw.tensor(*lead, n_agents, width, grad=True)
    actions = draw.integers(0, n_actions, *lead, n_agents)
    phi = [draw.tensor(width, n_cosines, grad=True), draw.tensor(width, grad=True)]
    fc2 = [draw.tensor(n_actions, width, grad=True), draw.tensor(n_actions, grad=True)]

    def run(backend: str) -> Any:
        values, mean = ops.quantile_features(taus, *phi, backend=backend)
        return [values, mean, ops.chosen_quantiles(hidden, values, actions, *fc2, backend=backend)]

    _compare(draw, [hidden, *phi, *fc2], run)


def prey(draw: Draw) -> None:
    """Predator-prey: some episodes of the compiled game and of the plain one, by random rules."""
    rules = random_rules(draw.seed)
    draw.log["rules"] = rules
    play_beside_reference(rules, draw.seed)


PROBLEMS: dict[str, Callable[[Draw], None]] = {
    problem.__name__: problem
    for problem in (
        select,
        returns,
        monotonic,
        duplex,
        importance,
        attention,
        unrestricted,
        recognise,
        recurrent,
        td_loss,
        quantile,
        implicit,
        prey,
    )
}


def _joint(draw: Draw) -> tuple[list[int], int, int, int, Tensor, ImportanceParams]:
    """Leading dimensions, agents, actions, state features, a joint action and importance networks."""
    leading = _leading(draw)
    agents, actions, state = draw.size("agents", 12), draw.size("actions", 20), draw.size("state", 130)
    kernels, depth = draw.size("kernels", 5), draw.size("importance_layers", 3)
    networks = ImportanceParams(
        _layers(draw, "key", state, 1, depth, kernels),
        _layers(draw, "agents_networks", state, agents, depth, kernels),
        _layers(draw, "action", state + agents * actions, agents, depth, kernels),
    )
    return leading, agents, actions, state, draw.integers(-1, actions, *leading, agents), networks


def _leading(draw: Draw) -> list[int]:
    return [draw.size("rows", 150, 0)] if draw.flag("flat") else [draw.size("episodes", 9, 0), draw.size("steps", 9)]


def _layers(draw: Draw, name: str, inputs: int, outputs: int, depth: int, groups: int | None = None) -> Layers:
    widths = [inputs, *(draw.size(f"{name}_width{layer}", 70) for layer in range(depth - 1)), outputs]
    group, grad = () if groups is None else (groups,), draw.flag(f"gradient_of_{name}", 0.8)
    return tuple(
        Linear(draw.tensor(*group, after, before, scale=before**-0.5, grad=grad), draw.tensor(*group, after, grad=grad))
        for before, after in pairwise(widths)
    )


def _network(draw: Draw, inputs: int, width: int, actions: int, trained: bool) -> RecurrentParams:
    def parameter(*shape: int) -> Tensor:
        return draw.tensor(*shape, scale=shape[-1] ** -0.5, grad=trained)

    # Over one or two features layer norm gives -1, 0 or 1 whatever comes in: its gradient is nothing but rounding.
    norm = draw.flag(f"layer_norm of width {width}", 0.3) and width > 2
    return RecurrentParams(
        fc1_weight=parameter(width, inputs),
        fc1_bias=parameter(width),
        weight_ih=parameter(3 * width, width),
        weight_hh=parameter(3 * width, width),
        bias_ih=parameter(3 * width),
        bias_hh=parameter(3 * width),
        norm_weight=parameter(width) if norm else None,
        norm_bias=parameter(width) if norm else None,
        fc2_weight=parameter(actions, width),
        fc2_bias=parameter(actions),
    )


def _compare(draw: Draw, inputs: Sequence[Tensor], run: Callable[[str], Any], mask: Tensor | None = None) -> None:
    """Outputs and gradients of both backends, from the same random output gradients."""
    leaves = [tensor for tensor in inputs if tensor.requires_grad]
    tolerance = TOLERANCE[draw.dtype]
    expected = _tensors(run("reference"))
    with poisoned_allocations():
        actual = _tensors(run("native"))
        assert len(actual) == len(expected), f"{len(actual)} outputs, expected {len(expected)}"
        upstream = [draw.tensor(*e.shape) if e.requires_grad else None for e in expected]
        if mask is not None:
            upstream = [
                None if u is None else u * mask.reshape(*mask.shape[:2], *[1] * (u.dim() - 2)) for u in upstream
            ]
        actual_grads = _gradients(actual, upstream, leaves)
    expected_grads = _gradients(expected, upstream, leaves)
    for index, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert_close(a, e, tolerance, name=f"output {index}", mask=mask)
    # Where terms cancel or an activation saturates, a gradient is as exact as the largest one, not as its size asks.
    largest = max((e.abs().max().item() for e in expected_grads if e.numel()), default=0.0)
    rounding = 100 * torch.finfo(draw.dtype).eps * max(1.0, largest)
    for index, (a, e) in enumerate(zip(actual_grads, expected_grads, strict=True)):
        if torch.allclose(a, e, rtol=0.0, atol=rounding):
            continue
        try:
            assert_close(a, e, tolerance, name=f"gradient {index} of shape {tuple(e.shape)}")
        except AssertionError:
            if not _ill_conditioned(draw, run, upstream, leaves, index, a, e):
                raise


def _ill_conditioned(
    draw: Draw,
    run: Callable[[str], Any],
    upstream: Sequence[Tensor | None],
    leaves: Sequence[Tensor],
    index: int,
    actual: Tensor,
    expected: Tensor,
) -> bool:
    """Whether the reference's own gradient moves as far when its inputs move by a few roundings.

    So it is where a ReLU sits on its edge.
    """
    originals = [leaf.detach().clone() for leaf in leaves]
    moved = 0.0
    for _ in range(10):
        with torch.no_grad():
            for leaf, original in zip(leaves, originals, strict=True):
                noise = torch.randn(original.shape, generator=draw.generator, dtype=draw.dtype)
                leaf.copy_(original * (1 + 30 * torch.finfo(draw.dtype).eps * noise))
        moved = max(moved, (_gradients(_tensors(run("reference")), upstream, leaves)[index] - expected).norm().item())
    with torch.no_grad():
        for leaf, original in zip(leaves, originals, strict=True):
            leaf.copy_(original)
    distance = (actual - expected).norm().item()
    return math.isfinite(distance) and distance <= 3 * moved


def _tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [t for t in result if t is not None]


def _gradients(outputs: Sequence[Tensor], upstream: Sequence[Tensor | None], leaves: Sequence[Tensor]) -> list[Tensor]:
    pairs = [(o, u) for o, u in zip(outputs, upstream, strict=True) if o.requires_grad and u is not None]
    if not pairs or not leaves:
        return []
    grads = torch.autograd.grad([o for o, _ in pairs], leaves, [u for _, u in pairs], allow_unused=True)
    return [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(grads, leaves, strict=True)]
