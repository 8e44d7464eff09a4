"""Predator-prey in plain Python, one copy at a time: the only definition of right, and nothing fast about it."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from fastmix.envs.prey.rules import PreyRules

STAYED, CAPTURED, GONE = -1, -2, -3
"""What a prey did in a step, where it did not move in a direction 0..3."""

DELTAS = ((0, 1), (1, 0), (0, -1), (-1, 0))
STAY, CATCH = 4, 5

Cell = tuple[int, int]


@dataclass
class Decisions:
    """What chance decided in one step: the orders in which agents and prey took turns, and the fate of each prey."""

    agent_order: list[int]
    prey_order: list[int]
    prey_move: list[int] = field(default_factory=list)


class PreyReference:
    """One copy of the game.

    ``agent_pos`` and ``prey_pos`` are (row, column), ``agent_active`` and ``prey_alive`` are flags; stags come first.
    """

    def __init__(self, rules: PreyRules, seed: int = 0) -> None:
        self.rules = rules
        self.rng = np.random.default_rng(seed)
        self.reset()

    def reset(self) -> None:
        """Agents, then stags, then hares each on a random empty cell."""
        rules = self.rules
        self.agent_pos: list[Cell] = []
        self.prey_pos: list[Cell] = []
        for entities, n in ((self.agent_pos, rules.n_agents), (self.prey_pos, rules.n_prey)):
            for _ in range(n):
                cell = self._random_cell()
                while cell in self.agent_pos or cell in self.prey_pos:
                    cell = self._random_cell()
                entities.append(cell)
        self.place(self.agent_pos, self.prey_pos)

    def place(self, agent_pos: list[Cell], prey_pos: list[Cell]) -> None:
        """A new episode from these cells."""
        self.agent_pos, self.prey_pos = list(agent_pos), list(prey_pos)
        self.agent_active = [True] * self.rules.n_agents
        self.prey_alive = [True] * self.rules.n_prey
        self.steps = 0

    # ---- one step ----

    def step(self, actions: list[int], given: Decisions | None = None) -> tuple[float, bool, bool]:
        """Reward, terminated, truncated. ``decisions`` then holds what chance decided, which ``given`` prescribes."""
        rules = self.rules
        if given is None:
            agent_order, prey_order = (self.rng.permutation(n).tolist() for n in (rules.n_agents, rules.n_prey))
            decisions = Decisions(agent_order, prey_order, [GONE] * rules.n_prey)
        else:
            decisions = Decisions(given.agent_order, given.prey_order, [GONE] * rules.n_prey)
        self.reward = np.float32(rules.reward_time)
        for agent in decisions.agent_order:
            if self.agent_active[agent]:
                self._move_agent(agent, actions[agent])
        over = False
        for prey in decisions.prey_order:
            if self.prey_alive[prey]:
                recorded = None if given is None else given.prey_move[prey]
                decisions.prey_move[prey] = fate = self._deal_with(prey, actions, recorded)
                over |= fate == CAPTURED and rules.capture_terminal
        self.decisions = decisions
        self.steps += 1
        over = over or not any(self.prey_alive) or not any(self.agent_active)
        return float(self.reward), over, self.steps >= rules.episode_limit

    def _move_agent(self, agent: int, action: int) -> None:
        rules, here = self.rules, self.agent_pos[agent]
        target = (self._neighbour(here, action) if action < STAY else None) or here
        if target == here:
            if rules.compat == "released" and self._blocks(here):
                self.reward += np.float32(rules.reward_collision)
        elif self._blocks(target):
            self.reward += np.float32(rules.reward_collision)
        else:
            self.agent_pos[agent] = target

    def _deal_with(self, prey: int, actions: list[int], recorded: int | None) -> int:
        rules, here = self.rules, self.prey_pos[prey]
        is_stag = rules.is_stag(prey)
        around = {d: cell for d in range(4) if (cell := self._neighbour(here, d)) is not None}
        free = [d for d, cell in around.items() if not self._holds(cell)]
        touched = any(0 in self._holds(cell) for cell in around.values())
        catchers = [
            agent
            for agent in range(rules.n_agents)
            if self.agent_active[agent]
            and (actions[agent] == CATCH or not rules.capture_action)
            and self._adjacent(self.agent_pos[agent], here)
        ]
        if rules.capture_action:
            captured = len(catchers) >= rules.capture_action_conditions[not is_stag]
            if catchers and not captured:
                self.reward += np.float32(rules.miscapture_punishment)
        else:
            captured = len(free) <= rules.capture_conditions[not is_stag]
        if captured and (touched or not rules.prevent_cannibalism):
            self.prey_alive[prey] = False
            self.reward += np.float32(rules.reward_stag if is_stag else rules.reward_hare)
            if rules.capture_freezes:
                for agent in catchers:
                    self.agent_active[agent] = False
            return CAPTURED
        if not free:
            return STAYED
        if recorded is None:
            rest = rules.p_stags_rest if is_stag else rules.p_hare_rest
            move = STAYED if self.rng.random() < rest else int(self.rng.choice(free))
        else:
            move = recorded if recorded in free else STAYED
        if move != STAYED:
            self.prey_pos[prey] = around[move]
        return move

    # ---- what can be seen and done ----

    def get_state(self) -> np.ndarray:
        """The grid ``[rows, columns, 3]``, flat: 1 where there is an agent, a stag, a hare."""
        grid = np.zeros((*self.rules.world_shape, 3), dtype=np.float32)
        for agent, cell in enumerate(self.agent_pos):
            grid[(*cell, 0)] = max(grid[(*cell, 0)], self._on_grid(agent))
        for prey, cell in enumerate(self.prey_pos):
            if self.prey_alive[prey]:
                grid[(*cell, 1 if self.rules.is_stag(prey) else 2)] = 1
        return grid.reshape(-1)

    def get_obs_agent(self, agent: int) -> np.ndarray:
        """The window around an agent, flat: non-frozen agents (itself included) and live prey."""
        rules = self.rules
        k_rows, k_cols = rules.agent_obs
        window = np.zeros((2 * k_rows + 1, 2 * k_cols + 1, 3), dtype=np.float32)
        if not self.agent_active[agent] and rules.capture_freezes and rules.remove_frozen:
            return window.reshape(-1)
        seen: dict[tuple[Cell, int], int] = {}
        for other, cell in enumerate(self.agent_pos):
            if self.agent_active[other]:
                seen[cell, 0] = other + 1
        for prey, cell in enumerate(self.prey_pos):
            if self.prey_alive[prey]:
                seen[cell, 1 if rules.is_stag(prey) else 2] = prey + 1
        row, col = self.agent_pos[agent]
        for i in range(2 * k_rows + 1):
            for j in range(2 * k_cols + 1):
                cell = (row + i - k_rows, col + j - k_cols)
                if rules.toroidal and rules.compat == "paper":
                    cell = (cell[0] % rules.world_shape[0], cell[1] % rules.world_shape[1])
                elif not self._inside(cell):
                    window[i, j, 0] = -1.0 if rules.observe_walls and not rules.toroidal else 0.0
                for channel in range(3):
                    if (cell, channel) in seen:
                        window[i, j, channel] = seen[cell, channel] if rules.observe_ids else 1.0
        return window.reshape(-1)

    def get_obs(self) -> list[np.ndarray]:
        """The observations of all agents."""
        return [self.get_obs_agent(agent) for agent in range(self.rules.n_agents)]

    def get_avail_agent_actions(self, agent: int) -> list[int]:
        """1 for each available action: moves within the world, staying, and catching beside a live prey."""
        rules = self.rules
        if not self.agent_active[agent]:
            return [int(action == STAY) for action in range(rules.n_actions)]
        here = self.agent_pos[agent]
        avail = [int(self._neighbour(here, d) is not None) for d in range(4)] + [1]
        if rules.capture_action:
            beside = (self._adjacent(here, cell) for p, cell in enumerate(self.prey_pos) if self.prey_alive[p])
            avail.append(int(any(beside)))
        return avail

    def get_avail_actions(self) -> list[list[int]]:
        """Those of all agents."""
        return [self.get_avail_agent_actions(agent) for agent in range(self.rules.n_agents)]

    # ---- helpers ----

    def _random_cell(self) -> Cell:
        rows, cols = self.rules.world_shape
        return int(self.rng.integers(rows)), int(self.rng.integers(cols))

    def _on_grid(self, agent: int) -> bool:
        return self.agent_active[agent] or not self.rules.remove_frozen

    def _inside(self, cell: Cell) -> bool:
        return 0 <= cell[0] < self.rules.world_shape[0] and 0 <= cell[1] < self.rules.world_shape[1]

    def _holds(self, cell: Cell) -> set[int]:
        """The channels of what stands on a cell."""
        holds = {0 for agent, other in enumerate(self.agent_pos) if other == cell and self._on_grid(agent)}
        for prey, other in enumerate(self.prey_pos):
            if other == cell and self.prey_alive[prey]:
                holds.add(1 if self.rules.is_stag(prey) else 2)
        return holds

    def _blocks(self, cell: Cell) -> bool:
        return bool(self._holds(cell) & set(self.rules.agent_move_block))

    def _neighbour(self, cell: Cell, direction: int) -> Cell | None:
        rows, cols = self.rules.world_shape
        row, col = cell[0] + DELTAS[direction][0], cell[1] + DELTAS[direction][1]
        if self.rules.toroidal:
            return row % rows, col % cols
        return (row, col) if self._inside((row, col)) else None

    def _adjacent(self, a: Cell, b: Cell) -> bool:
        """Near enough to catch; the public code does not look across the border of a toroidal world."""
        distances = [abs(x - y) for x, y in zip(a, b, strict=True)]
        if self.rules.toroidal and self.rules.compat == "paper":
            sizes = self.rules.world_shape
            distances = [min(d, size - d) for d, size in zip(distances, sizes, strict=True)]
        return sum(distances) == 1
