"""E copies of predator-prey in the compiled core."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from fastmix.envs.prey.rules import TEST_INTERVAL, TEST_NEPISODE, Preset, PreyRules
from fastmix.envs.protocol import EnvInfo, StateDict

_SAVED = ("agent_pos", "agent_active", "prey_pos", "prey_alive", "steps", "rng", "terminated", "truncated")
_INT8_MOST = 127


class PreyEnv:
    """E copies of predator-prey; implements :class:`fastmix.envs.BatchedEnv`.

    Where the game stands is readable: ``agent_pos [E,A,2]`` and ``prey_pos [E,M,2]`` int32 (row, column; stags first),
    ``agent_active [E,A]`` and ``prey_alive [E,M]`` bool. ``agent_order [E,A]``, ``prey_order [E,M]`` and ``prey_move
    [E,M]`` int16 are what chance decided in the last step; with them `replay` takes the same step again.

    Steps run on as many threads as torch has; every copy draws from its own generator, so their number changes nothing.
    """

    def __init__(self, preset: Preset, n_envs: int, seed: int) -> None:
        from fastmix import _core

        rules = preset.rules
        agents, prey = rules.n_agents, rules.n_prey
        self.rules = rules
        self.n_envs = n_envs
        self.info = EnvInfo(
            rules.n_agents,
            rules.n_actions,
            rules.obs_dim,
            rules.state_dim,
            rules.episode_limit,
            preset.t_max,
            TEST_INTERVAL,
            TEST_NEPISODE,
            preset.settings,
            obs_dtype="int8" if not rules.observe_ids or max(agents, prey) <= _INT8_MOST else "float32",
        )
        self.obs = np.zeros((n_envs, agents, rules.obs_dim), dtype=np.float32)
        self.state = np.zeros((n_envs, rules.state_dim), dtype=np.float32)
        self.avail = np.zeros((n_envs, agents, rules.n_actions), dtype=bool)
        self.reward = np.zeros(n_envs, dtype=np.float32)
        self.terminated = np.zeros(n_envs, dtype=bool)
        self.truncated = np.zeros(n_envs, dtype=bool)
        self.won: np.ndarray | None = None
        self.agent_pos = np.zeros((n_envs, agents, 2), dtype=np.int32)
        self.agent_active = np.zeros((n_envs, agents), dtype=bool)
        self.prey_pos = np.zeros((n_envs, prey, 2), dtype=np.int32)
        self.prey_alive = np.zeros((n_envs, prey), dtype=bool)
        self.steps = np.zeros(n_envs, dtype=np.int64)
        self.rng = np.random.SeedSequence(seed).generate_state(4 * n_envs, np.uint64).reshape(n_envs, 4)
        self.agent_order = np.zeros((n_envs, agents), dtype=np.int16)
        self.prey_order = np.zeros((n_envs, prey), dtype=np.int16)
        self.prey_move = np.zeros((n_envs, prey), dtype=np.int16)
        arrays = {name: value for name, value in vars(self).items() if isinstance(value, np.ndarray)}
        self._core = _core.Prey(_core_rules(rules), n_envs, arrays)
        self._all = np.arange(n_envs)
        self.reset()

    def reset(self, indices: np.ndarray | None = None) -> None:
        """See :class:`fastmix.envs.BatchedEnv`."""
        self._core.reset(self._all if indices is None else indices, torch.get_num_threads())

    def step(self, actions: np.ndarray) -> None:
        """One step of every copy by ``actions [E,A]`` int64, in the order right, down, left, up, stay, catch.

        An action that is not available is taken as staying. Raises ``ValueError`` for one that does not exist.
        """
        self._core.step(actions, False, torch.get_num_threads())

    def place(self, agent_pos: np.ndarray, prey_pos: np.ndarray) -> None:
        """New episodes in all copies, from cells ``agent_pos [E,A,2]`` and ``prey_pos [E,M,2]``.

        Raises ``ValueError`` for a cell outside the world or taken twice.
        """
        cells = np.concatenate([np.asarray(agent_pos), np.asarray(prey_pos)], axis=1)
        expected = (self.n_envs, self.rules.n_agents + self.rules.n_prey, 2)
        if cells.shape != expected:
            raise ValueError(f"agent_pos and prey_pos have together shape {cells.shape}; it must be {expected}")
        if (cells < 0).any() or (cells >= self.rules.world_shape).any():
            raise ValueError(f"a cell is outside the world of {self.rules.world_shape}: {cells.tolist()}")
        flat = np.sort(cells @ [self.rules.world_shape[1], 1], axis=1)
        if (flat[:, 1:] == flat[:, :-1]).any():
            raise ValueError(f"two entities are on the same cell: {cells.tolist()}")
        self.agent_pos[:], self.prey_pos[:] = agent_pos, prey_pos
        self.agent_active[:], self.prey_alive[:] = True, True
        self.steps[:] = 0
        self.terminated[:], self.truncated[:] = False, False
        self._core.observe(torch.get_num_threads())

    def replay(
        self, actions: np.ndarray, agent_order: np.ndarray, prey_order: np.ndarray, prey_move: np.ndarray
    ) -> None:
        """As `step`, but with chance's decisions given: ``[E,A]``, ``[E,M]`` and ``[E,M]``.

        ``prey_move`` is a direction 0..3, -1 where a prey stayed, -2 where it was captured, -3 where it had gone.
        Raises ``ValueError`` when they contradict the rules; the copies are then in the middle of a step.
        """
        self.agent_order[:], self.prey_order[:], self.prey_move[:] = agent_order, prey_order, prey_move
        impossible = self._core.step(actions, True, 1)
        if impossible >= 0:
            raise ValueError(f"the decisions given for copy {impossible} cannot be: an order is none, or a prey's fate")

    def state_dict(self) -> StateDict:
        """Positions, flags and random states of all copies."""
        return {name: getattr(self, name).copy() for name in _SAVED}

    def load_state_dict(self, state: StateDict) -> None:
        """The inverse of ``state_dict``."""
        for name in _SAVED:
            getattr(self, name)[:] = np.asarray(state[name])
        self._core.observe(torch.get_num_threads())

    def close(self) -> None:
        """Nothing to release."""


def _core_rules(rules: PreyRules) -> dict[str, Any]:
    """The rules as the core reads them."""
    names = (
        "world_shape", "agent_obs", "n_agents", "n_stags", "episode_limit", "toroidal", "capture_action",
        "capture_freezes", "capture_terminal", "remove_frozen", "prevent_cannibalism", "observe_walls", "observe_ids",
        "capture_conditions", "capture_action_conditions", "reward_time", "reward_collision", "miscapture_punishment",
    )  # fmt: skip
    return {
        **{name: getattr(rules, name) for name in names},
        "n_hares": rules.n_hare,
        "released": rules.compat == "released",
        "blocks": [channel in rules.agent_move_block for channel in range(3)],
        "rest": [rules.p_stags_rest, rules.p_hare_rest],
        "rewards": [rules.reward_stag, rules.reward_hare],
    }
