"""What is measured: one `Case` holds one computation as fastmix does it and in the ways it is compared with.

Contestants: ``ours``; ``eager``, the public way in plain PyTorch; ``compile``, that under ``torch.compile``, and
``autotune``, the same with the kernels that measure best; ``products``, the matrix products alone, a bound; for
`recurrent` also ``gru``, ``nn.GRU`` with its linear layers, and ``cell``, the loop over ``nn.GRUCell``; on a CUDA
device the backends that ours did not choose, by their names. Every case can compare ours with the reference, and
nothing of ours is timed that errs by more than twice what the public way errs by.
"""

from __future__ import annotations

import gc
import math
import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, Final, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn

from fastmix import backends, ops
from fastmix.experiments.bench import baselines, bounds
from fastmix.experiments.bench.bounds import Ceilings
from fastmix.experiments.bench.parity import (
    Error,
    Results,
    compared,
    near_input_kink,
    near_mixing_kink,
)
from fastmix.mixers.qmix import hypernet_params
from fastmix.ops.monotonic import MonotonicParams
from fastmix.ops.recurrent import RecurrentOutput, RecurrentParams, Stepper
from fastmix.testing.bench import Rotating, peak_memory, saved_bytes
from fastmix.testing.shapes import SHAPES

COMPILERS: Final[Mapping[str, str | None]] = {"compile": None, "autotune": "max-autotune-no-cudagraphs"}
"""Contestants that are the eager one under ``torch.compile``, with the mode; graphs are added as to all contestants."""

_SEED: Final = 0


@dataclass(frozen=True)
class Setting:
    """Where a case runs, and with how many digits."""

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    precision: str = "highest"
    """of float32 matrix products, as in `torch.set_float32_matmul_precision`; cuDNN is set alike"""
    autocast: torch.dtype | None = None

    @property
    def name(self) -> str:
        """One word for tables."""
        if self.autocast is not None:
            return f"autocast {_short(self.autocast)}"
        return _short(self.dtype) if self.dtype != torch.float32 or self.device == "cpu" else self.precision

    @property
    def tolerance(self) -> Error:
        """What ours may err by even where the public way errs less.

        Products keep all digits of float32 factors in "highest", 11 bits of each factor in "high", 8 in bfloat16. With
        fewer digits hidden units and generated weights near zero change sides, and with it their slope: gradients lose
        more than values, by about the root of what these lose.
        """
        if self.autocast is not None:
            return Error(1e-2, 5e-2) if self.autocast == torch.bfloat16 else Error(2e-3, 2e-2)
        if self.dtype == torch.float64:
            return Error(1e-10, 1e-10)
        return Error(1e-3, 1e-2) if self.precision == "high" and self.device == "cuda" else Error(1e-5, 1e-5)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Products inside the block have this precision."""
        outer = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
        torch.set_float32_matmul_precision(self.precision)
        torch.backends.cudnn.allow_tf32 = self.precision != "highest"
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(outer[0])
            torch.backends.cudnn.allow_tf32 = outer[1]

    def entered(self, call: Callable[[], Any]) -> Callable[[], Any]:
        """``call`` under this autocast, which is entered at every call as in a training step."""
        if self.autocast is None:
            return call

        def run() -> Any:
            with torch.autocast(self.device, self.autocast):
                return call()

        return run

    def new(self, *shape: int, requires_grad: bool = False) -> Tensor:
        """Random numbers."""
        return torch.randn(*shape, dtype=self.dtype, device=self.device, requires_grad=requires_grad)

    def sets(self, n_bytes: int) -> int:
        """Sets of inputs to rotate among so that one of ``n_bytes`` is not found in the cache of a CUDA device."""
        if self.device != "cuda":
            return 1
        cache: int = torch.cuda.get_device_properties().L2_cache_size
        return min(128, max(1, math.ceil(1.5 * cache / n_bytes)))


FLOAT32: Final = Setting()


@dataclass(frozen=True)
class Case:
    """One computation and the ways to do it."""

    op: str
    phase: str
    """``"forward"``, ``"forward+backward"``, ``"acting"`` or ``"step"``"""
    shape: str
    sizes: Mapping[str, int]
    contestants: Mapping[str, Callable[[], object]]
    errors: Mapping[str, Callable[[], Error]]
    """What contestants err by: ``"ours"``, ``"eager"`` unless results are exact, backends that ours did not choose"""
    tolerance: Error
    """What ours may err by even where the public way errs less"""
    note: str = ""
    setting: Setting = FLOAT32
    captured: tuple[str, ...] = ()
    """Contestants that are also timed in a CUDA graph, as ``"<name> graph"``"""
    floor: Callable[[Ceilings], float] | None = None
    """Seconds no implementation can be much faster than, by what the device can do"""
    absent: Mapping[str, str] = field(default_factory=dict)
    """Contestants that this installation lacks, and why"""
    backend: str = ""
    """What ours runs on, where the case asked"""
    main: str = "ours"
    """Which of ours contestants without a graph are compared with"""

    @property
    def name(self) -> str:
        """One line for progress messages."""
        sizes = " ".join(f"{key}={value}" for key, value in self.sizes.items())
        return f"{self.op} {self.phase} {self.shape} {sizes} {self.setting.name}"

    def measured_errors(self) -> tuple[dict[str, Error], Error]:
        """What every contestant of ``errors`` errs by, and what those of ours may err by."""
        errors = {name: error() for name, error in self.errors.items()}
        return errors, errors.get("eager", Error(0.0)).allowed(self.tolerance)


class RecurrentSize(NamedTuple):
    """``episodes * n_agents`` rows, ``steps`` observations each."""

    episodes: int
    n_agents: int
    steps: int
    n_inputs: int
    n_actions: int


RECURRENT_SIZES: Final = {"matrix": RecurrentSize(128, 2, 2, 13, 3)} | {
    name: RecurrentSize(
        shape.batch_size,
        shape.n_agents,
        shape.steps + 1,
        shape.obs_dim + shape.n_actions + shape.n_agents,
        shape.n_actions,
    )
    for name, shape in SHAPES.items()
    if name != "matrix"
}


def monotonic(
    shape: str,
    rows: int,
    train: bool = True,
    setting: Setting = FLOAT32,
    compiled: Sequence[str] = ("compile",),
) -> Case:
    """QMIX's mixer with two-layer hypernets (embed 32, hypernet 64); gradients for utilities and parameters.

    ``compiled`` names the `COMPILERS` to compare with.
    """
    sizes = SHAPES[shape]
    mixer = _mixer(shape, setting)
    params = mixing_params(mixer)
    modules: dict[str, Callable[..., Tensor]] = {"eager": mixer, **_compilations(mixer, compiled)}
    sets = setting.sets(4 * rows * (sizes.n_agents + sizes.state_dim + 1))
    inputs = [_mixing_inputs(shape, rows, setting) for _ in range(sets)]
    cotangents = [setting.new(rows, 1) for _ in range(sets)]

    def module(call: Callable[..., Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda agent_qs, states: call(agent_qs.view(rows, 1, -1), states.view(rows, 1, -1)).view(rows, 1)

    def op(backend: str | None = None) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda agent_qs, states: ops.monotonic(agent_qs, states, params, backend=backend)

    def passes(
        forwards: Mapping[str, Callable[[Tensor, Tensor], Tensor]],
        pair: tuple[Tensor, Tensor] = inputs[0],
        cotangent: Tensor = cotangents[0],
    ) -> dict[str, Callable[[], object]]:
        calls = {name: partial(forward, *pair) for name, forward in forwards.items()}
        return _passes(calls, [pair[0], *mixer.parameters()], cotangent, train, setting)

    able = _backends("monotonic", setting, lambda backend: passes({"ours": op(backend)})["ours"])
    ours = {"ours": op(), **{name: op(name) for name in able.others}}
    forwards = ours | {name: module(network) for name, network in modules.items()}
    contestants = _rotated([passes(forwards, *each) for each in zip(inputs, cotangents, strict=True)])
    if train:
        contestants["products"] = baselines.load("operators").monotonic_products(
            rows, sizes.n_agents, sizes.state_dim, dtype=setting.autocast or setting.dtype, device=setting.device
        )
    return Case(
        "monotonic",
        "forward+backward" if train else "forward",
        shape,
        {"rows": rows},
        contestants,
        _monotonic_errors(ours | {"eager": module(mixer)}, *inputs[0], params, cotangents[0], setting),
        setting.tolerance,
        setting=setting,
        captured=("ours", *able.others, "eager", *COMPILERS, "products"),
        floor=lambda ceilings: bounds.monotonic(
            rows, sizes.n_agents, sizes.state_dim, train, ceilings.rate(setting.precision, setting.autocast), ceilings
        ),
        absent=able.absent,
        backend=able.chosen,
    )


def recurrent(
    shape: str,
    train: bool = True,
    setting: Setting = FLOAT32,
    compiled: Sequence[str] = (),
    episodes: int | None = None,
    steps: int | None = None,
    loops: bool = True,
) -> Case:
    """A training batch through the recurrent agent (hidden size 64) from a zero state; inputs need no gradient.

    ``episodes`` and ``steps`` (observations) replace those of the shape's usual batch. Without ``loops`` the loop over
    cells and the products step by step, which take long, are left out.
    """
    size = RECURRENT_SIZES[shape]
    size = size._replace(episodes=episodes or size.episodes, steps=steps or size.steps)
    networks, operators = baselines.load("networks"), baselines.load("operators")
    torch.manual_seed(_SEED)
    cell = networks.CellAgent(size.n_inputs, size.n_actions).to(setting.device, setting.dtype)
    gru = networks.SequenceAgent(size.n_inputs, size.n_actions).to(setting.device, setting.dtype)
    params = utility_params(cell)
    _copy_into_sequence(cell, gru)
    rows = size.episodes * size.n_agents
    obs = setting.new(size.episodes, size.steps, size.n_agents, size.n_inputs)
    cotangent = setting.new(size.episodes, size.steps, size.n_agents, size.n_actions)
    # The baselines get the layout they are fastest with: time first.
    time_major = obs.transpose(0, 1).reshape(size.steps, rows, -1).contiguous()
    time_major_cotangent = cotangent.transpose(0, 1).reshape(size.steps, rows, -1).contiguous()

    def op(backend: str | None = None) -> Callable[[Tensor], RecurrentOutput]:
        return lambda obs: ops.recurrent(obs, [params], backend=backend)[0]

    def passes(calls: Mapping[str, Callable[[Tensor], RecurrentOutput]]) -> dict[str, Callable[[], object]]:
        values = {name: (lambda call=call: call(obs).q) for name, call in calls.items()}
        return _passes(values, _present(params), cotangent, train, setting)

    able = _backends("recurrent", setting, lambda backend: passes({"ours": op(backend)})["ours"])
    ours = {"ours": op(), **{name: op(name) for name in able.others}}
    contestants = passes(ours)
    forwards: dict[str, tuple[nn.Module, Callable[[], Tensor]]] = {"gru": (gru, lambda: gru(time_major))}
    if loops:
        forwards["cell"] = (cell, lambda: operators.cell_loop(cell, time_major))
    for name, compiled_cell in _compilations(cell, compiled).items():
        forwards[name] = (cell, partial(operators.cell_loop, compiled_cell, time_major, cell.hidden_dim))
    for name, (network, forward) in forwards.items():
        contestants |= _passes({name: forward}, list(network.parameters()), time_major_cotangent, train, setting)
    if train and loops:
        contestants["products"] = operators.recurrent_products(
            rows,
            size.steps,
            size.n_inputs,
            size.n_actions,
            dtype=setting.autocast or setting.dtype,
            device=setting.device,
        )
    return Case(
        "recurrent",
        "forward+backward" if train else "forward",
        shape,
        {"rows": rows, "steps": size.steps, "inputs": size.n_inputs, "actions": size.n_actions},
        contestants,
        _recurrent_errors(ours, cell, obs[:8], params, cotangent[:8], setting),
        setting.tolerance,
        "compile: the cell is compiled, the loop is not" if compiled else "",
        setting=setting,
        captured=("ours", *able.others, "gru", "cell", *COMPILERS, "products"),
        floor=lambda ceilings: bounds.recurrent(
            rows * size.steps,
            size.n_inputs,
            size.n_actions,
            train,
            ceilings.rate(setting.precision, setting.autocast),
            ceilings,
        ),
        absent=able.absent,
        backend=able.chosen,
    )


def acting(shape: str, rows: int, setting: Setting = FLOAT32) -> Case:
    """One step of the recurrent agent in a rollout, without gradients."""
    size = RECURRENT_SIZES[shape]
    networks, operators = baselines.load("networks"), baselines.load("operators")
    torch.manual_seed(_SEED)
    cell = networks.CellAgent(size.n_inputs, size.n_actions).to(setting.device, setting.dtype)
    params = utility_params(cell)
    inputs, hidden = setting.new(rows, size.n_inputs), setting.new(rows, cell.hidden_dim)
    obs, state = inputs.view(1, 1, rows, -1), hidden.view(1, rows, -1)

    step, first = Stepper(params, size.n_inputs), obs[0]

    def ours() -> tuple[Tensor, Tensor]:
        return step(first, state)

    def eager() -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = operators.acting_step(cell, inputs, hidden)
        return result

    def exact() -> Results:
        doubled = RecurrentParams(*_leaves64(params))
        out = ops.recurrent(obs.double(), [doubled], [state.double()], backend="reference")[0]
        return [out.q[0, 0], out.hidden[0]], []

    def flat(call: Callable[[], tuple[Tensor, Tensor]]) -> Callable[[], Results]:
        return lambda: ([x.view(rows, -1) for x in call()], [])

    return Case(
        "recurrent",
        "acting",
        shape,
        {"rows": rows, "inputs": size.n_inputs, "actions": size.n_actions},
        {"ours": ours, "eager": eager},
        compared({"ours": flat(ours), "eager": flat(eager)}, exact),
        setting.tolerance,
        setting=setting,
    )


def returns(episodes: int, steps: int, setting: Setting = FLOAT32) -> Case:
    """TD(lambda) targets of a batch against the recursion in Python."""
    torch.manual_seed(_SEED)
    operators = baselines.load("operators")
    gamma, td_lambda = 0.99, 0.6
    n_bytes = bounds.returns_bytes(episodes, steps, setting.dtype.itemsize)

    def draw() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        mask, terminated = ragged_mask(episodes, steps, setting)
        return setting.new(episodes, steps, 1), terminated, mask, setting.new(episodes, steps + 1, 1)

    def ours(inputs: tuple[Tensor, ...], backend: str | None = None) -> Tensor:
        return ops.returns(*inputs, gamma=gamma, td_lambda=td_lambda, backend=backend)

    def eager(inputs: tuple[Tensor, ...]) -> Tensor:
        targets: Tensor = operators.td_lambda_recursion(*inputs, gamma, td_lambda)
        return targets

    sets = [draw() for _ in range(setting.sets(n_bytes))]
    calls = {"ours": ours, "eager": eager}
    contestants = _rotated([{name: partial(call, inputs) for name, call in calls.items()} for inputs in sets])
    return Case(
        "returns",
        "forward",
        f"{episodes}x{steps}",
        {"episodes": episodes, "steps": steps},
        contestants,
        compared(
            {name: lambda call=call: ([call(sets[0])], []) for name, call in calls.items()},  # type: ignore[misc]
            lambda: ([ours(_doubled(sets[0]), "reference")], []),
        ),
        setting.tolerance,
        setting=setting,
        captured=("ours", "eager"),
        floor=lambda ceilings: n_bytes / ceilings.bandwidth,
        backend=_backend("returns", setting, contestants["ours"]),
    )


def select(
    episodes: int, steps: int, n_agents: int, n_actions: int, train: bool = False, setting: Setting = FLOAT32
) -> Case:
    """Greedy actions of a batch and the values that a learner gathers with them."""
    torch.manual_seed(_SEED)
    operators = baselines.load("operators")
    shape = (episodes, steps, n_agents)
    n_bytes = bounds.select_bytes(math.prod(shape), n_agents, n_actions, train, setting.dtype.itemsize)

    def draw() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        actions = torch.randint(n_actions, shape, device=setting.device)
        avail = torch.rand(*shape, n_actions, device=setting.device) < 0.6
        avail.scatter_(-1, actions.unsqueeze(-1), True)
        agent_qs = setting.new(*shape, n_actions, requires_grad=train)
        return agent_qs, avail, actions, setting.new(*shape, n_actions)

    def ours(inputs: tuple[Tensor, ...], backend: str | None = None) -> Any:
        agent_qs, avail, actions, target_qs = inputs
        return ops.select(agent_qs, avail, actions=actions, target_qs=target_qs, backend=backend)

    cotangent = setting.new(*shape)

    def contestants(inputs: tuple[Tensor, ...]) -> dict[str, Callable[[], Any]]:
        calls: dict[str, Callable[[], Any]] = {
            "ours": partial(ours, inputs),
            "eager": partial(operators.select_steps, *inputs),
        }
        if not train:
            return calls
        return {name: _gradient_of_chosen(call, inputs[0], cotangent) for name, call in calls.items()}

    sets = [draw() for _ in range(setting.sets(n_bytes))]
    calls = _rotated([contestants(inputs) for inputs in sets])

    def error() -> Error:
        pairs = list(zip(ours(sets[0]), ours(sets[0], "reference"), strict=True))
        return Error(0.0 if all(torch.equal(a, b) for a, b in pairs) else math.inf)

    return Case(
        "select",
        "forward+backward" if train else "forward",
        "x".join(map(str, (*shape, n_actions))),
        {"episodes": episodes, "steps": steps, "agents": n_agents, "actions": n_actions},
        calls,
        {"ours": error},
        Error(0.0),
        setting=setting,
        captured=("ours", "eager"),
        floor=lambda ceilings: n_bytes / ceilings.bandwidth,
        backend=_backend("select", setting, calls["ours"]),
    )


def td_loss(episodes: int, steps: int, setting: Setting = FLOAT32) -> Case:
    """Masked squared error and its gradient."""
    torch.manual_seed(_SEED)
    operators = baselines.load("operators")
    one = torch.ones((), dtype=setting.dtype, device=setting.device)
    n_bytes = bounds.td_loss_bytes(episodes * steps, setting.dtype.itemsize)

    def draw() -> tuple[Tensor, Tensor, Tensor]:
        qs = setting.new(episodes, steps, 1, requires_grad=True)
        return qs, setting.new(episodes, steps, 1), ragged_mask(episodes, steps, setting)[0]

    def ours(inputs: tuple[Tensor, ...], backend: str | None = None) -> Tensor:
        return ops.td_loss(*inputs, backend=backend).loss

    def eager(inputs: tuple[Tensor, ...]) -> Tensor:
        loss: Tensor = operators.td_loss_steps(*inputs)[0]
        return loss

    def results(call: Callable[[tuple[Tensor, ...]], Tensor], inputs: tuple[Tensor, ...]) -> Results:
        loss = call(inputs)
        return [loss], [torch.autograd.grad(loss, inputs[0])[0]]

    sets = [draw() for _ in range(setting.sets(n_bytes))]
    calls = {"ours": ours, "eager": eager}
    contestants = _rotated(
        [
            _passes({name: partial(call, inputs) for name, call in calls.items()}, [inputs[0]], one, True, setting)
            for inputs in sets
        ]
    )
    return Case(
        "td_loss",
        "forward+backward",
        f"{episodes}x{steps}",
        {"episodes": episodes, "steps": steps},
        contestants,
        compared(
            {name: partial(results, call, sets[0]) for name, call in calls.items()},
            lambda: results(partial(ours, backend="reference"), _doubled(sets[0])),
        ),
        setting.tolerance,
        setting=setting,
        captured=("ours", "eager"),
        floor=lambda ceilings: n_bytes / ceilings.bandwidth,
        backend=_backend("td_loss", setting, contestants["ours"]),
    )


def quantile(episodes: int, steps: int, n: int, setting: Setting = FLOAT32, compiled: Sequence[str] = ()) -> Case:
    """Pairwise quantile Huber loss of ``n`` quantiles of a joint value against as many targets, and its gradient."""
    torch.manual_seed(_SEED)
    operators = baselines.load("operators")
    one = torch.ones((), dtype=setting.dtype, device=setting.device)
    n_bytes = bounds.quantile_bytes(episodes * steps, n, setting.dtype.itemsize)
    public = {"eager": operators.quantile_huber_steps}
    public |= _compilations(operators.quantile_huber_steps, compiled)

    def ours(inputs: tuple[Tensor, ...], backend: str | None = None) -> Tensor:
        return ops.quantile_loss(*inputs, backend=backend).loss

    def results(call: Callable[[tuple[Tensor, ...]], Tensor], inputs: tuple[Tensor, ...]) -> Results:
        loss = call(inputs)
        return [loss], [torch.autograd.grad(loss, inputs[0])[0]]

    sets = [_quantile_inputs(episodes, steps, n, setting) for _ in range(setting.sets(n_bytes))]
    calls = {"ours": ours} | {name: (lambda inputs, call=call: call(*inputs)) for name, call in public.items()}
    contestants = _rotated(
        [
            _passes({name: partial(call, inputs) for name, call in calls.items()}, [inputs[0]], one, True, setting)
            for inputs in sets
        ]
    )
    return Case(
        "quantile",
        "forward+backward",
        f"{episodes}x{steps}x{n}",
        {"episodes": episodes, "steps": steps, "quantiles": n},
        contestants,
        compared(
            {name: partial(results, calls[name], sets[0]) for name in ("ours", "eager")},
            lambda: results(partial(ours, backend="reference"), _doubled(sets[0])),
        ),
        setting.tolerance,
        setting=setting,
        captured=("ours", "eager", *COMPILERS),
        floor=lambda ceilings: n_bytes / ceilings.bandwidth,
        backend=_backend("quantile", setting, contestants["ours"]),
    )


def memory(op: str, threads: int, **sizes: Any) -> dict[str, dict[str, int | None]]:
    """Memory of training with ``op``, ours and eager, each measured in a process of its own.

    Args:
        op: ``"monotonic"`` (``shape``, ``rows``) or ``"quantile"`` (``episodes``, ``steps``, ``n``).
        threads: of torch.
        **sizes: of the problem.

    Returns:
        contestant -> ``peak_bytes``, growth of the resident set in forward and backward, and ``saved_bytes``, what
        autograd keeps between the two.
    """
    context = multiprocessing.get_context("spawn")
    result = {}
    for contestant in ("ours", "eager"):
        with context.Pool(1) as pool:
            result[contestant] = pool.apply(_memory, (op, contestant, threads, sizes))
    return result


def first_line(error: Exception) -> str:
    """What an exception says, short enough for a table."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def mixing_params(mixer: nn.Module) -> MonotonicParams:
    """The baseline mixer's parameters in the order of `fastmix.ops.monotonic`."""
    m: Any = mixer
    return hypernet_params(m.hyper_w_1, m.hyper_w_final, m.hyper_b_1, m.V)


def utility_params(cell: nn.Module) -> RecurrentParams:
    """The baseline agent's parameters in the order of `fastmix.ops.recurrent`."""
    c: Any = cell
    norm = c.layer_norm if isinstance(c.layer_norm, nn.LayerNorm) else None
    return RecurrentParams(
        *(c.fc1.weight, c.fc1.bias, c.rnn.weight_ih, c.rnn.weight_hh, c.rnn.bias_ih, c.rnn.bias_hh),
        *(None if norm is None else norm.weight, None if norm is None else norm.bias),
        *(c.fc2.weight, c.fc2.bias),
    )


def ragged_mask(episodes: int, steps: int, setting: Setting = FLOAT32) -> tuple[Tensor, Tensor]:
    """``mask`` and ``terminated``, ``[B, T, 1]``: lengths from half of ``steps`` to all; short episodes ended truly."""
    lengths = torch.randint(max(1, steps // 2), steps + 1, (episodes, 1))
    lengths[0] = steps
    time = torch.arange(steps)
    terminated = (time == lengths - 1) & (lengths < steps)
    flags = (time < lengths).unsqueeze(-1), terminated.unsqueeze(-1)
    mask, ended = (flag.to(setting.device, setting.dtype) for flag in flags)
    return mask, ended


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _mixer(shape: str, setting: Setting) -> nn.Module:
    sizes = SHAPES[shape]
    torch.manual_seed(_SEED)
    mixer: nn.Module = baselines.load("networks").QMixer(sizes.n_agents, sizes.state_dim)
    return mixer.to(setting.device, setting.dtype)


def _mixing_inputs(shape: str, rows: int, setting: Setting) -> tuple[Tensor, Tensor]:
    sizes = SHAPES[shape]
    return setting.new(rows, sizes.n_agents, requires_grad=True), setting.new(rows, sizes.state_dim)


def _passes(
    forwards: Mapping[str, Callable[[], Tensor]],
    leaves: Sequence[Tensor],
    cotangent: Tensor,
    train: bool,
    setting: Setting = FLOAT32,
) -> dict[str, Callable[[], object]]:
    """The forwards without recording gradients, or with the gradients of all ``leaves`` computed after them."""

    def forward_only(call: Callable[[], Tensor]) -> Callable[[], object]:
        def run() -> Tensor:
            with torch.no_grad():
                return call()

        return run

    def forward_backward(call: Callable[[], Tensor]) -> Callable[[], object]:
        def run() -> tuple[Tensor, ...]:
            output = call()
            return torch.autograd.grad(output, leaves, cotangent.to(output.dtype))

        return run

    wrap = forward_backward if train else forward_only
    return {name: wrap(setting.entered(call)) for name, call in forwards.items()}


def _rotated(sets: Sequence[Mapping[str, Callable[[], Any]]]) -> dict[str, Callable[[], Any]]:
    """The contestants of one set of inputs, or of several in turn."""
    if len(sets) == 1:
        return dict(sets[0])
    return {name: Rotating([contestants[name] for contestants in sets]) for name in sets[0]}


def _doubled(inputs: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """The same numbers in float64, as leaves where the originals are."""
    return tuple(x.detach().double().requires_grad_(x.requires_grad) for x in inputs)


def _gradient_of_chosen(call: Callable[[], Any], agent_qs: Tensor, cotangent: Tensor) -> Callable[[], object]:
    return lambda: torch.autograd.grad(call().chosen_qs, agent_qs, cotangent)


def _compilations(module: Callable[..., Any], names: Sequence[str]) -> dict[str, Callable[..., Any]]:
    """``module`` under ``torch.compile``, once for each of `COMPILERS` that is named."""
    unknown = set(names) - set(COMPILERS)
    if unknown:
        raise ValueError(f"compiled must hold names of {', '.join(COMPILERS)}, got {', '.join(sorted(unknown))}")
    if names:
        # Graphs of earlier cases would count towards the limit of recompilations.
        torch.compiler.reset()
    return {name: torch.compile(module, fullgraph=True, dynamic=False, mode=COMPILERS[name]) for name in names}


def _present(params: Iterable[Tensor | None]) -> list[Tensor]:
    return [tensor for tensor in params if tensor is not None]


def _copy_into_sequence(cell: nn.Module, gru: nn.Module) -> None:
    state = cell.state_dict()
    gru.load_state_dict({f"{key}_l0" if key.startswith("rnn.") else key: value for key, value in state.items()})


def _monotonic_errors(
    calls: Mapping[str, Callable[[Tensor, Tensor], Tensor]],
    agent_qs: Tensor,
    states: Tensor,
    params: MonotonicParams,
    cotangent: Tensor,
    setting: Setting,
) -> dict[str, Callable[[], Error]]:
    exact = MonotonicParams(*_leaves64(params))

    @cache
    def upstream() -> Tensor:
        return cotangent * ~near_mixing_kink(states.double(), exact)

    def results(call: Callable[[Tensor], Tensor], agent_qs: Tensor, params: MonotonicParams) -> Results:
        agent_qs = agent_qs.detach().clone().requires_grad_()
        q_tot = call(agent_qs)
        return [q_tot], torch.autograd.grad(q_tot, [agent_qs, *_present(params)], upstream().to(q_tot.dtype))

    def rounded(call: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], Results]:
        return setting.entered(lambda: results(lambda agent_qs: call(agent_qs, states), agent_qs, params))

    def reference(agent_qs: Tensor) -> Tensor:
        return ops.monotonic(agent_qs, states.double(), exact, backend="reference")

    return compared(
        {name: rounded(call) for name, call in calls.items()}, lambda: results(reference, agent_qs.double(), exact)
    )


def _recurrent_errors(
    calls: Mapping[str, Callable[[Tensor], RecurrentOutput]],
    cell: nn.Module,
    obs: Tensor,
    params: RecurrentParams,
    cotangent: Tensor,
    setting: Setting,
) -> dict[str, Callable[[], Error]]:
    exact = RecurrentParams(*_leaves64(params))
    episodes, steps, n_agents = obs.shape[:3]

    @cache
    def upstream() -> Tensor:
        return cotangent * ~near_input_kink(obs.double(), exact).unsqueeze(-1)

    def gradients(q: Tensor, params: RecurrentParams) -> Sequence[Tensor]:
        return torch.autograd.grad(q, _present(params), upstream().to(q.dtype))

    def results(call: Callable[[Tensor], RecurrentOutput], obs: Tensor, params: RecurrentParams) -> Results:
        out = call(obs)
        return [out.q, out.hidden], gradients(out.q, params)

    def public() -> Results:
        time_major = obs.transpose(0, 1).reshape(steps, episodes * n_agents, -1)
        q = baselines.load("operators").cell_loop(cell, time_major).view(steps, episodes, n_agents, -1).transpose(0, 1)
        return [q], gradients(q, params)

    def reference(obs: Tensor) -> RecurrentOutput:
        return ops.recurrent(obs, [exact], backend="reference")[0]

    rounded = {name: partial(results, call, obs, params) for name, call in calls.items()} | {"eager": public}
    return compared(
        {name: setting.entered(call) for name, call in rounded.items()},
        lambda: results(reference, obs.double(), exact),
    )


@dataclass(frozen=True)
class _Backends:
    """On a CUDA device: which backend ours chose, others to compare it with, and why some of these cannot run."""

    chosen: str = ""
    others: tuple[str, ...] = ()
    absent: Mapping[str, str] = field(default_factory=dict)


def _backends(op: str, setting: Setting, call: Callable[[str | None], Callable[[], object]]) -> _Backends:
    """``call(backend)`` is a computation by ``op`` on this backend, None for the automatic choice."""
    if setting.device != "cuda":
        return _Backends()
    chosen = _backend(op, setting, call(None))
    others, absent = list[str](), dict[str, str]()
    for name in backends.available(op, setting.device, setting.dtype):
        if name in ("reference", chosen):
            continue
        try:
            with setting.applied():
                call(name)()
            others.append(name)
        except Exception as error:
            absent[name] = first_line(error)
    return _Backends(chosen, tuple(others), absent)


def _backend(op: str, setting: Setting, call: Callable[[], object]) -> str:
    """On a CUDA device the backend that ``call`` runs ``op`` on."""
    if setting.device != "cuda":
        return ""
    resolve, found = backends.resolve, list[str]()

    def noting(name: str, *args: Any, **options: Any) -> str:
        chosen = resolve(name, *args, **options)
        if name == op:
            found.append(chosen)
        return chosen

    with setting.applied(), mock.patch.object(backends, "resolve", noting):
        call()
    return found[-1]


def _leaves64(params: Iterable[Tensor | None]) -> list[Any]:
    return [None if p is None else p.detach().double().requires_grad_() for p in params]


def _quantile_inputs(episodes: int, steps: int, n: int, setting: Setting) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = (episodes, steps, 1, n)
    fractions = torch.rand(shape, dtype=setting.dtype, device=setting.device)
    theta = setting.new(*shape, requires_grad=True)
    return theta, setting.new(*shape), fractions, ragged_mask(episodes, steps, setting)[0]


class _Training(NamedTuple):
    forward: Callable[[], Tensor]
    inputs: Sequence[Tensor]
    leaves: Sequence[Tensor]
    cotangent: Tensor

    def run(self) -> object:
        return torch.autograd.grad(self.forward(), self.leaves, self.cotangent)


def _monotonic_training(contestant: str, shape: str, rows: int) -> _Training:
    mixer = _mixer(shape, FLOAT32)
    agent_qs, states = _mixing_inputs(shape, rows, FLOAT32)
    params, leaves = mixing_params(mixer), [agent_qs, *mixer.parameters()]

    def forward() -> Tensor:
        if contestant == "ours":
            return ops.monotonic(agent_qs, states, params)
        q_tot: Tensor = mixer(agent_qs.view(rows, 1, -1), states.view(rows, 1, -1))
        return q_tot.view(rows, 1)

    return _Training(forward, [*leaves, states], leaves, torch.randn(rows, 1))


def _quantile_training(contestant: str, episodes: int, steps: int, n: int) -> _Training:
    inputs, operators = _quantile_inputs(episodes, steps, n, FLOAT32), baselines.load("operators")

    def forward() -> Tensor:
        loss: Tensor = (
            ops.quantile_loss(*inputs).loss if contestant == "ours" else operators.quantile_huber_steps(*inputs)
        )
        return loss

    return _Training(forward, inputs, inputs[:1], torch.ones(()))


_TRAININGS: Final[Mapping[str, tuple[Callable[..., _Training], Mapping[str, int]]]] = {
    "monotonic": (_monotonic_training, {"rows": 64}),
    "quantile": (_quantile_training, {"episodes": 2, "steps": 3}),
}
"""What `memory` measures, and the sizes it starts with to load libraries, thread pools and their workspaces"""


def _memory(op: str, contestant: str, threads: int, sizes: dict[str, Any]) -> dict[str, int | None]:
    torch.set_num_threads(threads)
    build, small = _TRAININGS[op]
    build(contestant, **{**sizes, **small}).run()
    training = build(contestant, **sizes)
    peak = peak_memory(training.run)
    gc.collect()
    return {"peak_bytes": peak, "saved_bytes": saved_bytes(training.forward, list(training.inputs))}
