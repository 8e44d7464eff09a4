"""Every kind of mixer in its forms: how to build it, how to call it, and its equations layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastmix import backends, mixers
from fastmix.mixers import REGISTRY, Mixer
from fastmix.mixers.base import attended
from tests.generators import Shape, joint_actions

SMALL = Shape(3, 5, 7, 4)
HIDDEN = 6
"""Width of QTRAN's hidden states"""
QUANTILES = 5
"""of each agent's return, for mixers of distributions"""

FORMS: dict[str, dict[str, Any]] = {
    "vdn": {},
    "qmix": {},
    "qmix/one_layer": {"hypernet_layers": 1},
    "qmix_noabs": {},
    "nmix": {},
    "nmix/softplus": {"qmix_pos_func": "softplus"},
    "qatten_pymarl2": {},
    "qatten_pymarl2/unweighted": {"type": "plain"},
    "qatten_pymarl": {"hypernet_layers": 1},
    "qatten_pymarl/everything": {"nonlinear": True, "weighted_head": True, "state_bias": True, "mask_dead": True},
    "qatten_pymarl/one_layer": {"hypernet_layers": 1, "weighted_head": True},
    "qtran_base": {},
    "qtran_base/coma": {"qtran_arch": "coma_critic", "network_size": "big"},
    "qtran_alt": {},
    "qtran_alt/big": {"network_size": "big"},
    "qplex_dmaq": {},
    "qplex_dmaq/one_layer": {"adv_hypernet_layers": 1, "is_minus_one": False},
    "qplex_dmaq/unweighted": {"adv_hypernet_layers": 3, "weighted_head": False},
    "qplex_dmaq_qatten": {},
    "qplex_dmaq_qatten/everything": {"nonlinear": True, "weighted_head": True, "is_minus_one": False},
    "qplex_dmaq_qatten/no_bias": {"state_bias": False},
    "qplex_lambda": {},
    "central_ff": {},
    "central_ff/three": {"central_action_embed": 3},
    "central_atten": {},
    "powqmix_recogniser": {},
    "ddn": {},
    "dmix": {},
    "dmix/one_layer": {"hypernet_layers": 1},
    "datten": {},
    "datten/unweighted": {"type": "plain"},
    "resz_central_atten": {},
    "resz_central_ff": {},
}
"""Kind, and form where there are several -> what it reads differently from `arguments`"""

OPS = {
    **dict.fromkeys(("vdn", "ddn"), ()),
    **dict.fromkeys(("qatten_pymarl2", "qatten_pymarl", "datten", "resz_central_atten"), ("attention",)),
    "qplex_dmaq": ("duplex",),
    "qplex_dmaq_qatten": ("attention", "duplex"),
    "qplex_lambda": ("importance",),
    "powqmix_recogniser": ("recognise",),
    **dict.fromkeys(("qmix", "qmix_noabs", "nmix"), ("monotonic",)),
    "dmix": ("monotonic", "quantile"),
    **dict.fromkeys(("qtran_base", "qtran_alt", "central_ff", "central_atten", "resz_central_ff"), ("unrestricted",)),
}
"""Kind -> the ops it runs"""

RUNS = [
    (form, backend)
    for form in FORMS
    for backend in backends.NAMES
    if all(backend in backends.available(op) for op in OPS[form.partition("/")[0]])
]
"""Every form with every backend that has all its ops"""

UNUSED = {
    "qatten_pymarl2/unweighted": ("head_embedding_layer.",),
    "datten/unweighted": ("head_embedding_layer.",),
    "qtran_base/coma": ("action_encoding.",),
    "qplex_dmaq/unweighted": ("hyper_w_final.", "V."),
}
"""Form -> beginnings of names of parameters without a gradient, as in public code"""


class Inputs(NamedTuple):
    """What mixers are called with."""

    agent_qs: Tensor
    """`[..., A]`"""
    states: Tensor
    """`[..., S]`"""
    max_qs: Tensor
    """`[..., A]`"""
    hidden_states: Tensor
    """`[..., A, D]`"""
    central_qs: Tensor
    """`[..., A, c]`; `[..., A, N]` for mixers of distributions"""
    actions: Tensor
    """`[..., A]` int64"""
    one_hots: Tensor
    """`[..., A, U]`, of `actions`"""

    def map(self, function: Callable[[Tensor], Tensor]) -> Inputs:
        """The floating-point inputs changed; one-hots as they are."""
        *numbers, actions, one_hots = self
        return Inputs._make([*map(function, numbers), actions, one_hots])


def arguments(shape: Shape = SMALL, embed: int = 8, **options: Any) -> SimpleNamespace:
    """A namespace with what all kinds read."""
    own = max(1, min(2, shape.state_dim // shape.n_agents))
    fields = {
        "n_agents": shape.n_agents, "n_actions": shape.n_actions, "state_shape": shape.state_dim,
        "mixing_embed_dim": embed, "hypernet_embed": 6, "hypernet_layers": 2, "qmix_pos_func_beta": 1.0,
        "agent_own_state_size": own, "n_attention_head": 3, "n_query_embedding_layer1": 5, "n_constrant_value": 4,
        "n_query_embedding_layer2": embed, "n_key_embedding_layer1": embed, "n_head_embedding_layer1": 7,
        "n_head_embedding_layer2": 3, "type": "weighted",
        "unit_dim": own, "n_head": 3, "attend_reg_coef": 0.5, "nonlinear": False, "weighted_head": True,
        "state_bias": True, "mask_dead": False, "is_minus_one": True,
        "num_kernel": 3, "adv_hypernet_layers": 2, "adv_hypernet_embed": embed,
        "rnn_hidden_dim": HIDDEN, "qtran_arch": "qtran_paper", "network_size": "small",
        "central_mixing_embed_dim": embed, "central_action_embed": 1, "n_target_quantiles": QUANTILES,
    }  # fmt: skip
    return SimpleNamespace(**(fields | options))


def make(form: str, shape: Shape = SMALL, embed: int = 8, **options: Any) -> Mixer:
    """The mixer of a form."""
    return REGISTRY[form.partition("/")[0]].from_args(arguments(shape, embed, **FORMS[form] | options))


def data(form: str, *lead: int, shape: Shape = SMALL, dtype: torch.dtype = torch.float64) -> Inputs:
    """Random inputs; the largest utilities are the largest, and some agents act not at all."""
    kind = REGISTRY[form.partition("/")[0]]
    embed = QUANTILES if issubclass(kind, mixers.QuantileMixer) else FORMS[form].get("central_action_embed", 1)
    agent_qs = torch.randn(*lead, shape.n_agents, dtype=dtype)
    actions = joint_actions(shape, *lead).clamp(min=-1)
    table = torch.cat([torch.zeros(1, shape.n_actions), torch.eye(shape.n_actions)]).to(dtype)
    return Inputs(
        agent_qs,
        torch.randn(*lead, shape.state_dim, dtype=dtype),
        agent_qs + torch.rand(*lead, shape.n_agents, dtype=dtype),
        torch.randn(*lead, shape.n_agents, HIDDEN, dtype=dtype),
        torch.randn(*lead, shape.n_agents, embed, dtype=dtype),
        actions,
        table[actions + 1],
    )


def call(mixer: Callable[..., Any], given: Inputs, kind: Mixer | None = None) -> list[Tensor]:
    """Everything that the kind's call returns. `mixer` may be a stand-in that is called like `kind`."""
    kind = kind or (mixer if isinstance(mixer, Mixer) else None)
    q, s, actions = given.agent_qs, given.states, given.actions
    if isinstance(kind, mixers.QMixerCentralFF | mixers.QMixerCentralAtten | mixers.QuantileMixer):
        return [mixer(given.central_qs, s)]
    if isinstance(kind, mixers.StateMixer):
        return [mixer(q, s)]
    if isinstance(kind, mixers.QattenPymarlMixer):
        q_tot, regulariser, entropies = mixer(q, s, actions.unsqueeze(-1))
        return [q_tot, regulariser, torch.stack(entropies)]
    if isinstance(kind, mixers.QTranBase):
        return list(mixer({"state": s, "actions_onehot": given.one_hots}, given.hidden_states))
    if isinstance(kind, mixers.QTranAlt):
        return list(mixer({"state": s, "actions_onehot": given.one_hots}))
    if isinstance(kind, mixers.DMAQSIWeight):
        return [mixer(s, given.one_hots)]
    if isinstance(kind, mixers.Recogniser):
        return list(mixer(q, s, given.one_hots, given.max_qs))
    parts = [mixer(q, s, given.one_hots, given.max_qs, is_v=is_v) for is_v in (True, False)]
    if isinstance(parts[0], Tensor):
        return parts
    v, adv = parts
    return [v.q_tot, adv.q_tot, v.attend_mag_regs, torch.stack(v.head_entropies)]


def joint(mixer: mixers.ActionMixer, given: Inputs) -> list[Tensor]:
    """What `call` returns, from `ActionMixer.joint`."""
    value = mixer.joint(given.agent_qs, given.states, given.actions, given.max_qs)
    parts = [value.q_tot] if value.v_tot is None or value.adv_tot is None else [value.v_tot, value.adv_tot]
    if isinstance(mixer, mixers.QattenPymarlMixer | mixers.DMAQQattenMixer):
        _, regulariser, entropies = attended(value, value.q_tot, mixer.attend_reg_coef)
        parts += [regulariser, torch.stack(entropies)]
    return parts


# ------------------------------------------------------------------------------------------------------- the equations


def public_form(mixer: Mixer, given: Inputs) -> list[Tensor]:
    """What `call` returns, as equations, with the layers that the mixer holds and one-hots built in full."""
    m: Any = mixer
    q, s, actions = given.agent_qs, given.states, given.one_hots
    both = torch.cat([s, actions.flatten(-2)], -1)
    if isinstance(mixer, mixers.VDNMixer):
        return [q.sum(-1, keepdim=True)]
    if isinstance(mixer, mixers.MonotonicMixer):
        return [_monotonic(mixer, q, s)]
    if isinstance(mixer, mixers.DDNMixer):
        return [given.central_qs.sum(-2, keepdim=True)]
    if isinstance(mixer, mixers.DMixer):
        means = given.central_qs.mean(-1, keepdim=True)
        nets = (m.hyper_w_1, m.hyper_b_1, m.hyper_w_final, m.V)
        mixed = _mixing_network(nets, torch.abs, means.squeeze(-1), s)
        return [mixed.unsqueeze(-1) + (given.central_qs - means).sum(-2, keepdim=True)]
    if isinstance(mixer, mixers.ResZCentralFF):
        return [m.net(torch.cat([s, given.central_qs.flatten(-2)], -1)).unsqueeze(-2)]
    if isinstance(mixer, mixers.DattenMixer | mixers.ResZCentralAtten):
        heads = m.head_embedding_layer(s).abs() if m.weighted else torch.ones_like(s[..., :1])
        p, logits = _attention(m.query_embedding_layers, m.key_embedding_layers, q, s.detach(), s, m.own_size, None)
        if isinstance(mixer, mixers.ResZCentralAtten):
            p = logits / m.key_embedding_layers[0].out_features ** 0.5
        each_head = (p.unsqueeze(-1) * given.central_qs.unsqueeze(-3)).sum(-2)
        mixed = (heads.unsqueeze(-1) * each_head).sum(-2, keepdim=True)
        return [mixed + m.constrant_value_layer(s).unsqueeze(-1)]
    if isinstance(mixer, mixers.QattenMixer):
        heads = m.head_embedding_layer(s).abs() if m.weighted else torch.ones_like(s[..., :1])
        p, _ = _attention(m.query_embedding_layers, m.key_embedding_layers, q, s.detach(), s, m.own_size, None)
        weights = (heads.unsqueeze(-1) * p).sum(-2)
        return [(weights * q).sum(-1, keepdim=True) + m.constrant_value_layer(s)]
    if isinstance(mixer, mixers.QattenPymarlMixer):
        alive = given.actions != 0 if m.mask_dead else None
        weights, v, statistics = _pymarl_attention(m, q, s, m.unit_dim, alive)
        q_tot = (weights * q).sum(-1, keepdim=True)
        return [q_tot if v is None else q_tot + v, m.attend_reg_coef * statistics[0], statistics[1]]
    if isinstance(mixer, mixers.QTranBase):
        encoded = m.action_encoding(torch.cat([given.hidden_states, actions], -1)).sum(-2)
        x = torch.cat([s, encoded if m.arch == "qtran_paper" else actions.flatten(-2)], -1)
        return [m.Q(x).reshape(-1, 1), m.V(s).reshape(-1, 1)]
    if isinstance(mixer, mixers.QTranAlt):
        rows = []
        for i in range(m.n_agents):
            others = actions.clone()
            others[..., i, :] = 0
            itself = torch.eye(m.n_agents).to(s)[i].expand(*s.shape[:-1], -1)
            rows.append(m.Q(torch.cat([s, others.flatten(-2), itself], -1)))
        v = m.V(s).unsqueeze(-2).expand(*s.shape[:-1], m.n_agents, 1)
        return [torch.stack(rows, -2).reshape(-1, m.n_actions), v.reshape(-1, 1)]
    if isinstance(mixer, mixers.DMAQSIWeight):
        return [_importance(m, s, both).reshape(-1, m.n_agents)]
    if isinstance(mixer, mixers.DMAQer):
        w, b = (m.hyper_w_final(s).abs() + 1e-10, m.V(s)) if m.weighted_head else (1.0, 0.0)
        return _dueling(m, w, b, given, both)
    if isinstance(mixer, mixers.DMAQQattenMixer):
        weights, v, statistics = _pymarl_attention(m.attention_weight, q, s, m.unit_dim, None)
        parts = _dueling(m, weights + 1e-10, v * float(m.state_bias) / m.n_agents, given, both)
        return [*parts, m.attend_reg_coef * statistics[0], statistics[1]]
    if isinstance(mixer, mixers.QMixerCentralFF):
        return [m.net(torch.cat([s, given.central_qs.flatten(-2)], -1)) + m.V(s)]
    if isinstance(mixer, mixers.QMixerCentralAtten):
        weights = m.atten_layer(s).unflatten(-1, (m.n_agents, -1)).softmax(-2)
        return [m.net((weights * given.central_qs).sum(-2)) + m.V(s)]
    assert isinstance(mixer, mixers.Recogniser)
    w1, w2 = m.hyper_w1(both).abs().unflatten(-1, (m.n_agents, -1)), m.hyper_w2(both).abs()
    importance = (w1 * w2.unsqueeze(-2)).sum(-1)
    v = m.V(s)
    return [(importance * (q - given.max_qs).detach()).sum(-1, keepdim=True) + v, v]


def _monotonic(mixer: mixers.MonotonicMixer, agent_qs: Tensor, states: Tensor) -> Tensor:
    nets: list[Any] = []
    if isinstance(mixer, mixers.NMixer):
        nets = [mixer.hyper_w1, mixer.hyper_b1, mixer.hyper_w2, mixer.hyper_b2]
    elif isinstance(mixer, mixers.QMixer):
        nets = [mixer.hyper_w_1, mixer.hyper_b_1, mixer.hyper_w_final, mixer.V]
    positive: dict[str, Callable[[Tensor], Tensor]] = {
        "abs": torch.abs,
        "softplus": nn.Softplus(beta=mixer.beta),
        "quadratic": lambda w: w * w / 2,
        "none": lambda w: w,
    }
    return _mixing_network(nets, positive[mixer.positivity], agent_qs, states)


def _mixing_network(
    nets: Sequence[Any], make_positive: Callable[[Tensor], Tensor], agent_qs: Tensor, states: Tensor
) -> Tensor:
    """`nets` generate `w1`, `b1`, `w2` and `v`, in this order."""
    w1, b1, w2, v = (net(states) for net in nets)
    w1 = make_positive(w1).unflatten(-1, (agent_qs.shape[-1], -1))
    hidden = nn.functional.elu(torch.einsum("...a,...ae->...e", agent_qs, w1) + b1)
    return (hidden * make_positive(w2)).sum(-1, keepdim=True) + v


def _attention(
    queries: Any, keys: Any, agent_qs: Tensor, own_of: Tensor, states: Tensor, own: int, alive: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Attention and unscaled logits, `[..., H, A]`."""
    n_agents = agent_qs.shape[-1]
    features = own_of[..., : n_agents * own].unflatten(-1, (n_agents, own))
    if keys[0].in_features > own:
        features = torch.cat([features, agent_qs.unsqueeze(-1)], -1)
    logits = torch.stack(
        [(query(states).unsqueeze(-2) * key(features)).sum(-1) for query, key in zip(queries, keys, strict=True)],
        -2,
    )
    scaled = logits / keys[0].out_features ** 0.5
    if alive is not None:
        scaled = torch.where(alive.unsqueeze(-2), scaled, -99999999.0)
    return scaled.softmax(-1), logits


def _pymarl_attention(
    m: Any, agent_qs: Tensor, states: Tensor, own: int, alive: Tensor | None
) -> tuple[Tensor, Any, tuple[Tensor, Tensor]]:
    p, logits = _attention(m.selector_extractors, m.key_extractors, agent_qs, states, states, own, alive)
    heads = torch.ones_like(p[..., 0]) if m.hyper_w_head is None else m.hyper_w_head(states).abs()
    squares = logits.square().mean(-1).reshape(-1, len(m.key_extractors)).mean(0).sum()
    entropies = -(p * (p + 1e-8).log()).sum(-1).reshape(-1, len(m.key_extractors)).mean(0)
    return (heads.unsqueeze(-1) * p).sum(-2), None if m.V is None else m.V(states), (squares, entropies)


def _importance(m: Any, states: Tensor, both: Tensor) -> Tensor:
    total: Any = 0.0
    for key, agents, action in zip(m.key_extractors, m.agents_extractors, m.action_extractors, strict=True):
        total = total + (key(states).abs() + 1e-10) * agents(states).sigmoid() * action(both).sigmoid()
    importance: Tensor = total
    return importance


def _dueling(m: Any, w: Any, b: Any, given: Inputs, both: Tensor) -> list[Tensor]:
    values, largest = w * given.agent_qs + b, w * given.max_qs + b
    importance = _importance(m.si_weight, given.states, both) - float(m.is_minus_one)
    advantages = (values - largest).detach() if isinstance(values, Tensor) else values
    return [values.sum(-1, keepdim=True), (advantages * importance).sum(-1, keepdim=True)]
