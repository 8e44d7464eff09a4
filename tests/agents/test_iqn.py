"""The distributional agent: what its short cuts leave out, its fractions, and its names."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import fastmix
from fastmix import backends
from fastmix.agents import REGISTRY, IQNRNNAgent
from fastmix.testing import assert_close
from tests.ops.support import fullgraph

B, T, A, U, D, N_IN, FEATURES = 3, 4, 2, 5, 8, 7, 6
BACKENDS = backends.available("recurrent")


def make(**options: Any) -> IQNRNNAgent:
    sizes = {"quantile_embed_dim": FEATURES, "n_quantiles": 5, "n_target_quantiles": 3, "n_approx_quantiles": 9}
    return IQNRNNAgent(N_IN, U, D, **(sizes | options)).double()


def at(agent: IQNRNNAgent, obs: Tensor, fractions: Tensor) -> Tensor:
    """``[B, T, A, U, N]``: step by step and fraction by fraction, as the paper has it; fractions ``[B, T, A, N]``."""
    j = torch.arange(FEATURES, dtype=obs.dtype)
    hidden, steps = torch.zeros(B * A, D, dtype=obs.dtype), []
    for t in range(T):
        hidden = agent.rnn(torch.relu(agent.fc1(obs[:, t].reshape(B * A, -1))), hidden)
        each = []
        for f in fractions[:, t].reshape(B * A, -1).unbind(-1):
            phi = torch.relu(agent.phi(torch.cos(torch.pi * j * f.unsqueeze(-1))))
            each.append(agent.fc2(hidden * phi))
        steps.append(torch.stack(each, -1).view(B, A, U, -1))
    return torch.stack(steps, 1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", ["shared", "own", "fixed"])
def test_quantiles_are_the_definition(form: str, backend: str) -> None:
    agent = make()
    obs = torch.randn(B, T, A, N_IN, dtype=torch.float64)
    shape = {"shared": (B, T, 4), "own": (B, T, A, 4), "fixed": (4,)}[form]
    fractions = torch.rand(shape, dtype=torch.float64)
    each = fractions.unsqueeze(2) if form == "shared" else fractions
    actions = torch.randint(U, (B, T, A))
    cotangent = torch.randn(B, T, A, 4, dtype=torch.float64)
    grads = []
    for ours in (True, False):
        agent.zero_grad()
        if ours:
            with fastmix.backend(backend):
                states, after = agent.trunk(obs)
            assert torch.equal(after, states[:, -1])
            every, chosen = agent.quantiles(states, fractions), agent.quantiles(states, fractions, actions)
            means = agent.means(states, fractions)
        else:
            expected = at(agent, obs, each.expand(B, T, A, 4))
            assert_close(every, expected, 1e-12)
            assert_close(means, expected.mean(-1), 1e-12)
            index = actions[..., None, None].expand(B, T, A, 1, 4)
            assert_close(chosen, expected.gather(3, index).squeeze(3), 1e-12)
            every, means, chosen = expected, expected.mean(-1), expected.gather(3, index).squeeze(3)
        total = (chosen * cotangent).sum() + means.square().sum() + every.sin().sum()
        grads.append(torch.autograd.grad(total, list(agent.parameters())))
    for got, wanted in zip(*grads, strict=True):
        assert_close(got, wanted, 1e-10)


def test_utilities_are_means_over_midpoints() -> None:
    agent = make()
    obs = torch.randn(B, T, A, N_IN, dtype=torch.float64)
    middles = (torch.arange(9) + 0.5).double() / 9
    assert_close(agent.unroll(obs).q, at(agent, obs, middles.expand(B, T, A, 9)).mean(-1), 1e-12)


def test_padding_spoils_no_other_row() -> None:
    agent = make()
    states, fractions = torch.randn(B, T, A, D, dtype=torch.float64), torch.rand(B, T, 4, dtype=torch.float64)
    actions = torch.randint(U, (B, T, A))
    clean = agent.quantiles(states, fractions, actions)
    states[0, 2:], fractions[0, 2:] = torch.nan, torch.nan
    dirty = agent.quantiles(states, fractions, actions)
    assert torch.equal(dirty[1:], clean[1:]) and torch.equal(dirty[0, :2], clean[0, :2])


# ----------------------------------------------------------------------------------------------------------- fractions


@pytest.mark.parametrize(("purpose", "count"), [("policy", 5), ("target", 3), ("approx", 9)])
def test_draws(purpose: str, count: int) -> None:
    key = torch.tensor([1, 2])
    shared, own = make(), make(per_agent_fractions=True)
    drawn = shared.draw(purpose, key, B, T, A)
    assert drawn.shape == (B, T, count) and drawn.dtype == torch.float64
    assert own.draw(purpose, key, B, T, A).shape == (B, T, A, count)
    assert shared.midpoints(purpose).shape == (count,)
    assert torch.equal(shared.draw(purpose, key, B, T + 3, A)[:, :T], drawn)  # padding along time
    assert not torch.equal(shared.draw(purpose, key + torch.tensor([0, 1]), B, T, A), drawn)
    assert not torch.equal(shared.draw(purpose, key, B, T, A, stream=1), drawn)
    states = torch.randn(B, T, A, D, dtype=torch.float64)
    assert own.quantiles(states, own.draw(purpose, key, B, T, A)).shape == (B, T, A, U, count)


# ------------------------------------------------------------------------------------------- names, and what is refused


def test_from_args() -> None:
    sizes = {"n_quantiles": 5, "n_target_quantiles": 3, "n_approx_quantiles": 9, "quantile_embed_dim": FEATURES}
    args = SimpleNamespace(rnn_hidden_dim=D, n_actions=U, name="dmix", **sizes)
    agent = REGISTRY["iqn_rnn"].from_args(N_IN, args)
    assert isinstance(agent, IQNRNNAgent) and not agent.per_agent_fractions
    assert agent.counts == {"policy": 5, "target": 3, "approx": 9}
    assert sum(p.numel() for p in agent.parameters()) == (
        (N_IN + 1) * D + 6 * D * D + 6 * D + (FEATURES + 1) * D + (D + 1) * U
    )
    args.name = "diql"
    assert IQNRNNAgent.from_args(N_IN, args).per_agent_fractions
    args.per_agent_fractions = False  # which the public code cannot say: there the name decides
    assert not IQNRNNAgent.from_args((N_IN,), args).per_agent_fractions
    del args.n_quantiles
    with pytest.raises(ValueError, match="n_quantiles"):
        IQNRNNAgent.from_args(N_IN, args)
    with pytest.raises(ValueError, match="n_target_quantiles must be a positive int, got 0"):
        make(n_target_quantiles=0)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"hidden_states": torch.zeros(B, T, A, D + 1)}, ValueError, r"hidden_states must be \[\.\.\., A, 8\]"),
        ({"fractions": torch.zeros(B, T + 1, 4)}, ValueError, "fractions must be"),
        ({"fractions": torch.zeros(B, T, 0)}, ValueError, "at least one fraction"),
        ({"fractions": torch.zeros(())}, ValueError, "fractions must be"),
        ({"fractions": torch.zeros(4, dtype=torch.int64)}, TypeError, "fractions must be a floating-point"),
        ({"actions": torch.zeros(B, T, dtype=torch.int64)}, ValueError, "actions must have shape"),
        ({"actions": torch.zeros(B, T, A)}, TypeError, "actions must have dtype torch.int64"),
    ],
)
def test_wrong_arguments_raise(changes: dict[str, Tensor], error: type[Exception], message: str) -> None:
    args = {"hidden_states": torch.zeros(B, T, A, D), "fractions": torch.zeros(B, T, 4)} | changes
    with pytest.raises(error, match=message):
        make().float().quantiles(**args)


def test_unknown_purpose_raises() -> None:
    with pytest.raises(ValueError, match="purpose must be one of"):
        make().draw("act", torch.tensor([0, 0]), B, T, A)
    with pytest.raises(ValueError, match="purpose must be one of"):
        make().midpoints("act")


def test_compiles_whole() -> None:
    agent, key, actions = make(), torch.tensor([1, 2]), torch.randint(U, (B, T, A))

    def step(obs: Tensor) -> tuple[Tensor, Tensor]:
        states, _ = agent.trunk(obs)
        drawn = agent.draw("policy", key, B, T, A)
        return agent.quantiles(states, drawn, actions), agent.means(states, drawn)

    obs = torch.randn(B, T, A, N_IN, dtype=torch.float64)
    for got, wanted in zip(fullgraph(step)(obs), step(obs), strict=True):
        assert_close(got, wanted, 1e-12)
