"""Games made into a batch: the same numbers in this process and in workers, restored in the middle, errors told."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from fastmix.envs import BatchedEnv, ExternalEnv
from fastmix.envs.games import GamesEnv, InProcess, derive
from fastmix.envs.keywords import parse_keywords
from fastmix.envs.workers import Workers, WorkerSettings, make_games_env
from fastmix.errors import EnvironmentFailed
from tests.envs.toy import Walk

FACTORY = "tests.envs.toy:make_walk"


def local(n_envs: int, seed: int = 0, **given: Any) -> GamesEnv:
    return GamesEnv("walk", InProcess(lambda s: Walk(s, **given), n_envs, seed), seed, replayable=True)


def remote(n_envs: int, n_workers: int, seed: int = 0, *, patience: int = 3, **given: Any) -> GamesEnv:
    settings = WorkerSettings(FACTORY, given, timeout=20, start_timeout=60)
    return GamesEnv("walk", Workers(settings, n_envs, n_workers, seed), seed, replayable=True, patience=patience)


@pytest.fixture
def closing() -> Iterator[list[GamesEnv]]:
    made: list[GamesEnv] = []
    yield made
    for env in made:
        env.close()


def choose(env: BatchedEnv, rng: np.random.Generator) -> np.ndarray:
    return np.asarray((rng.random(env.avail.shape) * env.avail).argmax(-1))


def arrays(env: GamesEnv) -> list[np.ndarray]:
    assert env.won is not None
    named = (env.obs, env.state, env.avail, env.reward, env.terminated, env.truncated, env.won)
    return [array.copy() for array in named]


def test_workers_play_what_this_process_plays(closing: list[GamesEnv]) -> None:
    here, there = local(5, seed=3), remote(5, 2, seed=3)
    closing.append(there)
    assert isinstance(here, ExternalEnv) and isinstance(there, ExternalEnv)
    assert here.info == there.info
    rng, endings = np.random.default_rng(0), 0
    for env in (here, there):
        env.reset()
    for _ in range(30):
        actions = choose(here, rng)
        for env in (here, there):
            env.step(actions)
        for mine, theirs in zip(arrays(here), arrays(there), strict=True):
            np.testing.assert_array_equal(mine, theirs)
        done = np.flatnonzero(here.terminated | here.truncated)
        endings += len(done)
        for env in (here, there):
            env.reset(done)
    assert endings > 10 and here.build == there.build == "walk 1"


def test_the_seed_decides_and_copies_and_episodes_differ() -> None:
    first, again, other = local(3, seed=1), local(3, seed=1), local(3, seed=2)
    for env in (first, again, other):
        env.reset()
    np.testing.assert_array_equal(first.obs, again.obs)
    assert (first.obs != other.obs).any()
    assert len({tuple(row.ravel()) for row in first.obs}) == 3
    before = first.obs.copy()
    first.reset()
    assert (first.obs[:, :, 1] != before[:, :, 1]).all()
    assert len({derive(0, row, episode) for row in range(20) for episode in range(20)}) == 400


@pytest.mark.parametrize("workers", [0, 2])
def test_a_saved_run_goes_on_in_the_middle_of_its_episodes(closing: list[GamesEnv], workers: int) -> None:
    def make(seed: int) -> GamesEnv:
        env = remote(4, workers, seed) if workers else local(4, seed)
        closing.append(env)
        return env

    env, rng = make(0), np.random.default_rng(5)
    env.reset()
    for _ in range(9):
        env.step(choose(env, rng))
        env.reset(np.flatnonzero(env.terminated | env.truncated))
    env.step(choose(env, rng))  # some are finished and not yet reset
    state = env.state_dict()
    resumed = make(1)
    resumed.load_state_dict(state)
    assert not resumed.failed.any()
    running = ~(env.terminated | env.truncated)
    assert running.any()
    np.testing.assert_array_equal(resumed.terminated, env.terminated)
    np.testing.assert_array_equal(resumed.obs[running], env.obs[running])
    for each in (env, resumed):
        each.reset(np.flatnonzero(~running))
    for _ in range(12):
        actions = choose(env, rng)
        for each in (env, resumed):
            each.step(actions)
        for mine, theirs in zip(arrays(env), arrays(resumed), strict=True):
            np.testing.assert_array_equal(mine, theirs)
        done = np.flatnonzero(env.terminated | env.truncated)
        for each in (env, resumed):
            each.reset(done)


def test_a_game_that_its_seed_does_not_decide_loses_its_running_episodes() -> None:
    env = local(3, seeded=False)
    env.reset()
    env.step(np.ones((3, 2), dtype=np.int64))
    resumed = local(3, seeded=False)
    resumed.reset()  # draws, so that the noise is another
    resumed.load_state_dict(env.state_dict())
    assert resumed.failed.all() and resumed.failures == 0
    resumed.reset(np.flatnonzero(resumed.failed))
    assert not resumed.failed.any()


def test_another_build_is_refused() -> None:
    env = local(1)
    with pytest.raises(ValueError, match="walk was saved with walk 0, and this is walk 1"):
        env.load_state_dict(env.state_dict() | {"build": "walk 0"})


def test_a_worker_that_dies_takes_its_own_copies_along(closing: list[GamesEnv]) -> None:
    env = remote(4, 2, trouble="exit", patience=50)
    closing.append(env)
    env.reset()
    while not env.failed.any():
        env.step(env.avail[:, :, 1:].argmax(-1) + 1)
        env.reset(np.flatnonzero(env.terminated | env.truncated))
    assert env.failed.tolist() in ([True, True, False, False], [False, False, True, True], [True] * 4)
    env.reset(np.flatnonzero(env.failed))
    assert not env.failed.any()


def test_what_a_dying_worker_said_is_told(closing: list[GamesEnv]) -> None:
    env = remote(1, 1, trouble="exit", patience=1)
    closing.append(env)
    with pytest.raises(EnvironmentFailed, match=r"ended with status 7 \(it said: the ghost of cell 4\)"):
        for _ in range(50):
            env.reset()
            for _ in range(6):
                env.step(np.ones((1, 2), dtype=np.int64))


def test_a_bug_of_the_environment_is_raised_with_its_traceback(closing: list[GamesEnv]) -> None:
    env = remote(2, 2, trouble="bug")
    closing.append(env)
    with pytest.raises(RuntimeError, match="raised ZeroDivisionError: a bug of the environment") as caught:
        for _ in range(50):
            env.reset()
            for _ in range(6):
                env.step(np.ones((2, 2), dtype=np.int64))
    assert "in act_up" in str(caught.value.__cause__)


def test_a_factory_that_refuses_and_wrong_numbers_of_workers() -> None:
    with pytest.raises(ValueError, match=r"^no walk today$"):
        remote(2, 2, trouble="refuse")
    with pytest.raises(EnvironmentFailed, match="a worker did not start: its process ended with status 9"):
        remote(2, 2, trouble="die")
    with pytest.raises(ImportError):
        Workers(WorkerSettings("tests.envs.nowhere:make"), 1, 1, 0)
    with pytest.raises(ValueError, match="workers is 3; it must be between 1 and the number of copies, 2"):
        remote(2, 3)


def test_a_method_of_the_games_is_called_or_says_why_not(closing: list[GamesEnv]) -> None:
    workers = Workers(WorkerSettings(FACTORY), 3, 3, 0)
    env = GamesEnv("walk", workers, 0, replayable=True)
    closing.append(env)
    env.reset()
    with pytest.raises(RuntimeError, match="shout of copy 2: copy 2 cannot hello"):
        workers.call("shout", "hello")
    assert sum(worker.alive for worker in workers._workers) == 2


def test_workers_are_an_option(closing: list[GamesEnv]) -> None:
    env = make_games_env("walk", FACTORY, {}, {"workers": 1, "trouble": "tell"}, 2, 0)
    closing.append(env)
    env.reset()
    assert env.build.startswith("walk 1 (process ") and str(os.getpid()) not in env.build


def test_workers_load_no_torch() -> None:
    code = "import sys, fastmix.envs.worker, fastmix.envs.smac.game; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize(
    ("spec", "name", "options"),
    [
        ("3m", "3m", {}),
        ("3m,timeout=2.5,a=True,b=None,c=false", "3m", {"timeout": 2.5, "a": True, "b": None, "c": False}),
        ("m.f,sizes=[1,2],name=x-y", "m.f", {"sizes": [1, 2], "name": "x-y"}),
        ("a:B-v3,k={'x': (1, 2)},z=", "a:B-v3", {"k": {"x": (1, 2)}, "z": ""}),
    ],
)
def test_options_in_names(spec: str, name: str, options: dict[str, Any]) -> None:
    assert parse_keywords(spec) == (name, options)


@pytest.mark.parametrize("spec", ["3m,fast", "3m,=3", "3m,a b=3", "3m,"])
def test_options_that_are_none(spec: str) -> None:
    with pytest.raises(ValueError, match="options such as key=value"):
        parse_keywords(spec)


def test_an_option_given_twice() -> None:
    with pytest.raises(ValueError, match="gives a twice"):
        parse_keywords("3m,a=1,a=2")
