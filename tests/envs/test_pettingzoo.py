"""PettingZoo: the packages themselves (MPE), and an environment with everything unusual that the interface allows."""

from __future__ import annotations

import numpy as np
import pytest

from fastmix import envs
from fastmix.envs import ExternalEnv
from fastmix.envs.games import GamesEnv, derive

pytest.importorskip("pettingzoo", reason="pettingzoo is not installed: pip install 'fastmix[pettingzoo]'")
SPREAD = "pettingzoo:mpe2.simple_spread_v3"


def make(name: str, n_envs: int = 1, seed: int = 0) -> GamesEnv:
    env = envs.make(name, n_envs, seed)
    assert isinstance(env, GamesEnv) and isinstance(env, ExternalEnv)
    return env


def relay(options: str = "", n_envs: int = 1) -> GamesEnv:
    return make(f"pettingzoo:tests.envs.toy_team.parallel_env,limit=4{options}", n_envs)


def test_simple_spread_is_the_team_of_its_agents() -> None:
    mpe2 = pytest.importorskip("mpe2.simple_spread_v3", reason="mpe2 is not installed: pip install mpe2")
    env = make(f"{SPREAD}.parallel_env,max_cycles=12", 3, seed=4)
    info = env.info
    sizes = (info.n_agents, info.n_actions, info.obs_dim, info.state_dim, info.episode_limit)
    assert sizes == (3, 5, 18, 54, 12)
    assert env.build.startswith("mpe2 ") and env.won is None
    theirs = mpe2.parallel_env(max_cycles=12)
    env.reset()
    obs, _ = theirs.reset(seed=derive(4, 2, 0))
    rng = np.random.default_rng(0)
    for t in range(12):
        assert env.avail.all()
        for a, agent in enumerate(theirs.possible_agents):
            np.testing.assert_array_equal(env.obs[2, a], obs[agent])
        np.testing.assert_array_equal(env.state[2], theirs.state())
        actions = rng.integers(0, 5, size=(3, 3))
        env.step(actions)
        obs, rewards, *_ = theirs.step({agent: int(actions[2, a]) for a, agent in enumerate(theirs.possible_agents)})
        assert env.reward[2] == pytest.approx(sum(rewards.values()), rel=1e-5)
        assert not env.terminated.any() and (env.truncated == (t == 11)).all()
    env.close()


def test_agents_of_different_sizes_are_padded_and_masked() -> None:
    pytest.importorskip("mpe2", reason="mpe2 is not installed: pip install mpe2")
    env = make("pettingzoo:mpe2.simple_speaker_listener_v4", 2)
    env.reset()
    assert (env.info.n_agents, env.info.n_actions, env.info.obs_dim) == (2, 5, 11)
    assert env.avail[0].sum(-1).tolist() == [3, 5]
    assert (env.obs[:, 0, 3:] == 0).all() and (env.obs[:, 1, 3:] != 0).any()
    env.step(np.array([[2, 4], [0, 0]]))
    with pytest.raises(ValueError, match="action 3 of agent 0"):
        env.step(np.array([[3, 4], [0, 0]]))


def test_a_real_one_is_restored_and_played_by_workers() -> None:
    pytest.importorskip("mpe2", reason="mpe2 is not installed: pip install mpe2")
    env, other = make(SPREAD, 2), make(f"{SPREAD},workers=2", 2)
    actions = np.random.default_rng(1).integers(0, 5, size=(20, 2, 3))
    for each in (env, other):
        each.reset()
    for joint in actions[:10]:
        for each in (env, other):
            each.step(joint)
        np.testing.assert_array_equal(env.obs, other.obs)
        np.testing.assert_array_equal(env.reward, other.reward)
    other.close()
    resumed = make(SPREAD, 2)
    resumed.load_state_dict(env.state_dict())
    assert not resumed.failed.any()
    for joint in actions[10:]:
        for each in (env, resumed):
            each.step(joint)
        np.testing.assert_array_equal(env.obs, resumed.obs)
        np.testing.assert_array_equal(env.reward, resumed.reward)


def test_the_other_interface_is_refused() -> None:
    pytest.importorskip("mpe2", reason="mpe2 is not installed: pip install mpe2")
    with pytest.raises(ValueError, match="it must make a parallel environment"):
        make(f"{SPREAD}.env")


def test_masks_leaving_agents_and_a_state_made_of_observations() -> None:
    env = relay()
    assert (env.info.n_actions, env.info.obs_dim, env.info.state_dim) == (3, 4, 6)
    env.reset()
    assert env.avail[0].tolist() == [[False, True, True], [True, False, False]]
    assert env.obs[0].tolist() == [[0, 7, 0, 0], [1, 0, 0, 0]]
    assert env.state[0].tolist() == [0, 7, 1, 0, 0, 0]
    env.step(np.array([[2, 0]]))
    assert env.reward[0] == 3.0  # its actions count from 1
    assert env.avail[0].tolist() == [[False, True, True], [True, True, False]]
    env.step(np.array([[1, 1]]))
    assert env.reward[0] == 3.0 and not env.terminated[0]
    assert env.avail[0, 0].tolist() == [True, False, False] and (env.obs[0, 0] == 0).all()  # it has left
    env.step(np.array([[0, 0]]))
    env.step(np.array([[0, 1]]))
    assert env.reward[0] == 1.0 and env.terminated[0] and not env.truncated[0]


@pytest.mark.parametrize("options", [",cut=True", ",last=9"])
def test_a_cut_by_the_environment_and_by_our_limit(options: str) -> None:
    env = relay(options)
    env.reset()
    for _ in range(4):
        env.step(env.avail.argmax(-1))
    assert env.truncated[0] and not env.terminated[0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.at.all", "neither a function nowhere.at.all nor"),
        ("tests.envs.toy_team.nothing", "neither a function"),
        ("tests.envs.toy_team.parallel_env", "does not say how long its episodes are; add the option limit=N"),
        ("tests.envs.toy_team.parallel_env,limit=0", "limit of .* is 0; it must be a whole number"),
        ("tests.envs.toy_team.parallel_env,limit=4,speed=3", r"does not take the options \{'speed': 3\}"),
        ("tests.envs.toy_team.not_an_environment,limit=4", "makes a object; it must make a parallel environment"),
        ("tests.envs.toy_team.Continuous,limit=4", "the actions of a are Box.*; every agent must have a Discrete"),
        ("tests.envs.toy_team.parallel_env,limit=4,forbid_all=True", r"mask of agent 1 is \[0, 0\]; it must allow"),
    ],
)
def test_what_cannot_be_is_explained(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(f"pettingzoo:{name}")
