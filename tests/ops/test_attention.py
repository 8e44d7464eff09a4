"""`attention`: against the equations, agent by agent and head by head; sizes, strides, options, and what it refuses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastmix import backends
from fastmix.ops import attention
from fastmix.ops._layers import Layers, Linear
from fastmix.ops.attention import AttentionOutput, AttentionParams
from fastmix.testing import assert_close
from tests.generators import ODD_AGENTS, ODD_EMBEDS, ODD_ROWS, Shape, attention_params, non_contiguous
from tests.ops.support import TOLERANCE, fullgraph, gradients, leaves, rebuild

BACKENDS = backends.available("attention")
pytestmark = pytest.mark.parametrize("backend", BACKENDS)

FORMS: dict[str, dict[str, Any]] = {
    "pymarl2": {},
    "pymarl2_unweighted": {"weighted": False},
    "pymarl": {"bias": False, "layers": 1, "weighted": False, "constant": 0},
    "pymarl_all": {"bias": False, "nonlinear": True, "own_grad": True, "dead": True},
    "signed": {"softmax": False},
}


class Problem:
    """Random inputs, weights and options."""

    def __init__(
        self,
        *leading: int,
        agents: int = 5,
        own: int = 3,
        heads: int = 4,
        embed: int = 8,
        hidden: int = 9,
        state: int | None = None,
        dtype: torch.dtype = torch.float64,
        grad: bool = True,
        own_grad: bool = False,
        dead: bool = False,
        softmax: bool = True,
        **form: Any,
    ) -> None:
        state = agents * own + 4 if state is None else state
        self.params = attention_params(
            Shape(agents, 3, state, 3), own, heads, embed, hidden, dtype=dtype, requires_grad=grad, **form
        )
        self.agent_qs = torch.randn(*leading, agents, dtype=dtype, requires_grad=grad)
        self.states = torch.randn(*leading, state, dtype=dtype, requires_grad=grad)
        self.options: dict[str, Any] = {"own_size": own, "own_grad": own_grad, "softmax": softmax}
        if dead:
            alive = torch.rand(*leading, agents) < 0.6
            alive.view(-1, agents)[:1] = False  # nobody
            self.options["alive"] = alive

    @property
    def inputs(self) -> list[Tensor]:
        return [self.agent_qs, self.states, *leaves(self.params)]

    def run(self, backend: str, inputs: Sequence[Tensor] | None = None, everything: bool = True) -> AttentionOutput:
        agent_qs, states, *rest = self.inputs if inputs is None else inputs
        options = self.options | {"return_weights": everything}
        options["return_statistics"] = everything and self.options["softmax"]
        return attention(agent_qs, states, rebuild(self.params, rest), backend=backend, **options)

    def expected(self) -> list[Tensor]:
        """Everything in float64, one agent and head after another; and the inputs it was made of."""
        agent_qs, states, *rest = (t.double() for t in self.inputs)
        params, alive = rebuild(self.params, rest), self.options.get("alive")
        own, S, A = self.options["own_size"], states.shape[-1], agent_qs.shape[-1]
        heads, embed = params.key.weight.shape[:2]
        q, s = agent_qs.reshape(-1, A), states.reshape(-1, S)
        weights, squares, entropies = torch.zeros_like(q), [], []
        for h in range(heads):
            query = network(s, params.query, h)
            head = network(s, params.head)[:, h].abs() if params.head else torch.ones_like(q[:, 0])
            columns = []
            for a in range(A):
                features = s[:, a * own : (a + 1) * own]
                features = features if self.options["own_grad"] else features.detach()
                if params.key.weight.shape[-1] > own:
                    features = torch.cat([features, q[:, a : a + 1]], 1)
                key = features @ params.key.weight[h].T
                key = key if params.key.bias is None else key + params.key.bias[h]
                columns.append((query * key).sum(1))
            logits = torch.stack(columns, 1)
            p = logits / embed**0.5
            if self.options["softmax"]:
                if alive is not None:
                    dead = ~alive.reshape(-1, A)
                    p = torch.where(dead & ~dead.all(1, keepdim=True), -torch.inf, torch.where(dead, 0.0, p))
                p = p.exp() / p.exp().sum(1, keepdim=True)
                entropies.append(-(p * (p + 1e-8).log()).sum(1))
            squares.append((logits**2).mean(1))
            weights = weights + head[:, None] * p
        v = [] if not params.v else [network(s, params.v)]
        q_tot = (weights * q).sum(1, keepdim=True) + (v[0] if v else 0.0)
        statistics = [torch.stack(squares, 1), torch.stack(entropies, 1)] if self.options["softmax"] else []
        lead = self.agent_qs.shape[:-1]
        return [x.reshape(*lead, x.shape[-1]) for x in (q_tot, weights, *v, *statistics)]


def network(x: Tensor, layers: Layers, group: int | None = None) -> Tensor:
    for i, (weight, bias) in enumerate(layers):
        weight, bias = (weight, bias) if group is None else (weight[group], None if bias is None else bias[group])
        x = F.linear(x if i == 0 else x.relu(), weight, bias)
    return x


def assert_parity(problem: Problem, backend: str) -> None:
    tolerance = TOLERANCE[problem.states.dtype]
    outputs, expected = leaves(problem.run(backend)), problem.expected()
    for i, (got, want) in enumerate(zip(outputs, expected, strict=True)):
        assert_close(got, want, tolerance, name=f"output {i}")
    for i, (got, want) in enumerate(
        zip(gradients(outputs, problem.inputs), gradients(expected, problem.inputs), strict=True)
    ):
        assert_close(got, want, 10 * tolerance, name=f"gradient of input {i}", zero=1e-9)
    only = problem.run(backend, everything=False)
    assert_close(only.q_tot, expected[0], tolerance, name="q_tot alone")
    assert leaves(only) == [only.q_tot]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("embed", ODD_EMBEDS)
@pytest.mark.parametrize("agents", ODD_AGENTS)
def test_parity_over_networks(backend: str, agents: int, embed: int, form: str) -> None:
    assert_parity(Problem(7, agents=agents, embed=embed, **FORMS[form]), backend)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rows", ODD_ROWS)
def test_parity_over_rows(backend: str, rows: int, form: str) -> None:
    assert_parity(Problem(rows, **FORMS[form]), backend)


@pytest.mark.parametrize(
    "sizes",
    [{"own": 1, "heads": 1, "hidden": 1}, {"own": 33, "heads": 7}, {"own": 2, "agents": 3, "state": 6}],
    ids=str,
)
@pytest.mark.parametrize("form", FORMS)
def test_parity_over_widths(backend: str, form: str, sizes: dict[str, Any]) -> None:
    assert_parity(Problem(13, **sizes, **FORMS[form]), backend)


@pytest.mark.parametrize("leading", [(), (7,), (3, 5), (2, 3, 5), (0, 5), (5, 0)])
def test_leading_dimensions(backend: str, leading: tuple[int, ...]) -> None:
    problem = Problem(*leading, **FORMS["pymarl_all"])
    shapes = [(*leading, n) for n in (1, 5, 1, 4, 4)]
    assert [tuple(out.shape) for out in leaves(problem.run(backend))] == shapes
    assert_parity(problem, backend)


@pytest.mark.parametrize("form", FORMS)
def test_strides_of_any_kind(backend: str, form: str) -> None:
    problem = Problem(6, 9, **FORMS[form])
    problem.agent_qs = non_contiguous(problem.agent_qs.detach()).requires_grad_()
    problem.states = torch.randn(6, 10, 19, dtype=torch.float64)[:, :-1].requires_grad_()
    problem.params = rebuild(
        problem.params, [non_contiguous(p.detach()).requires_grad_() for p in leaves(problem.params)]
    )
    if "alive" in problem.options:
        problem.options["alive"] = non_contiguous(problem.options["alive"])
    assert_parity(problem, backend)


def test_alive_of_any_dtype(backend: str) -> None:
    problem = Problem(9, dead=True)
    expected = problem.run(backend).q_tot
    problem.options["alive"] = problem.options["alive"].int() * 3
    assert torch.equal(problem.run(backend).q_tot, expected)


@pytest.mark.parametrize("form", [form for form in FORMS if form != "signed"])
def test_nobody_alive_is_everybody(backend: str, form: str) -> None:
    problem = Problem(4, **FORMS[form])
    problem.options["alive"] = torch.zeros(4, 5, dtype=torch.bool)
    out = problem.run(backend)
    weights = out.agent_weights
    assert weights is not None and out.entropies is not None
    assert_close(weights, weights.mean(-1, keepdim=True).expand_as(weights), 1e-12)
    assert_close(out.entropies, torch.full_like(out.entropies, torch.tensor(5.0).double().log().item()), 1e-6)


def test_dead_agents_are_not_attended_to(backend: str) -> None:
    problem = Problem(64, **FORMS["pymarl_all"])
    out = problem.run(backend)
    alive = problem.options["alive"]
    some = alive.any(-1, keepdim=True)
    assert out.agent_weights is not None
    assert (out.agent_weights[some & ~alive] == 0).all()
    (grad,) = torch.autograd.grad(out.q_tot.sum(), problem.agent_qs)
    assert (grad[some & ~alive] == 0).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["agent_qs", "states"])
@pytest.mark.parametrize("form", FORMS)
def test_a_bad_row_spoils_no_other(backend: str, form: str, where: str, value: float) -> None:
    problem = Problem(40, **FORMS[form])
    others = torch.arange(40) != 2
    clean = leaves(problem.run(backend))
    clean_grads = torch.autograd.grad(clean[0].sum(), problem.inputs[:2])
    with torch.no_grad():
        getattr(problem, where)[2] = value
    spoilt = leaves(problem.run(backend))
    for got, want in zip(spoilt, clean, strict=True):
        assert torch.equal(got[others], want[others])
    for got, want in zip(torch.autograd.grad(spoilt[0].sum(), problem.inputs[:2]), clean_grads, strict=True):
        assert torch.equal(got[others], want[others])
    assert not spoilt[0][2].isfinite().all()


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(backend: str, form: str) -> None:
    problem = Problem(3, agents=2, heads=2, embed=3, hidden=4, own=2, **FORMS[form])
    if problem.options["own_grad"]:
        assert torch.autograd.gradcheck(lambda *inputs: leaves(problem.run(backend, inputs)), problem.inputs)
    else:  # the analytical gradient of the state leaves out a path on purpose

        def function(*inputs: Tensor) -> tuple[Tensor, ...]:
            return tuple(leaves(problem.run(backend, [inputs[0], problem.states.detach(), *inputs[1:]])))

        assert torch.autograd.gradcheck(function, [problem.agent_qs, *problem.inputs[2:]])


def test_unused_parameters_get_no_gradient(backend: str) -> None:
    problem = Problem(5, **FORMS["pymarl2"])
    spare = problem.params.head
    problem.params = problem.params._replace(head=())
    problem.run(backend).q_tot.sum().backward()
    assert all(tensor.grad is None for tensor in leaves(spare))
    assert all(tensor.grad is not None for tensor in leaves(problem.params))


def test_nothing_is_recorded_without_need(backend: str) -> None:
    problem = Problem(5)
    assert not any(out.requires_grad for out in leaves(problem.run(backend, [t.detach() for t in problem.inputs])))
    with torch.no_grad():
        assert not any(out.requires_grad for out in leaves(problem.run(backend)))


@pytest.mark.traced
@pytest.mark.parametrize("form", FORMS)
def test_compiles_whole(backend: str, form: str) -> None:
    problem = Problem(3, 4, **FORMS[form])
    results = [leaves(run()) for run in (lambda: problem.run(backend), fullgraph(lambda: problem.run(backend)))]
    for got, want in zip(*results, strict=True):
        assert_close(got, want, 1e-12)
    for got, want in zip(*(gradients(result, problem.inputs) for result in results), strict=True):
        assert_close(got, want, 1e-12, zero=1e-9)


@pytest.mark.parametrize("form", FORMS)
def test_autocast_is_float32(backend: str, form: str) -> None:
    problem = Problem(9, dtype=torch.float32, grad=False, **FORMS[form])
    halves = [t.bfloat16() for t in problem.inputs]
    with torch.autocast("cpu", torch.bfloat16):
        results = leaves(problem.run(backend, halves))
    wanted = leaves(problem.run(backend, [t.float() for t in halves]))
    assert all(result.dtype == torch.float32 for result in results)
    assert all(torch.equal(*pair) for pair in zip(results, wanted, strict=True))


GOOD = Problem(4, agents=2, own=2, heads=3, embed=3, hidden=4, state=6, dtype=torch.float32, grad=False)


def params(**changes: Any) -> dict[str, Any]:
    return {"params": GOOD.params._replace(**changes)}


def layer(name: str, index: int, **changes: Any) -> dict[str, Any]:
    layers = list(getattr(GOOD.params, name))
    layers[index] = layers[index]._replace(**changes)
    return params(**{name: tuple(layers)})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"agent_qs": 1.0}, TypeError, "agent_qs must be a torch.Tensor, got float"),
        ({"agent_qs": torch.ones(4, 2).int()}, TypeError, "agent_qs must be a floating-point tensor"),
        ({"agent_qs": torch.ones(4, 0)}, ValueError, "at least one agent"),
        ({"agent_qs": torch.ones(4, 4)}, ValueError, r"own_size must be at least 1 and at most S // A = 6 // 4, got 2"),
        ({"own_size": 0}, ValueError, "own_size must be at least 1"),
        ({"own_size": 3}, ValueError, r"params.key.weight must have shape .* = \(any, any, 3 or 4\), got \(3, 3, 2\)"),
        ({"states": None}, TypeError, "states must be a torch.Tensor"),
        ({"states": torch.ones(3, 6)}, ValueError, r"states must have shape .* = \(4, S\), .* got \(3, 6\)"),
        ({"states": torch.ones(4, 7)}, ValueError, r"params.query\[0\].* \(3, 4, 7\), .* got \(3, 4, 6\)"),
        ({"states": torch.ones(4, 6).double()}, TypeError, "states must have the dtype of agent_qs"),
        ({"alive": 1}, TypeError, "alive must be a torch.Tensor"),
        ({"alive": torch.ones(4, 3)}, ValueError, r"alive must have shape \[..., A\] = \(4, 2\), got \(4, 3\)"),
        ({"alive": torch.ones(4, 2, device="meta")}, ValueError, "alive must be on the device of agent_qs"),
        ({"alive": torch.ones(4, 2), "softmax": False}, ValueError, "softmax must be True where alive"),
        ({"return_statistics": True, "softmax": False}, ValueError, "softmax must be True where"),
        ({"params": tuple(GOOD.params)}, TypeError, "params must be an AttentionParams, got tuple"),
        (params(key=GOOD.params.query), TypeError, "params.key must be a Linear, got tuple"),
        (params(query=()), TypeError, r"params.query must be a tuple of one or more Linear, got \(\)"),
        (params(query=GOOD.params.key), TypeError, "params.query must be a tuple of one or more Linear, got Linear"),
        (params(query=(torch.ones(3),)), TypeError, r"params.query\[0\] must be a Linear, got Tensor"),
        (params(key=Linear(torch.ones(3, 2), None)), ValueError, "params.key.weight must have shape"),
        (layer("query", 0, weight=None), TypeError, r"params.query\[0\].weight must be a torch.Tensor"),
        (layer("query", 0, weight=torch.ones(4, 6)), ValueError, r"params.query\[0\].* have shape \[G, out, in\]"),
        (layer("query", 1, weight=torch.ones(3, 2, 4)), ValueError, r"params.query\[1\].* \(3, 3, 4\), .*\(3, 2, 4\)"),
        (layer("query", 1, bias=torch.ones(3, 2)), ValueError, r"params.query\[1\].bias must have shape \[G, out\]"),
        (layer("head", 1, weight=torch.ones(2, 4)), ValueError, r"params.head\[1\].* \(3, 4\), .* got \(2, 4\)"),
        (layer("head", 1, bias=None), TypeError, r"params.head\[1\].bias must be a torch.Tensor, got None"),
        (layer("v", 0, bias=torch.ones(32).double()), TypeError, r"params.v\[0\].bias must have the dtype of states"),
        (layer("v", 1, weight=torch.ones(1, 32, device="meta")), ValueError, r"params.v\[1\].* be on the device"),
        ({"backend": "fast"}, ValueError, "backend must be one of"),
    ],
)  # fmt: skip
def test_bad_input(backend: str, changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {
        "agent_qs": GOOD.agent_qs, "states": GOOD.states, "params": GOOD.params, "own_size": 2, "backend": backend,
    }  # fmt: skip
    with pytest.raises(error, match=message):
        attention(**(arguments | changes))


def test_biases_may_be_absent_in_queries_and_keys(backend: str) -> None:
    params = AttentionParams(
        (*GOOD.params.query[:1], GOOD.params.query[1]._replace(bias=None)), GOOD.params.key._replace(bias=None), (), ()
    )
    out = attention(GOOD.agent_qs, GOOD.states, params, own_size=2, return_weights=True, backend=backend)
    assert out.v is None
    assert out.agent_weights is not None
    assert_close(out.agent_weights.sum(-1), torch.full((4,), 3.0), 1e-6)  # three heads
