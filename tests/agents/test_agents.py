"""The utility networks: their interface, names, shapes, and that a sequence is its steps one after another."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import fastmix
from fastmix import backends
from fastmix.agents import REGISTRY, Agent, CentralRNNAgent, FFAgent, IQNRNNAgent, NRNNAgent, RNNAgent
from fastmix.mixers import load_pymarl
from fastmix.testing import assert_close, rms_ratio
from tests.generators import non_contiguous

B, T, A, U, D = 4, 6, 3, 5, 8
N_OBS = 7
N_IN = N_OBS + U + A
BACKENDS = backends.available("recurrent")

FORMS = {
    "rnn": lambda: RNNAgent(N_IN, U, D),
    "n_rnn": lambda: NRNNAgent(N_IN, U, D, use_layer_norm=True),
    "mlp": lambda: RNNAgent(N_IN, U, D, use_rnn=False),
    "ff": lambda: FFAgent(N_IN, U, D),
    "central": lambda: CentralRNNAgent(N_IN, U, D, central_action_embed=2),
    "iqn": lambda: IQNRNNAgent(N_IN, U, D, quantile_embed_dim=6),
}
ON_BACKENDS = pytest.mark.parametrize(
    ("form", "backend"),
    [
        (form, backend)
        for form in FORMS
        for backend in BACKENDS
        if form != "iqn" or backend in backends.available("implicit")  # which is the head's operator
    ],
)


def tail(form: str) -> tuple[int, ...]:
    """The axes of utilities behind the agents'."""
    return (U, 2) if form == "central" else (U,)


def sequence(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Observations, and last actions with -1 (none yet) at the first step."""
    last_actions = torch.randint(U, (B, T, A))
    last_actions[:, 0] = -1
    return torch.randn(B, T, A, N_OBS, dtype=dtype), last_actions


def one_hot_inputs(obs: Tensor, last_actions: Tensor) -> Tensor:
    """The input as public controllers build it."""
    n_agents = obs.shape[2]
    taken = torch.cat([torch.zeros(1, U), torch.eye(U)]).to(obs)[last_actions + 1]
    return torch.cat([obs, taken, torch.eye(n_agents).to(obs).expand(*obs.shape[:3], n_agents)], -1)


@ON_BACKENDS
@pytest.mark.parametrize("rank", [2, 3])
def test_a_sequence_is_its_steps(backend: str, form: str, rank: int) -> None:
    agent = FORMS[form]().double()
    obs, last_actions = sequence()
    start = torch.randn(B, A, D, dtype=torch.float64)
    results = []
    for whole in (True, False):
        agent.zero_grad()
        o, h = obs.clone().requires_grad_(), start.clone().requires_grad_()
        with fastmix.backend(backend):
            if whole:
                q, after, states = agent.unroll(o, h, last_actions, agent_ids=True, return_hidden_states=True)
                assert states is not None
            else:
                qs, hs, carried = [], [], h
                for x in one_hot_inputs(o, last_actions).unbind(1):
                    step_q, carried = agent(x if rank == 3 else x.flatten(0, 1), carried)
                    assert step_q.shape == ((B, A, *tail(form)) if rank == 3 else (B * A, *tail(form)))
                    assert carried.shape == ((B, A, D) if rank == 3 else (B * A, D))
                    qs.append(step_q.view(B, A, *tail(form)))
                    hs.append(carried.view(B, A, D))
                q, after, states = torch.stack(qs, 1), hs[-1], torch.stack(hs, 1)
            (q.square().sum() + states.sin().sum() + after.sum()).backward()
        carried_grad = torch.zeros_like(h) if h.grad is None else h.grad
        results.append([q, after, states, o.grad, carried_grad, *(p.grad for p in agent.parameters())])
    for got, expected in zip(*results, strict=True):
        assert_close(got, expected, 1e-10)


@pytest.mark.parametrize("form", FORMS)
def test_without_ids_and_last_actions(form: str) -> None:
    agent = FORMS[form]()
    obs = torch.randn(B, T, A, N_IN)
    q, after, states = agent.unroll(obs)
    assert (q.shape, after.shape, states) == ((B, T, A, *tail(form)), (B, A, D), None)
    explicit = agent.unroll(obs, agent.init_hidden().expand(B, A, -1))
    assert_close(explicit.q, q, 1e-6)


@ON_BACKENDS
@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 5, 27), (3, 1, 2), (0, 4, 2), (2, 0, 3)], ids=str)
def test_odd_sizes(backend: str, form: str, sizes: tuple[int, int, int]) -> None:
    agent = FORMS[form]()
    start = torch.randn(sizes[0], sizes[2], D)
    with fastmix.backend(backend):
        q, after, _ = agent.unroll(torch.randn(*sizes, N_IN), start)
    assert q.shape == (*sizes, *tail(form))
    assert after.shape == (sizes[0], sizes[2], D)
    if sizes[1] == 0:
        assert torch.equal(after, start)
    q.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for n, p in agent.named_parameters() if "fc" in n)


@pytest.mark.parametrize("form", FORMS)
def test_strided_inputs(form: str) -> None:
    agent = FORMS[form]()
    obs, last_actions = sequence(torch.float32)
    expected = agent.unroll(obs, None, last_actions, agent_ids=True).q
    assert_close(
        agent.unroll(non_contiguous(obs), None, non_contiguous(last_actions), agent_ids=True).q, expected, 1e-6
    )
    x, h = torch.randn(B, A, N_IN), torch.randn(B, A, D)
    q, after = agent(non_contiguous(x), non_contiguous(h))
    q_dense, after_dense = agent(x, h)
    assert_close(q, q_dense, 1e-6)
    assert_close(after, after_dense, 1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_wrong_inputs_raise(form: str) -> None:
    agent = FORMS[form]()
    with pytest.raises(ValueError, match=f"inputs must be .*{N_IN}"):
        agent(torch.zeros(B, N_IN + 1), torch.zeros(B, D))
    with pytest.raises(ValueError, match="hidden_state must hold 8 features"):
        agent(torch.zeros(B, N_IN), torch.zeros(B + 1, D))
    with pytest.raises(TypeError, match="inputs"):
        agent(torch.zeros(B, N_IN, dtype=torch.int64), torch.zeros(B, D))
    obs, last_actions = sequence(torch.float32)
    with pytest.raises(ValueError, match="obs"):
        agent.unroll(obs[0])
    with pytest.raises(ValueError, match=r"obs|input"):
        agent.unroll(obs[..., 1:], None, last_actions, agent_ids=True)
    with pytest.raises(ValueError, match="last_actions"):
        agent.unroll(obs, None, last_actions[:, 1:], agent_ids=True)


# ----------------------------------------------------------------------------------------------- names of public code


def test_keys_are_those_of_the_public_code() -> None:
    linear = {f"{n}.{w}" for n in ("fc1", "fc2") for w in ("weight", "bias")}
    gru = {f"rnn.{w}_{g}" for w in ("weight", "bias") for g in ("ih", "hh")}
    assert set(FORMS["rnn"]().state_dict()) == linear | gru
    assert set(FORMS["n_rnn"]().state_dict()) == linear | gru | {"layer_norm.weight", "layer_norm.bias"}
    assert set(FORMS["mlp"]().state_dict()) == linear | {"rnn.weight", "rnn.bias"}
    assert set(FORMS["ff"]().state_dict()) == linear | {"fc3.weight", "fc3.bias"}
    assert set(FORMS["central"]().state_dict()) == linear | gru
    phi = {"phi.weight", "phi.bias"}
    assert set(FORMS["iqn"]().state_dict()) == linear | gru | phi
    assert FORMS["central"]().state_dict()["fc2.weight"].shape == (U * 2, D)
    count = sum(p.numel() for p in FORMS["rnn"]().parameters())
    assert count == (N_IN + 1) * D + 6 * D * D + 6 * D + (D + 1) * U


def test_from_args() -> None:
    args = SimpleNamespace(rnn_hidden_dim=D, n_actions=U, use_layer_norm=True)
    assert RNNAgent.from_args(N_IN, args).layer_norm is None  # PyMARL's `rnn` does not know the field
    assert NRNNAgent.from_args((N_IN,), args).layer_norm is not None
    assert FFAgent.from_args(N_IN, args).fc1.in_features == N_IN
    assert REGISTRY.keys() >= {"rnn", "n_rnn", "ff", "central_rnn", "iqn_rnn"}
    with pytest.raises(ValueError, match="central_action_embed"):
        CentralRNNAgent.from_args(N_IN, args)
    wide = SimpleNamespace(**vars(args), central_action_embed=3, central_rnn_hidden_dim=99)
    assert CentralRNNAgent.from_args(N_IN, wide).fc2.weight.shape == (3 * U, D)
    with pytest.raises(ValueError, match="central_action_embed must be a positive int, got 0"):
        CentralRNNAgent(N_IN, U, D, 0)
    epymarl = SimpleNamespace(hidden_dim=D, n_actions=U, use_rnn=False)
    assert isinstance(RNNAgent.from_args(N_IN, epymarl).rnn, nn.Linear)
    with pytest.raises(ValueError, match="n_actions"):
        RNNAgent.from_args(N_IN, SimpleNamespace(hidden_dim=D))
    with pytest.raises(ValueError, match="hidden_dim"):
        FFAgent.from_args(N_IN, SimpleNamespace(n_actions=U))
    with pytest.raises(ValueError, match="input_dim"):
        FFAgent.from_args(0, args)


def test_checkpoints_of_public_trainers_load(tmp_path: Path) -> None:
    public = nn.Module()
    public.fc1, public.rnn, public.fc2 = nn.Linear(N_IN, D), nn.GRUCell(D, D), nn.Linear(D, U)
    torch.save(public.state_dict(), tmp_path / "agent.th")
    agent = FORMS["rnn"]()
    load_pymarl(agent, tmp_path / "agent.th")
    x, h = torch.randn(B * A, N_IN), torch.randn(B * A, D)
    expected = public.rnn(torch.relu(public.fc1(x)), h)
    q, after = agent(x, h)
    assert_close(after, expected, 1e-6)
    assert_close(q, public.fc2(expected), 1e-6)


def test_orthogonal_initialisation() -> None:
    agent = RNNAgent(N_IN, U, D, use_orthogonal=True, gain=0.5)
    assert_close(agent.fc1.weight @ agent.fc1.weight.T, torch.eye(D), 1e-5)
    assert_close(agent.fc2.weight @ agent.fc2.weight.T, 0.25 * torch.eye(U), 1e-5)
    assert not agent.fc1.bias.any()
    assert not agent.fc2.bias.any()
    assert agent.rnn.bias_ih.any()  # type: ignore[operator]


# --------------------------------------------------------------------------------------------------------- properties


def gradients_reach(agent: Agent) -> None:
    obs, last_actions = sequence(torch.float32)
    agent.unroll(obs, None, last_actions, agent_ids=True).q.sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in agent.parameters())


@pytest.mark.parametrize("form", FORMS)
def test_every_parameter_gets_a_gradient(form: str) -> None:
    gradients_reach(FORMS[form]())


@ON_BACKENDS
def test_gradcheck(backend: str, form: str) -> None:
    agent = FORMS[form]().double()
    names = [name for name, _ in agent.named_parameters()]
    obs, last_actions = sequence()
    obs, last_actions = obs[:2, :3].contiguous(), last_actions[:2, :3].contiguous()

    class Unroll(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.agent = agent

        def forward(self, o: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
            out = self.agent.unroll(o, h, last_actions, agent_ids=True)
            return out.q, out.hidden

    def function(o: Tensor, h: Tensor, *params: Tensor) -> tuple[Tensor, Tensor]:
        swapped = {f"agent.{name}": p for name, p in zip(names, params, strict=True)}
        with fastmix.backend(backend):
            result: tuple[Tensor, Tensor] = torch.func.functional_call(Unroll(), swapped, (o, h))
        return result

    h = torch.randn(2, A, D, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(function, (obs.requires_grad_(), h, *agent.parameters()), fast_mode=True)


@pytest.mark.parametrize("form", FORMS)
def test_deepcopy_and_meta(form: str) -> None:
    agent = FORMS[form]()
    obs = torch.randn(B, T, A, N_IN)
    assert torch.equal(copy.deepcopy(agent).unroll(obs).q, agent.unroll(obs).q)
    meta = copy.deepcopy(agent).to("meta")
    assert meta.init_hidden().device.type == "meta"
    assert meta.unroll(obs.to("meta")).q.shape == (B, T, A, *tail(form))


@pytest.mark.parametrize("form", FORMS)
def test_autocast(form: str) -> None:
    agent = FORMS[form]()
    obs, last_actions = sequence(torch.float32)
    expected = agent.unroll(obs, None, last_actions, agent_ids=True).q
    with torch.autocast("cpu", dtype=torch.bfloat16):
        q = agent.unroll(obs, None, last_actions, agent_ids=True).q
    assert rms_ratio(q, expected) < 2e-2
    q.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in agent.parameters())


@pytest.mark.parametrize("form", FORMS)
def test_compile_fullgraph(form: str) -> None:
    agent = FORMS[form]()
    obs = torch.randn(2, 3, A, N_IN)
    compiled = torch.compile(lambda o: agent.unroll(o).q, fullgraph=True, backend="aot_eager")
    assert_close(compiled(obs), agent.unroll(obs).q, 1e-6)
