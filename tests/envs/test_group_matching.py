"""REFIL's group matching: rewards, ends, groups, what is seen, and wrong settings."""

from __future__ import annotations

import numpy as np
import pytest

from fastmix import envs
from fastmix.envs import BatchedEnv, GroupMatching


def make(spec: str = "refil", n_envs: int = 1, seed: int = 0) -> GroupMatching:
    env = envs.make(f"group_matching:{spec}", n_envs, seed)
    assert isinstance(env, GroupMatching)
    return env


def put(env: GroupMatching, cells: list[int], groups: list[int]) -> None:
    env.load_state_dict(env.state_dict() | {"cells": np.array([cells]), "groups": np.array([groups])})


def test_sizes_are_refils() -> None:
    env = make(n_envs=3)
    assert isinstance(env, BatchedEnv) and env.won is env.solved
    info = env.info
    assert (info.n_agents, info.n_actions, info.episode_limit, info.t_max, info.test_nepisode) == (8, 3, 50, 10**6, 80)
    assert env.entities.shape == (3, 8, 16) and info.obs_dim == info.state_dim == 128
    assert (env.entities.sum(-1) == 3).all() and env.avail.all()
    np.testing.assert_array_equal(env.obs, np.repeat(env.state[:, None], 8, 1))


def test_rewards_and_end() -> None:
    env = make("refil,n_agents=4,rand_trans=0")
    put(env, [0, 1, 5, 3], [0, 0, 1, 1])
    env.step(np.array([[2, 1, 1, 1]]))  # the first group meets
    assert env.reward[0] == np.float32(2.4) and not env.terminated[0]
    env.step(np.array([[1, 1, 2, 1]]))  # over the border of the ring, away from the other
    assert env.cells[0, 2] == 0 and env.reward[0] == np.float32(-0.1)
    env.step(np.array([[0, 1, 0, 1]]))  # the first group parts
    assert env.reward[0] == np.float32(-2.6)
    put(env, [2, 2, 4, 3], [0, 0, 1, 1])
    env.step(np.array([[1, 1, 0, 1]]))
    assert env.reward[0] == np.float32(2.4) and env.terminated[0] and env.solved[0] and not env.truncated[0]


def test_an_empty_group_is_matched_and_the_limit_truncates() -> None:
    env = make("refil,n_agents=2,rand_trans=0,episode_limit=1")
    put(env, [0, 3], [1, 1])
    env.step(np.array([[1, 1]]))
    assert env.reward[0] == np.float32(-0.1) and env.truncated[0] and not env.terminated[0]
    env.reset()
    put(env, [2, 3], [1, 1])
    env.step(np.array([[2, 1]]))
    assert env.terminated[0] and env.truncated[0] and env.solved[0]


def test_masks_follow_the_groups() -> None:
    env = make("refil,n_agents=3")
    put(env, [0, 1, 2], [0, 1, 0])
    np.testing.assert_array_equal(env.gt_mask[0], [[0, 1, 0], [1, 0, 1], [0, 1, 0]])
    assert not env.obs_mask.any() and not env.entity_mask.any()
    np.testing.assert_array_equal(env.entities[0, 1], [0, 1, 0, 0, 0, 0, 0, 1, 0, 1, 0])


def test_groups_are_cut_at_random_or_equal() -> None:
    n = 6000
    env = make(n_envs=n)
    sizes = np.bincount((env.groups == 0).sum(1), minlength=8)[:8]
    assert (abs(sizes - n / 8) < 5 * np.sqrt(n / 8)).all()  # the cut is uniform on 0..7
    three = make("refil,n_groups=3", n_envs=200)
    assert set(np.unique(three.groups)) == {0, 1, 2}
    fixed = make("refil,fixed_scen=true,n_groups=4", n_envs=50)
    assert all((np.bincount(groups, minlength=4) == 2).all() for groups in fixed.groups)
    assert len({tuple(groups) for groups in fixed.groups.tolist()}) > 10


def test_slips_are_as_frequent_as_stated() -> None:
    n = 5000
    env = make("refil,rand_trans=0.3", n_envs=n)
    before = env.cells.copy()
    env.step(np.ones((n, 8), dtype=np.int64))
    moved = (env.cells != before).mean()
    assert abs(moved - 0.2) < 5 * np.sqrt(0.16 / (8 * n))  # two of three random actions move


def test_seed_and_state_decide_everything() -> None:
    first, second, other = make(n_envs=5, seed=1), make(n_envs=5, seed=1), make(n_envs=5, seed=2)
    assert (first.state == second.state).all() and (first.state != other.state).any()
    other.load_state_dict(first.state_dict())
    rng = np.random.default_rng(0)
    for _ in range(60):
        actions = rng.integers(0, 3, (5, 8))
        for env in (first, second, other):
            env.step(actions)
            env.reset(np.flatnonzero(env.terminated | env.truncated))
        for name in ("state", "obs", "reward", "gt_mask", "terminated"):
            np.testing.assert_array_equal(getattr(first, name), getattr(second, name))
            np.testing.assert_array_equal(getattr(first, name), getattr(other, name))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("mine", "like group_matching:refil,n_agents=4"),
        ("refil,n_agents=0", "n_agents is 0; it must be at least 1"),
        ("refil,rand_trans=2", "rand_trans is 2.0; it must be a probability"),
        ("refil,n_groups=3,fixed_scen=true", "a divisor of the 8 agents"),
        ("refil,agents=3", "'agents=3' must be rule=value"),
    ],
)
def test_wrong_settings_are_explained(spec: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        make(spec)
    assert message in str(caught.value)


def test_wrong_actions_are_explained() -> None:
    env = make()
    with pytest.raises(ValueError, match=r"\[n_envs, n_agents\] = \(1, 8\)"):
        env.step(np.zeros((1, 3), dtype=np.int64))
    with pytest.raises(ValueError, match=r"outside 0\.\.2"):
        env.step(np.full((1, 8), 3))
