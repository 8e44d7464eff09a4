"""VDN and the monotonic mixers: what only they have, and the properties their papers claim."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastmix
from fastmix import backends
from fastmix.mixers import Mixer, NMixer, QMixer, convert_state_dict, load_pymarl
from fastmix.testing import assert_close
from tests.generators import Shape
from tests.mixers.kinds import SMALL, make

A, S = SMALL.n_agents, SMALL.state_dim
KINDS = ["nmix", "qmix", "qmix_noabs", "vdn"]
MONOTONIC = ["qmix", "nmix"]
BACKENDS = backends.available("monotonic")


def data(shape: Shape, *lead: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.randn(*lead, shape.n_agents, dtype=dtype), torch.randn(*lead, shape.state_dim, dtype=dtype)


def test_sizes_may_be_numpy_integers() -> None:
    """Environments often report them so."""
    mixer = QMixer(np.int64(A), np.int32(S), np.int64(4))  # type: ignore[arg-type]
    assert mixer(torch.zeros(2, A), torch.zeros(2, S)).shape == (2, 1)


@pytest.mark.parametrize("kind", ["qmix", "qmix_noabs", "nmix"])
@pytest.mark.parametrize(
    ("agent_qs", "states", "message"),
    [
        (torch.zeros(4, A + 1), torch.zeros(4, S), "agent_qs must be .* n_agents = 3"),
        (torch.zeros(4, A), torch.zeros(4, S + 1), "states must be .*7"),
        (torch.zeros(4, A), torch.zeros(5, S), "states must be"),
        (torch.zeros(4, 6, A), torch.zeros(24, S), "states must be"),
        (torch.tensor(0.0), torch.zeros(S), "scalar"),
        (torch.zeros(4, A, dtype=torch.int64), torch.zeros(4, S), "floating"),
        ([0.0] * A, torch.zeros(S), "torch.Tensor"),
        (torch.zeros(4, A), None, "torch.Tensor"),
    ],
)
def test_wrong_inputs_raise(kind: str, agent_qs: object, states: object, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        make(kind)(agent_qs, states)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_agents": 0}, "n_agents"),
        ({"n_agents": True}, "n_agents"),
        ({"n_agents": 2.0}, "n_agents"),
        ({"state_dim": (3, 0)}, "state_dim"),
        ({"mixing_embed_dim": -1}, "mixing_embed_dim"),
        ({"hypernet_layers": 3}, "hypernet_layers"),
        ({"hypernet_embed": 0}, "hypernet_embed"),
        ({"positivity": "exp"}, "positivity"),
        ({"beta": 0.0}, "beta"),
    ],
)
def test_wrong_sizes_raise(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QMixer(**{"n_agents": 2, "state_dim": 3, **options})  # type: ignore[arg-type]


# ----------------------------------------------------------------------------------------------- names of public code


def test_from_args_defaults_and_required_fields() -> None:
    args = SimpleNamespace(n_agents=A, state_shape=(S,), mixing_embed_dim=4)
    mixer = QMixer.from_args(args)
    assert isinstance(mixer.hyper_w_1, nn.Linear)  # one layer when the namespace does not say
    assert mixer.positivity == "abs"
    assert QMixer.from_args(SimpleNamespace(**vars(args), abs=False)).positivity == "none"
    with pytest.raises(ValueError, match="hypernet_embed"):
        QMixer.from_args(SimpleNamespace(**vars(args), hypernet_layers=2))
    with pytest.raises(ValueError, match="hypernet_embed"):
        NMixer.from_args(args)
    with pytest.raises(ValueError, match="hypernet_layers"):
        QMixer.from_args(SimpleNamespace(**vars(args), hypernet_layers=3, hypernet_embed=4))
    soft = SimpleNamespace(**vars(args), hypernet_embed=4, qmix_pos_func="softplus", qmix_pos_func_beta=2.0)
    assert (NMixer.from_args(soft).positivity, NMixer.from_args(soft).beta) == ("softplus", 2.0)
    assert NMixer.from_args(soft, abs=False).positivity == "none"


def public_checkpoint(family: str) -> dict[str, Tensor]:
    """A state dict as a public trainer's module gives it, made without fastmix."""

    def mlp(out: int, hidden: int = 6) -> nn.Sequential:
        return nn.Sequential(nn.Linear(S, hidden), nn.ReLU(), nn.Linear(hidden, out))

    module = nn.Module()
    if family == "qmix":
        module.hyper_w_1, module.hyper_w_final = mlp(A * 8), mlp(8)
        module.hyper_b_1, module.V = nn.Linear(S, 8), mlp(1, 8)
    else:
        module.hyper_w1, module.hyper_b1 = mlp(A * 8), nn.Sequential(nn.Linear(S, 8))
        module.hyper_w2, module.hyper_b2 = mlp(8), mlp(1, 8)
    return module.state_dict()


@pytest.mark.parametrize("saved", ["qmix", "nmix"])
@pytest.mark.parametrize("loaded", ["qmix", "nmix"])
def test_checkpoints_of_public_trainers_load(saved: str, loaded: str, tmp_path: Path) -> None:
    path = tmp_path / "mixer.th"
    state = public_checkpoint(saved)
    torch.save(state, path)
    mixer = make(loaded)
    load_pymarl(mixer, path)
    twin = make(saved)
    twin.load_state_dict(torch.load(path, weights_only=True))
    inputs = data(SMALL, 4, 6, dtype=torch.float32)
    assert torch.equal(mixer(*inputs), twin(*inputs))
    back = convert_state_dict(mixer.state_dict(), saved)  # type: ignore[arg-type]
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)


def test_foreign_checkpoints_are_refused(tmp_path: Path) -> None:
    one_layer = make("qmix", hypernet_layers=1).state_dict()
    with pytest.raises(ValueError, match="hypernet_layers=1"):
        convert_state_dict(one_layer, "nmix")
    with pytest.raises(ValueError, match="hypernet_layers=1"):
        load_pymarl(make("nmix"), one_layer)
    with pytest.raises(ValueError, match="QMixer or an NMixer"):
        convert_state_dict({"fc1.weight": torch.zeros(1)}, "nmix")
    with pytest.raises(ValueError, match="qmix' or 'nmix"):
        convert_state_dict(one_layer, "vdn")  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=r"fc1\.weight"):
        load_pymarl(make("qmix"), {"fc1.weight": torch.zeros(1)})
    torch.save([1, 2], tmp_path / "list.th")
    with pytest.raises(ValueError, match="state dict"):
        load_pymarl(make("qmix"), tmp_path / "list.th")


# --------------------------------------------------------------------------------------------------------- properties


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["vdn", *MONOTONIC])
@pytest.mark.parametrize("positivity", ["abs", "softplus", "quadratic"])
def test_joint_value_never_falls_when_a_utility_rises(backend: str, kind: str, positivity: str) -> None:
    if kind == "qmix" and positivity != "abs":
        mixer: Mixer = QMixer(A, S, positivity=positivity)
    else:
        mixer = make(kind, qmix_pos_func=positivity, qmix_pos_func_beta=1.0)
    agent_qs, states = data(SMALL, 300, dtype=torch.float32)
    agent_qs = (10 * agent_qs).requires_grad_()
    with fastmix.backend(backend):
        (grad,) = torch.autograd.grad(mixer(agent_qs, states).sum(), agent_qs)
    assert (grad >= 0).all()
    assert (grad > 0).any()


def test_without_positivity_it_may_fall() -> None:
    agent_qs, states = data(SMALL, 300, dtype=torch.float32)
    agent_qs.requires_grad_()
    (grad,) = torch.autograd.grad(make("qmix_noabs")(agent_qs, states).sum(), agent_qs)
    assert (grad < 0).any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layers", [1, 2])
def test_gradcheck(backend: str, kind: str, layers: int) -> None:
    mixer = make(kind, embed=4, hypernet_layers=layers).double()
    names = [name for name, _ in mixer.named_parameters()]

    def function(agent_qs: Tensor, states: Tensor, *params: Tensor) -> Tensor:
        with fastmix.backend(backend):
            q_tot: Tensor = torch.func.functional_call(mixer, dict(zip(names, params, strict=True)), (agent_qs, states))
        return q_tot

    agent_qs, states = (x.requires_grad_() for x in data(SMALL, 2, 3))
    assert torch.autograd.gradcheck(function, (agent_qs, states, *mixer.parameters()))


def test_frozen_parameters_and_no_grad() -> None:
    mixer = make("qmix")
    assert isinstance(mixer, QMixer)
    mixer.hyper_b_1.requires_grad_(False)
    agent_qs, states = data(SMALL, 4, dtype=torch.float32)
    mixer(agent_qs, states).sum().backward()
    assert mixer.hyper_b_1.weight.grad is None
    assert mixer.V[0].weight.grad is not None
    with torch.no_grad():
        assert not mixer(agent_qs, states).requires_grad


@pytest.mark.parametrize("kind", [*MONOTONIC, "qmix_noabs"])
def test_analysis_helpers(kind: str) -> None:
    """k is the normalised slope where the ELU is linear; b is the rest of the mix."""
    mixer = make(kind).double()
    states = torch.randn(4, 6, S, dtype=torch.float64)
    k, b = mixer.k(states), mixer.b(states)  # type: ignore[operator]
    assert k.shape == (4, 6, A)
    assert b.shape == (4, 6, 1)
    assert_close(k.sum(-1), torch.ones(4, 6, dtype=torch.float64), 1e-12)
    if kind in MONOTONIC:
        agent_qs = torch.full((4, 6, A), 1e3, dtype=torch.float64, requires_grad=True)
        q_tot = mixer(agent_qs, states)
        (slope,) = torch.autograd.grad(q_tot.sum(), agent_qs)
        assert_close(slope / slope.sum(-1, keepdim=True), k, 1e-9)
        assert_close(q_tot - (slope * agent_qs).sum(-1, keepdim=True), b, 1e-9)
