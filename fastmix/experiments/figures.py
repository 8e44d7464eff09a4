"""Heat maps of payoffs and learned joint values. matplotlib is optional and imported here only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastmix.experiments.matrix import LearnedGame


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


def save_or_say(path: Path, rows: Sequence[Sequence[Panel]], actions: Sequence[str], title: str) -> bool:
    """``save_panels``, with a sentence where matplotlib is missing."""
    drawn = save_panels(path, rows, actions, title)
    if not drawn:
        print("(no figure: it needs matplotlib, pip install 'fastmix[train]')")
    return drawn


def panels_of(title: str, learned: LearnedGame) -> list[Panel]:
    """One heat map for each learned table."""
    return [Panel(f"{title}: {name}", table, [learned.greedy], learned) for name, table in learned.tables.items()]
