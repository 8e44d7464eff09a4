"""Environments in PettingZoo's parallel interface and in Gymnasium's, with everything unusual that those allow."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces


class Relay:
    """Two runners: ``a`` with 3 actions that count from 1 and its mask in ``info``, ``b`` with 2, its mask in the
    observation.

    ``a`` leaves after step 2, ``b`` after step ``last``, cut by the limit where ``cut``. An agent's reward is its
    action; there is no state.
    """

    def __init__(self, last: int = 4, cut: bool = False, forbid_all: bool = False) -> None:
        self.possible_agents = ["a", "b"]
        self.agents: list[str] = []
        self.last, self.cut, self.forbid_all = last, cut, forbid_all
        self.taken: list[dict[str, int]] = []
        self.t = 0

    def observation_space(self, agent: str) -> spaces.Space[Any]:
        if agent == "a":
            return spaces.Box(0, 9, (1, 2), np.float64)
        mask = spaces.MultiBinary(2)
        return spaces.Dict({"observation": spaces.Discrete(4), "action_mask": mask})

    def action_space(self, agent: str) -> spaces.Discrete:
        return spaces.Discrete(3, start=1) if agent == "a" else spaces.Discrete(2)

    def reset(self, seed: int | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
        self.agents, self.t = list(self.possible_agents), 0
        return self.look()

    def step(self, actions: dict[str, int]) -> tuple[Any, ...]:
        assert set(actions) == set(self.agents)
        self.taken.append(actions)
        self.t += 1
        here = self.agents
        ended = {"a": self.t == 2, "b": self.t == self.last and not self.cut}
        cut = {"a": False, "b": self.t == self.last and self.cut}
        self.agents = [agent for agent in here if not ended[agent] and not cut[agent]]
        obs, infos = self.look()
        rewards = {agent: float(actions[agent]) for agent in here}
        return obs, rewards, {k: ended[k] for k in here}, {k: cut[k] for k in here}, infos

    def look(self) -> tuple[dict[str, Any], dict[str, Any]]:
        mask = [0, 0] if self.forbid_all else [1, self.t % 2]
        obs = {"a": np.array([[self.t, 7.0]]), "b": {"observation": self.t % 4, "action_mask": np.array(mask)}}
        infos: dict[str, Any] = {"a": {"action_mask": np.array([0, 1, 1])}, "b": {}}
        return {k: obs[k] for k in self.agents}, {k: infos[k] for k in self.agents}

    def state(self) -> np.ndarray:
        raise NotImplementedError

    def close(self) -> None:
        """Nothing to release."""


def parallel_env(**options: Any) -> Relay:
    return Relay(**options)


class Continuous(Relay):
    def action_space(self, agent: str) -> Any:
        return spaces.Box(0, 1, (2,))


def not_an_environment() -> object:
    return object()


class Masked(gymnasium.Env[Any, Any]):
    """Two agents with masks in ``info``, one reward for both, and an end after 3 steps of action 1 by agent 0."""

    observation_space = spaces.Tuple([spaces.Box(0, 9, (2,), np.float32), spaces.Box(0, 9, (3,), np.float32)])
    action_space = spaces.Tuple([spaces.Discrete(2), spaces.Discrete(4)])

    def __init__(self, bonus: float = 0.0) -> None:
        self.bonus, self.count = bonus, 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.count = 0
        return self.look(), self.info()

    def step(self, actions: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.count += int(actions[0])
        return self.look(), float(actions[1]) + self.bonus, self.count == 3, False, self.info()

    def look(self) -> tuple[np.ndarray, np.ndarray]:
        return np.full(2, self.count, np.float32), np.full(3, 5, np.float32)

    def info(self) -> dict[str, Any]:
        return {"action_mask": [np.array([1, 1]), np.array([1, 0, 0, 1])]}


gymnasium.register("toy-masked-v0", entry_point="tests.envs.toy_team:Masked", max_episode_steps=5)
gymnasium.register("toy-endless-v0", entry_point="tests.envs.toy_team:Masked")
