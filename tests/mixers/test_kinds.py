"""What holds for every kind of mixer: its equations, shapes, names, and that it is an ordinary module."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastmix
from fastmix.mixers import REGISTRY, ActionMixer, Mixer, QuantileMixer, StateMixer, load_pymarl
from fastmix.testing import assert_close, rms_ratio
from tests.generators import ODD_ROWS, SHAPES, non_contiguous, odd_shapes
from tests.mixers.kinds import FORMS, RUNS, SMALL, UNUSED, arguments, call, data, joint, make, public_form

KINDS = sorted(REGISTRY)
ACTION_FORMS = [form for form in FORMS if isinstance(make(form), ActionMixer)]


def results(outputs: list[Tensor], leaves: list[Tensor]) -> list[Tensor]:
    """Outputs, and gradients of a random linear function of them; zeros where there is none."""
    generator = torch.Generator().manual_seed(0)
    terms = [(out * torch.randn(out.shape, generator=generator, dtype=out.dtype)).sum() for out in outputs]
    grads = torch.autograd.grad(torch.stack(terms).sum(), leaves, allow_unused=True)
    return [*outputs, *(torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True))]


def test_every_kind_has_a_form() -> None:
    assert {form.partition("/")[0] for form in FORMS} == set(REGISTRY)


@pytest.mark.parametrize("lead", [(4, 6), (5,), (2, 3, 4), (7, 1), ()])
@pytest.mark.parametrize(("form", "backend"), RUNS)
def test_equations_and_gradients(form: str, backend: str, lead: tuple[int, ...]) -> None:
    mixer = make(form).double()
    given = data(form, *lead).map(Tensor.requires_grad_)
    leaves = [*given[:5], *mixer.parameters()]
    with fastmix.backend(backend):
        ours = results(call(mixer, given), leaves)
    for i, (got, expected) in enumerate(zip(ours, results(public_form(mixer, given), leaves), strict=True)):
        assert_close(got, expected, 1e-10, name=str(i), zero=1e-10)


@pytest.mark.parametrize(("form", "backend"), RUNS)
@pytest.mark.parametrize(("shape", "embed"), odd_shapes(), ids=str)
def test_odd_shapes(form: str, backend: str, shape: Any, embed: int) -> None:
    mixer = make(form, shape, embed).double()
    for rows in ODD_ROWS[1:]:
        given = data(form, rows, shape=shape).map(Tensor.requires_grad_)
        leaves = [*given[:5], *mixer.parameters()]
        with fastmix.backend(backend):
            ours = results(call(mixer, given), leaves)
        for got, expected in zip(ours, results(public_form(mixer, given), leaves), strict=True):
            assert_close(got, expected, 1e-10, zero=1e-10)


@pytest.mark.parametrize("form", FORMS)
def test_no_rows(form: str) -> None:
    mixer = make(form).double()
    for lead in [(0,), (0, 4), (4, 0)]:
        given = data(form, *lead).map(Tensor.requires_grad_)
        value = call(mixer, given)[0]
        assert value.shape == public_form(mixer, given)[0].shape
        value.sum().backward()


@pytest.mark.parametrize("form", ACTION_FORMS)
def test_one_call_gives_what_two_do(form: str) -> None:
    mixer: Any = make(form).double()
    given = data(form, 4, 6).map(Tensor.requires_grad_)
    leaves = [*given[:5], *mixer.parameters()]
    for got, expected in zip(results(joint(mixer, given), leaves), results(call(mixer, given), leaves), strict=True):
        assert_close(got, expected, 1e-12)
    value = mixer.joint(given.agent_qs, given.states, given.one_hots, given.max_qs) if "qplex" in form else None
    if value is not None:
        assert torch.equal(value.q_tot, value.v_tot + value.adv_tot)


@pytest.mark.parametrize("form", FORMS)
def test_strided_inputs(form: str) -> None:
    mixer = make(form)
    given = data(form, 4, 6, dtype=torch.float32)
    strided = type(given)(*map(non_contiguous, given))
    assert not strided.agent_qs.is_contiguous()
    for got, expected in zip(call(mixer, strided), call(mixer, given), strict=True):
        assert_close(got, expected, 1e-6)
    expanded = type(given)(*(x[:, :1].expand_as(x) for x in given))
    dense = type(given)(*(x.contiguous() for x in expanded))
    for got, expected in zip(call(mixer, expanded), call(mixer, dense), strict=True):
        assert_close(got, expected, 1e-6)


@pytest.mark.parametrize("form", [form for form in FORMS if form != "vdn"])
def test_states_keep_their_axes(form: str) -> None:
    shape = SMALL._replace(state_dim=24)
    mixer, given = make(form, shape), data(form, 5, 6, shape=shape, dtype=torch.float32)
    axes = given._replace(states=given.states.unflatten(-1, (2, 3, 4)))
    tuple_shape = make(form, shape, state_shape=(2, 3, 4))
    tuple_shape.load_state_dict(mixer.state_dict())
    for got, expected in zip(call(tuple_shape, axes), call(mixer, given), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_none_where_public_ones_are(form: str) -> None:
    mixer = make(form)
    given = data(form, 4, 6, dtype=torch.float32).map(Tensor.requires_grad_)
    torch.stack([out.sum() for out in call(mixer, given)]).sum().backward()
    for name, param in mixer.named_parameters():
        assert (param.grad is None) == name.startswith(UNUSED.get(form, ("-",))), name
        assert param.grad is None or param.grad.shape == param.shape


@pytest.mark.parametrize("form", FORMS)
def test_frozen_parameters_and_no_grad(form: str) -> None:
    mixer = make(form).requires_grad_(False)
    given = data(form, 4, dtype=torch.float32)
    assert not any(out.requires_grad for out in call(mixer, given))
    with torch.no_grad():
        assert not any(out.requires_grad for out in call(make(form), given))


@pytest.mark.parametrize("form", FORMS)
def test_weights_are_read_at_call_time(form: str) -> None:
    mixer, other = make(form), make(form)
    given = data(form, 4, 6, dtype=torch.float32)
    call(mixer, given)

    class Swapped(nn.Module):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return torch.func.functional_call(mixer, dict(other.named_parameters()), args, kwargs)

    def equal(first: list[Tensor], second: list[Tensor]) -> bool:
        return all(torch.equal(*pair) for pair in zip(first, second, strict=True))

    assert equal(call(Swapped(), given, mixer), call(other, given))
    with torch.no_grad():
        for p in mixer.parameters():
            p.mul_(0.5)
    twin = make(form)
    twin.load_state_dict(mixer.state_dict())
    assert equal(call(mixer, given), call(twin, given))
    assert equal(call(mixer, given), call(copy.deepcopy(mixer), given))


@pytest.mark.parametrize("form", FORMS)
def test_meta_device(form: str) -> None:
    given = data(form, 4, 6)
    shapes = [out.shape for out in call(make(form).double(), given)]
    outputs = call(make(form).to("meta"), type(given)(*(x.to("meta", x.dtype) for x in given.map(Tensor.float))))
    assert [out.shape for out in outputs] == shapes
    assert {out.device.type for out in outputs} == {"meta"}


@pytest.mark.parametrize("form", FORMS)
def test_autocast(form: str) -> None:
    """Under autocast low-precision inputs are mixed in at least the precision autocast promises."""
    mixer = make(form)
    given = data(form, 4, 6, dtype=torch.float32)
    expected = call(mixer, given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = call(mixer, given.map(Tensor.bfloat16))
    for got, want in zip(outputs, expected, strict=True):
        assert rms_ratio(got, want) < 3e-2
    if form in ("vdn", "ddn"):  # sums: no parameters, and their dtype is autocast's business
        return
    assert {out.dtype for out in outputs} == {torch.float32}
    torch.stack([out.sum() for out in outputs]).sum().backward()
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in mixer.parameters())


@pytest.mark.parametrize("form", KINDS)
def test_compile_fullgraph(form: str) -> None:
    mixer = make(form, embed=4)
    torch.compiler.reset()
    compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager")
    given = data(form, 4, 6, dtype=torch.float32).map(Tensor.requires_grad_)
    leaves = [*given[:5], *mixer.parameters()]
    ours, wanted = (results(call(function, given, mixer), leaves) for function in (compiled, mixer))
    for got, expected in zip(ours, wanted, strict=True):
        assert_close(got, expected, 1e-5, zero=1e-6)


@pytest.mark.parametrize("form", ["qatten_pymarl2", "qatten_pymarl2/unweighted", "qatten_pymarl"])
def test_qatten_never_falls_when_a_utility_rises(form: str) -> None:
    mixer, given = make(form), data(form, 300, dtype=torch.float32)
    (grad,) = torch.autograd.grad(call(mixer, given.map(Tensor.requires_grad_))[0].sum(), given.agent_qs)
    assert (grad >= 0).all()
    assert (grad > 0).any()


@pytest.mark.parametrize("form", ["qplex_dmaq", "qplex_dmaq/one_layer", "qplex_dmaq/unweighted", "qplex_dmaq_qatten"])
def test_qplex_is_largest_at_the_greedy_joint_action(form: str) -> None:
    """IGM, for any weights: each agent's largest utility, taken by all, gives the largest joint value."""
    mixer: Any = make(form).double()
    given = data(form, 300)
    greedy = given._replace(agent_qs=given.max_qs)
    best, others = (torch.stack(joint(mixer, inputs)[:2]).sum(0) for inputs in (greedy, given))
    assert (best >= others).all()


# ----------------------------------------------------------------------------------------------- names of public code


def linear(name: str, bias: bool = True) -> set[str]:
    return {f"{name}.weight", *([f"{name}.bias"] if bias else [])}


def mlp(name: str, *indices: int) -> set[str]:
    return set().union(*(linear(f"{name}.{i}") for i in indices))


IMPORTANCE = set().union(*(mlp(f"{net}_extractors.{k}", 0, 2) for net in ("key", "agents", "action") for k in range(3)))
ATTENTION = set().union(
    *(linear(f"selector_extractors.{h}.0") | linear(f"selector_extractors.{h}.2", False) for h in range(3)),
    *(linear(f"key_extractors.{h}", False) for h in range(3)),
)


def under(prefix: str, names: set[str]) -> set[str]:
    return {f"{prefix}.{name}" for name in names}


KEYS = {
    "vdn": set(),
    "qmix": mlp("hyper_w_1", 0, 2) | mlp("hyper_w_final", 0, 2) | mlp("V", 0, 2) | linear("hyper_b_1"),
    "qmix/one_layer": linear("hyper_w_1") | linear("hyper_w_final") | linear("hyper_b_1") | mlp("V", 0, 2),
    "nmix": mlp("hyper_w1", 0, 2) | mlp("hyper_w2", 0, 2) | mlp("hyper_b2", 0, 2) | linear("hyper_b1.0"),
    "qatten_pymarl2": set().union(
        *(mlp(f"query_embedding_layers.{h}", 0, 2) | linear(f"key_embedding_layers.{h}") for h in range(3)),
        mlp("head_embedding_layer", 0, 2),
        mlp("constrant_value_layer", 0, 2),
    ),
    "qatten_pymarl/everything": ATTENTION | mlp("hyper_w_head", 0, 2) | mlp("V", 0, 2),
    "qatten_pymarl/one_layer": set().union(
        *(linear(f"selector_extractors.{h}", False) | linear(f"key_extractors.{h}", False) for h in range(3)),
        linear("hyper_w_head"),
        mlp("V", 0, 2),
    ),
    "qtran_base": mlp("Q", 0, 2, 4) | mlp("V", 0, 2, 4) | mlp("action_encoding", 0, 2),
    "qtran_base/coma": mlp("Q", 0, 2, 4, 6) | mlp("V", 0, 2, 4, 6) | mlp("action_encoding", 0, 2),
    "qtran_alt": mlp("Q", 0, 2, 4) | mlp("V", 0, 2),
    "qtran_alt/big": mlp("Q", 0, 2, 4, 6) | mlp("V", 0, 2, 4),
    "qplex_dmaq": mlp("hyper_w_final", 0, 2) | mlp("V", 0, 2) | under("si_weight", IMPORTANCE),
    "qplex_dmaq_qatten/everything": under("si_weight", IMPORTANCE)
    | under("attention_weight", ATTENTION | mlp("hyper_w_head", 0, 2) | mlp("V", 0, 2)),
    "qplex_lambda": IMPORTANCE,
    "central_ff": mlp("net", 0, 2, 4, 6) | mlp("V", 0, 2),
    "central_atten": mlp("atten_layer", 0, 2) | mlp("net", 0, 2, 4) | mlp("V", 0, 2),
    "powqmix_recogniser": mlp("hyper_w1", 0, 2) | mlp("hyper_w2", 0, 2) | mlp("V", 0, 2),
    "ddn": set(),
    "resz_central_ff": mlp("net", 0, 2, 4),
}
KEYS |= {"dmix": KEYS["qmix"], "dmix/one_layer": KEYS["qmix/one_layer"]}
KEYS |= {"datten": KEYS["qatten_pymarl2"], "resz_central_atten": KEYS["qatten_pymarl2"]}


@pytest.mark.parametrize("form", KEYS)
def test_keys_are_those_of_the_public_code(form: str) -> None:
    assert set(make(form).state_dict()) == KEYS[form]


@pytest.mark.parametrize("form", FORMS)
def test_checkpoints_load(form: str, tmp_path: Any) -> None:
    saved, mixer = make(form), make(form)
    torch.save(saved.state_dict(), tmp_path / "mixer.th")
    load_pymarl(mixer, tmp_path / "mixer.th")
    given = data(form, 4, 6, dtype=torch.float32)
    assert all(torch.equal(*pair) for pair in zip(call(mixer, given), call(saved, given), strict=True))
    with pytest.raises(RuntimeError, match="another"):
        load_pymarl(mixer, {"another.weight": torch.zeros(1)})


def count(kind: str, name: str, **options: Any) -> int:
    s = SHAPES[name]
    sizes = {"mixing_embed_dim": 32, "hypernet_embed": 64, "central_mixing_embed_dim": 256, "adv_hypernet_embed": 64}
    args = arguments(s._replace(obs_dim=0), **(sizes | {"num_kernel": 4} | options))
    return sum(p.numel() for p in REGISTRY[kind].from_args(args).parameters())


@pytest.mark.parametrize("name", SHAPES)
def test_parameter_counts(name: str) -> None:
    s, E, H, M, F, K = SHAPES[name], 32, 64, 256, 64, 4
    A, U, S = s.n_agents, s.n_actions, s.state_dim
    common = 2 * (S * E + E) + E + 1
    assert count("qmix", name, hypernet_layers=1) == (S + 1) * A * E + (S + 1) * E + common
    two_layers = 2 * (S * H + H) + (H + 1) * A * E + (H + 1) * E + common
    assert count("qmix", name) == count("nmix", name) == two_layers
    for c in (1, 4):
        central = (S + A * c + 1) * M + 2 * (M + 1) * M + (M + 1) + (S + 1) * M + M + 1
        assert count("central_ff", name, central_action_embed=c) == central
    one = K * ((S + 1) * (1 + A) + (S + A * U + 1) * A)
    two = K * (2 * (S + 1) * F + (S + A * U + 1) * F + (F + 1) * (1 + 2 * A))
    transform = 2 * ((S + 1) * H + (H + 1) * A)
    for layers, expected in ((1, one), (2, two)):
        assert count("qplex_lambda", name, adv_hypernet_layers=layers) == expected
        assert count("qplex_dmaq", name, adv_hypernet_layers=layers) == expected + transform
    recogniser = 2 * (S + A * U + 1) * H + (H + 1) * (A + 1) * E + (S + 1) * E + E + 1
    assert count("powqmix_recogniser", name) == recogniser


def test_parameter_counts_of_the_papers() -> None:
    """ResQ's appendix on MMM2: 320K, of a QMixer and two central networks; Qatten's sizes there give 123,333."""
    assert count("qmix", "MMM2") + 2 * count("central_ff", "MMM2", central_mixing_embed_dim=128) == 319_429
    qatten = {
        "agent_own_state_size": 7, "n_attention_head": 4, "n_query_embedding_layer1": 64,
        "n_query_embedding_layer2": 32, "n_key_embedding_layer1": 32, "n_head_embedding_layer1": 64,
        "n_head_embedding_layer2": 4, "n_constrant_value": 32,
    }  # fmt: skip
    assert count("qatten_pymarl2", "MMM2", **qatten) == 123_333
    # DMIX: 85K, and its larger form 350K. ResZ: 316K, of two attention mixers and an unrestricted one.
    assert count("dmix", "MMM2") == 84_929
    assert count("dmix", "MMM2", mixing_embed_dim=227) == 350_519
    central = {"central_mixing_embed_dim": 128, "n_target_quantiles": 8}
    resz = [count(kind, "MMM2", **qatten) for kind in ("datten", "resz_central_atten")]
    assert sum(resz) + count("resz_central_ff", "MMM2", **central) == 315_794


@pytest.mark.parametrize(
    ("kind", "optional"),
    [
        ("qatten_pymarl2", {"use_orthogonal"}),
        ("qatten_pymarl", {"hypernet_layers"}),
        ("qtran_base", {"use_orthogonal"}),
        ("qtran_alt", set()),
        ("qplex_dmaq", {"use_orthogonal", "adv_hypernet_layers"}),
        ("qplex_dmaq_qatten", {"mask_dead", "adv_hypernet_layers"}),
        ("qplex_lambda", {"use_orthogonal", "adv_hypernet_layers"}),
        ("central_ff", {"use_orthogonal"}),
        ("central_atten", set()),
        ("powqmix_recogniser", {"use_orthogonal"}),
        ("dmix", {"use_orthogonal", "hypernet_layers"}),
        ("datten", {"use_orthogonal"}),
        ("resz_central_atten", {"use_orthogonal"}),
        ("resz_central_ff", {"use_orthogonal"}),
    ],
)
def test_fields_that_are_read(kind: str, optional: set[str]) -> None:
    """Everything is required that public code has no default for, and nothing else."""
    read: set[str] = set()

    class Recorder:
        def __init__(self, fields: dict[str, Any]) -> None:
            self.fields = fields

        def __getattr__(self, name: str) -> Any:
            read.add(name)
            if name not in self.__dict__["fields"]:
                raise AttributeError(name)
            return self.__dict__["fields"][name]

    fields = vars(arguments())
    REGISTRY[kind].from_args(Recorder(fields))
    for name in sorted(read):
        without = SimpleNamespace(**{k: v for k, v in fields.items() if k != name})
        if name in optional:
            REGISTRY[kind].from_args(without)
        else:
            with pytest.raises(ValueError, match=f"args has no field '{name}'"):
                REGISTRY[kind].from_args(without)
    assert optional <= read


@pytest.mark.parametrize(
    ("form", "options", "message"),
    [
        ("qatten_pymarl2", {"agent_own_state_size": True}, "agent_own_state_size must be a positive int, got True"),
        ("qatten_pymarl2", {"agent_own_state_size": 3}, "agent_own_state_size must be at most .* = 2, got 3"),
        ("qatten_pymarl2", {"n_key_embedding_layer1": 9}, "n_key_embedding_layer1 must equal n_query_embedding_layer2"),
        ("qatten_pymarl2", {"n_head_embedding_layer2": 9}, r"n_head_embedding_layer2 must equal .* \(3\), got 9"),
        ("qatten_pymarl", {"unit_dim": 3}, "unit_dim must be at most"),
        ("qatten_pymarl", {"hypernet_layers": 3}, "hypernet_layers must be one of 1, 2, got 3"),
        ("qtran_base", {"qtran_arch": "paper"}, "qtran_arch must be one of 'qtran_paper', 'coma_critic'"),
        ("qtran_base", {"network_size": "huge"}, "network_size must be one of 'small', 'big'"),
        ("qtran_alt", {"network_size": "huge"}, "network_size must be one of"),
        ("qplex_dmaq", {"adv_hypernet_layers": 4}, "adv_hypernet_layers must be one of 1, 2, 3, got 4"),
        ("qplex_dmaq", {"num_kernel": 0}, "num_kernel must be a positive int, got 0"),
        ("qplex_dmaq_qatten", {"mask_dead": True}, "mask_dead must be False for this mixer"),
        ("qplex_dmaq_qatten", {"unit_dim": 3}, "unit_dim must be at most"),
        ("central_ff", {"central_action_embed": 0}, "central_action_embed must be a positive int"),
        ("central_atten", {"central_action_embed": 2}, "central_action_embed must be 1 for this mixer, got 2"),
        ("powqmix_recogniser", {"hypernet_embed": 0}, "hypernet_embed must be a positive int"),
        ("dmix", {"hypernet_layers": 3}, "hypernet_layers must be one of 1, 2, got 3"),
        ("datten", {"agent_own_state_size": True}, "agent_own_state_size must be a positive int, got True"),
        ("resz_central_atten", {"agent_own_state_size": 3}, "agent_own_state_size must be at most .* = 2, got 3"),
        ("resz_central_ff", {"n_target_quantiles": 0}, "n_quantiles must be a positive int, got 0"),
    ],
)
def test_wrong_sizes_raise(form: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(form, **options)


@pytest.mark.parametrize(
    "kind",
    [
        "qmix",
        "nmix",
        "qatten_pymarl2",
        "qtran_base",
        "qplex_dmaq",
        "qplex_lambda",
        "central_ff",
        "powqmix_recogniser",
        "dmix",
        "datten",
        "resz_central_ff",
    ],
)
def test_orthogonal_initialisation(kind: str) -> None:
    for layer in make(kind, use_orthogonal=True).modules():
        if isinstance(layer, nn.Linear):
            weight = layer.weight if layer.out_features <= layer.in_features else layer.weight.T
            assert_close(weight @ weight.T, torch.eye(len(weight)), 1e-5)
            assert not layer.bias.any()


# ------------------------------------------------------------------------------------------------- calls of public code


@pytest.mark.parametrize("form", ["qplex_dmaq", "powqmix_recogniser", "qtran_base", "qplex_dmaq_qatten"])
def test_actions_in_every_form(form: str) -> None:
    mixer, given = make(form), data(form, 4, 6, dtype=torch.float32)
    expected = call(mixer, given)
    for actions in (given.actions, given.actions.unsqueeze(-1), given.one_hots.flatten(-2), given.one_hots.double()):
        for got, want in zip(call(mixer, given._replace(one_hots=actions)), expected, strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("form", ["qplex_dmaq", "powqmix_recogniser", "qtran_base", "qplex_dmaq_qatten"])
def test_wrong_actions_raise(form: str) -> None:
    mixer, given = make(form), data(form, 4, 6, dtype=torch.float32)
    for actions, message in (
        (given.one_hots[:, 1:], r"actions must be one-hots \[\*\(4, 6\), 3, 5\], got shape \(4, 5, 3, 5\)"),
        (given.one_hots[..., 1:], r"actions must be one-hots"),
        (given.actions[..., 1:], r"actions must be indices \[\*\(4, 6\), 3\], got shape \(4, 6, 2\)"),
        (given.actions + 1, r"actions must lie in \[-1, 5\), got 5"),
        (given.one_hots.clone().requires_grad_(), "actions must not require a gradient"),
    ):
        with pytest.raises(ValueError, match=message):
            call(mixer, given._replace(one_hots=actions))


@pytest.mark.parametrize("kind", ["qatten_pymarl2", "qatten_pymarl", "qplex_dmaq", "powqmix_recogniser"])
def test_wrong_utilities_raise(kind: str) -> None:
    mixer, given = make(kind), data(kind, 4, 6, dtype=torch.float32)
    for changes, message in (
        ({"agent_qs": given.agent_qs[..., 1:]}, "agent_qs must be .* n_agents = 3"),
        ({"agent_qs": given.agent_qs.long()}, "floating"),
        ({"states": given.states[..., 1:]}, "states must be .*7"),
        ({"states": given.states[1:]}, "states must be"),
        ({"states": None}, "torch.Tensor"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            call(mixer, given._replace(**changes))


def test_parts_without_their_inputs_raise() -> None:
    for form in ("qplex_dmaq", "qplex_dmaq_qatten"):
        mixer, given = make(form), data(form, 4, dtype=torch.float32)
        mixer(given.agent_qs, given.states, is_v=True)
        with pytest.raises(TypeError, match=r"actions must be a torch\.Tensor"):
            mixer(given.agent_qs, given.states)
        with pytest.raises(TypeError, match=r"max_q(s|_i) must be a torch\.Tensor"):
            mixer(given.agent_qs, given.states, given.one_hots)


def test_central_utilities_with_and_without_their_axis() -> None:
    for form in ("central_ff", "central_atten"):
        mixer, given = make(form), data(form, 4, 6, dtype=torch.float32)
        assert isinstance(mixer, StateMixer)
        assert torch.equal(mixer(given.central_qs.squeeze(-1), given.states), mixer(given.central_qs, given.states))
        with pytest.raises(ValueError, match=r"must be \[..., 3, 1\] or \[..., 3\] and \[..., 7\]"):
            mixer(given.central_qs[..., 1:, :], given.states)
    mixer, given = make("central_ff/three"), data("central_ff/three", 4, 6, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"must be \[..., 3, 3\] and \[..., 7\]"):
        mixer(given.agent_qs, given.states)


def test_only_mask_dead_looks_at_actions() -> None:
    given = data("qatten_pymarl", 4, 6, dtype=torch.float32)
    plain: Any = make("qatten_pymarl")
    assert torch.equal(plain(given.agent_qs, given.states).q_tot, plain(given.agent_qs, given.states, 1).q_tot)
    dead = make("qatten_pymarl/everything")
    with pytest.raises(TypeError, match=r"actions must be a torch\.Tensor, got NoneType"):
        dead(given.agent_qs, given.states)
    with pytest.raises(ValueError, match=r"actions must be indices \[..., 3\]"):
        dead(given.agent_qs, given.states, given.actions[..., 1:])


def test_qtran_actions_of_the_batch_or_given() -> None:
    for form in ("qtran_base", "qtran_base/coma"):
        mixer, given = make(form), data(form, 4, 6, dtype=torch.float32)
        other = given.one_hots.roll(1, 0)
        batch = {"state": given.states, "actions_onehot": given.one_hots}
        q, v = mixer(batch, given.hidden_states, actions=other)
        assert q.shape == v.shape == (24, 1)
        assert torch.equal(q, mixer(batch | {"actions_onehot": other}, given.hidden_states)[0])
        assert not torch.equal(q, mixer(batch, given.hidden_states)[0])
        with pytest.raises(ValueError, match=r"hidden_states must be \[..., 3, 6\], got \(4, 6, 3, 5\)"):
            mixer(batch, given.hidden_states[..., 1:])


def test_qtran_alt_takes_masked_actions() -> None:
    mixer, given = make("qtran_alt"), data("qtran_alt", 4, 6, dtype=torch.float32)
    batch = {"state": given.states, "actions_onehot": given.one_hots}
    masked = given.one_hots.unsqueeze(-3) * (1 - torch.eye(3)).unsqueeze(-1)
    for form in (masked, masked.reshape(4 * 6 * 3, 15)):
        for got, want in zip(mixer(batch, form), mixer(batch), strict=True):
            assert torch.equal(got, want)
    with pytest.raises(ValueError, match="masked_actions must hold one-hots"):
        mixer(batch, masked[1:])


def test_recogniser_tells_its_weights() -> None:
    mixer: Any = make("powqmix_recogniser").double()
    given = data("powqmix_recogniser", 4, 6)
    weights = mixer.importance(given.states, given.one_hots)
    q_r, v = mixer(given.agent_qs, given.states, given.actions, given.max_qs)
    assert weights.shape == (4, 6, 3)
    assert_close((weights * (given.agent_qs - given.max_qs)).sum(-1, keepdim=True) + v, q_r, 1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_printed_sizes(kind: str) -> None:
    mixer = make(kind)
    assert isinstance(mixer, Mixer)
    assert kind in ("vdn", "ddn") or f"n_agents={SMALL.n_agents}" in repr(mixer)


# ------------------------------------------------------------------------------------------------------- distributions


QUANTILE_FORMS = [form for form in FORMS if isinstance(make(form), QuantileMixer)]


@pytest.mark.parametrize("form", QUANTILE_FORMS)
@pytest.mark.parametrize("quantiles", [1, 3, 17, 32])
def test_any_number_of_quantiles(form: str, quantiles: int) -> None:
    mixer: Any = make(form, n_target_quantiles=quantiles).double()
    given = data(form, 4, 6)
    given = given._replace(central_qs=torch.randn(4, 6, 3, quantiles, dtype=torch.float64))
    z_tot = mixer(given.central_qs, given.states)
    assert z_tot.shape == (4, 6, 1, quantiles)
    assert_close(z_tot, public_form(mixer, given)[0], 1e-12)
    assert torch.equal(z_tot, mixer(given.central_qs, given.states, True))  # PyMARL's third argument


def test_an_unrestricted_mixer_takes_the_quantiles_it_was_built_for() -> None:
    mixer, given = make("resz_central_ff"), data("resz_central_ff", 4, 6, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"with 5 quantiles, which the mixer was built for, got shape \(4, 6, 3, 4\)"):
        mixer(given.central_qs[..., 1:], given.states)


@pytest.mark.parametrize("form", QUANTILE_FORMS)
def test_wrong_distributions_raise(form: str) -> None:
    mixer, given = make(form), data(form, 4, 6, dtype=torch.float32)
    bad: list[tuple[Any, str]] = [
        (given.central_qs.long(), "floating"),
        (given.central_qs[0, 0, 0], r"agent_qs must be \[..., n_agents, quantiles\]"),
        (given.central_qs[..., :0], r"agent_qs must be \[..., n_agents, quantiles\]"),
        (None, "torch.Tensor"),
    ]
    if form != "ddn":
        bad.append((given.central_qs[..., 1:, :], r"n_agents = 3, got shape \(4, 6, 2, 5\)"))
    for agent_qs, message in bad:
        with pytest.raises((ValueError, TypeError), match=message):
            mixer(agent_qs, given.states)
    if form != "ddn":
        with pytest.raises(ValueError, match=r"states must be .*7"):
            mixer(given.central_qs, given.states[..., 1:])


@pytest.mark.parametrize("form", ["ddn", "dmix", "datten"])
def test_means_are_mixed_monotonically(form: str) -> None:
    """The mean of the joint distribution depends on the agents' means only, and falls in none of them."""
    mixer: Any = make(form).double()
    given = data(form, 4, 6).map(Tensor.requires_grad_)
    mean = mixer(given.central_qs, given.states).mean(-1)
    (slopes,) = torch.autograd.grad(mean.sum(), given.central_qs)
    assert (slopes >= 0).all()
    assert_close(slopes, slopes[..., :1].expand_as(slopes), 1e-12)
    reshaped = given.central_qs.flip(-1)  # other shapes, the same means
    assert_close(mixer(reshaped, given.states).mean(-1), mean, 1e-12)
