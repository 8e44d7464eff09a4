"""The SMAC adapter against a package with smac's exact interface, and each of the ways in which the game fails."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastmix import envs
from fastmix.envs import ExternalEnv
from fastmix.envs.smac import SmacEnv
from fastmix.errors import EnvironmentFailed
from tests.starcraft import games, install, wait_until

MakeEnv = Callable[..., SmacEnv]


@pytest.fixture
def ledger(tmp_path: Path) -> Path:
    folder = tmp_path / "ledger"
    folder.mkdir()
    return folder


@pytest.fixture
def make(tmp_path: Path, ledger: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``make(spec, n_envs, **how it fails)``; closed at the end, when no game may be left."""
    install(tmp_path, monkeypatch)
    made: list[SmacEnv] = []

    def make_env(spec: str = "3m", n_envs: int = 1, seed: int = 0, **failing: Any) -> SmacEnv:
        monkeypatch.setenv("FAKE_SMAC", json.dumps({"ledger": str(ledger), **failing}))
        env = envs.make(f"smac:{spec}", n_envs, seed)
        assert isinstance(env, SmacEnv)
        made.append(env)
        return env

    yield make_env
    for env in made:
        env.close()
    assert wait_until(lambda: not games(ledger)), "a game outlived its environment"


def attack(env: SmacEnv) -> np.ndarray:
    """Everybody attacks the first living enemy, or does the only thing left."""
    actions = env.avail[:, :, 6:].argmax(-1) + 6
    can = np.take_along_axis(env.avail, actions[..., None], -1)[..., 0]
    return np.where(can, actions, env.avail.argmax(-1))


def stop(env: SmacEnv) -> np.ndarray:
    return env.avail.argmax(-1)


def play(env: SmacEnv, policy: Callable[[SmacEnv], np.ndarray] = attack) -> float:
    """One episode of copy 0; returns its return."""
    total = 0.0
    while True:
        env.step(policy(env))
        total += float(env.reward[0])
        if env.terminated[0] or env.truncated[0] or env.failed[0]:
            return total


# ---- a game that works ----


def test_sizes_seeds_and_the_state_that_mixers_read(make: MakeEnv) -> None:
    env = make("3m", 2)
    assert isinstance(env, ExternalEnv)
    info = env.info
    sizes = (info.n_agents, info.n_actions, info.obs_dim, info.state_dim, info.episode_limit)
    assert sizes == (3, 9, 30, 48, 60)
    assert info.settings == {"unit_dim": 4}
    assert env.build == ""  # nothing has been launched yet
    env.reset()
    assert env.build == "StarCraft II 4.10.0 (build 75689)"
    assert env.obs.shape == (2, 3, 30) and (env.obs[:, :, -1] == 1).all()
    assert (env.state[:, :12:4] == 1).all()
    assert not env.avail[:, :, 0].any() and env.avail[:, :, 1:].all()
    for _ in range(8):
        env.step(stop(env))
    assert (env.obs[0] != env.obs[1]).any(), "both copies have the same seed"


def test_a_win_is_worth_twenty_however_often_it_is_reset(make: MakeEnv) -> None:
    env = make()
    for _ in range(3):  # before the first step, which would relaunch the game
        env.reset()
    assert play(env) == pytest.approx(20.0, abs=1e-4)
    assert env.won is not None and env.won[0] and env.terminated[0] and not env.truncated[0]
    env.reset()
    env.step(attack(env))
    env.reset()  # in the middle of an episode: played to its end
    assert play(env) == pytest.approx(20.0, abs=1e-4)


def test_the_first_episode_may_be_cut_short(make: MakeEnv, ledger: Path) -> None:
    env = make()
    env.reset()
    env.step(stop(env))
    env.reset()
    assert play(env) == pytest.approx(20.0, abs=1e-4)
    assert len(list(ledger.glob("game-*"))) == 1, "the game was launched again"


def test_a_finished_copy_waits_for_its_reset(make: MakeEnv) -> None:
    env = make("3m", 2)
    env.reset()
    policy = np.stack([attack(env)[0], stop(env)[1]])
    while not env.terminated[0]:
        policy = np.stack([attack(env)[0], stop(env)[1]])
        env.step(policy)
    last, battles = env.obs[0].copy(), env.state[1].copy()
    for _ in range(2):
        env.step(np.stack([np.full(3, 8), stop(env)[1]]))  # no action is checked where nobody listens
    np.testing.assert_array_equal(env.obs[0], last)
    assert (env.state[1] != battles).any()
    env.reset(np.array([0]))
    assert not env.terminated[0] and (env.obs[0] != last).any()


@pytest.mark.parametrize("continuing", [False, True])
def test_the_time_limit_is_an_end_as_in_the_public_results_unless_continuing(make: MakeEnv, continuing: bool) -> None:
    env = make(f"3m,continuing_episode={continuing}", damage=0)
    env.reset()
    play(env, stop)
    assert (bool(env.terminated[0]), bool(env.truncated[0])) == (not continuing, continuing)
    assert env.won is not None and not env.won[0]


def test_actions_are_checked_before_the_game_sees_them(make: MakeEnv) -> None:
    env = make("3m", 2)
    env.reset()
    state = env.state.copy()
    with pytest.raises(ValueError, match=r"action 0 of agent 1 in copy 1 is not available; it may take \[1, 2, 3"):
        env.step(np.array([[1, 1, 1], [1, 0, 1]]))
    with pytest.raises(ValueError, match="action 9 of agent 2 in copy 0"):
        env.step(np.array([[1, 1, 9], [1, 1, 1]]))
    with pytest.raises(ValueError, match=r"it must be \[n_envs, n_agents\] = \(2, 3\)"):
        env.step(np.ones((2, 2), dtype=np.int64))
    with pytest.raises(ValueError, match="float64; it must be integers"):
        env.step(np.ones((2, 3)))
    np.testing.assert_array_equal(env.state, state)
    env.step(np.ones((2, 3), dtype=np.int64))


def test_replays_are_saved_of_every_copy(make: MakeEnv, tmp_path: Path) -> None:
    env = make("3m", 2)
    env.reset()
    written = env.save_replays(tmp_path / "replays" / "deep")
    assert [path.name for path in written] == [f"3m-copy{e}_2026-01-01-00-00-00.SC2Replay" for e in range(2)]


# ---- a game that fails ----


@pytest.mark.parametrize("kind", ["crash", "raise", "exit", "kill"])
def test_a_crash_in_a_step_loses_that_episode_only(make: MakeEnv, kind: str, ledger: Path) -> None:
    env = make("3m", 2, fail=kind, episode=0, step=3)
    env.reset()
    for _ in range(3):
        env.step(attack(env))
    assert env.failed.sum() == 1 and env.failures == 1
    lost = int(env.failed.argmax())
    assert not env.terminated[lost] and not env.truncated[lost]
    while not env.terminated[1 - lost]:
        env.step(attack(env))  # the other goes on
    assert wait_until(lambda: len(games(ledger)) == 1)
    env.reset(np.array([lost]))
    assert not env.failed.any()
    assert (env.obs[lost, :, -1] == 1).all()
    total = 0.0
    while not env.terminated[lost]:
        env.step(attack(env))
        total += float(env.reward[lost])
    assert total == pytest.approx(20.0, abs=1e-4), "the game was not made anew"


@pytest.mark.parametrize("kind", ["crash", "join", "never_starts"])
def test_a_game_that_does_not_begin_is_started_again(make: MakeEnv, kind: str) -> None:
    env = make(fail=kind, times=2)
    env.reset()
    assert env.failures == 2 and not env.failed.any()
    assert play(env) == pytest.approx(20.0, abs=1e-4)


def test_a_silent_crash_between_episodes_is_noticed(make: MakeEnv) -> None:
    env = make(fail="crash", episode=1)
    env.reset()
    play(env)
    env.reset()
    assert env.failures == 1 and (env.obs[:, :, -1] == 1).all()
    assert play(env) == pytest.approx(20.0, abs=1e-4)


@pytest.mark.parametrize("step", [0, 2])
def test_a_hang_ends_with_the_timeout(make: MakeEnv, step: int) -> None:
    env = make("3m,timeout=0.5,start_timeout=20", fail="hang", episode=1, step=step)
    env.reset()
    play(env)
    began = time.monotonic()
    env.reset()
    if step:
        for _ in range(step):
            env.step(attack(env))
        assert env.failed.all()
        env.reset()
    assert env.failures == 1 and time.monotonic() - began < 15
    assert play(env) == pytest.approx(20.0, abs=1e-4)


@pytest.mark.parametrize(("kind", "step"), [("crash", 2), ("never_starts", 0), ("exit", 1)])
def test_a_game_that_keeps_failing_stops_the_run(make: MakeEnv, kind: str, step: int) -> None:
    env = make("3m,patience=2", fail=kind, step=step, times=100)

    def run() -> None:
        for _ in range(5):
            env.reset()
            play(env)

    reason = {"crash": "the game crashed in a step", "never_starts": "ConnectError: Failed to connect"}
    with pytest.raises(
        EnvironmentFailed, match="smac:3m,patience=2: the game of copy 0 failed 2 times in a row"
    ) as caught:
        run()
    assert reason.get(kind, "its process ended with status 3") in str(caught.value)


def test_failures_in_a_row_are_forgotten_after_a_whole_episode(make: MakeEnv) -> None:
    env = make("3m,patience=2", fail="crash", step=1, times=1)
    env.reset()
    play(env)
    assert env.failed[0]
    for _ in range(2):
        env.reset()
        play(env)
        assert env.terminated[0]
    assert env._in_a_row[0] == 0


# ---- what is missing ----


def test_no_game_and_no_map(make: MakeEnv, ledger: Path) -> None:
    env = make(fail="no_install")
    with pytest.raises(FileNotFoundError, match=r"StarCraft II cannot be started: .* No such file"):
        env.reset()
    for path in ledger.glob("failure-*"):
        path.unlink()
    env = make(fail="no_map")
    with pytest.raises(ValueError, match="the map of 'smac:3m' cannot be loaded: Map 3m not found"):
        env.reset()
    assert wait_until(lambda: not games(ledger)), "the game was left running"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("9q", "smac has no map '9q'"),
        ("3m,speed=3", r"smac does not take these options, \['speed'\]: .*unexpected keyword"),
        ("3m,seed=3", "seed is not an option of it"),
        ("3m,timeout=0", "timeout is 0; it must be a number of at least 0.1"),
        ("3m,patience=1.5", "patience is 1.5; it must be a whole number"),
        ("3m,fast", "holds 'fast'"),
    ],
)
def test_wrong_names_and_options_are_explained(make: MakeEnv, spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(spec)


def test_a_number_names_a_difficulty(make: MakeEnv) -> None:
    make("3m,difficulty=3")


def test_a_size_that_is_not_the_promised_one(make: MakeEnv) -> None:
    env = make("3m,obs_timestep_number=True")
    with pytest.raises(ValueError, match=r"delivers obs of shape \[3, 31\], and promised \[3, 30\]"):
        env.reset()


def test_the_package_of_another_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch)
    (tmp_path / "wrong" / "smac" / "facade").mkdir(parents=True)
    (tmp_path / "wrong" / "smac" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path / "wrong"))
    with pytest.raises(ImportError, match=r"is another project .* git\+https://github.com/oxwhirl/smac.git"):
        envs.make("smac:3m", 1, 0)


def test_the_game_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch)
    monkeypatch.setenv("SC2PATH", str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="StarCraft II is not installed"):
        envs.make("smac:3m", 1, 0)


def test_warnings_made_errors_and_arguments_of_ours_do_not_reach_smac(
    make: MakeEnv, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONWARNINGS", "error")
    monkeypatch.setattr(sys, "argv", ["fastmix", "train", "--env", "smac:3m"])
    make().reset()


# ---- how processes end ----


CHILD = """
import json, os, sys, time
sys.path[:] = json.loads(sys.argv[1])
from fastmix import envs
env = envs.make("smac:3m", 2, 0)
env.reset()
print("ready", flush=True)
{then}
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_no_game_outlives_a_killed_run(make: MakeEnv, ledger: Path, number: int) -> None:
    make()  # sets FAKE_SMAC
    command = [sys.executable, "-c", CHILD.format(then="time.sleep(60)"), json.dumps(sys.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        assert len(games(ledger)) == 2
        process.send_signal(number)
        process.wait()
        assert wait_until(lambda: not games(ledger))


def test_a_fork_that_ends_leaves_the_games_alone(make: MakeEnv, ledger: Path) -> None:
    make()
    fork = "pid = os.fork()\nif pid == 0: sys.exit(0)\nos.waitpid(pid, 0)"
    then = f"{fork}\nenv.step(env.avail.argmax(-1))\nprint(env.failures)"
    command = [sys.executable, "-c", CHILD.format(then=then), json.dumps(sys.path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "ready\n0\n", done.stderr
    assert wait_until(lambda: not games(ledger))


def test_closing_twice_and_forgetting_to(make: MakeEnv, ledger: Path) -> None:
    env = make()
    env.reset()
    env.close()
    env.close()
    assert not games(ledger)
    for call in (env.reset, lambda: env.step(stop(env))):
        with pytest.raises(RuntimeError, match="has been closed"):
            call()


def test_a_resumed_run_begins_new_episodes_and_wants_the_same_build(make: MakeEnv) -> None:
    env = make("3m", 2)
    env.reset()
    env.step(stop(env))
    state = env.state_dict()
    other = make("3m", 2)
    other.reset()
    other.load_state_dict(state)
    assert other.failed.all() and other.failures == 0
    other.reset(np.flatnonzero(other.failed))
    assert not other.failed.any()
    with pytest.raises(ValueError, match=r"saved with StarCraft II 4.6.2 .*, and this is StarCraft II 4.10.0"):
        other.load_state_dict(state | {"build": "StarCraft II 4.6.2 (build 69232)"})
