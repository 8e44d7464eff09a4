"""Random problems of `duplex`, `importance` and `recognise`, and what they give by the equations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastmix.ops import duplex, importance, recognise
from fastmix.ops._layers import Layers
from fastmix.ops.duplex import ImportanceParams, RecogniserParams
from fastmix.testing import assert_close
from tests.generators import Shape, duplex_params, joint_actions, recogniser_params
from tests.ops.support import TOLERANCE, gradients, leaves, rebuild


class Problem:
    """Random inputs and weights of one of the three functions."""

    def __init__(
        self,
        op: str,
        *leading: int,
        agents: int = 3,
        actions: int = 4,
        state: int = 11,
        dtype: torch.dtype = torch.float64,
        grad: bool = True,
        minus_one: bool = True,
        part: str = "both",
        **sizes: Any,
    ) -> None:
        shape = Shape(agents, actions, state, 3)
        make: dict[str, Callable[..., Any]] = {
            "duplex": duplex_params,
            "importance": lambda *a, **k: duplex_params(*a, **k).importance,
            "recognise": recogniser_params,
        }
        self.op = op
        self.params = make[op](shape, dtype=dtype, requires_grad=grad, **sizes)
        self.states = torch.randn(*leading, state, dtype=dtype, requires_grad=grad)
        self.agent_qs = torch.randn(*leading, agents, dtype=dtype, requires_grad=grad)
        self.max_qs = (self.agent_qs.detach() + torch.rand(*leading, agents, dtype=dtype)).requires_grad_(grad)
        self.actions = joint_actions(shape, *leading)
        self.options: dict[str, Any] = {"minus_one": minus_one, "part": part} if op == "duplex" else {}

    @property
    def inputs(self) -> list[Tensor]:
        qs = [] if self.op == "importance" else [self.agent_qs, self.max_qs]
        return [*qs, self.states, *leaves(self.params)]

    def run(self, backend: str, inputs: Sequence[Tensor] | None = None) -> list[Tensor]:
        q, m, states, params = self._arguments(self.inputs if inputs is None else inputs)
        if self.op == "importance":
            return [importance(states, self.actions, params, backend=backend)]
        if self.op == "recognise":
            return leaves(recognise(q, m, states, self.actions, params, backend=backend))
        return leaves(duplex(q, m, states, self.actions, params, backend=backend, **self.options))

    def expected(self) -> list[Tensor]:
        """The same from the equations in float64, one small network after another."""
        q, m, s, params = self._arguments([t.double() for t in self.inputs])
        if self.op == "importance":
            return [lambdas(s, self.actions, params)]
        if self.op == "recognise":
            return recognised(q, m, s, self.actions, params)
        w = b = None
        if params.scale:
            w, b = network(s, params.scale).abs() + 1e-10, network(s, params.shift)
        transformed, largest = (x if w is None or b is None else w * x + b for x in (q, m))
        v = transformed.sum(-1, keepdim=True)
        weights = lambdas(s, self.actions, params.importance) - float(self.options["minus_one"])
        adv = ((transformed - largest).detach() * weights).sum(-1, keepdim=True)
        return {"both": [v + adv, v, adv], "v": [v, v], "adv": [adv, adv]}[self.options["part"]]

    def _arguments(self, inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Any]:
        qs = [self.agent_qs, self.max_qs] if self.op == "importance" else []
        q, m, states, *rest = [*qs, *inputs]
        return q, m, states, rebuild(self.params, rest)


def lambdas(s: Tensor, actions: Tensor, params: ImportanceParams) -> Tensor:
    both = with_one_hots(s, actions, params.action[0].weight.shape[-1])
    total: Tensor = torch.zeros((), dtype=s.dtype)
    for k in range(params.key[0].weight.shape[0]):
        key = network(s, params.key, k).abs() + 1e-10
        total = total + key * network(s, params.agents, k).sigmoid() * network(both, params.action, k).sigmoid()
    return total


def recognised(q: Tensor, m: Tensor, s: Tensor, actions: Tensor, params: RecogniserParams) -> list[Tensor]:
    both = with_one_hots(s, actions, params.w1[0].weight.shape[-1])
    w1, w2 = network(both, params.w1).abs().unflatten(-1, (q.shape[-1], -1)), network(both, params.w2).abs()
    v = network(s, params.v)
    adv = ((w1 * w2.unsqueeze(-2)).sum(-1) * (q - m).detach()).sum(-1, keepdim=True)
    return [adv + v, v]


def with_one_hots(s: Tensor, actions: Tensor, width: int) -> Tensor:
    n_actions = (width - s.shape[-1]) // actions.shape[-1]
    table = torch.cat([torch.zeros(1, n_actions), torch.eye(n_actions)]).to(s)
    return torch.cat([s, *table[actions + 1].unbind(-2)], -1)


def network(x: Tensor, layers: Layers, group: int | None = None) -> Tensor:
    for i, (weight, bias) in enumerate(layers):
        assert bias is not None
        w, b = (weight, bias) if group is None else (weight[group], bias[group])
        x = F.linear(x if i == 0 else x.relu(), w, b)
    return x


def assert_parity(problem: Problem, backend: str) -> None:
    tolerance = TOLERANCE[problem.states.dtype]
    outputs, expected = problem.run(backend), problem.expected()
    for i, (got, want) in enumerate(zip(outputs, expected, strict=True)):
        assert got.shape == want.shape
        assert_close(got, want, tolerance, name=f"output {i}")
    for i, (got, want) in enumerate(
        zip(gradients(outputs, problem.inputs), gradients(expected, problem.inputs), strict=True)
    ):
        assert_close(got, want, 10 * tolerance, name=f"gradient of input {i}")
