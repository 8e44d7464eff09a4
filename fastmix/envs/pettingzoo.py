"""``pettingzoo:MODULE.FUNCTION``: environments of PettingZoo's parallel interface, as one team.

``pettingzoo:mpe2.simple_spread_v3.parallel_env,max_cycles=50``; the function may be left out where it is
``parallel_env``. Options that are not ours go to the function:

===========  =====  =====================================================================================
``limit``           steps after which an episode is cut, where the environment does not say by itself
``workers``  0      worker processes (see ``fastmix.envs.workers``); 0: in this process
===========  =====  =====================================================================================

The reward of the team is the sum of the agents' rewards. The state is the environment's own (``state()``) or, without
one, all observations. An agent that has left sees zeros and can take action 0 only.
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

from fastmix import requirements
from fastmix.envs.games import Frame, GamesEnv, Outcome
from fastmix.envs.keywords import parse_keywords
from fastmix.envs.protocol import EnvInfo
from fastmix.envs.spaces import AgentSpaces
from fastmix.envs.workers import make_games_env

LIMITS = ("max_cycles", "max_steps", "max_iter")
"""Where environments keep the length of their episodes."""


def make_pettingzoo(spec: str, n_envs: int, seed: int) -> GamesEnv:
    """``spec`` is what follows ``pettingzoo:``.

    Raises ``ImportError`` without the package, and ``ValueError`` for an environment that does not exist, does not take
    the options, or has actions that are no single choice.
    """
    requirements.demand("pettingzoo")
    path, options = parse_keywords(spec)
    return make_games_env(
        f"pettingzoo:{spec}", "fastmix.envs.pettingzoo:make_game", {"path": path}, options, n_envs, seed
    )


def make_game(seed: int, path: str, options: dict[str, Any]) -> PettingZooGame:
    """For :func:`fastmix.envs.workers.make_games_env`; ``seed`` is not needed, since every reset has one."""
    options = dict(options)
    limit = options.pop("limit", None)
    function = _find(path)
    try:
        env = function(**options)
    except TypeError as error:
        raise ValueError(f"pettingzoo:{path} does not take the options {options}: {error}") from error
    if not hasattr(env, "possible_agents") or hasattr(env, "agent_iter"):  # which is PettingZoo's other interface
        raise ValueError(f"pettingzoo:{path} makes a {type(env).__name__}; it must make a parallel environment")
    return PettingZooGame(env, path, limit)


class PettingZooGame:
    """A :class:`fastmix.envs.games.Game` around a parallel environment. ``limit`` is ``None`` if that has its own."""

    knows_victory = False

    def __init__(self, env: Any, path: str, limit: int | None) -> None:
        self._env = env
        self._agents: list[str] = list(env.possible_agents)
        self._spaces = AgentSpaces(
            self._agents,
            [env.observation_space(agent) for agent in self._agents],
            [env.action_space(agent) for agent in self._agents],
        )
        self.build = f"{path.partition('.')[0]} {requirements.installed_version(path.partition('.')[0]) or '(local)'}"
        self._limit = checked_limit(limit if limit is not None else own_limit(env, LIMITS), f"pettingzoo:{path}")
        self._t = 0
        self._has_state = True
        frame = self.reset(0)  # only now does it tell its sizes
        self.info = EnvInfo(
            self._spaces.n_agents, self._spaces.n_actions, self._spaces.obs_dim, len(frame.state), self._limit
        )

    def reset(self, seed: int) -> Frame:
        """See :class:`fastmix.envs.games.Game`."""
        self._t = 0
        observations, infos = self._env.reset(seed=seed)
        return self._frame(observations, infos)

    def step(self, actions: np.ndarray) -> Outcome:
        """See :class:`fastmix.envs.games.Game`."""
        live = set(self._env.agents)
        joint = {name: self._spaces.action(a, int(actions[a])) for a, name in enumerate(self._agents) if name in live}
        observations, rewards, _, truncations, infos = self._env.step(joint)
        self._t += 1
        over = not self._env.agents
        cut = any(truncations.values()) if over else self._t >= self._limit
        reward = float(sum(rewards[name] for name in joint if name in rewards))
        return Outcome(self._frame(observations, infos), reward, over and not cut, cut)

    def close(self) -> None:
        """See :class:`fastmix.envs.games.Game`."""
        self._env.close()

    def _frame(self, observations: dict[str, Any], infos: dict[str, Any]) -> Frame:
        live = set(self._env.agents) or set(observations)  # at the end, what the last ones see
        seen = [observations.get(name) if name in live else None for name in self._agents]
        obs = self._spaces.obs(seen)
        return Frame(obs, self._state(obs), self._spaces.avail(seen, [infos.get(name) for name in self._agents]))

    def _state(self, obs: np.ndarray) -> np.ndarray:
        if self._has_state:
            try:
                return np.asarray(self._env.state(), dtype=np.float32).reshape(-1)
            except (NotImplementedError, AttributeError):
                self._has_state = False
        return self._spaces.joint(obs)


def own_limit(env: Any, names: tuple[str, ...]) -> int | None:
    """The length of episodes that an environment keeps under one of ``names``."""
    inner = getattr(env, "unwrapped", env)
    values = [getattr(inner, name, None) for name in names]
    return next((int(value) for value in values if isinstance(value, (int, np.integer)) and value > 0), None)


def checked_limit(limit: Any, name: str) -> int:
    """``limit``. Raises ``ValueError`` unless it is a positive whole number."""
    if limit is None:
        raise ValueError(f"{name} does not say how long its episodes are; add the option limit=N, in steps")
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
        raise ValueError(f"the limit of {name} is {limit!r}; it must be a whole number of steps, at least 1")
    return limit


def _find(path: str) -> Any:
    """The function ``module.function``, or ``parallel_env`` of a module."""
    for module_name, attribute in ((path, "parallel_env"), path.rpartition(".")[::2]):
        try:
            module = importlib.import_module(module_name) if module_name else None
        except ModuleNotFoundError as error:
            # A package that is not there is the answer; one that it needs is another matter.
            if error.name is None or not (module_name + ".").startswith(error.name + "."):
                raise
            continue
        function = getattr(module, attribute, None)
        if callable(function):
            return function
    raise ValueError(
        f"env is 'pettingzoo:{path}', and there is neither a function {path} nor a parallel_env in a module {path}; "
        "an example is pettingzoo:mpe2.simple_spread_v3"
    )
