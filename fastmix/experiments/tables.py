"""Payoffs and learned values as text, the way the papers print them: utilities on the margins, joint values inside."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

import numpy as np

from fastmix.envs import Payoff
from fastmix.experiments.matrix import LearnedGame
from fastmix.experiments.stats import wilson_interval

MARK = "*"  # the greedy choice
TOP_JOINT_ACTIONS = 8  # how many joint actions of a game with other than two agents are listed


def game_text(learned: LearnedGame, payoff: Payoff) -> str:
    """The payoff and every learned table side by side, greedy actions marked ``*``."""
    if payoff.n_agents == 2 and max(payoff.values.shape) <= 12:
        blocks = [matrix_block("payoff", payoff.values, payoff.actions, best=payoff.optimal_actions())]
        blocks += [
            matrix_block(name, table, payoff.actions, utilities=learned.utilities, best=[learned.greedy])
            for name, table in learned.tables.items()
        ]
        return side_by_side(blocks)
    return _listing(learned, payoff)


def matrix_block(
    title: str,
    cells: np.ndarray,
    actions: Sequence[str],
    *,
    utilities: Sequence[np.ndarray] | None = None,
    best: Sequence[tuple[int, ...]] = (),
) -> list[str]:
    """One 2-agent table as lines. ``utilities`` go to the margins; the joint actions ``best`` are marked."""

    def head(agent: int, action: int) -> str:
        if utilities is None:
            return actions[action]
        mark = MARK if any(joint[agent] == action for joint in best) else ""
        return f"{mark}{actions[action]} {_number(utilities[agent][action])}"

    rows, columns = cells.shape
    grid = [[title, *(head(1, j) for j in range(columns))]]
    for i in range(rows):
        values = [(MARK if (i, j) in best else "") + _number(cells[i, j]) for j in range(columns)]
        grid.append([head(0, i), *values])
    widths = [max(len(row[j]) for row in grid) for j in range(columns + 1)]
    return ["  ".join(entry.rjust(width) for entry, width in zip(row, widths, strict=True)) for row in grid]


def side_by_side(blocks: Sequence[Sequence[str]], gap: str = "   |   ") -> str:
    """Blocks of lines as columns of one text."""
    widths = [max(map(len, block)) for block in blocks]
    lines = zip_longest(*blocks, fillvalue="")
    return "\n".join(
        gap.join(line.ljust(width) for line, width in zip(row, widths, strict=True)).rstrip() for row in lines
    )


def verdict(learned: LearnedGame, payoff: Payoff) -> str:
    """``greedy CC pays 7.9; the optimum AA pays 8: NOT found``."""
    greedy = f"greedy {payoff.label(learned.greedy)} pays {payoff.values[learned.greedy]:g}"
    if learned.is_optimal(payoff):
        return f"{greedy}: optimum found"
    optimal = " or ".join(payoff.label(joint) for joint in payoff.optimal_actions()[:3])
    return f"{greedy}; the optimum {optimal} pays {payoff.optimum:g}: not found"


def share_text(games: Sequence[LearnedGame], payoff: Payoff) -> str:
    """``3 of 5 seeds (95 % interval 0.23 to 0.88)``."""
    found = sum(game.is_optimal(payoff) for game in games)
    low, high = wilson_interval(found, len(games))
    return f"{found} of {len(games)} seeds (95 % interval {low:.2f} to {high:.2f})"


def _listing(learned: LearnedGame, payoff: Payoff) -> str:
    """A game that is no readable table: utilities an agent, then the joint actions with the highest payoff."""
    lines = []
    for i, utilities in enumerate(learned.utilities):
        entries = (
            f"{MARK if a == learned.greedy[i] else ''}{payoff.actions[a]} {_number(q)}" for a, q in enumerate(utilities)
        )
        lines.append(f"Q_{i + 1}: " + "  ".join(entries))
    order = np.argsort(-payoff.values, axis=None, kind="stable")[:TOP_JOINT_ACTIONS]
    joints = [tuple(int(a) for a in np.unravel_index(index, payoff.values.shape)) for index in order]
    if learned.greedy not in joints:
        joints.append(learned.greedy)
    grid = [["", "joint action", "payoff", *learned.tables]]
    for joint in joints:
        values = [f"{payoff.values[joint]:g}", *(_number(table[joint]) for table in learned.tables.values())]
        grid.append([MARK if joint == learned.greedy else "", payoff.label(joint), *values])
    widths = [max(len(row[j]) for row in grid) for j in range(len(grid[0]))]
    lines += ["  ".join(entry.rjust(width) for entry, width in zip(row, widths, strict=True)) for row in grid]
    return "\n".join(lines)


def _number(value: float) -> str:
    if np.isnan(value):
        return "?"
    text = f"{value:.2f}" if abs(value) < 1000 else f"{value:.0f}"
    return "0.00" if text == "-0.00" else text
