"""SMAX as one batched environment. Importing this imports JAX and every environment of JaxMARL (4 s)."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Iterator
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fastmix import requirements
from fastmix.envs.protocol import EnvInfo, StateDict


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """JaxMARL prints while it is imported, and then points our output to where the process's was at its start."""
    start, hidden = sys.__stdout__, io.StringIO()
    vars(sys)["__stdout__"] = hidden
    try:
        with contextlib.redirect_stdout(hidden), contextlib.redirect_stderr(sys.stderr):
            yield
    finally:
        vars(sys)["__stdout__"] = start


with _undisturbed():
    from jaxmarl.environments.smax import HeuristicEnemySMAX
    from jaxmarl.environments.smax.smax_env import MAP_NAME_TO_SCENARIO, Scenario

MARINE, ZERGLING, STALKER, ZEALOT = 0, 4, 2, 3
OURS: dict[str, tuple[list[int], int, int]] = {
    "corridor": ([ZEALOT] * 6 + [ZERGLING] * 24, 6, 24),
    "8m_vs_9m": ([MARINE] * 17, 8, 9),
}
"""SMAC's maps that JaxMARL lacks: unit types, allies, enemies."""
NOT_OPTIONS = ("scenario", "action_type", "num_allies", "num_enemies", "use_self_play_reward")


class Seen(NamedTuple):
    """What a step or a reset delivers, for all copies."""

    obs: jax.Array
    state: jax.Array
    avail: jax.Array
    reward: jax.Array
    terminated: jax.Array
    truncated: jax.Array
    won: jax.Array


class SmaxEnv:
    """E copies of one map; implements :class:`fastmix.envs.ExternalEnv`.

    One compiled function plays all copies, compiled once for each map, options and E (3 to 11 s, at the first reset and
    step). It runs on the CPU: there it is fastest with about 8 copies or more.

    Everything random follows from the seed, the copy, its episode and the step, so that a saved run goes on exactly.
    An ally that is dead may only stop. ``won`` is: all enemies dead and an ally alive. An episode that reaches the time
    limit is ``truncated`` (JaxMARL ends it at the call after ``max_steps``). Resets are ours: JaxMARL's own would
    overwrite the last observation of an episode. Positions and unit types are scaled to at most 1 in the state, which
    JaxMARL leaves in map units and as numbers of a list.
    """

    def __init__(self, map_name: str, options: dict[str, Any], n_envs: int, seed: int) -> None:
        self._program = program = _program(map_name, n_envs, tuple(sorted(options.items())))
        self.info, n_agents = program.info, program.info.n_agents
        self.build = f"SMAX (not SMAC), jaxmarl {requirements.installed_version('jaxmarl')}"
        self.n_envs = n_envs
        self.obs = np.zeros((n_envs, n_agents, self.info.obs_dim), dtype=np.float32)
        self.state = np.zeros((n_envs, self.info.state_dim), dtype=np.float32)
        self.avail = np.zeros((n_envs, n_agents, self.info.n_actions), dtype=bool)
        self.reward = np.zeros(n_envs, dtype=np.float32)
        self.terminated = np.zeros(n_envs, dtype=bool)
        self.truncated = np.zeros(n_envs, dtype=bool)
        self.won: np.ndarray | None = np.zeros(n_envs, dtype=bool)
        self.failed = np.zeros(n_envs, dtype=bool)
        self.failures = 0
        self._seed = seed % 2**32
        self._episode = np.full(n_envs, -1, dtype=np.int32)
        self._t = np.zeros(n_envs, dtype=np.int32)
        self._games = program.no_games()

    def reset(self, indices: np.ndarray | None = None) -> None:
        """See :class:`fastmix.envs.BatchedEnv`."""
        fresh = np.zeros(self.n_envs, dtype=bool)
        fresh[slice(None) if indices is None else indices] = True
        self._episode[fresh] += 1
        self._t[fresh] = 0
        self._games, seen = self._program.reset(
            self._games, *map(_put, (fresh, self._episode)), _put(np.uint32(self._seed))
        )
        self._show(seen, fresh)

    def step(self, actions: np.ndarray) -> None:
        """See :class:`fastmix.envs.BatchedEnv`. Raises ``ValueError`` for actions of another shape or out of range.

        An action that is not available does nothing in SMAX.
        """
        expected = (self.n_envs, self.info.n_agents)
        if actions.shape != expected:
            raise ValueError(f"actions has shape {actions.shape}; it must be [n_envs, n_agents] = {expected}")
        if (actions < 0).any() or (actions >= self.info.n_actions).any():
            raise ValueError(f"actions holds an action outside 0..{self.info.n_actions - 1}: {actions.tolist()}")
        given = map(_put, (actions.astype(np.int32), self._episode, self._t))
        self._games, seen = self._program.step(self._games, *given, _put(np.uint32(self._seed)))
        self._t += 1
        self._show(seen, ~(self.terminated | self.truncated))

    def state_dict(self) -> StateDict:
        """The running battles."""
        leaves = [np.array(leaf) for leaf in jax.tree.leaves(self._games)]
        ended = {"terminated": self.terminated.copy(), "truncated": self.truncated.copy()}
        counted = {"seed": self._seed, "episode": self._episode.copy(), "t": self._t.copy()}
        return {"build": self.build, "games": leaves, **counted, **ended}

    def load_state_dict(self, state: StateDict) -> None:
        """The inverse of ``state_dict``. Raises ``ValueError`` for the state of another version of JaxMARL."""
        if state["build"] != self.build:
            raise ValueError(f"the battles were saved with {state['build']}, and this is {self.build}")
        leaves, structure = jax.tree.flatten(self._games)
        given = [np.asarray(new, dtype=old.dtype) for new, old in zip(state["games"], leaves, strict=True)]
        self._games = jax.tree.unflatten(structure, [_put(leaf) for leaf in given])
        self._seed = int(state["seed"])
        self._episode[:], self._t[:] = np.asarray(state["episode"]), np.asarray(state["t"])
        everyone = np.ones(self.n_envs, dtype=bool)
        none = np.zeros(self.n_envs, dtype=bool)
        _, seen = self._program.reset(self._games, *map(_put, (none, self._episode)), _put(np.uint32(self._seed)))
        self._show(seen, everyone)
        self.terminated[:], self.truncated[:] = np.asarray(state["terminated"]), np.asarray(state["truncated"])

    def close(self) -> None:
        """Nothing to release."""

    def _show(self, seen: Seen, rows: np.ndarray) -> None:
        """Copy the rows: what JAX hands out is its own memory, and must neither be kept nor written."""
        for name, array in seen._asdict().items():
            np.copyto(getattr(self, name).T, _view(array).T, where=rows)
        self.failed[rows] = False


class _Program:
    """The functions of one map for E copies, compiled when they are first called."""

    def __init__(self, map_name: str, n_envs: int, options: dict[str, Any]) -> None:
        for name in NOT_OPTIONS:
            if name in options:
                raise ValueError(f"env is 'smax:{map_name}'; {name} is not an option of it")
        try:
            self._game = HeuristicEnemySMAX(scenario=_scenario(map_name), **options)
        except TypeError as error:
            raise ValueError(f"smax does not take the options {options}: {error}") from error
        inner = self._game._env
        self.n_envs = n_envs
        self.info = EnvInfo(
            n_agents=int(inner.num_allies),
            n_actions=int(inner.num_ally_actions),
            obs_dim=int(inner.obs_size),
            state_dim=int(inner.state_size),
            episode_limit=int(inner.max_steps) + 1,
            test_interval=10_000,
            test_nepisode=32,
            settings={"unit_dim": len(inner.own_features)},
        )
        self._scale = _state_scale(inner)
        self.reset = jax.jit(self._reset)
        self.step = jax.jit(self._step)

    def no_games(self) -> Any:
        """Zeros of a game state's shapes, for :meth:`reset` to fill.

        They lie on the device, as all that goes in: anything else would be compiled for once more.
        """
        shapes = jax.eval_shape(self._game.reset, jax.eval_shape(lambda: jax.random.PRNGKey(0)))[1]
        return jax.tree.map(lambda leaf: _put(np.zeros((self.n_envs, *leaf.shape), leaf.dtype)), shapes)

    def _reset(self, games: Any, fresh: jax.Array, episode: jax.Array, seed: jax.Array) -> tuple[Any, Seen]:
        keys = jax.vmap(partial(_key, seed))(jnp.arange(self.n_envs), episode, jnp.full(self.n_envs, -1))
        begun = jax.vmap(self._game.reset)(keys)[1]
        games = jax.tree.map(
            lambda new, old: jnp.where(fresh.reshape(-1, *(1,) * (new.ndim - 1)), new, old), begun, games
        )
        nothing = jnp.zeros(self.n_envs, dtype=bool)
        return games, self._look(games, jnp.zeros(self.n_envs), nothing, nothing)

    def _step(
        self, games: Any, actions: jax.Array, episode: jax.Array, t: jax.Array, seed: jax.Array
    ) -> tuple[Any, Seen]:
        keys = jax.vmap(partial(_key, seed))(jnp.arange(self.n_envs), episode, t)
        named = {agent: actions[:, a] for a, agent in enumerate(self._game.agents)}
        _, games, rewards, dones, _ = jax.vmap(self._game.step_env)(keys, games, named)
        return games, self._look(games, rewards[self._game.agents[0]], dones["__all__"], dones["__all__"])

    def _look(self, games: Any, reward: jax.Array, done: jax.Array, at_end: jax.Array) -> Seen:
        game, agents, n_allies = self._game, self._game.agents, self.info.n_agents
        obs = jax.vmap(game.get_obs)(games)
        avail = jax.vmap(game.get_avail_actions)(games)
        alive = games.state.unit_alive
        allies, enemies = alive[:, :n_allies].any(1), alive[:, n_allies:].any(1)
        over = ~allies | ~enemies
        return Seen(
            obs=jnp.stack([obs[agent] for agent in agents], axis=1),
            state=jax.vmap(game.get_world_state)(games) * self._scale,
            avail=jnp.stack([avail[agent] for agent in agents], axis=1).astype(bool),
            reward=reward.astype(jnp.float32),
            terminated=done & over,
            truncated=at_end & ~over,
            won=allies & ~enemies,
        )


@lru_cache(maxsize=8)
def _program(map_name: str, n_envs: int, options: tuple[tuple[str, Any], ...]) -> _Program:
    return _Program(map_name, n_envs, dict(options))


def _scenario(map_name: str) -> Scenario:
    if map_name in OURS:
        types, allies, enemies = OURS[map_name]
        return Scenario(jnp.array(types, dtype=jnp.uint8), allies, enemies, False, False)
    if map_name not in MAP_NAME_TO_SCENARIO:
        known = ", ".join([*MAP_NAME_TO_SCENARIO, *OURS])
        raise ValueError(f"env is 'smax:{map_name}'; the maps of SMAX are {known}")
    return MAP_NAME_TO_SCENARIO[map_name]


def _key(seed: jax.Array, copy: jax.Array, episode: jax.Array, t: jax.Array) -> jax.Array:
    key = jax.random.PRNGKey(seed)
    for number in (copy, episode, t + 1):
        key = jax.random.fold_in(key, number)
    return key


def _state_scale(inner: Any) -> np.ndarray:
    """Factors ``[S]``: the state is every unit's features (health, x, y, cooldown, type), then teams, then types."""
    unit = np.ones(len(inner.own_features), dtype=np.float32)
    unit[1:3] = 1.0 / inner.map_width, 1.0 / inner.map_height
    teams = np.ones(inner.num_agents, dtype=np.float32)
    types = np.full(inner.num_agents, 1.0 / max(1, len(inner.unit_type_names) - 1), dtype=np.float32)
    return np.concatenate([np.tile(unit, inner.num_agents), teams, types])


def _view(array: Any) -> np.ndarray:
    """Without a copy, and not to be written."""
    return np.from_dlpack(array)


def _put(array: Any) -> jax.Array:
    # Of a copy: JAX may keep the memory it is given, and ours changes.
    return jax.device_put(np.array(array), jax.devices("cpu")[0])
