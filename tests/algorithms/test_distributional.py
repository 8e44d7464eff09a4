"""DIQL, DDN, DMIX and ResZ: what the papers prove, what a step draws, and how agents act by distributions."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from fastmix.algorithms import EpisodeBatch, Scheme, configure, make
from fastmix.algorithms.distributional import PURPOSES, Distributional
from fastmix.mixers import ResZCentralFF
from fastmix.ops import midpoints, quantile_loss
from fastmix.testing import assert_close
from fastmix.testing.shapes import SHAPES
from tests.algorithms.test_properties import ACTIONS, AGENTS, OBS, SCHEME, SIZES, batch_of, every_joint_value, wild

NAMES = ("diql", "ddn", "dmix", "dmix_larger", "resz")
MAINS = ("datten", "ddn", "dmix")
RESIDUALS = ("resz_central_atten", "dmix", "ddn", "resz_central_ff")
UNEQUAL = {"n_quantiles": 5, "n_target_quantiles": 3, "n_approx_quantiles": 7, "quantile_embed_dim": 6}


def build(name: str, **settings: Any) -> Distributional:
    algorithm = make(name, SCHEME, **(SIZES | UNEQUAL | settings))
    assert isinstance(algorithm, Distributional)
    return algorithm


# ---- DIGM ----


@pytest.mark.parametrize("mixer", MAINS)
@pytest.mark.parametrize("residual_mixer", RESIDUALS)
def test_the_hard_residual_satisfies_digm_for_any_weights(mixer: str, residual_mixer: str) -> None:
    """ResZ, theorems 3 and 4: the joint action that is greedy by the agents' means has the largest ``E[Z_jt]``."""
    for seed in range(6):
        algorithm = wild("resz", seed, mixer=mixer, residual_mixer=residual_mixer, **UNEQUAL)
        greedy, tables = every_joint_value(algorithm, seed)
        assert tables["E[w_r Z_r]"][greedy] == 0
        assert (tables["E[w_r Z_r]"] <= 0).all()
        assert_close(tables["E[Z_jt]"], tables["E[Z_tot]"] + tables["E[w_r Z_r]"], 1e-12)
        scale = tables["E[Z_tot]"].abs().max()
        assert tables["E[Z_tot]"][greedy] >= tables["E[Z_tot]"].max() - 1e-9 * scale
        assert tables["E[Z_jt]"][greedy] >= tables["E[Z_jt]"].max() - 1e-9 * scale


def test_a_free_residual_does_not() -> None:
    """The test above can fail: without the sign, some greedy joint action is not the best of ``E[Z_jt]``."""
    misses = 0
    for seed in range(6):
        greedy, tables = every_joint_value(wild("resz", seed, residual_negative_abs=False, **UNEQUAL), seed)
        misses += int(tables["E[Z_jt]"][greedy] < tables["E[Z_jt]"].max() - 1e-6)
    assert misses > 0


@pytest.mark.parametrize("name", ["diql", "ddn", "dmix"])
def test_the_greedy_joint_action_has_the_largest_mean(name: str) -> None:
    """DFAC, theorem 1: DDN and DMIX satisfy DIGM."""
    for seed in range(6):
        greedy, tables = every_joint_value(wild(name, seed, **UNEQUAL), seed)
        (means,) = tables.values()
        assert means[greedy] >= means.max() - 1e-9 * means.abs().max()


# ---- the step ----


@pytest.mark.parametrize(
    "settings", [{}, {"mixer": "dmix", "residual_mixer": "resz_central_ff"}, {"residual_negative_abs": False}], ids=str
)
def test_a_step_is_the_equations(settings: dict[str, Any]) -> None:
    """With numbers of quantiles that all differ, from every quantile of every action and all pairs."""
    algorithm = build("resz", preset="paper", noopt_loss=0.3, central_loss=0.5, **settings).double()
    assert isinstance(algorithm, Distributional)
    batch = batch_of(torch.float64)
    terms = algorithm.losses(batch)
    networks: dict[str, Any] = algorithm.networks
    zs, taus = {}, {}
    for name in ("agent", "residual_agent", "central_agent"):
        hidden, _ = networks[name].trunk(batch.obs, None, batch.last_actions, True)
        taus[name] = algorithm.draw(name, *batch.obs.shape[:2])
        zs[name] = networks[name].quantiles(hidden, taus[name])
    greedy = zs["agent"].mean(-1).masked_fill(~batch.avail_actions, -torch.inf).argmax(-1)
    live = batch.mask[..., 0] != 0
    assert torch.equal(greedy[:, :-1][live], terms["greedy_actions"][:, :-1][live])

    states, taken, y = batch.states[:, :-1], batch.actions[:, :-1], terms["z_targets"]

    def mixed(mixer: str, name: str) -> Tensor:
        index = taken[..., None, None].expand(*taken.shape, 1, zs[name].shape[-1])
        z: Tensor = networks[mixer](zs[name][:, :-1].gather(-2, index).squeeze(-2), states)
        return z

    z_tot, z_res = mixed("mixer", "agent"), mixed("residual_mixer", "residual_agent")
    z_star = mixed("central_mixer", "central_agent")
    z_res = -z_res.abs() if algorithm.config.residual_negative_abs else z_res
    w_r = 1.0 - (taken == greedy[:, :-1]).all(-1).double()[..., None, None]
    assert (z_tot.shape[-1], y.shape[-1], z_star.shape[-1]) == (5, 3, 3)

    def huber(z: Tensor, name: str) -> Tensor:
        error = y.unsqueeze(-2) - z.unsqueeze(-1)
        rho = torch.nn.functional.huber_loss(error, torch.zeros_like(error), reduction="none")
        asymmetry = (taus[name][:, :-1, None, :, None] - (error <= 0).double()).abs()
        return ((asymmetry * rho).mean(-1).sum(-1) * batch.mask).sum() / batch.mask.sum()

    loss = huber(z_tot + w_r * z_res, "agent") + 0.5 * huber(z_star, "central_agent")
    if not algorithm.config.residual_negative_abs:
        loss = loss + 0.3 * (z_res.clamp(min=0).square().mean(-1) * batch.mask).sum() / batch.mask.sum()
    assert_close(terms["loss"], loss, 1e-12)
    parameters = algorithm.optimiser.parameters
    ours, expected = (torch.autograd.grad(x, parameters, allow_unused=True) for x in (terms["loss"], loss))
    for got, want in zip(ours, expected, strict=True):
        assert (got is None) == (want is None)
        if got is not None and want is not None:
            assert_close(got, want, 1e-9, zero=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_every_step_draws_other_fractions_and_a_resumed_run_the_same(name: str) -> None:
    algorithm, batch = build(name), batch_of()
    first = {network: algorithm.draw(network, 4, 6) for network in algorithm.networks if network in PURPOSES}
    assert len({float(fractions.double().sum()) for fractions in first.values()}) == len(first)
    algorithm.step(batch)
    for network, fractions in first.items():
        assert not torch.equal(algorithm.draw(network, 4, 6), fractions)
        assert torch.equal(algorithm.draw(network, 4, 6, torch.tensor([0, 0])), fractions)
        # Longer batches begin with the same draws.
        assert torch.equal(algorithm.draw(network, 4, 9, torch.tensor([0, 0]))[:, :6], fractions)
    resumed = build(name, seed=3)
    resumed.load_state_dict({key: value.clone() for key, value in algorithm.state_dict().items()})
    for one in (algorithm, resumed):
        one.step(batch)
    for key, value in algorithm.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], value), key


def test_seeds_draw_other_fractions() -> None:
    assert not torch.equal(build("dmix", seed=1).draw("agent", 4, 6), build("dmix", seed=2).draw("agent", 4, 6))


@pytest.mark.parametrize(("name", "shape"), [("diql", (4, 6, AGENTS, 5)), ("ddn", (4, 6, 5)), ("resz", (4, 6, 5))])
def test_agents_that_are_mixed_share_fractions(name: str, shape: tuple[int, ...]) -> None:
    assert build(name).draw("agent", 4, 6).shape == shape


def test_the_released_mask_looks_one_step_ahead() -> None:
    batch = batch_of(torch.float64)
    aligned, shifted = (make("resz", SCHEME, compat=compat).double() for compat in ("paper", "released"))
    greedy = aligned.losses(batch)["greedy_actions"]
    batch.actions[:2], batch.actions[2:, :-1] = greedy[:2], greedy[2:, 1:]  # what agents see of actions stays
    taken = batch.actions[:, :-1]
    ours, released = aligned.losses(batch), shifted.losses(batch)
    assert torch.equal(ours["w_r"] == 0, (taken == greedy[:, :-1]).all(-1, keepdim=True))
    assert torch.equal(released["w_r"] == 0, (taken == greedy[:, 1:]).all(-1, keepdim=True))
    assert not torch.equal(ours["w_r"], released["w_r"])
    assert (make("resz", SCHEME, condition="none").losses(batch_of())["w_r"] == 1).all()


def test_padded_steps_reach_nothing() -> None:
    for name in NAMES:
        one, other = build(name).double(), build(name).double()
        batch = batch_of(torch.float64)
        dirty = copy.deepcopy(batch)
        padded = batch.mask[..., 0] == 0
        assert padded.any()
        dirty.rewards[padded] = 1e6
        dirty.states[:, 1:][padded] = -50.0  # the state after the last transition is read
        expected, got = one.step(batch), other.step(dirty)
        assert_close(got["loss"], expected["loss"], 1e-12, name=name)
        assert_close(got["grad_norm"], expected["grad_norm"], 1e-12, name=name)


def test_importance_weights_weigh_episodes() -> None:
    batch = batch_of(torch.float64)
    algorithm = make("dmix", SCHEME).double()
    terms = algorithm.losses(batch)
    batch.weights = torch.rand(4, 1, 1, dtype=torch.float64)
    assert isinstance(algorithm, Distributional)
    at = algorithm.draw("agent", *batch.obs.shape[:2])[:, :-1].unsqueeze(2)
    rows = quantile_loss(terms["z_tot"], terms["z_targets"], at, batch.mask).row_losses
    expected = (batch.weights * rows * batch.mask).sum() / batch.mask.sum()
    assert_close(algorithm.losses(batch)["loss"], expected, 1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_agents_unroll_in_one_call_and_only_what_is_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastmix.algorithms import base

    calls: list[int] = []
    real = base.recurrent

    def counted(obs: Tensor, networks: Any, *rest: Any, **options: Any) -> Any:
        calls.append(len(networks))
        return real(obs, networks, *rest, **options)

    algorithm = build(name)
    monkeypatch.setattr(base, "recurrent", counted)
    algorithm.step(batch_of())
    assert calls == [4 if name == "resz" else 2]
    assert all(p.grad is not None for p in algorithm.optimiser.parameters)


# ---- acting ----


@pytest.mark.parametrize("name", NAMES)
def test_acting_by_midpoints_is_greedy_by_utilities(name: str) -> None:
    algorithm = build(name, acting_fractions="midpoints", residual_mixer="resz_central_atten")
    obs, last = torch.randn(16, AGENTS, OBS), torch.full((16, AGENTS), -1)
    avail = torch.rand(16, AGENTS, ACTIONS) < 0.6
    avail[..., 0] = True
    actions, hidden = algorithm.act(obs, last, avail, algorithm.initial_hidden(16), epsilon=0.0)
    qs = algorithm.utilities(obs.unsqueeze(1))[:, 0]
    assert torch.equal(actions, qs.masked_fill(~avail, -torch.inf).argmax(-1))
    # The hidden state carries on.
    again, _ = algorithm.act(obs, actions, avail, hidden, epsilon=0.0)
    qs = algorithm.utilities(torch.stack([obs, obs], 1), torch.stack([last, actions], 1))[:, 1]
    assert torch.equal(again, qs.masked_fill(~avail, -torch.inf).argmax(-1))


@pytest.mark.parametrize("name", ["diql", "dmix"])
def test_acting_by_draws_is_its_generators(name: str) -> None:
    """Draws of few quantiles change greedy actions; the same generator gives the same ones."""
    algorithm = wild(name, 0, **(UNEQUAL | {"n_approx_quantiles": 1})).double()
    obs = torch.randn(64, AGENTS, OBS, dtype=torch.float64)
    last, avail = torch.full((64, AGENTS), -1), torch.ones(64, AGENTS, ACTIONS, dtype=torch.bool)
    hidden = torch.zeros(64, AGENTS, SIZES["rnn_hidden_dim"], dtype=torch.float64)

    def act(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return algorithm.act(obs, last, avail, hidden, epsilon=0.0, generator=generator)[0]

    assert torch.equal(act(1), act(1))
    assert not torch.equal(act(1), act(2))


# ---- what is learnt, as distributions ----


def test_joint_quantiles_are_what_joint_values_are_means_of() -> None:
    for name in NAMES:
        algorithm = build(name, residual_mixer="resz_central_ff").double()
        assert isinstance(algorithm, Distributional)
        batch = batch_of(torch.float64)
        arguments = (batch.obs, batch.last_actions, batch.avail_actions, batch.states, batch.actions)
        quantiles, values = algorithm.joint_quantiles(*arguments), algorithm.joint_values(*arguments)
        for (key, z), (mean_key, mean) in zip(quantiles.items(), values.items(), strict=True):
            assert mean_key == f"E[{key}]"
            assert_close(mean, z.mean(-1), 1e-12)
        count = 5 if name == "resz" else 7  # the unrestricted residual takes as many as the loss has
        assert torch.equal(algorithm.midpoints(), midpoints(count, dtype=torch.float64))
        assert next(iter(quantiles.values())).shape == (*batch.obs.shape[:2], 1, count)


# ---- configuration ----


@pytest.mark.parametrize(
    ("name", "preset", "settings"),
    [
        ("diql", "paper", {"mixer": "none", "n_quantiles": 1, "n_target_quantiles": 1, "n_approx_quantiles": 32}),
        ("ddn", "paper", {"mixer": "ddn", "n_quantiles": 1, "optimizer": "adam", "lr": 5e-4, "optim_eps": 1e-5}),
        ("dmix", "paper", {"n_quantiles": 8, "n_target_quantiles": 8, "double_q": False, "targets": "one_step"}),
        ("dmix", "pymarl", {"optimizer": "adam", "batch_size": 32, "epsilon_anneal_time": 50_000}),
        ("dmix", "pymarl2", {"agent": "iqn_rnn", "targets": "td_lambda", "loss_scale": 1.0, "batch_size": 128}),
        ("resz", "paper", {"optimizer": "rmsprop", "lr": 1e-3, "targets": "td_lambda", "td_lambda": 0.6}),
        ("resz", "paper", {"mixer": "datten", "residual_mixer": "resz_central_atten", "double_q": True}),
        ("resz", "paper", {"central_mixing_embed_dim": 128, "epsilon_anneal_time": 100_000, "compat": "paper"}),
    ],
)
def test_presets(name: str, preset: str, settings: dict[str, Any]) -> None:
    config = configure(name, preset)
    assert {field: getattr(config, field) for field in settings} == settings


def test_parameter_counts_of_the_appendix() -> None:
    """ResQ, appendix: mixers on MMM2 have 85K (DMIX), 350K (DMIX-larger), 320K (ResQ) and 316K (ResZ) parameters."""
    s = SHAPES["MMM2"]
    scheme = Scheme(s.n_agents, s.n_actions, s.obs_dim, s.state_dim, s.steps)

    def count(name: str, **settings: Any) -> int:
        algorithm = make(name, scheme, preset="paper", **settings)
        own = [key for key in algorithm.online if key.endswith("mixer")]
        return sum(p.numel() for key in own for p in algorithm.networks[key].parameters())

    assert count("dmix") == 84_929
    assert count("dmix_larger") == 350_519
    assert count("resq") == 319_429
    assert count("resz", unit_dim=7) == 315_794  # four features, the shield and two bits of the unit's type
    assert count("resz", unit_dim=1) == 314_258  # the released runner


def test_central_networks_have_as_many_quantiles_as_targets() -> None:
    networks = build("resz", residual_mixer="resz_central_ff").networks
    residual, central = networks["residual_mixer"], networks["central_mixer"]
    assert isinstance(residual, ResZCentralFF) and isinstance(central, ResZCentralFF)
    assert (residual.n_quantiles, central.n_quantiles) == (5, 3)


def test_the_residual_agent_starts_as_the_agent() -> None:
    networks = build("resz").networks
    pairs = zip(networks["agent"].parameters(), networks["residual_agent"].parameters(), strict=True)
    assert all(torch.equal(a, b) and a is not b for a, b in pairs)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("dmix", {"agent": "rnn"}, "agent must be one of 'iqn_rnn', got 'rnn'"),
        ("qmix", {"agent": "iqn_rnn"}, "agent must be one of 'rnn', 'n_rnn', 'ff', got 'iqn_rnn'"),
        ("dmix", {"mixer": "ddn"}, "mixer must be one of 'dmix', got 'ddn'"),
        ("dmix", {"targets": "q_lambda"}, "targets must be one of 'one_step', 'n_step', 'td_lambda', got 'q_lambda'"),
        ("dmix", {"weighting": "cw"}, "weighting must be one of 'none', got 'cw'"),
        ("dmix", {"n_quantiles": 0}, "n_quantiles must be at least 1, got 0"),
        ("dmix", {"kappa": -1.0}, "kappa must not be negative"),
        ("dmix", {"acting_fractions": "fixed"}, "acting_fractions must be one of 'random', 'midpoints'"),
        ("resz", {"mixer": "qmix"}, "mixer must be one of 'datten', 'dmix', 'ddn', got 'qmix'"),
        ("resz", {"residual_mixer": "central_ff"}, "residual_mixer must be one of 'resz_central_atten'"),
        ("resz", {"central_mixer": "central_ff"}, "central_mixer must be one of 'resz_central_ff'"),
        ("resz", {"condition": "hysteretic"}, "condition must be one of 'max_action', 'none', got 'hysteretic'"),
        ("resq", {"residual_mixer": "ddn"}, "residual_mixer must be one of 'central_ff'"),
        ("resq", {"central_mixer": "resz_central_ff"}, "central_mixer must be one of 'central_ff'"),
    ],
)
def test_settings_that_they_cannot_have_are_named(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(name, SCHEME, **settings)


def test_mixed_lengths_do_not_change_draws() -> None:
    """A batch with padding appended, as buckets of lengths make it, has the same loss."""
    batch = batch_of(torch.float64)
    grown = {}
    for field, value in vars(batch).items():
        if value is not None:
            grown[field] = torch.cat([value, torch.zeros_like(value[:, :1]).expand(-1, 7, *value.shape[2:])], 1)
    for name in NAMES:
        a, b = (build(name).double().step(given) for given in (batch, EpisodeBatch(**grown)))
        assert_close(a["loss"], b["loss"], 1e-12, name=name)
