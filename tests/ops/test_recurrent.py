"""`recurrent` on the compiled core against plain PyTorch, forward and backward, and the acting step."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import fastmix
from fastmix import _core, backends
from fastmix.ops.recurrent import RecurrentOutput, RecurrentParams, Stepper, native, recurrent
from fastmix.testing.compare import assert_close
from tests.generators import non_contiguous, recurrent_params
from tests.ops.support import ISAS, TOLERANCE, fullgraph, gradients, run_tests_under_isa

FILE = "tests/ops/test_recurrent.py"
DTYPES = (torch.float32, torch.float64)


class Case(NamedTuple):
    """One problem; `I = O (+ U if actions) (+ A if ids)`."""

    episodes: int = 3
    steps: int = 7
    agents: int = 2
    obs: int = 7
    hidden: int = 64
    outputs: int = 5
    actions: bool = True
    ids: bool = True
    norm: bool = False
    start: bool = True


CASES = {
    "plain": Case(actions=False, ids=False, start=False),
    "everything": Case(norm=True),
    "one of everything": Case(1, 1, 1, 1, 1, 1),
    "hidden 8": Case(hidden=8, norm=True, outputs=1),
    "hidden 31": Case(hidden=31, norm=True, outputs=36, agents=27),
    "hidden 65": Case(hidden=65, ids=False, outputs=17),
    "hidden 128": Case(hidden=128, actions=False, norm=True),
    "27 agents": Case(5, 2, 27, 100, outputs=36),
    "long": Case(5, 61, 5, 20, start=False),
    "long and small": Case(1, 61, 1, 3, hidden=8, norm=True),
    "wide input": Case(4, 9, 7, 301, ids=False),
    "no observation": Case(obs=0),
    "two steps": Case(steps=2, start=False, outputs=16),
    "no steps": Case(steps=0),
    "no episodes": Case(episodes=0),
    "no agents": Case(agents=0, actions=False, ids=False),
}


class Inputs(NamedTuple):
    obs: Tensor
    network: RecurrentParams
    hidden: Tensor | None
    last_actions: Tensor | None


def make(case: Case, dtype: torch.dtype, seed: int = 0) -> Inputs:
    g = torch.Generator().manual_seed(seed)
    inputs = case.obs + (case.outputs if case.actions else 0) + (case.agents if case.ids else 0)
    network = recurrent_params(inputs, case.hidden, case.outputs, layer_norm=case.norm, dtype=dtype, seed=seed)
    rows = (case.episodes, case.steps, case.agents)
    obs = torch.randn(*rows, case.obs, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    hidden = torch.randn(rows[0], rows[2], case.hidden, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    actions = torch.randint(-1, case.outputs, rows, generator=g)
    return Inputs(obs, network, hidden if case.start else None, actions if case.actions else None)


def run(
    inputs: Inputs, case: Case, backend: str, states: bool = True, lengths: Tensor | None = None
) -> RecurrentOutput:
    return recurrent(
        inputs.obs,
        [inputs.network],
        [inputs.hidden],
        last_actions=inputs.last_actions,
        agent_ids=case.ids,
        return_hidden_states=states,
        lengths=lengths,
        backend=backend,
    )[0]


def leaves(inputs: Inputs) -> list[Tensor]:
    return [t for t in (inputs.obs, inputs.hidden, *inputs.network) if t is not None and t.requires_grad]


def present(output: RecurrentOutput) -> list[Tensor]:
    return [t for t in output if t is not None]


def compare(actual: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float, what: str) -> None:
    assert len(actual) == len(expected)
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert_close(a, e, tolerance, name=f"{what} {i}")


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_matches_reference(name: str, dtype: torch.dtype, threads: int) -> None:
    torch.set_num_threads(threads)
    case = CASES[name]
    inputs = make(case, dtype)
    actual, expected = run(inputs, case, "native"), run(inputs, case, "reference")
    compare(present(actual), present(expected), TOLERANCE[dtype], "output")
    grads = [gradients(present(out), leaves(inputs)) for out in (actual, expected)]
    compare(grads[0], grads[1], TOLERANCE[dtype], "gradient")


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_steps_that_are_wanted_match_reference(name: str, dtype: torch.dtype, threads: int) -> None:
    torch.set_num_threads(threads)
    case = CASES[name]
    inputs = make(case, dtype)
    lengths = torch.randint(case.steps + 1, (case.episodes,), generator=torch.Generator().manual_seed(3))
    wanted = (torch.arange(case.steps) < lengths.unsqueeze(-1))[..., None, None]
    results = []
    for backend, given in (("native", lengths), ("reference", None)):
        out = run(inputs, case, backend, lengths=given)
        assert all(tensor.isfinite().all() for tensor in present(out))
        assert out.hidden_states is not None
        read = [torch.where(wanted, out.q, 0), torch.where(wanted, out.hidden_states, 0)]
        read.append(out.hidden[lengths == case.steps])
        results.append((read, gradients(read, leaves(inputs))))
    compare(results[0][0], results[1][0], TOLERANCE[dtype], "output")
    compare(results[0][1], results[1][1], TOLERANCE[dtype], "gradient")


def test_steps_that_no_episode_has_are_not_computed() -> None:
    case = Case(7, 9, 5, start=False, norm=True)
    inputs = make(case, torch.float32)
    lengths = torch.tensor([1, 6, 0, 4, 6, 2, 3])
    with torch.no_grad():
        inputs.obs[:, 6:] = torch.nan
    out = run(inputs, case, "native", lengths=lengths)
    assert (out.q[:, 6:] == 0).all() and out.q.isfinite().all() and out.hidden.isfinite().all()
    grads = torch.autograd.grad(out.q[:, :6].sum(), leaves(inputs))
    assert all(grad.isfinite().all() for grad in grads)
    assert (grads[0][:, 6:] == 0).all()


@pytest.mark.parametrize(
    ("lengths", "error", "message"),
    [
        (torch.tensor([1, 8, 0]), ValueError, r"lengths must lie in \[0, 7\], got 8 at \[1\]"),
        (torch.tensor([1, 7, -1]), ValueError, r"lengths must lie in \[0, 7\], got -1 at \[2\]"),
        (torch.tensor([1, 2]), ValueError, r"lengths must have shape \[B\] = \(3\), got \(2,\)"),
        (torch.tensor([1.0, 2.0, 3.0]), TypeError, "lengths must have dtype torch.int64"),
        ([1, 2, 3], TypeError, "lengths must be a torch.Tensor"),
    ],
)
def test_lengths_that_cannot_be(lengths: Any, error: type[Exception], message: str) -> None:
    case = Case()
    with pytest.raises(error, match=message):
        run(make(case, torch.float32), case, "native", lengths=lengths)


@pytest.mark.parametrize("wanted", ["q", "hidden", "hidden_states"])
def test_gradient_of_each_output_alone(wanted: str) -> None:
    case = Case(norm=True)
    inputs = make(case, torch.float64)
    grads = [gradients([getattr(run(inputs, case, backend), wanted)], leaves(inputs)) for backend in _BOTH]
    compare(grads[0], grads[1], TOLERANCE[torch.float64], f"gradient of {wanted}")


@pytest.mark.parametrize("frozen", ["obs", "hidden", "network", "nothing but hidden"])
def test_gradients_only_where_wanted(frozen: str) -> None:
    case = Case()
    inputs = make(case, torch.float64)
    if frozen in ("obs", "nothing but hidden"):
        inputs.obs.requires_grad_(False)
    if frozen == "hidden":
        assert inputs.hidden is not None
        inputs.hidden.requires_grad_(False)
    if frozen in ("network", "nothing but hidden"):
        for p in inputs.network:
            if p is not None:
                p.requires_grad_(False)
    grads = [gradients(present(run(inputs, case, backend)), leaves(inputs)) for backend in _BOTH]
    compare(grads[0], grads[1], TOLERANCE[torch.float64], f"gradient with frozen {frozen}")


def test_several_networks_some_without_gradient() -> None:
    case = Case()
    inputs = make(case, torch.float32)
    other = recurrent_params(inputs.network.fc1_weight.shape[1], 31, 10, layer_norm=True, seed=1, requires_grad=False)
    obs = inputs.obs.detach()
    results = {}
    for backend in _BOTH:
        learned, target = recurrent(
            obs,
            [inputs.network, other],
            [inputs.hidden, None],
            last_actions=inputs.last_actions,
            agent_ids=True,
            backend=backend,
        )
        assert learned.q.requires_grad and not target.q.requires_grad
        assert learned.hidden_states is None and target.hidden_states is None
        weights = [p for p in inputs.network if p is not None]
        results[backend] = [learned.q, learned.hidden, target.q, target.hidden, *gradients(learned.q, weights)]
    compare(results["native"], results["reference"], TOLERANCE[torch.float32], "several networks")


def test_nothing_is_kept_without_gradients() -> None:
    case = Case()
    inputs = make(case, torch.float32)
    arguments = (inputs.obs, inputs.last_actions, inputs.hidden, *inputs.network, True, False)
    assert (
        torch.ops.fastmix.recurrent(*(a.detach() if isinstance(a, Tensor) else a for a in arguments), False)[3].numel()
        == 0
    )
    with torch.no_grad():
        assert not run(inputs, case, "native").q.requires_grad


def strided(kind: str, obs: Tensor) -> Tensor:
    """The values of ``obs [B, T, A, O]`` in another memory layout."""
    if kind == "gaps everywhere":
        return non_contiguous(obs)
    if kind == "time first":
        return obs.transpose(0, 1).contiguous().transpose(0, 1)
    if kind == "slice of a longer batch":
        episodes, steps, agents, features = obs.shape
        longer = obs.new_full((episodes + 1, steps + 2, agents, features + 3), float("nan"))
        longer[1:, 1:-1, :, :features] = obs
        return longer[1:, 1:-1, :, :features]
    return obs[:, :1].expand(obs.shape)


@pytest.mark.parametrize("kind", ["gaps everywhere", "time first", "slice of a longer batch", "expanded over time"])
def test_strides(kind: str) -> None:
    case = Case(5, 9, 3, 11)
    inputs = make(case, torch.float64)
    obs = strided(kind, inputs.obs.detach()).requires_grad_()
    assert inputs.last_actions is not None and inputs.hidden is not None
    inputs = inputs._replace(
        obs=obs,
        last_actions=non_contiguous(inputs.last_actions),
        hidden=non_contiguous(inputs.hidden.detach()).requires_grad_(),
        network=RecurrentParams._make(
            None if p is None else non_contiguous(p.detach()).requires_grad_() for p in inputs.network
        ),
    )
    actual, expected = run(inputs, case, "native"), run(inputs, case, "reference")
    compare(present(actual), present(expected), TOLERANCE[torch.float64], "output")
    grads = [gradients(present(out), leaves(inputs)) for out in (actual, expected)]
    compare(grads[0], grads[1], TOLERANCE[torch.float64], "gradient")


def test_a_copy_of_obs_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    inputs = make(Case(), torch.float32)
    with caplog.at_level(logging.DEBUG, "fastmix"):
        run(inputs, Case(), "native")
        assert "copies obs" not in caplog.text
        run(inputs._replace(obs=non_contiguous(inputs.obs.detach())), Case(), "native")
    assert caplog.text.count("copies obs") == 1


@pytest.mark.parametrize("threads", [1, 2])
def test_same_bits_every_time(threads: int) -> None:
    torch.set_num_threads(threads)
    case = Case(16, 40, 5, 30)
    inputs = make(case, torch.float32)
    results = []
    for _ in range(4):
        out = run(inputs, case, "native")
        results.append([*present(out), *gradients(present(out), leaves(inputs))])
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], again, strict=True))


@pytest.mark.parametrize("norm", [False, True])
def test_nan_spoils_its_own_row_from_its_step_on(norm: bool) -> None:
    case = Case(5, 9, 3, 11, norm=norm, start=False)
    inputs = make(case, torch.float32)
    clean = run(inputs, case, "native")
    obs = inputs.obs.detach().clone()
    obs[2, 4, 1, 3] = torch.nan
    q = run(inputs._replace(obs=obs), case, "native").q
    spoiled = torch.zeros(q.shape[:3], dtype=torch.bool)
    spoiled[2, 4:, 1] = True
    assert q[spoiled].isnan().all()
    assert torch.equal(q[~spoiled], clean.q[~spoiled])


def test_saturated_gates_stay_finite() -> None:
    case = Case(5, 20, 3, 11)
    inputs = make(case, torch.float32)
    inputs = inputs._replace(obs=(inputs.obs * 1e4).detach().requires_grad_())
    out = run(inputs, case, "native")
    assert all(t.isfinite().all() for t in [*present(out), *gradients(out.q, leaves(inputs))])


def test_many_steps_do_not_wear_out_single_precision() -> None:
    """Weight gradients are sums over 100,000 row-steps here; one running sum would be off by 1e-5."""
    case = Case(20, 500, 10, 5, actions=False, ids=False, start=False)
    inputs = make(case, torch.float32)
    double = make(case, torch.float64)._replace(
        network=RecurrentParams._make(
            None if p is None else p.detach().double().requires_grad_() for p in inputs.network
        ),
        obs=inputs.obs.detach().double(),
    )
    weights = [[p for p in i.network if p is not None] for i in (inputs, double)]
    q32, q64 = run(inputs, case, "native", states=False).q, run(double, case, "native", states=False).q
    compare(torch.autograd.grad(q32.sum(), weights[0]), torch.autograd.grad(q64.sum(), weights[1]), 3e-6, "gradient")


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa: str) -> None:
    run_tests_under_isa(FILE, "matches_reference or nan or stepper_matches", isa)


@pytest.mark.traced
@pytest.mark.parametrize("case", [Case(2, 3, 2, 3, hidden=5), Case(2, 3, 2, 3, hidden=5, norm=True, actions=False)])
def test_gradcheck(case: Case) -> None:
    inputs = make(case, torch.float64)
    tensors = leaves(inputs)

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        given = iter(values)
        taken = [next(given) if t is not None else None for t in (inputs.obs, inputs.hidden, *inputs.network)]
        obs, hidden, *weights = taken
        assert obs is not None
        replaced = inputs._replace(obs=obs, hidden=hidden, network=RecurrentParams._make(weights))
        return tuple(present(run(replaced, case, "native")))

    assert torch.autograd.gradcheck(function, tensors)


@pytest.mark.traced
@pytest.mark.parametrize("case", [Case(2, 3, 2, 3, hidden=5), Case(2, 3, 2, 3, norm=True, actions=False, start=False)])
@pytest.mark.parametrize("states", [False, True])
def test_opcheck(case: Case, states: bool) -> None:
    inputs = make(case, torch.float64)
    arguments = (inputs.obs, inputs.last_actions, inputs.hidden, *inputs.network, case.ids, states)
    torch.library.opcheck(torch.ops.fastmix.recurrent.default, (*arguments, True))
    frozen = tuple(a.detach() if isinstance(a, Tensor) else a for a in arguments)
    torch.library.opcheck(torch.ops.fastmix.recurrent.default, (*frozen, False))


@pytest.mark.traced
def test_compiles_without_graph_break() -> None:
    case = Case(norm=True)
    inputs = make(case, torch.float32)

    def function(obs: Tensor, hidden: Tensor, last_actions: Tensor, network: RecurrentParams) -> Any:
        target = RecurrentParams._make(None if p is None else p.detach() for p in network)
        learned, fixed = recurrent(obs, [network, target], [hidden, None], last_actions=last_actions, agent_ids=True)
        return learned.q, learned.hidden, fixed.q

    assert inputs.hidden is not None and inputs.last_actions is not None
    arguments = (inputs.obs, inputs.hidden, inputs.last_actions, inputs.network)
    compiled, eager = fullgraph(function)(*arguments), function(*arguments)
    compare(compiled, eager, 0.0, "output")
    compare(gradients(compiled[:2], leaves(inputs)), gradients(eager[:2], leaves(inputs)), 0.0, "gradient")


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_autocast_computes_in_single_precision(backend: str) -> None:
    case = Case()
    inputs = make(case, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = run(inputs._replace(obs=inputs.obs.detach().bfloat16()), case, backend)
    assert out.q.dtype == torch.float32
    expected = run(inputs._replace(obs=inputs.obs.detach().bfloat16().float()), case, "reference")
    assert_close(out.q, expected.q, 1e-6)


def test_half_precision_runs_on_the_reference() -> None:
    inputs = make(Case(), torch.bfloat16)
    assert (
        recurrent(inputs.obs, [inputs.network], last_actions=inputs.last_actions, agent_ids=True)[0].q.dtype
        == torch.bfloat16
    )
    with pytest.raises(RuntimeError, match="float32"):
        run(inputs, Case(), "native")


def test_memory_of_the_backward_pass_is_reused() -> None:
    case = Case(16, 40, 5, 30)
    inputs = make(case, torch.float32)
    _core.workspace_clear()
    for _ in range(2):
        run(inputs, case, "native").q.sum().backward()
    kept = _core.workspace_kept()
    assert kept >= native.saved_size(inputs.obs, inputs.network) * 4
    run(inputs, case, "native").q.sum().backward()
    assert _core.workspace_kept() == kept
    _core.workspace_clear()
    assert _core.workspace_kept() == 0


# ---- cuDNN, whose place PyTorch's own GRU takes on the CPU ----


@pytest.mark.parametrize("name", CASES)
def test_cudnn_matches_reference(name: str) -> None:
    case = CASES[name]
    inputs = make(case, torch.float64)
    actual, expected = run(inputs, case, "cudnn"), run(inputs, case, "reference")
    compare(present(actual), present(expected), TOLERANCE[torch.float64], "output")
    grads = [gradients(present(out), leaves(inputs)) for out in (actual, expected)]
    compare(grads[0], grads[1], TOLERANCE[torch.float64], "gradient")


def test_cudnn_in_half_precision() -> None:
    case = Case()
    inputs = make(case, torch.bfloat16)
    assert_close(run(inputs, case, "cudnn").q, run(inputs, case, "reference").q, 2e-2)


@pytest.mark.traced
def test_cudnn_compiles_without_graph_break() -> None:
    case = Case(norm=True)
    inputs = make(case, torch.float64)
    actual, expected = fullgraph(run)(inputs, case, "cudnn"), run(inputs, case, "reference")
    compare(present(actual), present(expected), TOLERANCE[torch.float64], "output")
    grads = [gradients(present(out), leaves(inputs)) for out in (actual, expected)]
    compare(grads[0], grads[1], TOLERANCE[torch.float64], "gradient")


def test_cudnn_is_never_chosen_on_the_cpu_but_obeyed() -> None:
    case = Case()
    inputs = make(case, torch.float32)
    for dtype in (*DTYPES, torch.bfloat16):
        assert backends.resolve("recurrent", inputs.obs.to(dtype)) != "cudnn"
    with fastmix.backend("cudnn"):
        step = stepper_of(inputs, case)
        with pytest.raises(RuntimeError, match="returns has no 'cudnn' backend on device 'cpu'"):
            backends.resolve("returns", inputs.obs)
    q, after = step(*step_of(inputs, case))
    assert_close(q, run(inputs, case, "reference").q[:, 0], TOLERANCE[torch.float32])
    assert not q.requires_grad and after.shape == (case.episodes, case.agents, case.hidden)


# ---- what must be refused ----


def bad(change: str, inputs: Inputs) -> dict[str, Any]:
    network, obs, actions = inputs.network, inputs.obs, inputs.last_actions
    assert actions is not None and inputs.hidden is not None
    arguments: dict[str, Any] = {
        "obs": obs, "networks": [network], "hidden": [inputs.hidden], "last_actions": actions, "agent_ids": True,
    }  # fmt: skip
    changes: dict[str, dict[str, Any]] = {
        "obs is a list": {"obs": [1.0]},
        "obs of three dimensions": {"obs": obs[0]},
        "integer obs": {"obs": obs.long()},
        "obs too wide": {"obs": torch.cat([obs] * 3, -1)},
        "obs too narrow": {"obs": obs[..., 1:]},
        "obs of another dtype": {"obs": obs.double()},
        "last actions of another shape": {"last_actions": actions[:, 1:]},
        "last actions of another dtype": {"last_actions": actions.int()},
        "last action too large": {"last_actions": torch.full_like(actions, 5)},
        "last action too small": {"last_actions": torch.full_like(actions, -2)},
        "features without last actions": {"last_actions": None},
        "features without agent ids": {"last_actions": None, "agent_ids": False},
        "a hidden state too many": {"hidden": [inputs.hidden, None]},
        "hidden of another shape": {"hidden": [inputs.hidden[:, :1]]},
        "hidden of another dtype": {"hidden": [inputs.hidden.double()]},
        "network is a tuple": {"networks": [tuple(network)]},
        "weight of another shape": {"networks": [network._replace(weight_hh=network.weight_hh[:, 1:])]},
        "bias of another shape": {"networks": [network._replace(fc2_bias=network.fc2_bias[1:])]},
        "weight of another dtype": {"networks": [network._replace(weight_ih=network.weight_ih.double())]},
        "weight missing": {"networks": [network._replace(bias_ih=None)]},  # type: ignore[arg-type]
        "half a layer norm": {"networks": [network._replace(norm_weight=network.fc1_bias)]},
    }
    return arguments | changes[change]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("obs is a list", "obs must be a torch.Tensor"),
        ("obs of three dimensions", r"obs must have shape \[B, T, A, O\]"),
        ("integer obs", "obs must be a floating-point"),
        ("obs too wide", r"networks\[0\].fc1_weight must take 21 features of obs, 2 agent ids"),
        ("obs too narrow", r"networks\[0\].fc1_weight must take 6 features of obs"),
        ("obs of another dtype", "must have the dtype of obs"),
        ("last actions of another shape", r"last_actions must have shape \[B, T, A\]"),
        ("last actions of another dtype", "last_actions must be int64"),
        ("last action too large", r"last_actions must lie in \[-1, 4\], got 5 at \[0, 0, 0\]"),
        ("last action too small", r"last_actions must lie in \[-1, 4\], got -2"),
        (
            "features without last actions",
            "exactly where they are given, got 5 features left",
        ),
        ("features without agent ids", "must take 7 features of obs, 0 agent ids, .* 5 outputs, got 14"),
        ("a hidden state too many", "hidden must hold one state"),
        ("hidden of another shape", r"hidden\[0\] must have shape \[B, A, D\]"),
        ("hidden of another dtype", r"hidden\[0\] must have the dtype of obs"),
        ("network is a tuple", r"networks\[0\] must be a RecurrentParams"),
        ("weight of another shape", r"networks\[0\].weight_hh must have shape \[3 D, D\]"),
        ("bias of another shape", r"networks\[0\].fc2_bias must have shape \[U\]"),
        ("weight of another dtype", r"networks\[0\].weight_ih must have the dtype"),
        ("weight missing", r"networks\[0\].bias_ih must be a torch.Tensor"),
        ("half a layer norm", "both of norm_weight and norm_bias"),
    ],
)
def test_bad_arguments_are_named(change: str, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        recurrent(**bad(change, make(Case(), torch.float32)))


# ---- acting ----


def step_of(inputs: Inputs, case: Case) -> tuple[Tensor, Tensor | None, Tensor | None]:
    return inputs.obs.detach()[:, 0], inputs.hidden, None if inputs.last_actions is None else inputs.last_actions[:, 0]


def stepper_of(inputs: Inputs, case: Case) -> Stepper:
    return Stepper(inputs.network, case.obs, case.agents if case.ids else 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.steps > 0])
def test_stepper_matches_reference(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    inputs = make(case, dtype)
    step = stepper_of(inputs, case)
    obs, hidden, actions = step_of(inputs, case)
    first = inputs._replace(obs=inputs.obs[:, :1], last_actions=None if actions is None else actions[:, None])
    for layout in (lambda t: t, non_contiguous):
        q, after = step(layout(obs), *(None if t is None else layout(t) for t in (hidden, actions)))
        expected = run(first, case, "reference")
        assert not q.requires_grad and not after.requires_grad
        assert_close(q, expected.q[:, 0], TOLERANCE[dtype])
        assert_close(after, expected.hidden, TOLERANCE[dtype])


def _optimise(module: torch.nn.Module) -> None:
    optimiser = torch.optim.SGD(module.parameters(), lr=0.1)
    for p in module.parameters():
        p.grad = torch.ones_like(p)
    optimiser.step()


def _swap(module: torch.nn.Module) -> None:
    module.weight_hh.data = module.weight_hh.data * 0.5  # type: ignore[operator, assignment]


def _load(module: torch.nn.Module) -> None:
    module.load_state_dict({name: value * 0.5 for name, value in module.state_dict().items()})


def _in_place(module: torch.nn.Module) -> None:
    with torch.no_grad():
        module.bias_ih.mul_(2.0)  # type: ignore[operator]


@pytest.mark.parametrize("update", [_optimise, _swap, _load, _in_place])
def test_stepper_sees_updates(update: Any) -> None:
    case = Case()
    inputs = make(case, torch.float32)
    cell = torch.nn.GRUCell(case.hidden, case.hidden)
    network = inputs.network._replace(
        weight_ih=cell.weight_ih, weight_hh=cell.weight_hh, bias_ih=cell.bias_ih, bias_hh=cell.bias_hh
    )
    step = Stepper(network, case.obs, case.agents)
    arguments = step_of(inputs, case)
    before, _ = step(*arguments)
    assert torch.equal(step(*arguments)[0], before)
    update(cell)
    after, _ = step(*arguments)
    assert not torch.equal(before, after)
    assert torch.equal(after, Stepper(network, case.obs, case.agents)(*arguments)[0])


def test_stepper_refresh_reads_what_no_counter_sees() -> None:
    case = Case()
    inputs = make(case, torch.float32)
    step, arguments = stepper_of(inputs, case), step_of(inputs, case)
    before, _ = step(*arguments)
    inputs.network.fc2_bias.data.add_(1.0)
    step.refresh()
    assert_close(step(*arguments)[0], before + 1.0, 1e-6)


def test_stepper_refuses_bad_arguments() -> None:
    case = Case()
    inputs = make(case, torch.float32)
    step = stepper_of(inputs, case)
    obs, hidden, actions = step_of(inputs, case)
    assert hidden is not None and actions is not None
    step(obs, hidden, actions)
    for arguments, message in (
        ((obs[0], hidden, actions), r"obs must have shape \[B, A, O\]"),
        ((obs[:, :1], hidden, actions), r"obs must have shape \[B, A, O\]"),
        ((obs.double(), hidden, actions), "obs must have the dtype of the parameters"),
        ((obs, hidden[:1], actions), r"hidden\[0\] must have shape"),
        ((obs, hidden.double(), actions), "hidden must have the dtype"),
        ((obs, hidden, actions.int()), "last_actions must be int64"),
        ((obs, hidden, None), "last_actions must be given"),
        ((obs, hidden, actions + case.outputs), "last_actions must lie in"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            step(*arguments)
    with pytest.raises(ValueError, match="must take 100 features of obs"):
        Stepper(inputs.network, 100)


_BOTH = ("native", "reference")
