"""`unrestricted`: against one plain network over one-hots, for every combination of inputs; and what it refuses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastmix import backends
from fastmix.ops import unrestricted
from fastmix.ops.unrestricted import Layers, UnrestrictedParams
from fastmix.testing import assert_close
from tests.generators import ODD_AGENTS, ODD_EMBEDS, ODD_ROWS, Shape, joint_actions, non_contiguous, unrestricted_params
from tests.ops.support import TOLERANCE, fullgraph, gradients, leaves, rebuild

BACKENDS = backends.available("unrestricted")
every_backend = pytest.mark.parametrize("backend", BACKENDS)

FORMS: dict[str, dict[str, Any]] = {
    "central": {"features": 5, "constant": 8, "depth": 3},
    "residual_only": {"features": 5, "depth": 2, "outputs": 4},
    "coma": {"with_actions": True, "depth": 2},
    "everything": {"features": 5, "with_actions": True, "constant": 8, "outputs": 3},
    "value": {"depth": 3},
    "linear": {"features": 2, "depth": 0},
}


class Problem:
    """Random inputs and weights; without `with_actions` and `features` the network sees the state alone."""

    def __init__(
        self,
        *leading: int,
        features: int = 0,
        with_actions: bool = False,
        agents: int = 3,
        actions: int = 4,
        state: int = 11,
        width: int = 8,
        depth: int = 1,
        outputs: int = 1,
        constant: int = 0,
        dtype: torch.dtype = torch.float64,
        grad: bool = True,
    ) -> None:
        shape = Shape(agents, actions, state, 3)
        inputs = state + features + (agents * actions if with_actions else 0)
        self.params = unrestricted_params(
            inputs, state, *[width] * depth, outputs=outputs, constant=constant, dtype=dtype, requires_grad=grad
        )
        self.states = torch.randn(*leading, state, dtype=dtype, requires_grad=grad)
        self.features = torch.randn(*leading, features, dtype=dtype, requires_grad=grad) if features else None
        self.actions = joint_actions(shape, *leading) if with_actions else None
        self.n_actions = actions

    @property
    def inputs(self) -> list[Tensor]:
        return [*leaves((self.features,)), self.states, *leaves(self.params)]

    def run(self, backend: str, inputs: Sequence[Tensor] | None = None) -> Tensor:
        features, states, params = self._arguments(self.inputs if inputs is None else inputs)
        return unrestricted(features, states, params, actions=self.actions, backend=backend)

    def expected(self) -> Tensor:
        """The same in float64 with modules of PyTorch."""
        features, states, params = self._arguments([t.double() for t in self.inputs])
        parts = [states]
        if self.actions is not None:
            table = torch.cat([torch.zeros(1, self.n_actions), torch.eye(self.n_actions)]).double()
            parts.append(table[self.actions + 1].flatten(-2))
        joint = network(torch.cat([*parts, *leaves((features,))], -1), params.net)
        return joint + network(states, params.v) if params.v else joint

    def _arguments(self, inputs: Sequence[Tensor]) -> tuple[Tensor | None, Tensor, UnrestrictedParams]:
        rest = list(inputs)
        features = None if self.features is None else rest.pop(0)
        return features, rest.pop(0), rebuild(self.params, rest)


def network(x: Tensor, layers: Layers) -> Tensor:
    for i, layer in enumerate(layers):
        assert layer.bias is not None
        x = (x if i == 0 else nn.functional.relu(x)) @ layer.weight.T + layer.bias
    return x


def assert_parity(problem: Problem, backend: str) -> None:
    tolerance = TOLERANCE[problem.states.dtype]
    output, expected = problem.run(backend), problem.expected()
    assert_close(output, expected, tolerance, name="q")
    for i, (got, want) in enumerate(
        zip(gradients(output, problem.inputs), gradients(expected, problem.inputs), strict=True)
    ):
        assert_close(got, want, 10 * tolerance, name=f"gradient of input {i}")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("width", ODD_EMBEDS)
@every_backend
def test_parity_over_networks(backend: str, width: int, form: str) -> None:
    assert_parity(Problem(7, width=width, **FORMS[form]), backend)


@pytest.mark.parametrize("agents", ODD_AGENTS)
@pytest.mark.parametrize("form", ["coma", "everything"])
@every_backend
def test_parity_over_agents(backend: str, form: str, agents: int) -> None:
    assert_parity(Problem(7, agents=agents, **FORMS[form]), backend)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rows", ODD_ROWS)
@every_backend
def test_parity_over_rows(backend: str, rows: int, form: str) -> None:
    assert_parity(Problem(rows, **FORMS[form]), backend)


@pytest.mark.parametrize("sizes", [{"state": 1, "actions": 1}, {"state": 130, "actions": 18}], ids=str)
@pytest.mark.parametrize("form", FORMS)
@every_backend
def test_parity_over_widths(backend: str, form: str, sizes: dict[str, Any]) -> None:
    assert_parity(Problem(13, **sizes, **FORMS[form]), backend)


@pytest.mark.parametrize("leading", [(), (7,), (3, 5), (2, 3, 5), (0, 5), (5, 0)])
@every_backend
def test_leading_dimensions(backend: str, leading: tuple[int, ...]) -> None:
    problem = Problem(*leading, **FORMS["everything"])
    assert problem.run(backend).shape == (*leading, 3)
    assert_parity(problem, backend)


@pytest.mark.parametrize("form", FORMS)
@every_backend
def test_strides_of_any_kind(backend: str, form: str) -> None:
    problem = Problem(6, 9, **FORMS[form])
    if problem.features is not None:
        problem.features = non_contiguous(problem.features.detach()).requires_grad_()
    if problem.actions is not None:
        problem.actions = non_contiguous(problem.actions)
    problem.states = torch.randn(1, 9, 11, dtype=torch.float64, requires_grad=True)
    problem.states = problem.states.detach().expand(6, 9, 11).requires_grad_()
    weights = [non_contiguous(p.detach()).requires_grad_() for p in leaves(problem.params)]
    problem.params = rebuild(problem.params, weights)
    assert_parity(problem, backend)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["features", "states"])
@every_backend
def test_a_bad_row_spoils_no_other(backend: str, where: str, value: float) -> None:
    problem = Problem(40, **FORMS["everything"])
    others = torch.arange(40) != 2
    clean = problem.run(backend)
    clean_grads = gradients(clean, problem.inputs[:2])
    with torch.no_grad():
        getattr(problem, where)[2] = value
    spoilt = problem.run(backend)
    for got, want in zip([spoilt, *gradients(spoilt, problem.inputs[:2])], [clean, *clean_grads], strict=True):
        assert torch.equal(got[others], want[others])
    assert not spoilt[2].isfinite().all()


@pytest.mark.parametrize("form", FORMS)
@every_backend
def test_gradcheck(backend: str, form: str) -> None:
    problem = Problem(3, state=5, width=4, **FORMS[form])
    assert torch.autograd.gradcheck(lambda *inputs: problem.run(backend, inputs), problem.inputs)


@every_backend
def test_nothing_is_recorded_without_need(backend: str) -> None:
    problem = Problem(5, **FORMS["everything"])
    assert problem.run(backend).requires_grad
    assert not problem.run(backend, [t.detach() for t in problem.inputs]).requires_grad
    with torch.no_grad():
        assert not problem.run(backend).requires_grad


@pytest.mark.traced
@pytest.mark.parametrize("form", ["central", "everything"])
@every_backend
def test_compiles_whole(backend: str, form: str) -> None:
    problem = Problem(3, 4, **FORMS[form])
    results = [run() for run in (lambda: problem.run(backend), fullgraph(lambda: problem.run(backend)))]
    assert_close(results[1], results[0], 1e-12)
    for got, want in zip(*(gradients(result, problem.inputs) for result in results), strict=True):
        assert_close(got, want, 1e-12)


@pytest.mark.parametrize("form", FORMS)
@every_backend
def test_autocast_is_float32(backend: str, form: str) -> None:
    problem = Problem(9, dtype=torch.float32, grad=False, **FORMS[form])
    halves = [t.bfloat16() for t in problem.inputs]
    with torch.autocast("cpu", torch.bfloat16):
        result = problem.run(backend, halves)
    assert result.dtype == torch.float32
    assert torch.equal(result, problem.run(backend, [t.float() for t in halves]))


GOOD = Problem(
    4, features=3, with_actions=True, agents=2, actions=3, state=5, width=6, constant=2, dtype=torch.float32, grad=False
)


def layer(name: str, index: int, **changes: Any) -> dict[str, Any]:
    layers = list(getattr(GOOD.params, name))
    layers[index] = layers[index]._replace(**changes)
    return {"params": GOOD.params._replace(**{name: tuple(layers)})}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"features": 1.0}, TypeError, "features must be a torch.Tensor, got float"),
        ({"features": torch.ones(4, 3).int()}, TypeError, "features must be a floating-point tensor"),
        ({"features": torch.ones(4, 0)}, ValueError, r"features must have shape \[..., F\], F at least 1"),
        ({"features": torch.ones(4, 2)}, ValueError, r"params.net\[0\].weight must take 7 features .* got 14 input"),
        ({"features": None, "actions": None}, ValueError, r"params.net\[0\].weight .* = \(6, 5\), .* got \(6, 14\)"),
        ({"states": None}, TypeError, "states must be a torch.Tensor"),
        ({"states": torch.ones(4, 5).int()}, TypeError, "states must be a floating-point tensor"),
        ({"states": torch.ones(3, 5)}, ValueError, r"states must have shape .* = \(4, S\), .*features, got \(3, 5\)"),
        ({"states": torch.ones(4, 5).double()}, TypeError, "states must have the dtype of features"),
        ({"features": None, "states": torch.ones(())}, ValueError, r"states must have shape \[..., S\], S at least 1"),
        ({"actions": torch.ones(4, 2)}, TypeError, "actions must have dtype torch.int64"),
        ({"actions": torch.ones(4, 1, 2).long()}, ValueError, r"actions must have shape .* = \(4, any\)"),
        ({"actions": torch.ones(4, 0).long()}, ValueError, "actions must have shape .* at least one agent"),
        ({"actions": torch.ones(4, 3).long() * 2}, ValueError, r"actions must lie in \[-1, 2\), got 2"),
        ({"actions": torch.ones(4, 4).long()}, ValueError, r"as there are agents \(4\), got 14 input features"),
        ({"params": tuple(GOOD.params)}, TypeError, "params must be an UnrestrictedParams, got tuple"),
        ({"params": UnrestrictedParams(())}, TypeError, r"params.net must be a tuple of one or more Linear, got \(\)"),
        (layer("net", 1, bias=torch.ones(2)), ValueError, r"params.net\[1\].bias must have shape \[out\] = \(1\)"),
        (layer("net", 0, weight=torch.ones(0, 14)), ValueError, r"params.net\[0\].* out at least 1, got \(0, 14\)"),
        (layer("v", 1, weight=torch.ones(2, 2)), ValueError, r"params.v\[1\].* = \(1, 2\), .* got \(2, 2\)"),
        (layer("v", 0, bias=None), TypeError, r"params.v\[0\].bias must be a torch.Tensor, got None"),
        ({"backend": "fast"}, ValueError, "backend must be one of"),
    ],
)  # fmt: skip
def test_bad_input(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    given: dict[str, Any] = {
        "features": GOOD.features, "states": GOOD.states, "params": GOOD.params, "actions": GOOD.actions,
    }  # fmt: skip
    with pytest.raises(error, match=message):
        unrestricted(**(given | changes))
