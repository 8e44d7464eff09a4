"""The mixers: their interface, names, shapes and the properties their papers claim."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastmix
from fastmix import backends
from fastmix.mixers import REGISTRY, Mixer, MonotonicMixer, NMixer, QMixer, convert_state_dict, load_pymarl
from fastmix.testing import assert_close, rms_ratio
from tests.generators import ODD_ROWS, SHAPES, Shape, non_contiguous, odd_shapes

S, A = 7, 3
SMALL = Shape(A, 5, S, 4)
KINDS = sorted(REGISTRY)
MONOTONIC = ["qmix", "nmix"]
BACKENDS = backends.available("monotonic")


def make(kind: str, shape: Shape = SMALL, embed: int = 8, **options: object) -> Mixer:
    args = {"n_agents": shape.n_agents, "state_shape": shape.state_dim, "mixing_embed_dim": embed, "hypernet_embed": 6}
    return REGISTRY[kind].from_args(SimpleNamespace(**{**args, "hypernet_layers": 2, **options}))


def public_form(mixer: Mixer, agent_qs: Tensor, states: Tensor) -> Tensor:
    """The mix as equations, layer by layer, with the modules the mixer holds."""
    if not isinstance(mixer, MonotonicMixer):
        return agent_qs.sum(-1, keepdim=True)
    nets: list[Any] = (
        [mixer.hyper_w1, mixer.hyper_b1, mixer.hyper_w2, mixer.hyper_b2] if isinstance(mixer, NMixer) else []
    )
    if isinstance(mixer, QMixer):
        nets = [mixer.hyper_w_1, mixer.hyper_b_1, mixer.hyper_w_final, mixer.V]
    positive: dict[str, Callable[[Tensor], Tensor]] = {
        "abs": torch.abs,
        "softplus": nn.Softplus(beta=mixer.beta),
        "quadratic": lambda w: w * w / 2,
        "none": lambda w: w,
    }
    make_positive = positive[mixer.positivity]
    w1, b1, w2, v = (net(states) for net in nets)
    w1 = make_positive(w1).unflatten(-1, (mixer.n_agents, -1))
    hidden = nn.functional.elu(torch.einsum("...a,...ae->...e", agent_qs, w1) + b1)
    return (hidden * make_positive(w2)).sum(-1, keepdim=True) + v


def data(shape: Shape, *lead: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.randn(*lead, shape.n_agents, dtype=dtype), torch.randn(*lead, shape.state_dim, dtype=dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lead", [(4, 6), (5,), (2, 3, 4), (7, 1), ()])
def test_any_leading_dimensions(kind: str, lead: tuple[int, ...]) -> None:
    mixer = make(kind).double()
    agent_qs, states = data(SMALL, *lead)
    q_tot = mixer(agent_qs, states)
    assert q_tot.shape == (*lead, 1)
    assert_close(q_tot, public_form(mixer, agent_qs, states), 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize(("shape", "embed"), odd_shapes(), ids=str)
def test_odd_shapes_with_gradients(backend: str, layers: int, shape: Shape, embed: int) -> None:
    mixer = make("qmix", shape, embed, hypernet_layers=layers).double()
    for rows in ODD_ROWS:
        results = []
        agent_qs, states = data(shape, rows)
        for function in (mixer, lambda q, s: public_form(mixer, q, s)):
            mixer.zero_grad()
            q = agent_qs.clone().requires_grad_()
            with fastmix.backend(backend):
                q_tot = function(q, states)
                q_tot.square().sum().backward()
            results.append([q_tot, q.grad, *(p.grad for p in mixer.parameters())])
        for got, expected in zip(*results, strict=True):
            assert_close(got, expected, 1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_strided_inputs(kind: str) -> None:
    mixer = make(kind)
    agent_qs, states = data(SMALL, 4, 6, dtype=torch.float32)
    strided = non_contiguous(agent_qs), non_contiguous(states)
    assert not strided[0].is_contiguous()
    assert_close(mixer(*strided), mixer(agent_qs, states), 1e-6)
    expanded = agent_qs[:, :1].expand(4, 6, A)
    assert_close(mixer(expanded, states), mixer(expanded.contiguous(), states), 1e-6)


def test_sizes_may_be_numpy_integers() -> None:
    """Environments often report them so."""
    mixer = QMixer(np.int64(A), np.int32(S), np.int64(4))  # type: ignore[arg-type]
    assert mixer(torch.zeros(2, A), torch.zeros(2, S)).shape == (2, 1)


def test_states_keep_their_axes() -> None:
    mixer = QMixer(A, (2, 3, 4), mixing_embed_dim=4)
    agent_qs, states = torch.randn(5, 6, A), torch.randn(5, 6, 2, 3, 4)
    assert mixer.state_dim == 24
    assert torch.equal(mixer(agent_qs, states), mixer(agent_qs, states.flatten(2)))


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


def test_keys_are_those_of_the_public_code() -> None:
    two = {f"{n}.{i}.{w}" for n in ("hyper_w_1", "hyper_w_final", "V") for i in (0, 2) for w in ("weight", "bias")}
    assert set(make("qmix").state_dict()) == two | {"hyper_b_1.weight", "hyper_b_1.bias"}
    one = {f"{n}.{w}" for n in ("hyper_w_1", "hyper_w_final", "hyper_b_1", "V.0", "V.2") for w in ("weight", "bias")}
    assert set(make("qmix", hypernet_layers=1).state_dict()) == one
    nmix = {f"{n}.{i}.{w}" for n in ("hyper_w1", "hyper_w2", "hyper_b2") for i in (0, 2) for w in ("weight", "bias")}
    assert set(make("nmix").state_dict()) == nmix | {"hyper_b1.0.weight", "hyper_b1.0.bias"}
    assert not make("vdn").state_dict()


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("layers", [1, 2])
def test_parameter_counts(name: str, layers: int) -> None:
    shape, E, H = SHAPES[name], 32, 64
    agents, state = shape.n_agents, shape.state_dim
    common = 2 * (state * E + E) + E + 1
    if layers == 1:
        expected = (state + 1) * agents * E + (state + 1) * E + common
    else:
        expected = 2 * (state * H + H) + (H + 1) * agents * E + (H + 1) * E + common
    mixer = QMixer(agents, state, hypernet_layers=layers)
    assert sum(p.numel() for p in mixer.parameters()) == expected


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


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_gets_a_gradient(kind: str) -> None:
    mixer = make(kind)
    agent_qs, states = data(SMALL, 4, 6, dtype=torch.float32)
    mixer(agent_qs.requires_grad_(), states).sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in mixer.parameters())
    assert agent_qs.grad is not None
    assert states.grad is None


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


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_read_at_call_time(kind: str) -> None:
    mixer, other = make(kind), make(kind)
    inputs = data(SMALL, 4, 6, dtype=torch.float32)
    mixer(*inputs)
    swapped = torch.func.functional_call(mixer, dict(other.named_parameters()), inputs)
    assert torch.equal(swapped, other(*inputs))
    with torch.no_grad():
        for p in mixer.parameters():
            p.mul_(0.5)
    twin = make(kind)
    twin.load_state_dict(mixer.state_dict())
    assert torch.equal(mixer(*inputs), twin(*inputs))
    assert torch.equal(mixer(*inputs), copy.deepcopy(mixer)(*inputs))


@pytest.mark.parametrize("kind", KINDS)
def test_meta_device(kind: str) -> None:
    meta = copy.deepcopy(make(kind)).to("meta")
    agent_qs, states = torch.empty(4, 6, A, device="meta"), torch.empty(4, 6, S, device="meta")
    q_tot = meta(agent_qs, states)
    assert q_tot.device.type == "meta"
    assert q_tot.shape == (4, 6, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind: str) -> None:
    """Under autocast low-precision utilities are mixed in at least the precision autocast promises."""
    mixer = make(kind)
    agent_qs, states = data(SMALL, 4, 6, dtype=torch.float32)
    expected = mixer(agent_qs, states)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        q_tot = mixer(agent_qs.bfloat16(), states)
    assert rms_ratio(q_tot, expected) < 2e-2
    if kind == "vdn":  # a sum: no parameters, and its dtype is autocast's business
        return
    assert q_tot.dtype == torch.float32
    q_tot.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in mixer.parameters())


@pytest.mark.parametrize("kind", ["qmix", "nmix"])
def test_compile_fullgraph(kind: str) -> None:
    mixer = make(kind, embed=4)
    compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager")
    agent_qs, states = data(SMALL, 4, 6, dtype=torch.float32)
    agent_qs.requires_grad_()
    grads = []
    for function in (mixer, compiled):
        mixer.zero_grad()
        q_tot = function(agent_qs, states)
        q_tot.sum().backward()
        grads.append([q_tot.detach(), *(p.grad for p in mixer.parameters())])
    for got, expected in zip(*grads, strict=True):
        assert_close(got, expected, 1e-6)


def test_orthogonal_initialisation() -> None:
    mixer = NMixer(A, S, 8, 6, use_orthogonal=True)
    for layer in mixer.modules():
        if isinstance(layer, nn.Linear):
            weight = layer.weight if layer.out_features <= layer.in_features else layer.weight.T
            assert_close(weight @ weight.T, torch.eye(len(weight)), 1e-5)
            assert not layer.bias.any()


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
