"""``gym:ID``: multi-agent environments in Gymnasium's registry, such as level-based foraging and the robot warehouse.

``gym:lbforaging:Foraging-8x8-2p-2f-coop-v3``: before the last colon stands the module whose import registers the
environment. Observations and actions are tuples with one entry an agent; rewards may be too, and are summed. Options
that are not ours go to ``gymnasium.make``:

===========  =====  =====================================================================================
``limit``           steps after which an episode is cut, where the environment does not say by itself
``workers``  0      worker processes (see ``fastmix.envs.workers``); 0: in this process
===========  =====  =====================================================================================

The state is all observations one after another. Masks are taken from ``info["action_mask"]`` (one an agent) or from
observations that are dictionaries.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fastmix import requirements
from fastmix.envs.games import Frame, GamesEnv, Outcome
from fastmix.envs.keywords import parse_keywords
from fastmix.envs.pettingzoo import checked_limit, own_limit
from fastmix.envs.protocol import EnvInfo
from fastmix.envs.spaces import AgentSpaces
from fastmix.envs.workers import make_games_env

LIMITS = ("_max_episode_steps", "max_episode_steps", "max_steps")
"""Where environments keep the length of their episodes, if not in the registry."""


def make_gym(spec: str, n_envs: int, seed: int) -> GamesEnv:
    """``spec`` is what follows ``gym:``.

    Raises ``ImportError`` without Gymnasium or the module, and ``ValueError`` for an environment that does not exist,
    does not take the options, or is not one of several agents with one choice each.
    """
    requirements.demand("gym")
    name, options = parse_keywords(spec)
    return make_games_env(f"gym:{spec}", "fastmix.envs.gym:make_game", {"name": name}, options, n_envs, seed)


def make_game(seed: int, name: str, options: dict[str, Any]) -> GymGame:
    """For :func:`fastmix.envs.workers.make_games_env`; ``seed`` is not needed, since every reset has one."""
    import gymnasium

    options = dict(options)
    limit = options.pop("limit", None)
    try:
        # Its checker knows single agents only, and warns of everything else.
        env = gymnasium.make(name, disable_env_checker=True, **options)
    except (gymnasium.error.Error, TypeError) as error:
        raise ValueError(f"env is 'gym:{name}' with the options {options}, and Gymnasium says: {error}") from error
    return GymGame(env, name, limit)


class GymGame:
    """A :class:`fastmix.envs.games.Game` around a Gymnasium environment with one entry an agent in its spaces."""

    knows_victory = False

    def __init__(self, env: Any, name: str, limit: int | None) -> None:
        from gymnasium import spaces

        for what in ("observation_space", "action_space"):
            space = getattr(env, what)
            if not isinstance(space, spaces.Tuple):
                raise ValueError(f"the {what} of gym:{name} is {space}; it must be a Tuple with one entry an agent")
        n_agents = len(env.action_space.spaces)
        if len(env.observation_space.spaces) != n_agents:
            raise ValueError(
                f"gym:{name} has {len(env.observation_space.spaces)} observations and {n_agents} actions; it must have "
                "one of each an agent"
            )
        self._env = env
        self._spaces = AgentSpaces(
            [f"agent {a}" for a in range(n_agents)], env.observation_space.spaces, env.action_space.spaces
        )
        registered = env.spec.max_episode_steps if env.spec is not None else None
        self._limit = checked_limit(limit or registered or own_limit(env, LIMITS), f"gym:{name}")
        module = type(env.unwrapped).__module__.partition(".")[0]
        self.build = f"{module} {requirements.installed_version(module) or '(local)'}"
        self._t = 0
        self.info = EnvInfo(n_agents, self._spaces.n_actions, self._spaces.obs_dim, self._spaces.joint_dim, self._limit)

    def reset(self, seed: int) -> Frame:
        """See :class:`fastmix.envs.games.Game`."""
        self._t = 0
        return self._frame(*self._env.reset(seed=seed))

    def step(self, actions: np.ndarray) -> Outcome:
        """See :class:`fastmix.envs.games.Game`."""
        joint = tuple(self._spaces.action(a, action) for a, action in enumerate(actions.tolist()))
        observations, reward, terminated, truncated, info = self._env.step(joint)
        self._t += 1
        cut = bool(truncated) or (self._t >= self._limit and not terminated)
        return Outcome(self._frame(observations, info), float(np.sum(reward)), bool(np.all(terminated)), cut)

    def close(self) -> None:
        """See :class:`fastmix.envs.games.Game`."""
        self._env.close()

    def _frame(self, observations: Any, info: dict[str, Any]) -> Frame:
        obs = self._spaces.obs(observations)
        masks = info.get("action_mask", [None] * self._spaces.n_agents)
        infos = [{} if mask is None else {"action_mask": mask} for mask in masks]
        return Frame(obs, self._spaces.joint(obs), self._spaces.avail(observations, infos))
