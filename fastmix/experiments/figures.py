"""Heat maps of joint values and curves of distributions. matplotlib is optional and imported here only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastmix.envs import Payoff
from fastmix.experiments.matrix import LearnedGame, true_quantiles

TRUE_QUANTILES = 101  # points of the true distribution's curve


@dataclass(frozen=True, eq=False)
class Panel:
    """One heat map of a two-agent game; ``learned`` adds utilities to the axes. ``best`` cells are framed."""

    title: str
    cells: np.ndarray
    best: Sequence[tuple[int, ...]]
    learned: LearnedGame | None = None


def save_panels(path: Path, rows: Sequence[Sequence[Panel]], actions: Sequence[str], title: str) -> bool:
    """Draw ``rows`` of panels to ``path`` (png). Returns False, having drawn nothing, where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Rectangle
    except ImportError:
        return False
    columns = max(map(len, rows))
    # Figure itself, not pyplot: no global state, no display.
    figure = Figure(figsize=(3.4 * columns, 3.3 * len(rows) + 0.5), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for axis_row, panels in zip(axes, rows, strict=True):
        for axis in axis_row[len(panels) :]:
            axis.set_axis_off()
        for axis, panel in zip(axis_row, panels, strict=False):
            cells = np.ma.masked_invalid(panel.cells)
            axis.imshow(cells, cmap="RdBu", aspect="auto")
            low, high = float(cells.min()), float(cells.max())
            n_rows, n_columns = panel.cells.shape
            for i in range(n_rows):
                for j in range(n_columns):
                    value = panel.cells[i, j]
                    # The ends of the colour map are dark: white figures there, black in the middle.
                    dark = abs((value - low) / (high - low or 1.0) - 0.5) > 0.4
                    text = "?" if np.isnan(value) else f"{value:.2f}"
                    axis.text(j, i, text, ha="center", va="center", fontsize=9, color="white" if dark else "black")
            for i, j in panel.best:
                axis.add_patch(Rectangle((j - 0.46, i - 0.46), 0.92, 0.92, fill=False, edgecolor="black", lw=2))
            axis.set_title(panel.title, fontsize=10)
            for agent, (count, ticks) in enumerate(((n_rows, axis.set_yticks), (n_columns, axis.set_xticks))):
                labels = list(actions[:count])
                if panel.learned is not None:
                    utilities = panel.learned.utilities[agent]
                    labels = [f"{label}\n{q:.2f}" for label, q in zip(labels, utilities, strict=True)]
                ticks(range(count), labels=labels, fontsize=8)
            axis.set_ylabel("agent 1" if panel.learned is None else "agent 1, Q_1", fontsize=8)
            axis.set_xlabel("agent 2" if panel.learned is None else "agent 2, Q_2", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return True


def save_distributions(path: Path, learned: Mapping[str, Sequence[LearnedGame]], payoff: Payoff, title: str) -> bool:
    """Draw learned distributions of the joint return beside the true ones, one panel a joint action of two agents.

    Thin lines are seeds, thick ones their mean. Returns False, having drawn nothing, where matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    rows, columns = payoff.values.shape
    figure = Figure(figsize=(3.4 * columns, 2.6 * rows + 0.8), layout="constrained")
    figure.suptitle(title)
    axes: Any = figure.subplots(rows, columns, squeeze=False, sharey=True)
    levels = (np.arange(TRUE_QUANTILES) + 0.5) / TRUE_QUANTILES
    truth = true_quantiles(payoff, TRUE_QUANTILES)
    for i, j in np.ndindex(rows, columns):
        axis = axes[i][j]
        axis.plot(truth[i, j], levels, color="black", lw=2, label="true")
        for number, (name, games) in enumerate(learned.items()):
            color = f"C{number}"
            curves = np.stack([game.quantiles[i, j] for game in games if game.quantiles is not None])
            fractions = (np.arange(curves.shape[1]) + 0.5) / curves.shape[1]
            for curve in curves:
                axis.plot(curve, fractions, color=color, lw=0.5, alpha=0.5)
            axis.plot(curves.mean(0), fractions, color=color, lw=2, label=name)
        axis.set_title(payoff.label((i, j)), fontsize=10)
        axis.set_xlabel("return", fontsize=8)
        if j == 0:
            axis.set_ylabel("probability", fontsize=8)
    axes[0][0].legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return True


def save_or_say(path: Path, rows: Sequence[Sequence[Panel]], actions: Sequence[str], title: str) -> bool:
    """``save_panels``, with a sentence where matplotlib is missing."""
    drawn = save_panels(path, rows, actions, title)
    if not drawn:
        print("(no figure: it needs matplotlib, pip install 'fastmix[train]')")
    return drawn


def panels_of(title: str, learned: LearnedGame) -> list[Panel]:
    """One heat map for each learned table."""
    return [Panel(f"{title}: {name}", table, [learned.greedy], learned) for name, table in learned.tables.items()]
