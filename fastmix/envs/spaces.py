"""Gymnasium's spaces of several agents as rows of equal length: flattened, padded with zeros, actions masked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


class AgentSpaces:
    """Observations and actions of A agents.

    An observation that is a dictionary with ``action_mask`` has its observation under ``observation``. Raises
    ``ValueError`` where an agent's actions are not a single choice (``Discrete``), or its observation has no fixed
    size.
    """

    def __init__(self, agents: Sequence[str], observations: Sequence[Any], actions: Sequence[Any]) -> None:
        from gymnasium import spaces

        for agent, space in zip(agents, actions, strict=True):
            if not isinstance(space, spaces.Discrete):
                raise ValueError(f"the actions of {agent} are {space}; every agent must have a Discrete space")
        self._spaces = [_without_mask(space) for space in observations]
        self._sizes = []
        for agent, space in zip(agents, self._spaces, strict=True):
            try:
                self._sizes.append(spaces.flatdim(space))
            except (ValueError, NotImplementedError) as error:
                raise ValueError(
                    f"the observations of {agent} are {space}, which has no fixed size: {error}"
                ) from error
        self._starts = [int(space.start) for space in actions]
        self._counts = np.array([int(space.n) for space in actions])
        self.n_agents = len(self._spaces)
        self.n_actions = int(self._counts.max())
        self._all = np.arange(self.n_actions) < self._counts[:, None]
        self._boxes = [isinstance(space, spaces.Box) for space in self._spaces]
        self.obs_dim = max(self._sizes)
        self.joint_dim = sum(self._sizes)
        """Numbers in all observations together, without the padding."""

    def action(self, agent: int, action: int) -> int:
        """Our action, counted from 0, as the environment's."""
        return action + self._starts[agent]

    def obs(self, observations: Sequence[Any]) -> np.ndarray:
        """``[A,O]`` float32; ``None`` stands for an agent that is gone, and sees zeros."""
        rows = np.zeros((self.n_agents, self.obs_dim), dtype=np.float32)
        for a, observation in enumerate(observations):
            if observation is not None:
                seen = _seen(observation)
                rows[a, : self._sizes[a]] = np.ravel(seen) if self._boxes[a] else _flat(self._spaces[a], seen)
        return rows

    def joint(self, obs: np.ndarray) -> np.ndarray:
        """``[S]``: the rows of :meth:`obs` one after another, for environments without a state."""
        return np.concatenate([row[:size] for row, size in zip(obs, self._sizes, strict=True)])

    def avail(self, observations: Sequence[Any], infos: Sequence[Any]) -> np.ndarray:
        """``[A,U]`` bool: the mask in an agent's observation or info, else all of its actions.

        Agents that are gone (``None``) take action 0. Raises ``ValueError`` for a mask that allows nothing.
        """
        rows = self._all.copy()
        for a, (observation, info) in enumerate(zip(observations, infos, strict=True)):
            mask = _mask(observation, info)
            if observation is None:
                rows[a] = False
                rows[a, 0] = True
            elif mask is not None:
                given = np.asarray(mask, dtype=bool).reshape(-1)
                if len(given) != self._counts[a] or not given.any():
                    raise ValueError(
                        f"the action mask of agent {a} is {np.asarray(mask).tolist()}; it must allow at least one of "
                        f"its {self._counts[a]} actions"
                    )
                rows[a, : len(given)] = given
        return rows


def _without_mask(space: Any) -> Any:
    parts = getattr(space, "spaces", None)
    return parts["observation"] if isinstance(parts, dict) and "action_mask" in parts else space


def _seen(observation: Any) -> Any:
    return observation["observation"] if isinstance(observation, dict) and "action_mask" in observation else observation


def _mask(observation: Any, info: Any) -> Any:
    for place in (observation, info):
        if isinstance(place, dict) and "action_mask" in place:
            return place["action_mask"]
    return None


def _flat(space: Any, value: Any) -> np.ndarray:
    from gymnasium import spaces

    return np.asarray(spaces.flatten(space, value), dtype=np.float32)
