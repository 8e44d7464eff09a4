"""``fastmix report``: learning curves and a table of the runs in some folders, over their seeds."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastmix.experiments.curve_figure import Column, save_curves
from fastmix.experiments.curves import METRICS, RunCurve, find_runs, group, marl_eval, summarise
from fastmix.train.checkpoint import write_json, write_text

Grouped = Mapping[str, Mapping[str, Sequence[RunCurve]]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``fastmix report``."""
    parser.description = (
        "Bring the runs in some folders together, finished or not: a figure for each environment (mean over seeds with "
        "its 95 % bootstrap interval, interquartile mean dotted; against steps and against wall-clock), a table, and "
        "all evaluations as marl-eval JSON."
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="DIR", help="folders with runs, at any depth")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write (default: report in the first)")


def run(args: argparse.Namespace) -> int:
    """Read, print, write; returns the exit status."""
    runs = find_runs(args.runs)
    if not runs:
        raise ValueError("none of these runs has an evaluation yet: " + ", ".join(map(str, args.runs)))
    folder = args.out or args.runs[0] / "report"
    grouped = group(runs)
    written = write_report(folder, grouped)
    for env, algorithms in grouped.items():
        metrics = metrics_of(algorithms)
        figure = folder / f"{slug(env)}.png"
        if save_curves(figure, [Column(metric, metric, algorithms) for metric in metrics], env):
            written.append(figure)
    print("\nwritten: " + ", ".join(map(str, written)))
    return 0


def write_report(folder: Path, grouped: Grouped) -> list[Path]:
    """Print the table and write ``report.md``, ``report.json`` and ``marl_eval.json``; returns the paths."""
    lines = table(grouped)
    print("\n".join(lines))
    folder.mkdir(parents=True, exist_ok=True)
    text = folder / "report.md"
    text.write_text("\n".join(lines) + "\n", encoding="utf-8")
    summary: dict[str, Any] = {
        env: {
            algo: {metric: summarise(runs, metric) for metric in metrics_of({algo: runs})}
            for algo, runs in algorithms.items()
        }
        for env, algorithms in grouped.items()
    }
    write_json(folder / "report.json", summary)
    runs = [run for algorithms in grouped.values() for seeds in algorithms.values() for run in seeds]
    write_text(folder / "marl_eval.json", json.dumps(marl_eval(runs)) + "\n")  # a number of every episode: no indents
    return [text, folder / "report.json", folder / "marl_eval.json"]


def table(grouped: Grouped) -> list[str]:
    """The runs as a Markdown table."""
    lines = [
        "| environment | algorithm | seeds | steps | metric | last evaluation | IQM | best networks, 10x episodes "
        "| hours | steps/s | replay ratio |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for env, algorithms in grouped.items():
        for algo, runs in algorithms.items():
            for metric in metrics_of({algo: runs}):
                s = summarise(runs, metric)
                values = f"{_estimate(s['last'])} | {s['last']['iqm']:.2f} | {_estimate(s['absolute'])}"
                cost = f"{s['hours']:.2f} | {s['steps_per_s']:,.0f} | {s['replay_ratio']:.1f}"
                lines.append(f"| `{env}` | `{algo}` | {s['seeds']} | {s['steps']:,} | {metric} | {values} | {cost} |")
    return lines + _builds(grouped)


def metrics_of(algorithms: Mapping[str, Sequence[RunCurve]]) -> list[str]:
    """The metrics that every run has."""
    runs = [run for seeds in algorithms.values() for run in seeds]
    return [metric for metric in METRICS if all(metric in run.values for run in runs)]


def slug(env: str) -> str:
    """An environment's name as that of a file."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", env).strip("-")


def _builds(grouped: Grouped) -> list[str]:
    """What the environments of others were, of finished runs; several of one are nothing to compare."""
    lines = []
    for env, algorithms in grouped.items():
        runs = [run for seeds in algorithms.values() for run in seeds]
        builds = sorted({run.result.get("env_build", "") for run in runs} - {""})
        if builds:
            warning = "; results of different builds are not comparable" if len(builds) > 1 else ""
            lines += ["", f"`{env}`: {' and '.join(builds)}{warning}."]
    return lines


def _estimate(values: dict[str, Any] | None) -> str:
    return "-" if values is None else f"{values['mean']:.2f} [{values['low']:.2f}, {values['high']:.2f}]"
