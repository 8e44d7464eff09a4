"""The one-step matrix games: payoffs, noise, seeds, and what a user's file may and may not hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastmix import envs
from fastmix.envs import BatchedEnv, MatrixGame
from fastmix.envs.matrix import PAYOFFS, parse_payoff


def make_game(name: str, n_envs: int = 1, seed: int = 0) -> MatrixGame:
    env = envs.make(name, n_envs, seed)
    assert isinstance(env, MatrixGame)
    return env


def test_is_a_batched_env() -> None:
    env = envs.make("matrix:resq1", 4, 0)
    assert isinstance(env, BatchedEnv)
    assert env.obs.shape == (4, 2, 5) and (env.obs == 1).all()
    assert env.state.shape == (4, 5) and (env.state == 1).all()
    assert env.avail.shape == (4, 2, 3) and env.avail.all()
    assert (env.info.n_agents, env.info.n_actions, env.info.episode_limit) == (2, 3, 1)


@pytest.mark.parametrize(
    ("name", "payoff", "optimum"),
    [
        ("matrix:resq1", [[8, -12, -12], [-12, 0, 0], [-12, 0, 7.9]], "AA"),
        ("matrix:resq2", [[2.5, 0, -100], [0, 2, 0], [-100, -100, 3]], "CC"),
    ],
)
def test_every_joint_action_pays_what_the_papers_say(name: str, payoff: list[list[float]], optimum: str) -> None:
    env = make_game(name, 9)
    env.reset()
    actions = np.stack(np.meshgrid(np.arange(3), np.arange(3), indexing="ij"), -1).reshape(9, 2)
    env.step(actions)
    np.testing.assert_array_equal(env.reward, np.array(payoff, dtype=np.float32).reshape(-1))
    assert env.terminated.all() and not env.truncated.any()
    assert [env.payoff.label(joint) for joint in env.payoff.optimal_actions()] == [optimum]


def test_noise_has_the_stated_moments_and_follows_the_seed() -> None:
    env = make_game("matrix:stochastic", 4000, seed=3)
    actions = np.full((4000, 2), 2)
    env.step(actions)
    first = env.reward.copy()
    assert abs(first.mean() - 7.9) < 0.06 and abs(first.std() - 1.0) < 0.05
    again = make_game("matrix:stochastic", 4000, seed=3)
    again.step(actions)
    np.testing.assert_array_equal(first, again.reward)
    other = make_game("matrix:stochastic", 4000, seed=4)
    other.step(actions)
    assert (first != other.reward).any()


def test_state_dict_carries_the_noise() -> None:
    env = make_game("matrix:stochastic", 5, seed=1)
    actions = np.zeros((5, 2), dtype=np.int64)
    env.step(actions)
    state = env.state_dict()
    env.step(actions)
    resumed = make_game("matrix:stochastic", 5, seed=99)
    resumed.load_state_dict(json.loads(json.dumps({"rng": state["rng"]})) | {"terminated": state["terminated"]})
    resumed.step(actions)
    np.testing.assert_array_equal(env.reward, resumed.reward)


def test_user_payoff_with_three_agents_of_different_sizes(tmp_path: Path) -> None:
    values = np.arange(2 * 3 * 4, dtype=float).reshape(2, 3, 4)
    path = tmp_path / "game.json"
    path.write_text(json.dumps({"payoff": values.tolist(), "actions": ["w", "x", "y", "zz"]}))
    env = make_game(f"matrix:@{path}", 24)
    assert (env.info.n_agents, env.info.n_actions) == (3, 4)
    np.testing.assert_array_equal(env.avail[0].sum(-1), [2, 3, 4])
    env.step(np.indices((2, 3, 4)).reshape(3, -1).T)
    np.testing.assert_array_equal(env.reward, values.reshape(-1))
    assert env.payoff.label((1, 2, 3)) == "x,y,zz"
    with pytest.raises(ValueError, match="outside"):
        env.step(np.full((24, 3), 2))  # agent 1 has two actions only


def test_ties_have_several_optima() -> None:
    payoff = parse_payoff({"payoff": [[1, 2], [2, 0]]}, name="g", where="here")
    assert payoff.optimal_actions() == [(0, 1), (1, 0)]


def test_many_actions_get_numbers_as_labels() -> None:
    payoff = parse_payoff({"payoff": [[0] * 30] * 30}, name="g", where="here")
    assert payoff.label((0, 29)) == "0,29"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([[1, 2], [3, 4]], "expected an object with the key 'payoff'"),
        ({}, "expected an object with the key 'payoff'"),
        ({"payoff": 3}, "it must be a list"),
        ({"payoff": []}, "payoff is \\[\\]"),
        ({"payoff": [[1, 2], [3]]}, r"payoff\[1\] has shape \[1\] but payoff\[0\] has \[2\]"),
        ({"payoff": [[1, 2], 3]}, r"payoff\[1\] has shape \[\] but payoff\[0\] has \[2\]"),
        ({"payoff": [[1, "a"], [3, 4]]}, r"payoff\[0\]\[1\] is 'a'"),
        ({"payoff": [[1, True], [3, 4]]}, r"payoff\[0\]\[1\] is True"),
        ({"payoff": [[1, None], [3, 4]]}, r"payoff\[0\]\[1\] is None"),
        ({"payoff": [[1, float("nan")], [3, 4]]}, "payoff holds nan"),
        ({"payoff": [[1, 1e300], [3, 4]]}, "payoff holds 1e\\+300"),
        ({"payoff": [[1, 2]], "noise": 1}, "unknown key 'noise'"),
        ({"payoff": [[1, 2]], "noise_std": -1}, "noise_std is -1"),
        ({"payoff": [[1, 2]], "noise_std": "big"}, "noise_std is 'big'"),
        ({"payoff": [[1, 2]], "actions": ["A"]}, "2 different labels"),
        ({"payoff": [[1, 2]], "actions": ["A", "A"]}, "2 different labels"),
        ({"payoff": [[1, 2]], "actions": "AB"}, "list of non-empty strings"),
    ],
)
def test_wrong_files_are_explained(tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "game.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as caught:
        envs.make(f"matrix:@{path}", 1, 0)
    assert str(path) in str(caught.value)


def test_not_json_and_missing_files(tmp_path: Path) -> None:
    path = tmp_path / "game.json"
    path.write_text("{payoff: 1}")
    with pytest.raises(ValueError, match="is not JSON"):
        envs.make(f"matrix:@{path}", 1, 0)
    with pytest.raises(FileNotFoundError, match="no file"):
        envs.make("matrix:@/no/such/file.json", 1, 0)


@pytest.mark.parametrize("name", ["matrix", "matrix:", "chess:resq1", "matrix:resq9", ""])
def test_unknown_names_are_explained(name: str) -> None:
    with pytest.raises(ValueError, match="resq1"):
        envs.make(name, 1, 0)


def test_bad_sizes() -> None:
    with pytest.raises(ValueError, match="n_envs is 0"):
        envs.make("matrix:resq1", 0, 0)
    with pytest.raises(ValueError, match=r"\[n_envs, n_agents\] = \(1, 2\)"):
        make_game("matrix:resq1").step(np.zeros((2, 2), dtype=np.int64))


def test_names_of_the_issue_exist() -> None:
    assert set(PAYOFFS) == {"resq1", "resq2", "stochastic"}
