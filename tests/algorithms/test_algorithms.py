"""The algorithms: configuration, acting, the training step, and state for exact resume."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from fastmix.algorithms import REGISTRY, Algorithm, EpisodeBatch, Scheme, configure, make
from fastmix.backends import backend
from fastmix.testing import CountDispatches, assert_close, rms_ratio
from tests.generators import SHAPES, Shape, episodes, own_presets

SMALL = Shape(3, 5, 11, 7)
ALL = [(name, preset) for name in REGISTRY for preset in own_presets(name)]


def scheme_of(shape: Shape, episode_limit: int = 9) -> Scheme:
    return Scheme(shape.n_agents, shape.n_actions, shape.obs_dim, shape.state_dim, episode_limit)


def build(name: str, preset: str, *, seed: int = 0, **overrides: Any) -> Algorithm:
    return make(name, scheme_of(SMALL), preset=preset, seed=seed, **overrides)


def batch_of(shape: Shape = SMALL, size: int = 4, steps: int = 9, seed: int = 0) -> EpisodeBatch:
    return EpisodeBatch(*episodes(shape, size, steps, seed=seed))


def weights(algorithm: Algorithm) -> list[torch.Tensor]:
    return list(algorithm.state_dict().values())


@pytest.mark.parametrize(("name", "preset"), ALL)
def test_step_learns_one_batch(name: str, preset: str) -> None:
    algorithm, batch = build(name, preset, lr=3e-3, standardise_rewards=False), batch_of()
    first = algorithm.step(batch)["loss"]
    for _ in range(60):
        last = algorithm.step(batch)["loss"]
    assert last < 0.7 * first


@pytest.mark.parametrize(("name", "preset"), ALL)
def test_step_is_the_same_on_every_backend(name: str, preset: str) -> None:
    native = build(name, preset).double()
    with backend("reference"):
        reference = build(name, preset).double()
        batch = batch_of()
        for field in ("obs", "states", "rewards", "terminated", "mask"):
            setattr(batch, field, getattr(batch, field).double())
        expected = reference.step(batch, detailed=True)
    actual = native.step(batch, detailed=True)
    for key, value in expected.items():
        assert rms_ratio(actual[key], value) < 1e-11, key
    for key, value in reference.state_dict().items():
        assert_close(native.state_dict()[key], value, 1e-9, name=key)


@pytest.mark.parametrize(("name", "preset"), ALL)
def test_state_dict_decides_everything(name: str, preset: str) -> None:
    one, other = build(name, preset, seed=1), build(name, preset, seed=2)
    one.step(batch_of(seed=1))
    one.update_targets()
    one.step(batch_of(seed=2))
    other.load_state_dict({k: v.clone() for k, v in one.state_dict().items()})
    for algorithm in (one, other):
        algorithm.step(batch_of(seed=3))
    assert all(torch.equal(a, b) for a, b in zip(weights(one), weights(other), strict=True))
    assert one.updates == other.updates == 3


def test_state_dict_of_another_algorithm_is_refused() -> None:
    with pytest.raises((RuntimeError, ValueError, KeyError)):
        build("qmix", "pymarl2").load_state_dict(build("vdn", "pymarl").state_dict())


def test_seed_decides_the_weights_and_leaves_the_global_state_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, same, other = (build("qmix", "pymarl2", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(weights(one), weights(same), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(weights(one), weights(other), strict=True))


@pytest.mark.parametrize("name", REGISTRY)
def test_targets_start_equal_and_move_only_when_told(name: str) -> None:
    algorithm = build(name, "pymarl2")

    def distance() -> float:
        return sum(
            (p - t).detach().abs().sum().item()
            for key in algorithm.targeted
            for p, t in zip(
                algorithm.networks[key].parameters(), algorithm.networks[f"target_{key}"].parameters(), strict=True
            )
        )

    assert distance() == 0
    algorithm.step(batch_of())
    assert distance() > 0
    algorithm.update_targets()
    assert distance() == 0
    copies = [network for key, network in algorithm.networks.items() if key not in algorithm.online]
    assert len(copies) == len(algorithm.targeted) > 0
    assert not any(p.requires_grad for network in copies for p in network.parameters())


def test_results_do_not_depend_on_padding() -> None:
    """Longer padding of the same episodes, as buckets of lengths make it, changes nothing."""
    short = batch_of()
    padded = {}
    for field in dataclasses.fields(short):
        value = getattr(short, field.name)
        if value is not None:
            tail = torch.zeros_like(value[:, :1]).expand(-1, 7, *value.shape[2:])
            padded[field.name] = torch.cat([value, tail], 1)
    # Episode 0 runs into the time limit: what follows its last stored step is padding as well.
    for name in REGISTRY:
        one, other = build(name, "pymarl").double(), build(name, "pymarl").double()
        float64 = {k: v.double() if v.is_floating_point() else v for k, v in padded.items()}
        before = {k: float64[k][:, : getattr(short, k).shape[1]] for k in float64}
        a, b = one.step(EpisodeBatch(**before)), other.step(EpisodeBatch(**float64))
        assert rms_ratio(b["loss"], a["loss"]) < 1e-12
        for key, value in one.state_dict().items():
            assert_close(other.state_dict()[key], value, 1e-9, name=key)


def test_act_is_greedy_without_exploration() -> None:
    algorithm = build("vdn", "pymarl2")
    batch = batch_of(size=16)
    obs, avail, none = batch.obs[:, 0], batch.avail_actions[:, 0], batch.last_actions[:, 0]
    actions, hidden = algorithm.act(obs, none, avail, algorithm.initial_hidden(16), epsilon=0.0)
    q = algorithm.utilities(obs.unsqueeze(1))[:, 0]
    assert torch.equal(actions, q.masked_fill(~avail, -torch.inf).argmax(-1))
    # The hidden state carries on: two acting steps are the two steps of one sequence.
    actions, _ = algorithm.act(batch.obs[:, 1], batch.last_actions[:, 1], avail, hidden, epsilon=0.0)
    q = algorithm.utilities(batch.obs[:, :2], batch.last_actions[:, :2])[:, 1]
    assert torch.equal(actions, q.masked_fill(~avail, -torch.inf).argmax(-1))


def test_act_explores_uniformly_over_available_actions() -> None:
    algorithm = build("vdn", "pymarl2")
    n = 6000
    avail = torch.tensor([True, False, True, True, False]).expand(n, 3, 5)
    obs, last = torch.zeros(n, 3, 7), torch.full((n, 3), -1)
    generator = torch.Generator().manual_seed(0)

    def draw(epsilon: float) -> torch.Tensor:
        return algorithm.act(obs, last, avail, algorithm.initial_hidden(n), epsilon=epsilon, generator=generator)[0]

    counts = torch.bincount(draw(1.0).flatten(), minlength=5) / (3 * n)
    assert counts[1] == counts[4] == 0
    assert torch.allclose(counts[[0, 2, 3]], torch.full((3,), 1 / 3), atol=0.015)
    greedy = draw(0.0)
    # A third of the explored draws is greedy by chance.
    assert (draw(0.3) == greedy).float().mean().item() == pytest.approx(1 - 0.3 * 2 / 3, abs=0.015)
    generator.manual_seed(1)
    first = draw(0.5)
    generator.manual_seed(1)
    assert torch.equal(first, draw(0.5))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"gamma": 1.5}, "gamma must lie in"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"mixer": "qmixx"}, "mixer must be one of"),
        ({"targets": "td"}, "targets must be one of"),
        ({"buffer_size": 8}, "buffer_size must be at least batch_size"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"learning_rate": 1e-3}, "unknown hyper-parameter 'learning_rate'"),
        ({"mixer": "none", "weighting": "cw"}, "needs a mixer"),
    ],
)
def test_bad_configuration_is_named(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        configure("qmix", **overrides)


def test_unknown_names_are_named() -> None:
    with pytest.raises(ValueError, match="algorithm must be one of 'iql', 'vdn', 'qmix', 'qmix_5'"):
        configure("qmixx")
    with pytest.raises(ValueError, match="preset must be one of"):
        configure("qmix", "pymarl3")
    with pytest.raises(ValueError, match=r"Scheme\.n_agents must be at least 1, got 0"):
        Scheme(0, 5, 7, 11, 9)


def test_presets_are_what_the_public_trainers_set() -> None:
    pymarl, pymarl2 = configure("qmix", "pymarl"), configure("qmix", "pymarl2")
    assert (pymarl.optimizer, pymarl.lr, pymarl.batch_size, pymarl.targets) == ("rmsprop", 5e-4, 32, "one_step")
    assert (pymarl2.optimizer, pymarl2.lr, pymarl2.batch_size, pymarl2.targets) == ("adam", 1e-3, 128, "td_lambda")
    assert configure("qmix_5", "pymarl2").w_high == 5
    assert configure("iql", "pymarl2").batch_size == 32


@pytest.mark.parametrize(
    ("name", "preset", "settings"),
    [
        ("cw_qmix", "pymarl", {"w_high": 1.0, "w": 0.1, "loss_scale": 1.0, "central_mixing_embed_dim": 256}),
        ("ow_qmix", "pymarl2", {"agent": "rnn", "mixer": "qmix", "loss_scale": 0.5, "targets": "td_lambda"}),
        ("cw_qmix_5", "paper", {"w_high": 5.0, "w": 0.0, "optimizer": "adam", "batch_size": 128, "weighting": "cw"}),
        ("powqmix", "paper", {"w_high": 5.0, "w": 0.0, "tolerance": 0.05, "agent": "n_rnn", "mixer": "nmix"}),
        ("powqmix", "paper", {"optimizer": "adam", "batch_size": 128, "batch_size_run": 8, "td_lambda": 0.6}),
        ("resq", "paper", {"optimizer": "rmsprop", "lr": 1e-3, "targets": "td_lambda", "batch_size": 32}),
        ("resq", "paper", {"central_mixing_embed_dim": 128, "epsilon_anneal_time": 100_000, "td_lambda": 0.6}),
        ("resq_vdn_mse", "paper", {"mixer": "vdn", "residual_negative_abs": False, "lr": 1e-3}),
        ("qplex", "pymarl", {"num_kernel": 10, "adv_hypernet_layers": 3, "adv_hypernet_embed": 64}),
        ("qplex", "pymarl2", {"num_kernel": 4, "adv_hypernet_layers": 2, "agent": "rnn", "loss_scale": 0.5}),
        ("qplex", "paper", {"num_kernel": 4, "adv_hypernet_layers": 1}),
        ("qtran", "pymarl2", {"lr": 5e-4, "optimizer": "adam", "targets": "one_step", "loss_scale": 1.0}),
        ("qtran", "pymarl", {"mixing_embed_dim": 64, "opt_loss": 1.0, "nopt_min_loss": 0.1}),
        ("qatten", "pymarl2", {"mixer": "qatten_pymarl2", "n_head": 4, "n_query_embedding_layer2": 32}),
        ("qatten", "pymarl", {"mixer": "qatten_pymarl", "attend_reg_coef": 0.001}),
    ],
)
def test_presets_of_each_algorithm(name: str, preset: str, settings: dict[str, Any]) -> None:
    config = configure(name, preset)
    assert {field: getattr(config, field) for field in settings} == settings


@pytest.mark.parametrize("preset", ["pymarl", "pymarl2"])
def test_a_qmix_step_needs_few_dispatches(preset: str) -> None:
    """The public way needs thousands (``tests/experiments/test_profile.py``)."""
    algorithm = make("qmix", scheme_of(SHAPES["3m"], 60), preset=preset)
    batch = batch_of(SHAPES["3m"], 4, 60)
    for skips, operators, views in ((True, 40, 50), (False, 20, 30)):
        algorithm.skips_padding = skips
        algorithm.step(batch)
        with CountDispatches() as count:
            algorithm.step(batch)
        assert 10 < count.operators.total() <= operators
        assert count.total <= operators + views
