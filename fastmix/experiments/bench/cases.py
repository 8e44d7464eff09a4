"""What is measured: one `Case` holds one computation as fastmix does it and in the ways it is compared with.

Contestants: ``ours``; ``eager``, the public way in plain PyTorch; ``compile``, that under ``torch.compile``;
``products``, the matrix products alone, a bound; for `recurrent` also ``gru``, ``nn.GRU`` with its linear layers, and
``cell``, the loop over ``nn.GRUCell``. Every case can compare itself with the reference, and nothing is timed that does
not agree with it.
"""

from __future__ import annotations

import gc
import math
import multiprocessing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastmix import ops
from fastmix.experiments.bench import baselines
from fastmix.ops.monotonic import MonotonicParams
from fastmix.ops.recurrent import RecurrentParams, Stepper
from fastmix.testing import rms_ratio
from fastmix.testing.bench import peak_memory, saved_bytes
from fastmix.testing.shapes import SHAPES

TOLERANCE: Final = {torch.float32: 1e-5, torch.float64: 1e-10}
"""Largest RMS ratio between ours and the reference."""

# An argument of relu or abs within rounding of zero may take the other side in another summation order. Rows with such
# an argument get no upstream gradient when gradients are compared.
_KINK: Final = 4e-6

_SEED: Final = 0


@dataclass(frozen=True)
class Case:
    """One computation and the ways to do it."""

    op: str
    phase: str
    """``"forward"``, ``"forward+backward"``, ``"acting"`` or ``"step"``"""
    shape: str
    sizes: Mapping[str, int]
    contestants: Mapping[str, Callable[[], object]]
    error: Callable[[], float]
    """Largest deviation of ours from the reference, as an RMS ratio"""
    tolerance: float
    note: str = ""

    @property
    def name(self) -> str:
        """One line for progress messages."""
        return f"{self.op} {self.phase} {self.shape} " + " ".join(f"{key}={value}" for key, value in self.sizes.items())


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
    shape: str, rows: int, train: bool = True, dtype: torch.dtype = torch.float32, compiled: bool = True
) -> Case:
    """QMIX's mixer with two-layer hypernets (embed 32, hypernet 64); gradients for utilities and parameters."""
    sizes = SHAPES[shape]
    mixer, agent_qs, states = _mixing_inputs(shape, rows, dtype)
    params = mixing_params(mixer)
    leaves = [agent_qs, *mixer.parameters()]
    cotangent = torch.randn(rows, 1, dtype=dtype)

    def module(call: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], Tensor]:
        return lambda: call(agent_qs.view(rows, 1, -1), states.view(rows, 1, -1)).view(rows, 1)

    def ours() -> Tensor:
        return ops.monotonic(agent_qs, states, params)

    forwards: dict[str, Callable[[], Tensor]] = {"ours": ours, "eager": module(mixer)}
    if compiled:
        forwards["compile"] = module(_compile(mixer))
    contestants = _passes(forwards, leaves, cotangent, train)
    if train:
        contestants["products"] = baselines.load("operators").monotonic_products(
            rows, sizes.n_agents, sizes.state_dim, dtype=dtype
        )
    return Case(
        "monotonic",
        "forward+backward" if train else "forward",
        shape,
        {"rows": rows},
        contestants,
        lambda: _monotonic_error(agent_qs.detach(), states, params, cotangent),
        TOLERANCE[dtype],
    )


def recurrent(shape: str, train: bool = True, dtype: torch.dtype = torch.float32, compiled: bool = False) -> Case:
    """A training batch through the recurrent agent (hidden size 64) from a zero state; inputs need no gradient."""
    size = RECURRENT_SIZES[shape]
    networks, operators = baselines.load("networks"), baselines.load("operators")
    torch.manual_seed(_SEED)
    cell = networks.CellAgent(size.n_inputs, size.n_actions).to(dtype)
    gru = networks.SequenceAgent(size.n_inputs, size.n_actions).to(dtype)
    params = utility_params(cell)
    _copy_into_sequence(cell, gru)
    rows = size.episodes * size.n_agents
    obs = torch.randn(size.episodes, size.steps, size.n_agents, size.n_inputs, dtype=dtype)
    cotangent = torch.randn(size.episodes, size.steps, size.n_agents, size.n_actions, dtype=dtype)
    # The baselines get the layout they are fastest with: time first.
    time_major = obs.transpose(0, 1).reshape(size.steps, rows, -1).contiguous()
    time_major_cotangent = cotangent.transpose(0, 1).reshape(size.steps, rows, -1).contiguous()

    contestants = _passes({"ours": lambda: ops.recurrent(obs, [params])[0].q}, _present(params), cotangent, train)
    forwards: dict[str, tuple[nn.Module, Callable[[], Tensor]]] = {
        "gru": (gru, lambda: gru(time_major)),
        "cell": (cell, lambda: operators.cell_loop(cell, time_major)),
    }
    if compiled:
        compiled_cell = _compile(cell)
        forwards["compile"] = (cell, lambda: operators.cell_loop(compiled_cell, time_major, cell.hidden_dim))
    for name, (network, forward) in forwards.items():
        contestants |= _passes({name: forward}, list(network.parameters()), time_major_cotangent, train)
    if train:
        contestants["products"] = operators.recurrent_products(
            rows, size.steps, size.n_inputs, size.n_actions, dtype=dtype
        )
    return Case(
        "recurrent",
        "forward+backward" if train else "forward",
        shape,
        {"rows": rows, "steps": size.steps, "inputs": size.n_inputs, "actions": size.n_actions},
        contestants,
        lambda: _recurrent_error(obs[:8], params, cotangent[:8]),
        TOLERANCE[dtype],
        "compile: the cell is compiled, the loop is not" if compiled else "",
    )


def acting(shape: str, rows: int, dtype: torch.dtype = torch.float32) -> Case:
    """One step of the recurrent agent in a rollout, without gradients."""
    size = RECURRENT_SIZES[shape]
    networks, operators = baselines.load("networks"), baselines.load("operators")
    torch.manual_seed(_SEED)
    cell = networks.CellAgent(size.n_inputs, size.n_actions).to(dtype)
    params = utility_params(cell)
    inputs, hidden = torch.randn(rows, size.n_inputs, dtype=dtype), torch.randn(rows, cell.hidden_dim, dtype=dtype)
    obs, state = inputs.view(1, 1, rows, -1), hidden.view(1, rows, -1)

    step, first = Stepper(params, size.n_inputs), obs[0]

    def ours() -> tuple[Tensor, Tensor]:
        return step(first, state)

    def error() -> float:
        expected = ops.recurrent(obs, [params], [state], backend="reference")[0]
        return max(rms_ratio(a, b) for a, b in zip(ours(), (expected.q[0], expected.hidden), strict=True))

    return Case(
        "recurrent",
        "acting",
        shape,
        {"rows": rows, "inputs": size.n_inputs, "actions": size.n_actions},
        {"ours": ours, "eager": lambda: operators.acting_step(cell, inputs, hidden)},
        error,
        TOLERANCE[dtype],
    )


def returns(episodes: int, steps: int, dtype: torch.dtype = torch.float32) -> Case:
    """TD(lambda) targets of a batch against the recursion in Python."""
    torch.manual_seed(_SEED)
    operators = baselines.load("operators")
    rewards, target_qs = torch.randn(episodes, steps, 1, dtype=dtype), torch.randn(episodes, steps + 1, 1, dtype=dtype)
    mask, terminated = ragged_mask(episodes, steps, dtype)
    gamma, td_lambda = 0.99, 0.6

    def ours(backend: str | None = None) -> Tensor:
        return ops.returns(rewards, terminated, mask, target_qs, gamma=gamma, td_lambda=td_lambda, backend=backend)

    return Case(
        "returns",
        "forward",
        f"{episodes}x{steps}",
        {"episodes": episodes, "steps": steps},
        {
            "ours": ours,
            "eager": lambda: operators.td_lambda_recursion(rewards, terminated, mask, target_qs, gamma, td_lambda),
        },
        lambda: rms_ratio(ours(), ours("reference")),
        TOLERANCE[dtype],
    )


def select(
    episodes: int, steps: int, n_agents: int, n_actions: int, train: bool = False, dtype: torch.dtype = torch.float32
) -> Case:
    """Greedy actions of a batch and the values that a learner gathers with them."""
    torch.manual_seed(_SEED)
    operators = baselines.load("operators")
    shape = (episodes, steps, n_agents)
    agent_qs = torch.randn(*shape, n_actions, dtype=dtype, requires_grad=train)
    target_qs = torch.randn(*shape, n_actions, dtype=dtype)
    actions = torch.randint(n_actions, shape)
    avail = (torch.rand(*shape, n_actions) < 0.6).scatter_(-1, actions.unsqueeze(-1), True)
    cotangent = torch.randn(*shape, dtype=dtype)

    def ours(backend: str | None = None) -> Any:
        return ops.select(agent_qs, avail, actions=actions, target_qs=target_qs, backend=backend)

    def steps_of_public_learners() -> Any:
        return operators.select_steps(agent_qs, avail, actions, target_qs)

    def error() -> float:
        pairs = list(zip(ours(), ours("reference"), strict=True))
        return 0.0 if all(torch.equal(a, b) for a, b in pairs) else math.inf

    calls: dict[str, Callable[[], Any]] = {"ours": ours, "eager": steps_of_public_learners}
    contestants = dict(calls)
    if train:
        contestants = {name: _gradient_of_chosen(call, agent_qs, cotangent) for name, call in calls.items()}
    return Case(
        "select",
        "forward+backward" if train else "forward",
        "x".join(map(str, (*shape, n_actions))),
        {"episodes": episodes, "steps": steps, "agents": n_agents, "actions": n_actions},
        contestants,
        error,
        0.0,
    )


def td_loss(episodes: int, steps: int, dtype: torch.dtype = torch.float32) -> Case:
    """Masked squared error and its gradient."""
    torch.manual_seed(_SEED)
    operators = baselines.load("operators")
    qs = torch.randn(episodes, steps, 1, dtype=dtype, requires_grad=True)
    targets = torch.randn(episodes, steps, 1, dtype=dtype)
    mask, _ = ragged_mask(episodes, steps, dtype)
    one = torch.ones((), dtype=dtype)

    def ours(backend: str | None = None) -> Tensor:
        return ops.td_loss(qs, targets, mask, backend=backend).loss

    def gradient(backend: str | None) -> Tensor:
        return torch.autograd.grad(ours(backend), qs)[0]

    return Case(
        "td_loss",
        "forward+backward",
        f"{episodes}x{steps}",
        {"episodes": episodes, "steps": steps},
        _passes({"ours": ours, "eager": lambda: operators.td_loss_steps(qs, targets, mask)[0]}, [qs], one, True),
        lambda: max(rms_ratio(ours(), ours("reference")), rms_ratio(gradient(None), gradient("reference"))),
        TOLERANCE[dtype],
    )


def monotonic_memory(shape: str, rows: int, threads: int) -> dict[str, dict[str, int | None]]:
    """Memory of `monotonic` training, ours and eager, each measured in a process of its own.

    Returns:
        contestant -> ``peak_bytes``, growth of the resident set in forward and backward, and ``saved_bytes``, what
        autograd keeps between the two.
    """
    context = multiprocessing.get_context("spawn")
    result = {}
    for contestant in ("ours", "eager"):
        with context.Pool(1) as pool:
            result[contestant] = pool.apply(_memory, (contestant, shape, rows, threads))
    return result


def mixing_params(mixer: nn.Module) -> MonotonicParams:
    """The baseline mixer's parameters in the order of `fastmix.ops.monotonic`."""
    m: Any = mixer
    w1, w2 = _hypernet(m.hyper_w_1), _hypernet(m.hyper_w_final)
    return MonotonicParams(*w1, *w2, m.hyper_b_1.weight, m.hyper_b_1.bias, *_hypernet(m.V))


def utility_params(cell: nn.Module) -> RecurrentParams:
    """The baseline agent's parameters in the order of `fastmix.ops.recurrent`."""
    c: Any = cell
    norm = c.layer_norm if isinstance(c.layer_norm, nn.LayerNorm) else None
    return RecurrentParams(
        *(c.fc1.weight, c.fc1.bias, c.rnn.weight_ih, c.rnn.weight_hh, c.rnn.bias_ih, c.rnn.bias_hh),
        *(None if norm is None else norm.weight, None if norm is None else norm.bias),
        *(c.fc2.weight, c.fc2.bias),
    )


def ragged_mask(episodes: int, steps: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``mask`` and ``terminated``, ``[B, T, 1]``: lengths from half of ``steps`` to all; short episodes ended truly."""
    lengths = torch.randint(max(1, steps // 2), steps + 1, (episodes, 1))
    lengths[0] = steps
    time = torch.arange(steps)
    terminated = (time == lengths - 1) & (lengths < steps)
    return (time < lengths).unsqueeze(-1).to(dtype), terminated.unsqueeze(-1).to(dtype)


def _hypernet(module: Any) -> tuple[Any, Any, Any, Any]:
    """Hidden weight and bias (None without hidden layer), weight and bias."""
    if isinstance(module, nn.Linear):
        return None, None, module.weight, module.bias
    return module[0].weight, module[0].bias, module[2].weight, module[2].bias


def _mixing_inputs(shape: str, rows: int, dtype: torch.dtype) -> tuple[nn.Module, Tensor, Tensor]:
    sizes = SHAPES[shape]
    torch.manual_seed(_SEED)
    mixer = baselines.load("networks").QMixer(sizes.n_agents, sizes.state_dim).to(dtype)
    agent_qs = torch.randn(rows, sizes.n_agents, dtype=dtype, requires_grad=True)
    return mixer, agent_qs, torch.randn(rows, sizes.state_dim, dtype=dtype)


def _passes(
    forwards: Mapping[str, Callable[[], Tensor]], leaves: Sequence[Tensor], cotangent: Tensor, train: bool
) -> dict[str, Callable[[], object]]:
    """The forwards without recording gradients, or with the gradients of all ``leaves`` computed after them."""

    def forward_only(call: Callable[[], Tensor]) -> Callable[[], object]:
        def run() -> Tensor:
            with torch.no_grad():
                return call()

        return run

    def forward_backward(call: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(call(), leaves, cotangent)

    wrap = forward_backward if train else forward_only
    return {name: wrap(call) for name, call in forwards.items()}


def _gradient_of_chosen(call: Callable[[], Any], agent_qs: Tensor, cotangent: Tensor) -> Callable[[], object]:
    return lambda: torch.autograd.grad(call().chosen_qs, agent_qs, cotangent)


def _compile(module: nn.Module) -> Callable[..., Any]:
    # Graphs of earlier cases would count towards the limit of recompilations.
    torch.compiler.reset()
    compiled: Callable[..., Any] = torch.compile(module, fullgraph=True, dynamic=False)
    return compiled


def _present(params: Iterable[Tensor | None]) -> list[Tensor]:
    return [tensor for tensor in params if tensor is not None]


def _copy_into_sequence(cell: nn.Module, gru: nn.Module) -> None:
    state = cell.state_dict()
    gru.load_state_dict({f"{key}_l0" if key.startswith("rnn.") else key: value for key, value in state.items()})


def _monotonic_error(agent_qs: Tensor, states: Tensor, params: MonotonicParams, cotangent: Tensor) -> float:
    exact = MonotonicParams(*_leaves64(params))
    cotangent = torch.where(_near_mixing_kink(states.double(), exact), 0.0, 1.0).to(cotangent.dtype) * cotangent

    def results(agent_qs: Tensor, states: Tensor, params: MonotonicParams, backend: str | None) -> list[Tensor]:
        agent_qs = agent_qs.clone().requires_grad_()
        q_tot = ops.monotonic(agent_qs, states, params, backend=backend)
        return [q_tot, *torch.autograd.grad(q_tot, [agent_qs, *_present(params)], cotangent.to(q_tot.dtype))]

    expected = results(agent_qs.double(), states.double(), exact, "reference")
    return max(rms_ratio(a, b) for a, b in zip(results(agent_qs, states, params, None), expected, strict=True))


@torch.no_grad()
def _near_mixing_kink(states: Tensor, p: MonotonicParams) -> Tensor:
    """``[N, 1]`` bool: rows where relu or abs has an argument within rounding of zero."""
    assert p.w1_hidden_weight is not None and p.w2_hidden_weight is not None  # these cases have two-layer hypernets
    h1 = F.linear(states, p.w1_hidden_weight, p.w1_hidden_bias)
    h2 = F.linear(states, p.w2_hidden_weight, p.w2_hidden_bias)
    arguments = [
        h1,
        h2,
        F.linear(h1.relu(), p.w1_weight, p.w1_bias),
        F.linear(h2.relu(), p.w2_weight, p.w2_bias),
        F.linear(states, p.v_hidden_weight, p.v_hidden_bias),
    ]
    return torch.stack([(x.abs() < _KINK).any(-1) for x in arguments]).any(0).unsqueeze(-1)


def _recurrent_error(obs: Tensor, params: RecurrentParams, cotangent: Tensor) -> float:
    exact = RecurrentParams(*_leaves64(params))
    with torch.no_grad():
        near_kink = (F.linear(obs.double(), exact.fc1_weight, exact.fc1_bias).abs() < _KINK).any(-1)
    # Gradients flow back through a sequence, so one such argument silences all of it.
    cotangent = cotangent * (~near_kink.any(1, keepdim=True)).unsqueeze(-1)

    def results(obs: Tensor, params: RecurrentParams, backend: str | None) -> list[Tensor]:
        out = ops.recurrent(obs, [params], backend=backend)[0]
        return [out.q, out.hidden, *torch.autograd.grad(out.q, _present(params), cotangent.to(out.q.dtype))]

    expected = results(obs.double(), exact, "reference")
    return max(rms_ratio(a, b) for a, b in zip(results(obs, params, None), expected, strict=True))


def _leaves64(params: Iterable[Tensor | None]) -> list[Any]:
    return [None if p is None else p.detach().double().requires_grad_() for p in params]


def _memory(contestant: str, shape: str, rows: int, threads: int) -> dict[str, int | None]:
    torch.set_num_threads(threads)

    def build(n_rows: int) -> tuple[Callable[[], Tensor], list[Tensor], Callable[[], object]]:
        mixer, agent_qs, states = _mixing_inputs(shape, n_rows, torch.float32)
        params, leaves = mixing_params(mixer), [agent_qs, *mixer.parameters()]

        def forward() -> Tensor:
            if contestant == "ours":
                return ops.monotonic(agent_qs, states, params)
            q_tot: Tensor = mixer(agent_qs.view(n_rows, 1, -1), states.view(n_rows, 1, -1))
            return q_tot.view(n_rows, 1)

        cotangent = torch.randn(n_rows, 1)
        return forward, [*leaves, states], lambda: torch.autograd.grad(forward(), leaves, cotangent)

    build(64)[2]()  # libraries, thread pools and their workspaces
    forward, inputs, training = build(rows)
    peak = peak_memory(training)
    gc.collect()
    return {"peak_bytes": peak, "saved_bytes": saved_bytes(forward, inputs)}
