"""Every native op, forward and backward, writes each element of everything it allocates."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastmix import backends
from fastmix.ops import (
    attention,
    chosen_quantiles,
    duplex,
    fractions,
    importance,
    mean_shape,
    monotonic,
    quantile_features,
    quantile_loss,
    quantile_mix,
    recognise,
    recurrent,
    returns,
    select,
    td_loss,
    unrestricted,
)
from fastmix.ops.td_loss import Favoured
from fastmix.testing import assert_close, poisoned_allocations
from tests.generators import (
    Shape,
    attention_params,
    duplex_params,
    episodes,
    joint_actions,
    monotonic_params,
    recogniser_params,
    recurrent_params,
    unrestricted_params,
)
from tests.ops.support import gradients, leaves

SHAPE = Shape(3, 5, state_dim=17, obs_dim=11)


def run_select(backend: str) -> tuple[list[Tensor], list[Tensor]]:
    batch = episodes(SHAPE, 4, 7)
    qs = torch.randn(4, 8, 3, 5, requires_grad=True)
    picked = select(qs, batch.avail_actions, actions=batch.actions, target_qs=torch.randn(4, 8, 3, 5), backend=backend)
    return [o for o in picked if o is not None], [qs]


def run_returns(backend: str) -> tuple[list[Tensor], list[Tensor]]:
    batch = episodes(SHAPE, 4, 7)
    inputs = [torch.randn(4, steps, 3, requires_grad=True) for steps in (7, 8, 8)]
    targets = returns(
        inputs[0], batch.terminated, batch.mask, inputs[1], behaviour_qs=inputs[2],
        gamma=0.9, kind="q_lambda", td_lambda=0.5, backend=backend,
    )  # fmt: skip
    return [targets], inputs


def run_td_loss(backend: str) -> tuple[list[Tensor], list[Tensor]]:
    inputs = [torch.randn(4, 7, 3, requires_grad=True) for _ in range(2)]
    loss = td_loss(
        inputs[0], torch.randn(4, 7, 1), episodes(SHAPE, 4, 7).mask, residual=inputs[1], favoured=Favoured("below"),
        backend=backend,
    )  # fmt: skip
    return [o for o in loss if o is not None], inputs


def run_implicit(backend: str) -> tuple[list[Tensor], list[Tensor]]:
    inputs = [torch.randn(size, requires_grad=True) for size in ((29, 3, 33), (33, 9), (33,), (5, 33), (5,))]
    features = quantile_features(torch.rand(29, 8), *inputs[1:3], backend=backend)
    z = chosen_quantiles(inputs[0], features.values, torch.randint(5, (29, 3)), *inputs[3:], backend=backend)
    return [*features, z], inputs


def run_quantile(backend: str) -> tuple[list[Tensor], list[Tensor]]:
    inputs = [torch.randn(4, 7, 3, 9, requires_grad=True) for _ in range(2)]
    drawn = fractions((4, 7, 1, 9), torch.tensor([1, 2]), backend=backend)
    loss = quantile_loss(inputs[0], torch.randn(4, 7, 1, 5), drawn, episodes(SHAPE, 4, 7).mask, backend=backend)
    return [*loss, *mean_shape(inputs[1], backend=backend), drawn], inputs


def run_monotonic(backend: str) -> tuple[list[Tensor], list[Tensor]]:
    params = monotonic_params(SHAPE, embed=33)
    qs, states = torch.randn(29, 3, requires_grad=True), torch.randn(29, 17, requires_grad=True)
    z = torch.randn(29, 3, 9, requires_grad=True)
    outputs = [monotonic(qs, states, params, backend=backend), quantile_mix(z, states, params, backend=backend)]
    return outputs, [qs, z, states, *leaves(params)]


def run_recurrent(backend: str) -> tuple[list[Tensor], list[Tensor]]:
    batch = episodes(SHAPE, 4, 7)
    nets = [recurrent_params(11 + 5 + 3, 33, 5, layer_norm=norm, seed=int(norm)) for norm in (False, True)]
    outputs = recurrent(
        batch.obs, nets, last_actions=batch.last_actions, agent_ids=True, return_hidden_states=True, backend=backend
    )
    return [o for out in outputs for o in out if o is not None], [p for net in nets for p in net if p is not None]


def run_duplex(backend: str) -> tuple[list[Tensor], list[Tensor]]:
    params = duplex_params(SHAPE, hidden=33)
    qs, states = torch.randn(70, 3, requires_grad=True), torch.randn(70, 17, requires_grad=True)
    result = duplex(qs, qs.detach() + 1, states, joint_actions(SHAPE, 70), params, backend=backend)
    return leaves(result), [qs, states, *leaves(params)]


def run_importance(backend: str) -> tuple[list[Tensor], list[Tensor]]:
    params, states = duplex_params(SHAPE, hidden=33).importance, torch.randn(70, 17, requires_grad=True)
    return [importance(states, joint_actions(SHAPE, 70), params, backend=backend)], [states, *leaves(params)]


def run_attention(backend: str) -> tuple[list[Tensor], list[Tensor]]:
    params = attention_params(SHAPE, 5, embed=9, hidden=33)
    qs, states = torch.randn(70, 3, requires_grad=True), torch.randn(70, 17, requires_grad=True)
    out = attention(
        qs, states, params, own_size=5, own_grad=True, return_weights=True, return_statistics=True, backend=backend
    )
    return leaves(out), [qs, states, *leaves(params)]


def run_unrestricted(backend: str) -> tuple[list[Tensor], list[Tensor]]:
    params = unrestricted_params(17 + 3 * 5 + 4, 17, 33, outputs=2, constant=9)
    features, states = torch.randn(70, 4, requires_grad=True), torch.randn(70, 17, requires_grad=True)
    joint = unrestricted(features, states, params, actions=joint_actions(SHAPE, 70), backend=backend)
    return [joint], [features, states, *leaves(params)]


def run_recognise(backend: str) -> tuple[list[Tensor], list[Tensor]]:
    params, states = recogniser_params(SHAPE, 9, 33), torch.randn(70, 17, requires_grad=True)
    out = recognise(torch.randn(70, 3), torch.randn(70, 3), states, joint_actions(SHAPE, 70), params, backend=backend)
    return list(out), [states, *leaves(params)]


OPS: dict[str, Callable[[str], tuple[list[Tensor], list[Tensor]]]] = {
    "select": run_select, "returns": run_returns, "td_loss": run_td_loss, "quantile": run_quantile,
    "monotonic": run_monotonic, "recurrent": run_recurrent, "duplex": run_duplex, "importance": run_importance,
    "attention": run_attention, "unrestricted": run_unrestricted, "recognise": run_recognise,
    "implicit": run_implicit,
}  # fmt: skip


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("op", OPS)
def test_every_element_is_written(op: str, threads: int) -> None:
    assert "native" in backends.available(op)
    torch.set_num_threads(threads)
    results = {}
    for backend in ("native", "reference"):
        torch.manual_seed(0)
        with poisoned_allocations() as report:
            outputs, inputs = OPS[op](backend)
            differentiable = [o for o in outputs if o.requires_grad]
            results[backend] = outputs + gradients(differentiable, inputs)
        assert backend == "reference" or report.count >= 2  # an output and a gradient at least
    for i, (ours, expected) in enumerate(zip(results["native"], results["reference"], strict=True)):
        assert_close(ours, expected, 1e-4, name=f"{op} {i}")
