"""One-step matrix games: every agent picks one action, the payoff tensor gives the team reward, the episode is over.

The payoffs are those of the ResQ appendix (tables 1 to 3) and the POWQMIX paper (table 1). State and observations are
the constant ones(5), the convention of the only public matrix game that has observations at all (wqmix).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fastmix.envs.protocol import EnvInfo, StateDict

OBS_DIM = 5
T_MAX = 20_000  # what the papers state: 20,000 steps


def action_labels(n: int) -> tuple[str, ...]:
    """A, B, C, ... as the papers write them; numbers where the alphabet is too short."""
    return tuple(chr(ord("A") + i) for i in range(n)) if n <= 26 else tuple(str(i) for i in range(n))


@dataclass(frozen=True, eq=False)
class Payoff:
    """A payoff tensor with one axis an agent, ``values[a_1, ..., a_A]`` float64, and the reward noise on top of it."""

    name: str
    values: np.ndarray
    noise_std: float = 0.0
    actions: tuple[str, ...] = field(default=())  # labels; A, B, C, ... unless given

    def __post_init__(self) -> None:
        if not self.actions:
            object.__setattr__(self, "actions", action_labels(max(self.values.shape)))

    @property
    def n_agents(self) -> int:
        """One axis an agent."""
        return self.values.ndim

    @property
    def optimum(self) -> float:
        """The highest mean payoff."""
        return float(self.values.max())

    def optimal_actions(self) -> list[tuple[int, ...]]:
        """Every joint action with the highest payoff (there may be ties)."""
        return [tuple(int(a) for a in joint) for joint in np.argwhere(self.values == self.values.max())]

    def label(self, joint: tuple[int, ...]) -> str:
        """``(0, 2)`` as ``AC``; labels longer than one character are joined by commas."""
        names = [self.actions[a] for a in joint]
        return ("" if all(len(n) == 1 for n in names) else ",").join(names)


_MATRIX_1 = [[8.0, -12.0, -12.0], [-12.0, 0.0, 0.0], [-12.0, 0.0, 7.9]]
_MATRIX_2 = [[2.5, 0.0, -100.0], [0.0, 2.0, 0.0], [-100.0, -100.0, 3.0]]

PAYOFFS: dict[str, Payoff] = {
    "resq1": Payoff("resq1", np.array(_MATRIX_1)),
    "resq2": Payoff("resq2", np.array(_MATRIX_2)),
    "stochastic": Payoff("stochastic", np.array(_MATRIX_1), noise_std=1.0),
}


class MatrixGame:
    """E copies of a one-step game. Agents with fewer actions than the widest one have the rest masked out.

    Implements :class:`fastmix.envs.BatchedEnv`. ``payoff`` is readable, so that learned tables can be set beside it.
    """

    def __init__(self, payoff: Payoff, n_envs: int, seed: int) -> None:
        shape = payoff.values.shape
        self.payoff = payoff
        self.n_envs = n_envs
        self.info = EnvInfo(len(shape), max(shape), OBS_DIM, OBS_DIM, episode_limit=1, t_max=T_MAX)
        self.obs = np.ones((n_envs, len(shape), OBS_DIM), dtype=np.float32)
        self.state = np.ones((n_envs, OBS_DIM), dtype=np.float32)
        self.avail = np.empty((n_envs, len(shape), max(shape)), dtype=bool)
        self.avail[:] = np.arange(max(shape)) < np.array(shape)[:, None]
        self.reward = np.zeros(n_envs, dtype=np.float32)
        self.terminated = np.zeros(n_envs, dtype=bool)
        self.truncated = np.zeros(n_envs, dtype=bool)
        self.won: np.ndarray | None = None
        self._rng = np.random.default_rng(seed)
        # One flat look-up: row-major strides turn a joint action into its index.
        self._flat = np.ascontiguousarray(payoff.values, dtype=np.float64).reshape(-1)
        self._strides = np.array([int(np.prod(shape[i + 1 :], dtype=np.int64)) for i in range(len(shape))])
        self._sizes = np.array(shape)

    def reset(self, indices: np.ndarray | None = None) -> None:
        """See :class:`fastmix.envs.BatchedEnv`; the observation is constant, so there is little to do."""
        self.terminated[slice(None) if indices is None else indices] = False

    def step(self, actions: np.ndarray) -> None:
        """Pay ``payoff[actions]`` (plus noise) and end every episode. Raises ``ValueError`` for other actions."""
        expected = (self.n_envs, self.info.n_agents)
        if actions.shape != expected:
            raise ValueError(f"actions has shape {actions.shape}; it must be [n_envs, n_agents] = {expected}")
        if (actions < 0).any() or (actions >= self._sizes).any():
            raise ValueError(f"actions holds an action outside 0..{self._sizes.tolist()} - 1: {actions.tolist()}")
        rewards = self._flat[actions @ self._strides]
        if self.payoff.noise_std > 0:
            rewards = rewards + self.payoff.noise_std * self._rng.standard_normal(self.n_envs)
        self.reward[:] = rewards
        self.terminated[:] = True

    def state_dict(self) -> StateDict:
        """The state of the noise."""
        return {"rng": self._rng.bit_generator.state, "terminated": self.terminated.copy()}

    def load_state_dict(self, state: StateDict) -> None:
        """The inverse of ``state_dict``."""
        self._rng.bit_generator.state = state["rng"]
        self.terminated[:] = np.asarray(state["terminated"])

    def close(self) -> None:
        """Nothing to release."""


def make_matrix(spec: str, n_envs: int, seed: int) -> MatrixGame:
    """``spec`` is what follows ``matrix:``, a name of ``PAYOFFS`` or ``@file.json``."""
    return MatrixGame(load_payoff(spec), n_envs, seed)


def load_payoff(spec: str) -> Payoff:
    """The payoff named ``spec``, or read from the file ``@file.json`` (its schema: :func:`parse_payoff`).

    Raises ``ValueError`` for an unknown name or a file that is not a payoff, ``FileNotFoundError`` for a missing file.
    """
    if not spec.startswith("@"):
        if spec not in PAYOFFS:
            known = ", ".join(f"matrix:{name}" for name in PAYOFFS)
            raise ValueError(
                f"env is 'matrix:{spec}'; the matrix games are {known}, and matrix:@file.json for your own"
            )
        return PAYOFFS[spec]
    path = Path(spec[1:])
    if not path.is_file():
        raise FileNotFoundError(f"env is 'matrix:{spec}', but there is no file {path}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    return parse_payoff(content, name=path.stem, where=str(path))


def parse_payoff(content: Any, *, name: str, where: str) -> Payoff:
    """A payoff from a JSON value: ``{"payoff": [[8, -12], [-12, 0]], "noise_std": 0.0, "actions": ["A", "B"]}``.

    ``payoff`` is nested one level an agent; ``noise_std`` (Gaussian, on every reward) and ``actions`` (labels, as many
    as the widest agent has actions) are optional. ``where`` names the source in error messages.
    """
    example = '{"payoff": [[8, -12, -12], [-12, 0, 0], [-12, 0, 7.9]], "noise_std": 0.0}'
    if not isinstance(content, dict) or "payoff" not in content:
        raise ValueError(f"{where}: expected an object with the key 'payoff', such as {example}")
    unknown = sorted(set(content) - {"payoff", "noise_std", "actions"})
    if unknown:
        raise ValueError(f"{where}: unknown key {unknown[0]!r}; the keys are 'payoff', 'noise_std', 'actions'")
    _check_nesting(content["payoff"], where, path="payoff")
    values = np.array(content["payoff"], dtype=np.float64)
    # The trainer stores rewards as float32: a finite float64 beyond its range would become an infinite reward.
    if not np.isfinite(values).all() or (np.abs(values) > np.finfo(np.float32).max).any():
        bad = values[~(np.abs(values) <= np.finfo(np.float32).max)].flat[0]
        raise ValueError(f"{where}: payoff holds {bad}; every entry must be finite in float32")
    noise_std = content.get("noise_std", 0.0)
    if not _is_number(noise_std) or not 0 <= noise_std < np.inf:
        raise ValueError(f"{where}: noise_std is {noise_std!r}; it must be a finite number >= 0")
    actions = content.get("actions", [])
    if not isinstance(actions, list) or not all(isinstance(label, str) and label for label in actions):
        raise ValueError(f"{where}: actions is {actions!r}; it must be a list of non-empty strings")
    if actions and (len(actions) != max(values.shape) or len(set(actions)) != len(actions)):
        raise ValueError(
            f"{where}: actions is {actions!r}; it must be {max(values.shape)} different labels, one an action"
        )
    return Payoff(name, values, float(noise_std), tuple(actions))


def _check_nesting(value: Any, where: str, path: str) -> tuple[int, ...]:
    """The shape of a rectangular nested list of numbers, or a ``ValueError`` that points at the first odd entry."""
    if _is_number(value):
        if path == "payoff":
            raise ValueError(f"{where}: payoff is the number {value}; it must be a list, nested one level an agent")
        return ()
    if not isinstance(value, list) or not value:
        raise ValueError(f"{where}: {path} is {value!r}; it must be a number or a non-empty list")
    shapes = [_check_nesting(entry, where, f"{path}[{i}]") for i, entry in enumerate(value)]
    for i, shape in enumerate(shapes):
        if shape != shapes[0]:
            raise ValueError(
                f"{where}: {path}[{i}] has shape {list(shape)} but {path}[0] has {list(shapes[0])}; "
                "the payoff must be rectangular, one axis an agent"
            )
    return (len(value), *shapes[0])


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
