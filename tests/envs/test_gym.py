"""Gymnasium-style environments of several agents: level-based foraging and the robot warehouse, and one of our own."""

from __future__ import annotations

import numpy as np
import pytest

from fastmix import envs
from fastmix.envs import ExternalEnv
from fastmix.envs.games import GamesEnv, derive

gymnasium = pytest.importorskip("gymnasium", reason="gymnasium is not installed: pip install 'fastmix[gym]'")
FORAGING = "gym:lbforaging:Foraging-8x8-2p-2f-coop-v3"


def make(name: str, n_envs: int = 1, seed: int = 0) -> GamesEnv:
    env = envs.make(name, n_envs, seed)
    assert isinstance(env, GamesEnv) and isinstance(env, ExternalEnv)
    return env


def test_foraging_is_the_team_of_its_agents() -> None:
    pytest.importorskip("lbforaging", reason="lbforaging is not installed: pip install lbforaging")
    env = make(FORAGING, 4, seed=2)
    info = env.info
    sizes = (info.n_agents, info.n_actions, info.obs_dim, info.state_dim, info.episode_limit)
    assert sizes == (2, 6, 12, 24, 50)
    assert env.build.startswith("lbforaging ") and env.won is None
    theirs = gymnasium.make("lbforaging:Foraging-8x8-2p-2f-coop-v3", disable_env_checker=True)
    env.reset()
    obs, _ = theirs.reset(seed=derive(2, 3, 0))
    rng = np.random.default_rng(0)
    done = False
    while not done:
        np.testing.assert_array_equal(env.obs[3], np.stack(obs))
        np.testing.assert_array_equal(env.state[3], np.concatenate(obs))
        actions = rng.integers(0, 6, size=(4, 2))
        env.step(actions)
        obs, rewards, done, cut, _ = theirs.step(tuple(actions[3].tolist()))
        assert env.reward[3] == pytest.approx(sum(rewards), rel=1e-5)
        assert (bool(env.terminated[3]), bool(env.truncated[3])) == (done, cut)


def test_foraging_is_restored_exactly() -> None:
    pytest.importorskip("lbforaging", reason="lbforaging is not installed: pip install lbforaging")
    env, resumed = make(FORAGING, 3), make(FORAGING, 3)
    env.reset()
    actions = np.random.default_rng(1).integers(0, 6, size=(30, 3, 2))
    for joint in actions[:15]:
        env.step(joint)
    resumed.load_state_dict(env.state_dict())
    assert not resumed.failed.any()
    for joint in actions[15:]:
        for each in (env, resumed):
            each.step(joint)
        np.testing.assert_array_equal(env.obs, resumed.obs)


def test_the_warehouse() -> None:
    pytest.importorskip("rware", reason="rware is not installed: pip install rware")
    env = make("gym:rware:rware-tiny-2ag-v2", 2)
    assert (env.info.n_agents, env.info.n_actions, env.info.obs_dim, env.info.episode_limit) == (2, 5, 71, 500)
    env.reset()
    for _ in range(5):
        env.step(np.ones((2, 2), dtype=np.int64))
    assert np.isfinite(env.obs).all() and (env.obs[0] != env.obs[1]).any()


def test_masks_one_reward_for_all_and_the_registered_limit() -> None:
    env = make("gym:tests.envs.toy_team:toy-masked-v0,bonus=0.5")
    assert (env.info.n_actions, env.info.obs_dim, env.info.state_dim, env.info.episode_limit) == (4, 3, 5, 5)
    env.reset()
    assert env.avail[0].tolist() == [[True, True, False, False], [True, False, False, True]]
    for _ in range(3):
        env.step(np.array([[1, 3]]))
    assert env.reward[0] == 3.5 and env.terminated[0] and not env.truncated[0]
    assert env.state[0].tolist() == [3, 3, 5, 5, 5]
    env.reset()
    for t in range(5):
        env.step(np.array([[0, 0]]))
        assert env.truncated[0] == (t == 4) and not env.terminated[0]


def test_a_limit_of_ours() -> None:
    env = make("gym:tests.envs.toy_team:toy-endless-v0,limit=2,workers=1")
    env.reset()
    for _ in range(2):
        env.step(np.array([[0, 0]]))
    assert env.truncated[0] and not env.terminated[0]
    env.close()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Nothing-v0", "Gymnasium says: Environment `Nothing` doesn't exist"),
        ("CartPole-v1", "observation_space of gym:CartPole-v1 is Box.*; it must be a Tuple with one entry an agent"),
        ("tests.envs.toy_team:toy-endless-v0", "does not say how long its episodes are; add the option limit=N"),
        ("tests.envs.toy_team:toy-masked-v0,speed=3", "with the options .*speed.*, and Gymnasium says"),
    ],
)
def test_what_cannot_be_is_explained(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(f"gym:{name}")


def test_a_module_that_is_not_there() -> None:
    with pytest.raises(ImportError):
        make("gym:nowhere_at_all:Thing-v0")
