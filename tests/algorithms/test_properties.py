"""What the papers prove of their algorithms, on random games, and what makes a step of ours theirs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fastmix.algorithms import REGISTRY, Algorithm, EpisodeBatch, Scheme, base, make, weighting
from fastmix.mixers import Recogniser
from fastmix.ops import td_loss
from fastmix.ops.recurrent import RecurrentOutput
from tests.generators import Shape, episodes

AGENTS, ACTIONS, STATE, OBS = 3, 4, 6, 5
SCHEME = Scheme(AGENTS, ACTIONS, OBS, STATE, 5)


def joint_actions(n_agents: int, n_actions: int) -> Tensor:
    return torch.tensor(list(itertools.product(range(n_actions), repeat=n_agents)))


SIZES: dict[str, Any] = {
    "rnn_hidden_dim": 6, "mixing_embed_dim": 4, "hypernet_embed": 5, "central_mixing_embed_dim": 7,
    "n_query_embedding_layer1": 5, "n_query_embedding_layer2": 4, "adv_hypernet_embed": 5, "recogniser_embed_dim": 4,
    "recogniser_hypernet_embed": 5,
}  # fmt: skip


def wild(name: str, seed: int, **settings: Any) -> Algorithm:
    """A small algorithm with larger weights than it would be initialised with, in float64."""
    algorithm = make(name, SCHEME, seed=seed, **(SIZES | settings)).double()
    torch.manual_seed(seed)
    with torch.no_grad():
        for network in algorithm.networks.values():
            for p in network.parameters():
                p.copy_(torch.randn_like(p))
    return algorithm


def every_joint_value(algorithm: Algorithm, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    """The greedy joint action (as an index) in some state, and the tables ``[U ** A]`` of all joint actions there."""
    g = torch.Generator().manual_seed(seed)
    obs = torch.randn(1, 1, AGENTS, OBS, generator=g, dtype=torch.float64)
    states = torch.randn(1, 1, STATE, generator=g, dtype=torch.float64)
    avail = torch.rand(1, 1, AGENTS, ACTIONS, generator=g) < 0.7
    avail[..., 1] = True
    joint = joint_actions(AGENTS, ACTIONS)
    joint = joint[avail[0, 0].gather(1, joint.T).all(0)]
    last = torch.full((1, 1, AGENTS), -1)
    qs = algorithm.utilities(obs, last).masked_fill(~avail, -torch.inf)
    greedy = (joint == qs.argmax(-1)[0, 0]).all(-1).nonzero().squeeze()
    copies = [x.expand(len(joint), *x.shape[1:]) for x in (obs, last, avail, states)]
    values = algorithm.joint_values(*(*copies, joint.unsqueeze(1)))
    return greedy, {key: value.flatten() for key, value in values.items()}


# ---- ResQ ----


@pytest.mark.parametrize("mixer", ["qmix", "vdn", "qatten_pymarl2"])
@pytest.mark.parametrize("residual_mixer", ["central_ff", "vdn", "qmix", "qatten_pymarl2"])
def test_the_hard_residual_satisfies_igm_for_any_weights(mixer: str, residual_mixer: str) -> None:
    """ResQ, theorem 1: the greedy joint action of the utilities has the largest ``Q_jt``."""
    for seed in range(10):
        algorithm = wild("resq", seed, mixer=mixer, residual_mixer=residual_mixer)
        greedy, tables = every_joint_value(algorithm, seed)
        assert tables["w_r Q_r"][greedy] == 0
        assert (tables["w_r Q_r"] <= 0).all()
        assert torch.equal(tables["Q_jt"], tables["Q_tot"] + tables["w_r Q_r"])
        # Q_tot itself is summed in another order for every joint action.
        assert tables["Q_jt"][greedy] >= tables["Q_jt"].max() - 1e-9 * tables["Q_tot"].abs().max()


@pytest.mark.parametrize(("name", "compat"), [("resq_mse", "paper"), ("resq", "released")])
def test_a_free_residual_does_not(name: str, compat: str) -> None:
    """The test above can fail: without the sign, some greedy joint action is not the best of ``Q_jt``."""
    misses = 0
    for seed in range(10):
        greedy, tables = every_joint_value(wild(name, seed, compat=compat), seed)
        misses += int(tables["Q_jt"][greedy] < tables["Q_jt"].max() - 1e-6)
    assert misses > 0


# ---- monotonic joint values, and QPLEX ----


@pytest.mark.parametrize("name", ["vdn", "qmix", "qatten", "qplex", "cw_qmix", "ow_qmix", "powqmix"])
def test_the_greedy_joint_action_is_the_best_of_q_tot(name: str) -> None:
    for seed in range(10):
        greedy, tables = every_joint_value(wild(name, seed), seed)
        q_tot = tables["Q_tot"]
        assert q_tot[greedy] >= q_tot.max() - 1e-9 * q_tot.abs().max()


# ---- POWQMIX ----


def test_greedy_joint_actions_are_always_recognised() -> None:
    """POWQMIX, lemma: ``A_igm`` is a subset of ``A_r``, whatever the weights, with equality of ``Q_r`` and ``V``."""
    for seed in range(25):
        greedy, tables = every_joint_value(wild("powqmix", seed), seed)
        assert tables["Q_r"][greedy] == tables["Q_r"].max()
    algorithm = make("powqmix", SCHEME, tolerance=0.0).double()
    batch = batch_of(torch.float64)
    terms = algorithm.losses(batch)
    greedy_taken = (terms["greedy_actions"] == batch.actions).all(-1)[:, :-1] & (batch.mask[..., 0] != 0)
    assert greedy_taken.any()
    assert torch.equal(terms["q_r"][greedy_taken], terms["v_r"][greedy_taken])
    assert (terms["weights"][greedy_taken] == algorithm.config.w_high).all()


@pytest.mark.parametrize("seed", range(4))
def test_with_a_converged_recogniser_the_optimum_is_recognised(seed: int) -> None:
    """POWQMIX, lemma: ``A_tgm`` is a subset of ``A_r``, also where the utilities' greedy joint action is another."""
    g = torch.Generator().manual_seed(seed)
    joint = joint_actions(2, 3)
    payoff = 4 * torch.randn(9, 1, generator=g)
    utilities = torch.rand(2, 3, generator=g)
    if seed % 2 == 0:  # the greedy joint action is the worst of all
        worst = joint[payoff.argmin()]
        utilities[torch.arange(2), worst] = 1.5
    qs = utilities.gather(1, joint.T).T
    best = utilities.amax(1).expand(9, 2)
    torch.manual_seed(seed)
    recogniser = Recogniser(2, 3, STATE)
    optimiser = torch.optim.Adam(recogniser.parameters(), lr=5e-3)
    states = torch.ones(9, STATE)
    for _ in range(1000):
        optimiser.zero_grad()
        (recogniser(qs, states, joint, best).q_r - payoff).square().mean().backward()
        optimiser.step()
    recognition = recogniser(qs, states, joint, best)
    recognised = recognition.q_r >= recognition.v - 0.05
    assert recognised[payoff.argmax()]
    greedy = (qs == best).all(-1)
    assert recognised[greedy].all()
    # The worst is recognised only where it is the greedy one.
    assert not recognised[payoff.argmin()] or greedy[payoff.argmin()]


# ---- weights ----


def weights_of(kind: str, q_tot: float, target: float, greedy_value: float, greedy: bool) -> float:
    config = make("qmix", SCHEME, weighting="cw", w_high=5.0, w=0.1).config
    config = type(config)(**{**config.__dict__, "weighting": kind})
    values, targets, greedy_values = torch.tensor([q_tot, target, greedy_value]).double().view(3, 1, 1, 1)
    favoured = weighting.favoured(config, greedy_values, torch.full((1, 1, 1), greedy))
    factors = td_loss(values, targets, torch.ones(1, 1, 1), favoured=favoured).factors
    assert factors is not None
    return factors.item()


@pytest.mark.parametrize(
    ("kind", "q_tot", "target", "greedy_value", "greedy", "expected"),
    [
        ("ow", 1.0, 2.0, 0.0, False, 5.0),
        ("ow", 2.0, 2.0, 0.0, True, 0.1),  # strictly underestimated
        ("cw", 9.0, 2.0, 1.0, False, 5.0),
        ("cw", 9.0, 2.0, 2.0, False, 0.1),  # strictly larger
        ("cw", 9.0, 2.0, 3.0, True, 5.0),
        ("igm", 0.0, 2.0, 1.0, False, 0.1),
        ("igm", 9.0, 2.0, 3.0, True, 5.0),
    ],
)
def test_weights_at_and_beside_ties(
    kind: str, q_tot: float, target: float, greedy_value: float, greedy: bool, expected: float
) -> None:
    assert weights_of(kind, q_tot, target, greedy_value, greedy) == expected


# ---- what a step computes ----


def batch_of(dtype: torch.dtype = torch.float32, seed: int = 0) -> EpisodeBatch:
    return EpisodeBatch(*episodes(Shape(AGENTS, ACTIONS, STATE, OBS), 4, 5, dtype=dtype, seed=seed))


UNROLLED = {
    "cw_qmix": ["agent", "central_agent", "target_central_agent"],
    "powqmix": ["agent", "central_agent", "target_central_agent"],
    "resq": ["agent", "central_agent", "target_central_agent", "residual_agent"],
    "qplex": ["agent", "target_agent"],
    "qtran": ["agent", "target_agent"],
}


@pytest.mark.parametrize("name", UNROLLED)
def test_all_utilities_of_a_step_are_one_call(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing is unrolled that the loss does not read; nor do such networks exist."""
    calls: list[int] = []

    def counted(obs: Tensor, networks: Sequence[Any], *rest: Any, **options: Any) -> list[RecurrentOutput]:
        calls.append(len(networks))
        return real(obs, networks, *rest, **options)

    real = base.recurrent
    algorithm = make(name, SCHEME)
    monkeypatch.setattr(base, "recurrent", counted)
    algorithm.step(batch_of())
    assert calls == [len(UNROLLED[name])]
    assert {key for key in algorithm.networks if key.endswith("agent")} == set(UNROLLED[name])


@pytest.mark.parametrize("name", REGISTRY)
def test_every_parameter_is_learnt(name: str) -> None:
    """Except those that a setting leaves aside, which have no gradient at all."""
    algorithm = make(name, SCHEME)
    algorithm.step(batch_of())
    none = {
        f"{key}.{own}"
        for key in algorithm.online
        for own, p in algorithm.networks[key].named_parameters()
        if p.grad is None
    }
    assert none == set()


def test_coefficients_weigh_the_terms_of_the_loss() -> None:
    """Terms are reported with their factors, and add up to the loss."""
    cases: dict[str, dict[str, Any]] = {
        "qtran": {},
        "cw_qmix": {"central_loss": 0.25},
        "powqmix": {"recogniser_loss": 3.0, "central_loss": 2.0},
        "resq_mse": {"noopt_loss": 7.0},
    }
    batch = batch_of(torch.float64)
    for name, factors in cases.items():
        once = make(name, SCHEME).double().losses(batch)
        again = make(name, SCHEME, **factors).double().losses(batch)
        for term, factor in factors.items():
            torch.testing.assert_close(again[term], factor * once[term])
        if name == "qtran":
            total = again["td_loss"] + again["opt_loss"] + 0.1 * again["nopt_loss"]
        else:
            parts = ("qmix_loss", "central_loss", "recogniser_loss", "noopt_loss")
            total = torch.stack([again[part] for part in parts if part in again]).sum()
        torch.testing.assert_close(again["loss"], total)


def test_the_residual_agent_starts_as_the_agent() -> None:
    networks = make("resq", SCHEME).networks
    pairs = zip(networks["agent"].parameters(), networks["residual_agent"].parameters(), strict=True)
    assert all(torch.equal(a, b) and a is not b for a, b in pairs)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("qplex", {"mixer": "qmix"}, "mixer must be one of 'qplex_dmaq', 'qplex_dmaq_qatten', got 'qmix'"),
        ("resq", {"mixer": "none"}, "mixer must be one of"),
        ("cw_qmix", {"weighting": "pow"}, "weighting must be one of 'cw', 'ow', 'igm', got 'pow'"),
        ("resq", {"targets": "q_lambda"}, "targets must be one of 'one_step', 'n_step', 'td_lambda', got 'q_lambda'"),
        ("qtran", {"targets": "q_lambda"}, "targets must be one of"),
        ("qmix", {"weighting": "pow"}, "weighting must be one of 'none', 'cw', 'ow', 'igm'"),
        ("qmix", {"w": -1.0}, "w must not be negative"),
        ("cw_qmix", {"central_loss": 0.0}, "central_loss must be positive"),
        ("resq", {"condition": "max"}, "condition must be one of"),
        ("resq", {"compat": "code"}, "compat must be one of 'paper', 'released'"),
    ],
)
def test_settings_that_an_algorithm_cannot_have_are_named(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(name, SCHEME, **settings)
