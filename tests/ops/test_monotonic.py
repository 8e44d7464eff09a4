"""`monotonic`: the compiled core against the reference in float64: sizes, strides, threads, instruction sets."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastmix.ops import monotonic, quantile_mix
from fastmix.ops.monotonic import POSITIVITIES, MonotonicParams, reference
from fastmix.testing import assert_close
from fastmix.testing.bench import saved_bytes
from tests.generators import ODD_AGENTS, ODD_EMBEDS, Shape, monotonic_params, non_contiguous
from tests.ops.support import ISAS, TOLERANCE, fullgraph, run_tests_under_isa

DTYPES = (torch.float32, torch.float64)
KINK = {torch.float32: 1e-5, torch.float64: 1e-12}
"""Closer than this to 0, rounding decides on which side of a relu or an absolute value a number falls."""


class Problem:
    """Random inputs and weights: of `quantile_mix` where ``quantiles`` are given."""

    def __init__(
        self,
        *leading: int,
        agents: int = 5,
        embed: int = 32,
        hyper: int = 33,
        state: int = 19,
        layers: int = 2,
        dtype: torch.dtype = torch.float32,
        positivity: str = "abs",
        beta: float = 1.3,
        grad: bool = True,
        quantiles: int | None = None,
    ) -> None:
        self.params = monotonic_params(
            Shape(agents, 3, state_dim=state, obs_dim=3), embed, hyper, layers, dtype=dtype, requires_grad=grad
        )
        self.op = monotonic if quantiles is None else quantile_mix
        self.outputs = quantiles or 1
        distribution = () if quantiles is None else (quantiles,)
        self.agent_qs = torch.randn(*leading, agents, *distribution, dtype=dtype, requires_grad=grad)
        self.states = torch.randn(*leading, state, dtype=dtype, requires_grad=grad)
        self.settings: dict[str, Any] = {"positivity": positivity, "beta": beta}

    @property
    def inputs(self) -> list[Tensor]:
        return [self.agent_qs, self.states, *(p for p in self.params if p is not None)]

    def run(self, backend: str = "native", inputs: Sequence[Tensor] | None = None) -> Tensor:
        agent_qs, states, *rest = self.inputs if inputs is None else inputs
        weights = iter(rest)
        params = MonotonicParams._make(None if p is None else next(weights) for p in self.params)
        return self.op(agent_qs, states, params, backend=backend, **self.settings)

    def exact(self) -> tuple[Tensor, list[Tensor]]:
        """The reference in float64, and its inputs."""
        inputs = [tensor.detach().double().requires_grad_() for tensor in self.inputs]
        return self.run("reference", inputs), inputs

    def upstream(self) -> Tensor:
        """A gradient of the result that is 0 in rows where some number lies on a kink."""
        p = MonotonicParams._make(None if t is None else t.detach().double() for t in self.params)
        states = self.states.detach().double()
        hidden1 = states if p.w1_hidden_weight is None else F.linear(states, p.w1_hidden_weight, p.w1_hidden_bias)
        hidden2 = states if p.w2_hidden_weight is None else F.linear(states, p.w2_hidden_weight, p.w2_hidden_bias)
        kinked = [F.linear(states, p.v_hidden_weight, p.v_hidden_bias)]
        if p.w1_hidden_weight is not None:
            kinked += [hidden1, hidden2]
            hidden1, hidden2 = hidden1.relu(), hidden2.relu()
        if self.settings["positivity"] == "abs":
            kinked += [F.linear(hidden1, p.w1_weight, p.w1_bias), F.linear(hidden2, p.w2_weight, p.w2_bias)]
        smooth = torch.cat(kinked, -1).abs().amin(-1, keepdim=True) > KINK[self.states.dtype]
        assert smooth.numel() == 0 or smooth.double().mean() > 0.5  # else the test would hide what it looks for
        return torch.randn(*self.states.shape[:-1], self.outputs).to(self.states.dtype) * smooth


def assert_parity(problem: Problem) -> None:
    tolerance = TOLERANCE[problem.states.dtype]
    result, (expected, exact) = problem.run(), problem.exact()
    assert_close(result, expected, tolerance, name="q_tot")
    with torch.no_grad():
        assert_close(problem.run(), expected, tolerance, name="q_tot without gradients")
    upstream = problem.upstream()
    grads = torch.autograd.grad(result, problem.inputs, upstream)
    wanted = torch.autograd.grad(expected, exact, upstream.double())
    for i, (grad, want) in enumerate(zip(grads, wanted, strict=True)):
        name = f"gradient of input {i} of shape {tuple(want.shape)}"
        if want.numel() == 1:  # may cancel to nearly nothing; a sum of that many terms is naturally of this size
            scale = max(want.abs().item(), upstream.norm().item())
            assert (grad - want).abs().item() <= tolerance * scale, name
        else:
            assert_close(grad, want, tolerance, name=name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("embed", ODD_EMBEDS)
@pytest.mark.parametrize("agents", ODD_AGENTS)
def test_parity_over_networks(agents: int, embed: int, layers: int, dtype: torch.dtype) -> None:
    for positivity in POSITIVITIES:
        assert_parity(Problem(61, agents=agents, embed=embed, layers=layers, dtype=dtype, positivity=positivity))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("rows", [0, 1, 2, 5, 6, 7, 12, 13, 97, 193, 1920])
def test_parity_over_rows(rows: int, layers: int, dtype: torch.dtype) -> None:
    assert_parity(Problem(rows, layers=layers, dtype=dtype))


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize(
    ("state", "hyper"), [(1, 1), (2, 64), (15, 16), (16, 65), (17, 130), (64, 64), (322, 64), (1024, 8)]
)
def test_parity_over_widths(state: int, hyper: int, layers: int) -> None:
    assert_parity(Problem(97, state=state, hyper=hyper, layers=layers, embed=17))


def test_parity_of_a_large_network() -> None:
    assert_parity(Problem(30, agents=64, embed=256, state=4096, hyper=64))


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa: str) -> None:
    run_tests_under_isa(__file__, "parity_over", isa)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("layers", [1, 2])
def test_same_result_in_every_run(threads: int, layers: int) -> None:
    torch.set_num_threads(threads)
    problem = Problem(1_000, state=100, layers=layers)
    assert_parity(problem)
    upstream = torch.randn(1_000, 1)

    def everything() -> list[Tensor]:
        result = problem.run()
        return [result.detach(), *torch.autograd.grad(result, problem.inputs, upstream)]

    first = everything()
    for _ in range(5):
        for ours, wanted in zip(everything(), first, strict=True):
            assert torch.equal(ours, wanted)


@pytest.mark.parametrize("positivity", POSITIVITIES)
@pytest.mark.parametrize("layers", [1, 2])
def test_every_subset_of_gradients(layers: int, positivity: str) -> None:
    problem = Problem(31, layers=layers, dtype=torch.float64, positivity=positivity)
    expected, exact = problem.exact()
    upstream = problem.upstream()
    wanted = torch.autograd.grad(expected, exact, upstream)
    for subset in [[0], [1], [0, 1], [2], [len(exact) - 1], [0, 3], [1, 5], list(range(2, len(exact)))]:
        inputs = [t.detach().requires_grad_(i in subset) for i, t in enumerate(problem.inputs)]
        problem.run(inputs=inputs).backward(upstream)
        for i, tensor in enumerate(inputs):
            if i in subset:
                assert tensor.grad is not None
                assert_close(tensor.grad, wanted[i], 1e-12, name=f"gradient of input {i}")
            else:
                assert tensor.grad is None


def test_nothing_is_recorded_without_need() -> None:
    problem = Problem(7)
    assert problem.run().requires_grad
    assert not problem.run(inputs=[tensor.detach() for tensor in problem.inputs]).requires_grad
    with torch.no_grad():
        assert not problem.run().requires_grad


def test_no_generated_weights_are_kept() -> None:
    shape = Shape(10, 3, state_dim=322, obs_dim=3)
    params = monotonic_params(shape)
    agent_qs, states = torch.randn(960, 10, requires_grad=True), torch.randn(960, 322)
    known = [agent_qs, states, *(p for p in params if p is not None)]
    ours = saved_bytes(lambda: monotonic(agent_qs, states, params, backend="native"), known)
    eager = saved_bytes(lambda: monotonic(agent_qs, states, params, backend="reference"), known)
    assert ours <= eager / 3
    assert ours < 960 * 10 * 32 * 4  # as floats the generated weights alone would take this


# ---- strides --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("leading", [(), (7,), (3, 5), (2, 3, 5), (0, 5), (5, 0)])
def test_leading_dimensions(leading: tuple[int, ...]) -> None:
    problem = Problem(*leading)
    assert problem.run().shape == (*leading, 1)
    assert_parity(problem)


def test_rows_with_gaps_are_not_copied(caplog: pytest.LogCaptureFixture) -> None:
    problem = Problem(6, 9)
    problem.agent_qs = torch.randn(6, 10, 5)[:, 1:].requires_grad_()
    problem.states = torch.randn(6, 10, 19)[:, :-1].requires_grad_()
    with caplog.at_level(logging.DEBUG, "fastmix"):
        assert_parity(problem)
        problem.states = torch.randn(9, 6, 19).transpose(0, 1).requires_grad_()
        problem.agent_qs = torch.randn(1, 9, 5).expand(6, 9, 5).requires_grad_()
        assert_parity(problem)
    assert "copies" not in caplog.text


def test_strides_of_any_kind(caplog: pytest.LogCaptureFixture) -> None:
    problem = Problem(6, 9)
    problem.agent_qs = non_contiguous(problem.agent_qs.detach()).requires_grad_()
    problem.states = non_contiguous(problem.states.detach()).requires_grad_()
    problem.params = MonotonicParams(
        *(non_contiguous(p.detach()).requires_grad_() for p in problem.params if p is not None)
    )
    with caplog.at_level(logging.DEBUG, "fastmix"):
        assert_parity(problem)
    assert "monotonic copies states of shape" in caplog.text
    assert "monotonic copies w1_weight" in caplog.text
    problem = Problem(2, 3, 5)
    problem.states = torch.randn(5, 3, 2, 19).permute(2, 1, 0, 3).requires_grad_()
    assert_parity(problem)


def test_upstream_gradient_of_any_stride() -> None:
    problem = Problem(6, 9, dtype=torch.float64)
    result, (expected, exact) = problem.run(), problem.exact()
    for ours, wanted in zip(
        torch.autograd.grad(result.sum(), problem.inputs), torch.autograd.grad(expected.sum(), exact), strict=True
    ):
        assert_close(ours, wanted, 1e-12)


def test_offsets_beyond_32_bits(tmp_path: Path) -> None:
    # A sparse file: 2^31 numbers apart, but only the pages in use exist.
    far = 2**31
    memory = torch.from_file(str(tmp_path / "sparse"), shared=True, size=far + 4_096, dtype=torch.float32)
    problem = Problem(2, 7)
    for name, width in (("agent_qs", 5), ("states", 19)):
        values = getattr(problem, name).detach()
        view = memory.as_strided((2, 7, width), (far, width, 1), 0 if name == "agent_qs" else 1_024)
        setattr(problem, name, view.copy_(values).requires_grad_())
    assert_parity(problem)


# ---- special values -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["agent_qs", "states"])
@pytest.mark.parametrize("rows", [4, 40])
def test_a_bad_row_spoils_no_other(rows: int, where: str, value: float) -> None:
    problem = Problem(rows)
    others = torch.arange(rows) != 2
    clean = problem.run()
    grads = torch.autograd.grad(clean, problem.inputs[:2], torch.ones_like(clean))
    with torch.no_grad():
        quick = problem.run()
        getattr(problem, where)[2] = value
        assert torch.equal(problem.run()[others], quick[others])
    spoilt = problem.run()
    assert torch.equal(spoilt[others], clean[others])
    for ours, wanted in zip(
        torch.autograd.grad(spoilt, problem.inputs[:2], torch.ones_like(clean)), grads, strict=True
    ):
        assert torch.equal(ours[others], wanted[others])
    if value != value:
        assert spoilt[2].isnan().all()


@pytest.mark.parametrize("layers", [1, 2])
def test_absolute_value_has_slope_zero_at_zero(layers: int) -> None:
    problem = Problem(13, layers=layers)
    with torch.no_grad():
        for weight in (problem.params.w1_weight, problem.params.w1_bias, problem.params.w2_weight[:16]):
            weight.zero_()
        problem.params.w2_bias[:16] = 0
    upstream = torch.randn(13, 1)
    ours = torch.autograd.grad(problem.run(), problem.inputs, upstream)
    wanted = torch.autograd.grad(problem.run("reference"), problem.inputs, upstream)
    for i, (grad, want) in enumerate(zip(ours, wanted, strict=True)):
        assert_close(grad, want, 1e-5, name=f"gradient of input {i}")
    (index,) = (i for i, tensor in enumerate(problem.inputs) if tensor is problem.params.w1_weight)
    assert (ours[index] == 0).all()


@pytest.mark.parametrize("beta", [0.1, 1.0, 30.0])
def test_softplus_far_from_zero(beta: float) -> None:
    problem = Problem(20, positivity="softplus", beta=beta, dtype=torch.float64)
    problem.params = MonotonicParams(*((20 * p).detach().requires_grad_() for p in problem.params if p is not None))
    result, (expected, exact) = problem.run(), problem.exact()
    # torch takes softplus(x) for x from beta * x = 20 on, which is off by up to 2e-9 / beta
    assert_close(result, expected, 1e-8)
    for ours, wanted in zip(
        torch.autograd.grad(result.sum(), problem.inputs), torch.autograd.grad(expected.sum(), exact), strict=True
    ):
        assert_close(ours, wanted, 1e-8)


# ---- what PyTorch asks of an op -------------------------------------------------------------------------------------


@pytest.mark.parametrize("positivity", POSITIVITIES)
@pytest.mark.parametrize("layers", [1, 2])
def test_gradcheck(layers: int, positivity: str) -> None:
    problem = Problem(3, agents=2, embed=3, hyper=4, state=5, layers=layers, dtype=torch.float64, positivity=positivity)
    assert torch.autograd.gradcheck(lambda *inputs: problem.run(inputs=inputs), problem.inputs)


def test_second_derivatives_raise() -> None:
    problem = Problem(3)
    upstream = torch.ones(3, 1, requires_grad=True)
    (grad,) = torch.autograd.grad(problem.run(), problem.agent_qs, upstream, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.traced
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("training", [True, False])
def test_opcheck(training: bool, layers: int) -> None:
    problem = Problem(3, 4, layers=layers, grad=training)
    arguments = (problem.agent_qs, problem.states, *problem.params, 0, 1.0, training)
    torch.library.opcheck(torch.ops.fastmix.monotonic.default, arguments)


@pytest.mark.traced
def test_opcheck_of_backward() -> None:
    problem = Problem(7, grad=False)
    _, activations, signs = torch.ops.fastmix.monotonic.default(
        problem.agent_qs, problem.states, *problem.params, 0, 1.0, True
    )
    arguments = (torch.randn(7, 1), problem.agent_qs, problem.states, *problem.params, activations, signs, 0, 1.0)
    torch.library.opcheck(torch.ops.fastmix.monotonic_backward.default, (*arguments, True, False, True))


@pytest.mark.traced
@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("positivity", ["abs", "softplus"])
def test_compiles_whole(positivity: str, backend: str) -> None:
    problem = Problem(3, 4, positivity=positivity)
    upstream = problem.upstream()
    result, wanted = fullgraph(lambda: problem.run(backend))(), problem.run(backend)
    assert_close(result, wanted, 1e-6)
    for ours, want in zip(
        torch.autograd.grad(result, problem.inputs, upstream),
        torch.autograd.grad(wanted, problem.inputs, upstream),
        strict=True,
    ):
        assert_close(ours, want, 1e-6)


@pytest.mark.traced
def test_compiles_for_any_number_of_rows() -> None:
    problem = Problem(5, grad=False)
    torch.compiler.reset()
    compiled = torch.compile(
        lambda q, s: monotonic(q, s, problem.params, backend="native"),
        fullgraph=True,
        backend="aot_eager",
        dynamic=True,
    )
    for rows in (5, 13, 200):
        q, s = torch.randn(rows, 5, requires_grad=True), torch.randn(rows, 19)
        result, wanted = compiled(q, s), monotonic(q, s, problem.params, backend="native")
        assert torch.equal(result, wanted)
        assert torch.equal(*(torch.autograd.grad(r.sum(), q)[0] for r in (result, wanted)))


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_autocast_is_float32(backend: str) -> None:
    problem = Problem(9, grad=False)
    half = problem.agent_qs.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        result = monotonic(half, problem.states, problem.params, backend=backend)
    assert result.dtype == torch.float32
    assert torch.equal(result, monotonic(half.float(), problem.states, problem.params, backend=backend))


def test_half_precision_runs_on_the_reference() -> None:
    problem = Problem(9, dtype=torch.bfloat16, grad=False)
    expected = reference.monotonic(problem.agent_qs, problem.states, problem.params, "abs", 1.0)
    assert torch.equal(monotonic(problem.agent_qs, problem.states, problem.params).squeeze(-1), expected)
    with pytest.raises(RuntimeError, match="float32"):
        problem.run("native")


# ---- bad input ------------------------------------------------------------------------------------------------------

GOOD = Problem(4, agents=2, embed=3, hyper=4, state=5, grad=False)
ONE_LAYER = Problem(4, agents=2, embed=3, state=5, layers=1, grad=False)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"agent_qs": 1.0}, TypeError, "agent_qs must be a torch.Tensor, got float"),
        ({"agent_qs": torch.ones(4, 2, dtype=torch.int64)}, TypeError, "agent_qs must be a floating-point tensor"),
        ({"agent_qs": torch.ones(())}, ValueError, r"agent_qs must have shape \[\.\.\., A\]"),
        ({"agent_qs": torch.ones(4, 0)}, ValueError, "at least one agent"),
        (
            {"agent_qs": torch.ones(4, 3)},
            ValueError,
            r"params.w1_weight must have shape .*A = 3.* = \(9, 4\), got \(6, 4\)",
        ),
        ({"states": None}, TypeError, "states must be a torch.Tensor"),
        ({"states": torch.ones(3, 5)}, ValueError, r"states must have shape .* = \(4, S\), .* got \(3, 5\)"),
        ({"states": torch.ones(4, 1, 5)}, ValueError, "states must have shape"),
        ({"states": torch.ones(4, 6)}, ValueError, "params.w1_hidden_weight must have shape"),
        ({"states": torch.ones(4, 0)}, ValueError, "states must have shape"),
        ({"states": torch.ones(4, 5, dtype=torch.float64)}, TypeError, "states must have the dtype of agent_qs"),
        ({"states": torch.ones(4, 5, device="meta")}, ValueError, "states must be on the device of agent_qs"),
        ({"params": tuple(GOOD.params)}, TypeError, "params must be a MonotonicParams, got tuple"),
        ({"w1_weight": None}, TypeError, "params.w1_weight must be a torch.Tensor, got None"),
        ({"v_bias": 0.0}, TypeError, "params.v_bias must be a torch.Tensor, got float"),
        ({"w1_hidden_bias": None}, ValueError, "all hidden layers or none, but w1_hidden_bias are None"),
        ({"w2_weight": torch.ones(3, 5)}, ValueError, r"params.w2_weight must have shape .* = \(3, 4\), got \(3, 5\)"),
        ({"w2_bias": torch.ones(3).double()}, TypeError, "params.w2_bias must have the dtype of agent_qs"),
        ({"v_weight": torch.ones(1, 3, device="meta")}, ValueError, "params.v_weight must be on the device"),
        ({"b1_bias": torch.ones(0)}, ValueError, "params.w1_weight must have shape"),
        (
            {"positivity": "exp"},
            ValueError,
            "positivity must be one of 'abs', 'softplus', 'quadratic', 'none', got 'exp'",
        ),
        ({"positivity": "softplus", "beta": 0.0}, ValueError, "beta must be positive and finite, got 0.0"),
        ({"backend": "fast"}, ValueError, "backend must be one of"),
    ],
)
def test_bad_input(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"agent_qs": GOOD.agent_qs, "states": GOOD.states, "params": GOOD.params}
    for name, value in changes.items():
        if name in MonotonicParams._fields:
            arguments["params"] = arguments["params"]._replace(**{name: value})
        else:
            arguments[name] = value
    with pytest.raises(error, match=message):
        monotonic(**arguments)


def test_bad_input_of_one_layer() -> None:
    params = ONE_LAYER.params._replace(w1_weight=torch.ones(6, 4))
    with pytest.raises(ValueError, match=r"params.w1_weight must have shape .* = \(6, 5\), got \(6, 4\)"):
        monotonic(ONE_LAYER.agent_qs, ONE_LAYER.states, params)
