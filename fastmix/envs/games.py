"""From single games to a batch of them: what one game is, the arrays of the batch, and the environment made of both.

Adapters to other people's environments write a :class:`Game`; :class:`GamesEnv` plays E of them, in this process
(:class:`InProcess`) or in worker processes (``fastmix.envs.workers``).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from fastmix.envs.protocol import EnvInfo, StateDict
from fastmix.errors import EnvironmentFailed

log = logging.getLogger(__name__)


class Frame(NamedTuple):
    """What a game shows before an action: ``obs [A,O]``, ``state [S]``, ``avail [A,U]``."""

    obs: np.ndarray
    state: np.ndarray
    avail: np.ndarray


class Outcome(NamedTuple):
    """What an action led to; the flags as in :class:`fastmix.envs.BatchedEnv`."""

    frame: Frame
    reward: float
    terminated: bool
    truncated: bool
    won: bool = False


class GameFailed(Exception):  # noqa: N818 - what happened
    """The game broke down: its episode is lost, and it must be made anew."""


class Game(Protocol):
    """One copy of an environment."""

    info: EnvInfo
    knows_victory: bool
    build: str

    def reset(self, seed: int) -> Frame:
        """Begin an episode, decided by ``seed`` where the game can be seeded. May raise :class:`GameFailed`."""

    def step(self, actions: np.ndarray) -> Outcome:
        """Take the joint action ``[A]`` int64, which is available. May raise :class:`GameFailed`."""

    def close(self) -> None:
        """Release what the game holds."""


@dataclass(frozen=True)
class Slots:
    """The arrays of E copies: those of :class:`fastmix.envs.BatchedEnv` and the joint actions ``[E,A]``."""

    obs: np.ndarray
    state: np.ndarray
    avail: np.ndarray
    actions: np.ndarray
    reward: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    won: np.ndarray

    @classmethod
    def over(cls, buffer: Any, info: EnvInfo, n_envs: int) -> Slots:
        """Views of ``buffer``, which has at least :meth:`size` bytes."""
        arrays, offset = {}, 0
        for name, (shape, dtype) in _fields(info, n_envs).items():
            count = int(np.prod(shape))
            arrays[name] = np.frombuffer(buffer, dtype, count, offset).reshape(shape)
            offset += _aligned(count * dtype.itemsize)
        return cls(**arrays)

    @staticmethod
    def size(info: EnvInfo, n_envs: int) -> int:
        """Bytes of all arrays."""
        return sum(_aligned(int(np.prod(shape)) * dtype.itemsize) for shape, dtype in _fields(info, n_envs).values())

    def show(self, row: int, frame: Frame) -> None:
        """Write what the copy ``row`` shows. Raises ``ValueError`` where it has other sizes than promised."""
        for name, given in frame._asdict().items():
            array, value = getattr(self, name), np.asarray(given)
            if value.shape != array.shape[1:]:
                raise ValueError(
                    f"the environment delivers {name} of shape {list(value.shape)}, and promised "
                    f"{list(array.shape[1:])}"
                )
            array[row] = value

    def begin(self, row: int, game: Game, seed: int) -> None:
        """Reset the copy ``row``."""
        self.show(row, game.reset(seed))
        self.reward[row] = 0.0
        self.terminated[row] = self.truncated[row] = self.won[row] = False

    def advance(self, row: int, game: Game) -> None:
        """Take the joint action that stands in ``actions``."""
        outcome = game.step(self.actions[row].copy())
        self.show(row, outcome.frame)
        self.reward[row] = outcome.reward
        self.terminated[row], self.truncated[row], self.won[row] = outcome[2:]


class Driver(Protocol):
    """Whatever plays the games of a :class:`GamesEnv`. ``reset`` and ``step`` return why a row failed, if any did."""

    info: EnvInfo
    knows_victory: bool
    slots: Slots

    @property
    def build(self) -> str:
        """What the games are, and their version; "" until known."""

    def reset(self, rows: np.ndarray, seeds: Sequence[int]) -> dict[int, str]:
        """Begin an episode in each of ``rows``."""

    def step(self, rows: np.ndarray) -> dict[int, str]:
        """Take the joint actions of ``slots`` in ``rows``."""

    def close(self) -> None:
        """End the games."""


class InProcess:
    """The games of all copies one after another, in this process."""

    def __init__(self, make: Callable[[int], Game], n_envs: int, seed: int) -> None:
        self.games = [make(derive(seed, row)) for row in range(n_envs)]
        self.info, self.knows_victory = self.games[0].info, self.games[0].knows_victory
        self.slots = Slots.over(bytearray(Slots.size(self.info, n_envs)), self.info, n_envs)

    @property
    def build(self) -> str:
        """See :class:`Driver`."""
        return self.games[0].build

    def reset(self, rows: np.ndarray, seeds: Sequence[int]) -> dict[int, str]:
        """See :class:`Driver`; a failure in this process is the user's to see."""
        for row, seed in zip(rows.tolist(), seeds, strict=True):
            self.slots.begin(row, self.games[row], seed)
        return {}

    def step(self, rows: np.ndarray) -> dict[int, str]:
        """See :class:`Driver`."""
        for row in rows.tolist():
            self.slots.advance(row, self.games[row])
        return {}

    def close(self) -> None:
        """See :class:`Driver`."""
        for game in self.games:
            game.close()


class GamesEnv:
    """E games as one :class:`fastmix.envs.ExternalEnv`.

    The n-th episode of a copy is seeded by ``seed``, the copy and n. A saved run goes on in the middle of its episodes
    where ``replayable`` says that a seed and the actions taken decide a game: they are played again. Otherwise, and
    where a game turns out not to be so, the running episodes are marked as ``failed`` and begin anew.

    A copy whose games break down ``patience`` times in a row raises ``EnvironmentFailed``.
    """

    def __init__(self, name: str, driver: Driver, seed: int, *, replayable: bool, patience: int = 3) -> None:
        slots = driver.slots
        self.name = name
        self.info = driver.info
        self.n_envs = len(slots.obs)
        self.obs, self.state, self.avail = slots.obs, slots.state, slots.avail
        self.reward, self.terminated, self.truncated = slots.reward, slots.terminated, slots.truncated
        self.won: np.ndarray | None = slots.won if driver.knows_victory else None
        self.failed = np.zeros(self.n_envs, dtype=bool)
        self.failures = 0
        self._driver = driver
        self._seed = seed
        self._replayable = replayable
        self._patience = patience
        self._in_a_row = np.zeros(self.n_envs, dtype=np.int64)
        self._episode = np.full(self.n_envs, -1, dtype=np.int64)
        self._running = np.zeros(self.n_envs, dtype=bool)
        self._t = np.zeros(self.n_envs, dtype=np.int64)
        steps = self.info.episode_limit if replayable else 0
        self._taken = np.zeros((self.n_envs, steps, self.info.n_agents), dtype=np.int32)
        self._copies = np.arange(self.n_envs)

    @property
    def build(self) -> str:
        """See :class:`fastmix.envs.ExternalEnv`."""
        return self._driver.build

    def reset(self, indices: np.ndarray | None = None) -> None:
        """See :class:`fastmix.envs.BatchedEnv`. A game that cannot begin is made anew and tried again."""
        rows = self._copies if indices is None else np.asarray(indices, dtype=np.int64)
        while len(rows):
            self._episode[rows] += 1
            self._begin(rows)
            rows = np.flatnonzero(self.failed & np.isin(self._copies, rows))

    def step(self, actions: np.ndarray) -> None:
        """See :class:`fastmix.envs.BatchedEnv`; finished and failed copies stand still.

        Raises ``ValueError`` for actions of another shape, and for one that is not available.
        """
        actions = np.asarray(actions)
        expected = (self.n_envs, self.info.n_agents)
        if actions.shape != expected:
            raise ValueError(f"actions has shape {actions.shape}; it must be [n_envs, n_agents] = {expected}")
        if actions.dtype.kind not in "iu":
            raise ValueError(f"actions is {actions.dtype}; it must be integers")
        rows = np.flatnonzero(self._running)
        self._check_available(rows, actions)
        self._advance(rows, actions)

    def state_dict(self) -> StateDict:
        """The running episodes as their seeds and actions (see the class), and what was counted."""
        return {
            "build": self.build,
            "seed": self._seed,
            "episode": self._episode.copy(),
            "running": self._running.copy(),
            "failed": self.failed.copy(),
            "t": self._t.copy(),
            "taken": self._taken.copy(),
            "obs": self.obs.copy(),
            "terminated": self.terminated.copy(),
            "truncated": self.truncated.copy(),
            "failures": self.failures,
        }

    def load_state_dict(self, state: StateDict) -> None:
        """The inverse of ``state_dict``. Raises ``ValueError`` for the state of another build of the game."""
        if self.build and state["build"] and self.build != state["build"]:
            raise ValueError(
                f"{self.name} was saved with {state['build']}, and this is {self.build}; results of different builds "
                "are not comparable, so go on with the one that the run was started with"
            )
        self._seed = int(state["seed"])
        self._episode[:] = np.asarray(state["episode"])
        self.failures = int(state["failures"])
        running, t = np.asarray(state["running"]), np.asarray(state["t"])
        if not self._replayable:
            self._running[:] = False
            self.failed[:] = running
        else:
            self._play_again(np.flatnonzero(running), t, np.asarray(state["taken"]), np.asarray(state["obs"]))
        self.failed |= np.asarray(state["failed"])
        self.terminated[~running] = np.asarray(state["terminated"])[~running]
        self.truncated[~running] = np.asarray(state["truncated"])[~running]

    def close(self) -> None:
        """End the games."""
        self._driver.close()

    def _begin(self, rows: np.ndarray) -> None:
        seeds = [derive(self._seed, row, int(self._episode[row])) for row in rows.tolist()]
        reasons = self._driver.reset(rows, seeds)
        self._t[rows] = 0
        self._running[rows] = True
        self.failed[rows] = False
        self._mark(reasons)

    def _advance(self, rows: np.ndarray, actions: np.ndarray) -> None:
        self._driver.slots.actions[rows] = actions[rows]
        if self._replayable:
            self._taken[rows, self._t[rows]] = actions[rows]
        reasons = self._driver.step(rows)
        self._t[rows] += 1
        # What a failed game left behind means nothing.
        whole = rows[~np.isin(rows, list(reasons))] if reasons else rows
        done = whole[self.terminated[whole] | self.truncated[whole]]
        self._running[done] = False
        self._in_a_row[done] = 0
        self._mark(reasons)

    def _mark(self, reasons: dict[int, str]) -> None:
        """Take note of rows that failed. Raises ``EnvironmentFailed`` where that goes on and on."""
        for row, reason in reasons.items():
            self.failures += 1
            self._in_a_row[row] += 1
            self._running[row] = self.terminated[row] = self.truncated[row] = False
            self.failed[row] = True
            log.warning("%s: the game of copy %d failed, and its episode is dropped: %s", self.name, row, reason)
            if self._in_a_row[row] >= self._patience:
                self.close()
                raise EnvironmentFailed(
                    f"{self.name}: the game of copy {row} failed {self._in_a_row[row]} times in a row, the last time "
                    f"because {reason}"
                )

    def _check_available(self, rows: np.ndarray, actions: np.ndarray) -> None:
        chosen = actions[rows]
        inside = (chosen >= 0) & (chosen < self.info.n_actions)
        if inside.all() and np.take_along_axis(self.avail[rows], chosen[..., None], -1).all():
            return
        for row in rows.tolist():
            for agent, action in enumerate(actions[row].tolist()):
                if not 0 <= action < self.info.n_actions or not self.avail[row, agent, action]:
                    raise ValueError(
                        f"action {action} of agent {agent} in copy {row} is not available; it may take "
                        f"{np.flatnonzero(self.avail[row, agent]).tolist()}"
                    )

    def _play_again(self, rows: np.ndarray, t: np.ndarray, taken: np.ndarray, obs: np.ndarray) -> None:
        """Bring ``rows`` to their steps ``t [E]`` by the actions ``taken [E,L,A]``, where they must show ``obs``."""
        self._running[:] = self.failed[:] = False
        self._begin(rows)
        for step in range(int(t[rows].max(initial=0))):
            self._advance(rows[(t[rows] > step) & self._running[rows]], taken[:, step])
        lost = rows[(self._t[rows] != t[rows]) | ~self._running[rows] | (self.obs[rows] != obs[rows]).any((1, 2))]
        if len(lost):
            log.warning("%s cannot be restored by its seeds and actions: %d episodes begin anew", self.name, len(lost))
        self._running[lost] = False
        self.failed[lost] = True


def derive(*key: int) -> int:
    """A seed below 2^31 that ``key`` decides."""
    return int(np.random.SeedSequence(key).generate_state(1)[0]) >> 1


def _fields(info: EnvInfo, n_envs: int) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
    A, U = info.n_agents, info.n_actions
    real, flag = np.dtype(np.float32), np.dtype(bool)
    return {
        "obs": ((n_envs, A, info.obs_dim), real),
        "state": ((n_envs, info.state_dim), real),
        "avail": ((n_envs, A, U), flag),
        "actions": ((n_envs, A), np.dtype(np.int64)),
        "reward": ((n_envs,), real),
        "terminated": ((n_envs,), flag),
        "truncated": ((n_envs,), flag),
        "won": ((n_envs,), flag),
    }


def _aligned(n_bytes: int) -> int:
    """Up to the next cache line, so that no two arrays share one."""
    return -(-n_bytes // 64) * 64
