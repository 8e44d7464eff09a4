"""SMAX with the real JaxMARL. Its functions take seconds to compile, so that few sizes are played here."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from fastmix import envs
from fastmix.envs import ExternalEnv

pytest.importorskip("jaxmarl", reason="jaxmarl is not installed: pip install 'fastmix[smax]'")

if TYPE_CHECKING:
    from fastmix.envs.smax.env import SmaxEnv

pytestmark = [
    pytest.mark.slow,
    # JaxMARL's dependencies warn of each other while they are imported.
    pytest.mark.filterwarnings("default::DeprecationWarning", "default::FutureWarning", "default::UserWarning"),
]

# map -> agents, actions, obs, state
SIZES = {
    "3m": (3, 8, 75, 72),
    "8m": (8, 13, 205, 192),
    "2s3z": (5, 10, 127, 120),
    "3s5z": (8, 13, 205, 192),
    "5m_vs_6m": (5, 11, 140, 132),
    "10m_vs_11m": (10, 16, 270, 252),
    "27m_vs_30m": (27, 35, 738, 684),
    "3s5z_vs_3s6z": (8, 14, 218, 204),
    "3s_vs_5z": (3, 10, 101, 96),
    "6h_vs_8z": (6, 13, 179, 168),
    "25m": (25, 30, 647, 600),
    "smacv2_5_units": (5, 10, 127, 120),
    "smacv2_10_units": (10, 15, 257, 240),
    "smacv2_20_units": (20, 25, 517, 480),
    "corridor": (6, 29, 387, 360),
    "8m_vs_9m": (8, 14, 218, 204),
}
E = 6


def make(name: str, n_envs: int = E, seed: int = 0) -> SmaxEnv:
    from fastmix.envs.smax.env import SmaxEnv

    env = envs.make(f"smax:{name}", n_envs, seed)
    assert isinstance(env, SmaxEnv) and isinstance(env, ExternalEnv)
    return env


def choose(env: SmaxEnv, rng: np.random.Generator) -> np.ndarray:
    return np.asarray((rng.random(env.avail.shape) * env.avail).argmax(-1))


def shoot(env: SmaxEnv) -> np.ndarray:
    """The first enemy in range; else to the right, where they are."""
    targets = env.avail[:, :, 5:]
    right = np.where(env.avail[:, :, 1], 1, 4)
    return np.where(targets.any(-1), targets.argmax(-1) + 5, right)


@pytest.mark.parametrize("name", SIZES)
def test_sizes_of_every_map(name: str) -> None:
    info = make(name, 1).info
    assert (info.n_agents, info.n_actions, info.obs_dim, info.state_dim) == SIZES[name]
    assert info.episode_limit == 101 and info.settings == {"unit_dim": 10}


def test_every_map_of_jaxmarl_is_known_here() -> None:
    from jaxmarl.environments.smax.smax_env import MAP_NAME_TO_SCENARIO

    assert set(MAP_NAME_TO_SCENARIO) | {"corridor", "8m_vs_9m"} == set(SIZES)


def test_battles() -> None:
    """Episodes of every ending, their rewards and flags, and one compilation for all of it."""
    env, rng = make("3m"), np.random.default_rng(0)
    env.reset()
    assert "SMAX (not SMAC), jaxmarl" in env.build
    assert (env.state <= 1).all() and (env.state >= 0).all()
    allies = env.state[:, :30].reshape(E, 3, 10)
    np.testing.assert_allclose(allies[:, :, 0], 1.0)  # health
    assert (allies[:, :, 1] < 0.5).all() and (allies[:, :, 1] > 0.1).all()  # they begin on the left
    returns, t = np.zeros(E), np.zeros(E, dtype=int)
    won, lost, fewer = 0, 0, False
    assert env.won is not None
    for _ in range(150):
        env.step(shoot(env) if rng.random() < 0.9 else choose(env, rng))
        assert env.avail.any(-1).all()
        dead = (env.obs == 0).all(-1)
        fewer |= bool(dead.any())
        assert (env.avail[dead] == (np.arange(8) == 4)).all()
        returns, t = returns + env.reward, t + 1
        done = env.terminated | env.truncated
        assert not (env.terminated & env.truncated).any()
        assert (env.reward[env.won & done] >= 1.0).all() and (env.reward[~env.won] < 1.0).all()
        won, lost = won + int((env.won & done).sum()), lost + int((~env.won & env.terminated).sum())
        assert (returns[done & env.won] == pytest.approx(2.0, abs=1e-3)) and (returns <= 2.001).all()
        last = env.obs.copy()
        env.reset(np.flatnonzero(done))
        np.testing.assert_array_equal(env.obs[~done], last[~done])
        assert (env.obs[done] != last[done]).any() == done.any()
        returns[done], t[done] = 0, 0
    assert won > 0 and lost > 0 and fewer
    program = env._program
    assert make("3m")._program is program
    compiled: list[Any] = [program.step, program.reset]
    assert [function._cache_size() for function in compiled] == [1, 1]


def test_the_time_limit_cuts_at_the_promised_step() -> None:
    env = make("3m,max_steps=7,enemy_shoots=False")
    assert env.info.episode_limit == 8
    env.reset()
    for step in range(1, 9):
        env.step(np.full((E, 3), 4))
        assert (env.truncated == (step == 8)).all() and not env.terminated.any()
    assert env.won is not None and not env.won.any()
    last = env.obs.copy()
    env.step(np.full((E, 3), 1))  # a finished copy stays as it is
    assert env.truncated.all() and (env.obs == last).all()


def test_seeds_and_resumption() -> None:
    env, same, other = make("3m", seed=1), make("3m", seed=1), make("3m", seed=2)
    rng = np.random.default_rng(0)
    for each in (env, same, other):
        each.reset()
    np.testing.assert_array_equal(env.obs, same.obs)
    assert (env.obs != other.obs).any() and (env.obs[0] != env.obs[1]).any()
    for _ in range(12):
        env.step(choose(env, rng))
    other.load_state_dict(env.state_dict())
    before = env.obs.copy()
    for _ in range(30):
        np.testing.assert_array_equal(env.obs, other.obs)
        np.testing.assert_array_equal(env.state, other.state)
        np.testing.assert_array_equal(env.avail, other.avail)
        actions = choose(env, rng)
        for each in (env, other):
            each.step(actions)
        done = np.flatnonzero(env.terminated | env.truncated)
        for each in (env, other):
            each.reset(done)
    assert (before != env.obs).any()
    with pytest.raises(ValueError, match=r"were saved with SMAX 1, and this is SMAX \(not SMAC\)"):
        env.load_state_dict(env.state_dict() | {"build": "SMAX 1"})


def test_arrays_are_copies() -> None:
    """What JAX hands out without a copy is its own memory."""
    env = make("3m")
    env.reset()
    obs = env.obs
    obs[:] = 7.0
    env.step(np.full((E, 3), 4))
    assert env.obs is obs and (obs != 7).all()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("9q", "the maps of SMAX are 3m, .*corridor, 8m_vs_9m"),
        ("3m,speed=3", r"smax does not take the options \{'speed': 3\}"),
        ("3m,num_allies=3", "num_allies is not an option"),
    ],
)
def test_what_cannot_be_is_explained(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(name)


def test_importing_jaxmarl_leaves_the_output_alone() -> None:
    code = (
        "import contextlib, io, sys; from fastmix import envs\n"
        "with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:\n"
        "    envs.make('smax:3m', 1, 0); assert sys.stdout is out and sys.stderr is err; print('hidden')\n"
        "assert out.getvalue() == 'hidden\\n'; sys.__stdout__.write('done')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "done" and not done.stderr


def test_wrong_actions() -> None:
    env = make("3m")
    with pytest.raises(ValueError, match=r"\(6, 3\)"):
        env.step(np.zeros((E, 2), dtype=np.int64))
    with pytest.raises(ValueError, match=r"outside 0\.\.7"):
        env.step(np.full((E, 3), 8))
