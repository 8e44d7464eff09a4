"""One game of StarCraft II. Runs in a worker: nothing else imports smac, which reads the command line and warns a lot.

What is handled here, because the package does not say it: a game that crashes ends an episode with reward 0 and an
empty info; one that crashes between episodes goes on with zeros; a second reset before the end of the first episode
makes every later reward smaller.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fastmix.envs.games import Frame, GameFailed, Outcome
from fastmix.envs.protocol import EnvInfo

NO_OP = 0  # available to dead units, and then alone


def make_game(seed: int, map_name: str, options: dict[str, Any]) -> SmacGame:
    """For ``fastmix.envs.workers``."""
    return SmacGame(map_name, seed, options)


class SmacGame:
    """A :class:`fastmix.envs.games.Game`; ``seed`` is that of the game, which takes one when it is made only.

    Raises ``ValueError`` for a map or an option that smac does not have.
    """

    knows_victory = True

    def __init__(self, map_name: str, seed: int, options: dict[str, Any]) -> None:
        from smac.env import StarCraft2Env

        try:
            self._env = StarCraft2Env(map_name=map_name, seed=seed, **options)
        except KeyError as error:
            raise ValueError(f"env is 'smac:{map_name}', and smac has no map {error}") from error
        except TypeError as error:
            raise ValueError(f"smac does not take these options, {sorted(options)}: {error}") from error
        sizes = self._env.get_env_info()
        self.info = EnvInfo(
            n_agents=int(sizes["n_agents"]),
            n_actions=int(sizes["n_actions"]),
            obs_dim=int(sizes["obs_shape"]),
            state_dim=int(sizes["state_shape"]),
            episode_limit=int(sizes["episode_limit"]),
            t_max=2_050_000,
            test_interval=10_000,
            test_nepisode=32,
            settings=_own_state_size(self._env),
        )
        self.build = ""
        self._first: Frame | None = None  # of an episode in which nothing has happened yet
        self._running = False
        self._avail = np.zeros((self.info.n_agents, self.info.n_actions), dtype=bool)

    def reset(self, seed: int) -> Frame:
        """Begin an episode (``seed`` has no say), launching the game for the first one.

        Raises ``FileNotFoundError`` without the game and ``ValueError`` without the map.
        """
        if self._first is not None:
            return self._first  # smac must not be reset before an episode has ended, and this one has not begun
        if self._running:
            self._play_out()
        restarts = self._env.force_restarts
        try:
            obs, state = self._env.reset()
            frame = Frame(np.asarray(obs, dtype=np.float32), np.asarray(state, dtype=np.float32), self._available())
        except FileNotFoundError as error:
            raise FileNotFoundError(f"StarCraft II cannot be started: {error} (fastmix doctor says more)") from error
        except ValueError as error:
            self._env.close()  # it leaves a game running
            raise ValueError(f"the map of 'smac:{self._env.map_name}' cannot be loaded: {error}") from error
        except Exception as error:
            raise GameFailed(f"the game did not begin: {_told(error)}") from error
        if self._env.force_restarts != restarts or not frame.avail[:, NO_OP + 1 :].any():
            raise GameFailed("the game crashed between two episodes")
        if not self.build:
            self.build = _build(self._env)
        self._first, self._running = frame, True
        return frame

    def step(self, actions: np.ndarray) -> Outcome:
        """See :class:`fastmix.envs.games.Game`.

        The time limit is a true end, as smac's own results have it, unless ``continuing_episode`` is on.
        """
        self._first = None
        try:
            reward, terminated, info = self._env.step(actions.tolist())
        except Exception as error:
            raise GameFailed(f"the game broke down in a step: {_told(error)}") from error
        if "battle_won" not in info:
            raise GameFailed("the game crashed in a step")
        self._running = not terminated
        cut = terminated and bool(info.get("episode_limit", False))
        frame = Frame(np.asarray(self._env.get_obs()), np.asarray(self._env.get_state()), self._available())
        return Outcome(frame, float(reward), terminated and not cut, cut, bool(info["battle_won"]))

    def save_replay(self, row: int, folder: str) -> None:
        """Everything since the game was launched, as one file of the game's own."""
        self._env.replay_dir, self._env.replay_prefix = folder, f"{self._env.map_name}-copy{row}"
        self._env.save_replay()

    def close(self) -> None:
        """End the game."""
        self._env.close()

    def _available(self) -> np.ndarray:
        self._avail = np.asarray(self._env.get_avail_actions(), dtype=bool)
        return self._avail

    def _play_out(self) -> None:
        """Bring the running episode to its end: every unit takes the first action it can, to stop or nothing."""
        while self._running:
            self.step(self._avail.argmax(axis=1))


def _own_state_size(env: Any) -> dict[str, int]:
    """Each ally's features at the front of the state: health, cooldown or energy, position, shield, type."""
    return {} if env.obs_instead_of_state else {"unit_dim": int(4 + env.shield_bits_ally + env.unit_type_bits)}


def _build(env: Any) -> str:
    """What the running game calls itself."""
    ping = env._controller.ping()
    return f"StarCraft II {ping.game_version} (build {ping.base_build})"


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
