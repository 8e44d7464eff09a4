"""Learning curves as a figure. matplotlib is optional and imported here only."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fastmix.experiments.curves import Axis, RunCurve, band

AXES: Final[dict[Axis, str]] = {"steps": "environment steps", "hours": "wall-clock hours"}


@dataclass(frozen=True)
class Column:
    """One environment and metric: drawn against steps, and below that against wall-clock."""

    title: str
    metric: str
    runs: Mapping[str, Sequence[RunCurve]]  # label of a line -> its seeds


def save_curves(path: Path, columns: Sequence[Column], title: str) -> bool:
    """Draw means over seeds with their 95 % bootstrap intervals, and interquartile means dotted, to ``path``.

    Returns False, having drawn nothing and said so, where matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import EngFormatter
    except ImportError:
        print("(no figure: it needs matplotlib, pip install 'fastmix[train]')")
        return False
    labels = list(dict.fromkeys(label for column in columns for label in column.runs))
    figure = Figure(figsize=(4.6 * len(columns), 3.4 * len(AXES) + 0.8), layout="constrained")
    figure.suptitle(textwrap.fill(title, 48 * len(columns)))
    grid = figure.subplots(len(AXES), len(columns), squeeze=False)
    for (axis, name), row in zip(AXES.items(), grid, strict=True):
        for column, plot in zip(columns, row, strict=True):
            for label, runs in column.runs.items():
                colour = f"C{labels.index(label) % 10}"
                curve = band(runs, column.metric, axis)
                plot.plot(curve.x, curve.mean, color=colour, label=f"{label} ({curve.n})")
                plot.plot(curve.x, curve.iqm, color=colour, linestyle=":", linewidth=1)
                plot.fill_between(curve.x, curve.low, curve.high, color=colour, alpha=0.2, linewidth=0)
            plot.set_title(column.title, fontsize=10)
            plot.set_xlabel(name, fontsize=9)
            plot.set_ylabel(f"test {column.metric.replace('_', ' ')}", fontsize=9)
            plot.grid(alpha=0.3)
            if axis == "steps":
                plot.xaxis.set_major_formatter(EngFormatter(sep=""))
                plot.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return True
