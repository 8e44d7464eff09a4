"""A batched environment whose numbers say where they come from, with episodes of different lengths."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastmix.envs import EnvInfo


class RaggedEnv:
    """Copy e in its k-th episode at step t shows ``obs[e, a] = [e, k, t, a]`` and ``state[e] = [e, k, t]``.

    Episodes end after a random number of steps, truly (and then sometimes at the limit) or by the limit. The reward is
    random; action u of agent a is available at step t unless ``(u + a + t) % 3 == 0`` (action 1 always is).
    """

    LIMIT, AGENTS, ACTIONS = 7, 2, 9

    def __init__(self, n_envs: int, seed: int) -> None:
        self.info = EnvInfo(self.AGENTS, self.ACTIONS, 4, 3, self.LIMIT)
        self.n_envs = n_envs
        self.obs = np.zeros((n_envs, self.AGENTS, 4), dtype=np.float32)
        self.state = np.zeros((n_envs, 3), dtype=np.float32)
        self.avail = np.zeros((n_envs, self.AGENTS, self.ACTIONS), dtype=bool)
        self.reward = np.zeros(n_envs, dtype=np.float32)
        self.terminated = np.zeros(n_envs, dtype=bool)
        self.truncated = np.zeros(n_envs, dtype=bool)
        self.won: np.ndarray | None = np.zeros(n_envs, dtype=bool)
        self.rng = np.random.default_rng(seed)
        self.episode = np.full(n_envs, -1)
        self.t = np.zeros(n_envs, dtype=np.int64)
        self.length = np.zeros(n_envs, dtype=np.int64)
        self.log: dict[tuple[int, int], list[dict[str, Any]]] = {}

    def reset(self, indices: np.ndarray | None = None) -> None:
        chosen = np.arange(self.n_envs) if indices is None else indices
        self.episode[chosen] += 1
        self.t[chosen] = 0
        # Beyond the limit means: cut by it.
        self.length[chosen] = self.rng.integers(1, self.LIMIT + 3, size=len(chosen))
        self._show()

    def step(self, actions: np.ndarray) -> None:
        for e in range(self.n_envs):
            assert self.avail[e, np.arange(self.AGENTS), actions[e]].all(), "an unavailable action was taken"
        self.reward[:] = self.rng.standard_normal(self.n_envs)
        self.t += 1
        self.terminated[:] = self.t == self.length
        self.truncated[:] = self.t == self.LIMIT
        assert self.won is not None
        self.won[:] = self.length % 2 == 0
        for e in range(self.n_envs):
            self.log.setdefault((e, int(self.episode[e])), []).append(
                {"actions": actions[e].copy(), "reward": float(self.reward[e]), "terminated": bool(self.terminated[e]),
                 "truncated": bool(self.truncated[e])}
            )  # fmt: skip
        self._show()

    def state_dict(self) -> dict[str, Any]:
        return {"rng": self.rng.bit_generator.state, "episode": self.episode, "t": self.t, "length": self.length}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rng.bit_generator.state = state["rng"]
        for name in ("episode", "t", "length"):
            getattr(self, name)[:] = state[name]

    def close(self) -> None:
        """Nothing to release."""

    def _show(self) -> None:
        e = np.arange(self.n_envs)
        self.state[:] = np.stack([e, self.episode, self.t], axis=1)
        self.obs[:, :, :3] = self.state[:, None]
        self.obs[:, :, 3] = np.arange(self.AGENTS)
        a, u = np.arange(self.AGENTS)[:, None], np.arange(self.ACTIONS)
        self.avail[:] = ((u + a)[None] + self.t[:, None, None]) % 3 != 0
        self.avail[:, :, 1] = True


def make_ragged(spec: str, n_envs: int, seed: int) -> RaggedEnv:
    """For ``fastmix.envs.REGISTRY``."""
    return RaggedEnv(n_envs, seed)
