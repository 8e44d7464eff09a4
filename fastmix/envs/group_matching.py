"""Group matching (REFIL, appendix): agents on a ring of cells have to meet the other agents of their group.

S. Iqbal et al., "Randomized entity-wise factorization for multi-agent reinforcement learning", 2021.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from fastmix.envs.options import changed
from fastmix.envs.protocol import EnvInfo, StateDict

STEP_REWARD, MATCH_REWARD = -0.1, 2.5
T_MAX, TEST_INTERVAL, TEST_NEPISODE = 1_000_000, 10_000, 80


@dataclass(frozen=True)
class GroupRules:
    """The defaults are REFIL's. Raises ``ValueError`` naming a rule, its value and what it must be."""

    n_agents: int = 8
    n_states: int = 6  # cells of the ring
    n_groups: int = 2
    rand_trans: float = 0.1  # probability that an agent's action is replaced by a random one
    episode_limit: int = 50
    fixed_scen: bool = False  # groups of equal size; otherwise of random sizes, 0 included

    def __post_init__(self) -> None:
        for name in ("n_agents", "n_states", "n_groups", "episode_limit"):
            self._check(name, getattr(self, name) >= 1, "at least 1")
        self._check("rand_trans", 0.0 <= self.rand_trans <= 1.0, "a probability")
        equal = not self.fixed_scen or self.n_agents % self.n_groups == 0
        self._check("n_groups", equal, f"a divisor of the {self.n_agents} agents with fixed_scen")

    def _check(self, name: str, ok: bool, must: str) -> None:
        if not ok:
            raise ValueError(f"group_matching: {name} is {getattr(self, name)!r}; it must be {must}")


PRESETS: Final[dict[str, GroupRules]] = {"refil": GroupRules()}


class GroupMatching:
    """E copies; implements :class:`fastmix.envs.BatchedEnv`. An episode is won when every group is on one cell.

    Actions are left, stay, right. An entity is an agent: its cell, its group and its index, one-hot each, so ``F =
    n_states + n_groups + n_agents``. Every agent sees all entities, and so does the state: ``O = S = A * F``.

    For methods that see entities: ``entities [E,A,F]`` float32, and uint8 masks in which 1 hides: ``obs_mask [E,A,A]``
    and ``entity_mask [E,A]``, all 0, and ``gt_mask [E,A,A]``, 0 inside an agent's own group.
    """

    def __init__(self, rules: GroupRules, n_envs: int, seed: int) -> None:
        self.rules = rules
        self.n_envs = n_envs
        agents = rules.n_agents
        width = rules.n_states + rules.n_groups + agents
        self.info = EnvInfo(
            agents,
            3,
            agents * width,
            agents * width,
            rules.episode_limit,
            T_MAX,
            TEST_INTERVAL,
            TEST_NEPISODE,
            obs_dtype="int8",
        )
        self.state = np.zeros((n_envs, agents * width), dtype=np.float32)
        self.obs = np.zeros((n_envs, agents, agents * width), dtype=np.float32)
        self.avail = np.ones((n_envs, agents, 3), dtype=bool)
        self.reward = np.zeros(n_envs, dtype=np.float32)
        self.terminated = np.zeros(n_envs, dtype=bool)
        self.truncated = np.zeros(n_envs, dtype=bool)
        self.solved = np.zeros(n_envs, dtype=bool)
        self.won: np.ndarray | None = self.solved
        self.cells = np.zeros((n_envs, agents), dtype=np.int64)
        self.groups = np.zeros((n_envs, agents), dtype=np.int64)
        self.steps = np.zeros(n_envs, dtype=np.int64)
        self.entities = self.state.reshape(n_envs, agents, width)  # the same memory
        self.obs_mask = np.zeros((n_envs, agents, agents), dtype=np.uint8)
        self.entity_mask = np.zeros((n_envs, agents), dtype=np.uint8)
        self.gt_mask = np.zeros((n_envs, agents, agents), dtype=np.uint8)
        self._rng = np.random.default_rng(seed)
        self.reset()

    def reset(self, indices: np.ndarray | None = None) -> None:
        """See :class:`fastmix.envs.BatchedEnv`."""
        copies = np.arange(self.n_envs) if indices is None else indices
        rules, shape = self.rules, (len(copies), self.rules.n_agents)
        self.cells[copies] = self._rng.integers(0, rules.n_states, shape)
        # Agents in a random order are cut into groups. With more than two groups the public code does not sort the
        # cuts, and has agents in several groups or in none; here every agent has one.
        if rules.fixed_scen:
            cuts = np.arange(1, rules.n_groups) * (rules.n_agents // rules.n_groups)
            cuts = np.broadcast_to(cuts, (len(copies), rules.n_groups - 1))
        else:
            cuts = self._rng.integers(0, rules.n_agents, (len(copies), rules.n_groups - 1))
        rank = self._rng.permuted(np.broadcast_to(np.arange(rules.n_agents), shape), axis=1)
        self.groups[copies] = (rank[:, :, None] >= cuts[:, None, :]).sum(-1)
        self.steps[copies] = 0
        self.terminated[copies] = self.truncated[copies] = self.solved[copies] = False
        self._observe()

    def step(self, actions: np.ndarray) -> None:
        """Move all agents, left 0, stay 1, right 2. Raises ``ValueError`` for other actions."""
        rules = self.rules
        if actions.shape != self.cells.shape:
            raise ValueError(f"actions has shape {actions.shape}; it must be [n_envs, n_agents] = {self.cells.shape}")
        if (actions < 0).any() or (actions > 2).any():
            raise ValueError(f"actions holds an action outside 0..2: {actions.tolist()}")
        before = self._matches()
        slip = self._rng.random(actions.shape) < rules.rand_trans
        taken = np.where(slip, self._rng.integers(0, 3, actions.shape), actions)
        self.cells[:] = (self.cells + taken - 1) % rules.n_states
        after = self._matches()
        self.steps += 1
        self.reward[:] = STEP_REWARD + MATCH_REWARD * (after - before)
        self.solved[:] = self.terminated[:] = after == rules.n_groups
        self.truncated[:] = self.steps >= rules.episode_limit
        self._observe()

    def state_dict(self) -> StateDict:
        """Cells, groups, steps, flags and the random state."""
        arrays = {name: getattr(self, name).copy() for name in _SAVED}
        return {**arrays, "rng": self._rng.bit_generator.state}

    def load_state_dict(self, state: StateDict) -> None:
        """The inverse of ``state_dict``."""
        for name in _SAVED:
            getattr(self, name)[:] = np.asarray(state[name])
        self._rng.bit_generator.state = state["rng"]
        self._observe()

    def close(self) -> None:
        """Nothing to release."""

    def _matches(self) -> np.ndarray:
        """How many groups are on one cell; an empty group is."""
        matched = np.zeros(self.n_envs, dtype=np.int64)
        for group in range(self.rules.n_groups):
            member = self.groups == group
            lowest = np.where(member, self.cells, self.rules.n_states).min(axis=1)
            highest = np.where(member, self.cells, -1).max(axis=1)
            matched += highest <= lowest
        return matched

    def _observe(self) -> None:
        rules = self.rules
        self.entities[:, :, : rules.n_states] = self.cells[:, :, None] == np.arange(rules.n_states)
        ids = rules.n_states + rules.n_groups
        self.entities[:, :, rules.n_states : ids] = self.groups[:, :, None] == np.arange(rules.n_groups)
        self.entities[:, :, ids:] = np.eye(rules.n_agents)
        self.obs[:] = self.state[:, None]
        self.gt_mask[:] = self.groups[:, :, None] != self.groups[:, None, :]


_SAVED = ("cells", "groups", "steps", "terminated", "truncated", "solved")


def make_group_matching(spec: str, n_envs: int, seed: int) -> GroupMatching:
    """``spec`` is what follows ``group_matching:``, ``refil`` and rules that differ: ``refil,n_agents=4``."""
    name, *changes = spec.split(",")
    if name not in PRESETS:
        raise ValueError(f"env is 'group_matching:{spec}'; it must be like group_matching:refil,n_agents=4")
    return GroupMatching(changed(f"group_matching:{spec}", PRESETS[name], changes), n_envs, seed)
