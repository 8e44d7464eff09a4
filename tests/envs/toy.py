"""A small game for ``fastmix.envs.games`` and its workers: a walk to the right, whose every number has a meaning."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from fastmix.envs import EnvInfo
from fastmix.envs.games import Frame, GameFailed, Outcome


class Walk:
    """Two agents on a line; an action is a step of 0, 1 or 2. Who passes cell 6 ends the episode, which step 8 cuts.

    Observations are ``[cell, noise]``, noise by the seed of the episode; the state is the cells. Action 2 is not
    available on odd cells. The reward is the sum of the steps. ``trouble`` is done when agent 0 stands on cell 4.
    """

    knows_victory = True

    def __init__(self, seed: int, trouble: str = "", seeded: bool = True) -> None:
        self.info = EnvInfo(n_agents=2, n_actions=3, obs_dim=2, state_dim=2, episode_limit=8)
        self.build = f"walk 1 (process {os.getpid()})" if trouble == "tell" else "walk 1"
        self.trouble, self.seeded = trouble, seeded
        self.cells, self.t = np.zeros(2, dtype=np.int64), 0
        self.rng = np.random.default_rng(seed)

    def reset(self, seed: int) -> Frame:
        if self.seeded:
            self.rng = np.random.default_rng(seed)
        self.cells[:] = self.rng.integers(0, 3, size=2)
        self.t = 0
        return self.frame()

    def step(self, actions: np.ndarray) -> Outcome:
        self.cells += actions
        self.t += 1
        if self.cells[0] == 4:
            self.act_up()
        over = bool((self.cells > 6).any())
        return Outcome(self.frame(), float(actions.sum()), over, self.t == 8, bool(self.cells[0] > 6))

    def act_up(self) -> None:
        if self.trouble == "fail":
            raise GameFailed("cell 4 is haunted")
        if self.trouble == "exit":
            print("the ghost of cell 4", flush=True)
            os._exit(7)
        if self.trouble == "bug":
            raise ZeroDivisionError("a bug of the environment")

    def frame(self) -> Frame:
        obs = np.stack([self.cells, self.rng.random(2)], axis=1).astype(np.float32)
        avail = np.ones((2, 3), dtype=bool)
        avail[:, 2] = self.cells % 2 == 0
        return Frame(obs, self.cells.copy(), avail)

    def shout(self, row: int, word: str) -> None:
        """For ``Workers.call``."""
        if row == 2:
            raise GameFailed(f"copy {row} cannot {word}")

    def close(self) -> None:
        """Nothing to release."""


def make_walk(seed: int, options: dict[str, Any] | None = None, **given: Any) -> Walk:
    """For ``fastmix.envs.workers``."""
    options = {**(options or {}), **given}
    if options.get("trouble") == "die":
        os._exit(9)
    if options.get("trouble") == "refuse":
        raise ValueError("no walk today")
    return Walk(seed, **options)
