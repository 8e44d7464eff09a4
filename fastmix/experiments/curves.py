"""Learning curves: read from the folders of runs, brought together over seeds, and written as marl-eval JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np

from fastmix.experiments.stats import bootstrap_interval, interquartile_mean
from fastmix.train.logging import read_metrics
from fastmix.train.trainer import CONFIG_FILE, RESULT_FILE

METRICS: Final[dict[str, tuple[str, str]]] = {"return": ("test_returns", "returns"), "win_rate": ("test_won", "won")}
"""Metric -> its values, one an episode, in evaluations and in the absolute metric."""

Axis = Literal["steps", "hours"]
GRID: Final = 200  # points of a curve over several seeds


@dataclass(frozen=True, eq=False)
class RunCurve:
    """The evaluations of one run. ``values`` has a list of episodes for each metric and evaluation."""

    folder: Path
    algo: str
    env: str
    seed: int
    t_env: np.ndarray
    wall_s: np.ndarray
    replay_ratio: np.ndarray
    values: dict[str, list[list[float]]]
    absolute: dict[str, list[float]] = field(default_factory=dict)
    """Of the best networks at the end of a finished run: a value an episode"""
    result: dict[str, Any] = field(default_factory=dict)
    """``result.json`` of a finished run"""

    def mean(self, metric: str) -> np.ndarray:
        """The mean over episodes, one value an evaluation."""
        return np.array([np.mean(episodes) for episodes in self.values[metric]])

    def along(self, axis: Axis) -> np.ndarray:
        """Environment steps, or hours, of the evaluations."""
        return self.t_env.astype(float) if axis == "steps" else self.wall_s / 3600


@dataclass(frozen=True, eq=False)
class Band:
    """A statistic over seeds along steps or hours, with its 95 % bootstrap interval."""

    x: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    iqm: np.ndarray
    n: int


def read_run(folder: Path) -> RunCurve:
    """The evaluations in the folder of a run, finished or not.

    Raises ``FileNotFoundError`` where there is no run, ``ValueError`` where it has no evaluation yet.
    """
    if not (folder / CONFIG_FILE).is_file():
        raise FileNotFoundError(f"{folder} is not a run: there is no {CONFIG_FILE} in it")
    config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))["train"]
    path = folder / "metrics.jsonl"
    records = [record for record in read_metrics(path) if "test_returns" in record] if path.is_file() else []
    if not records:
        raise ValueError(f"{folder} has no evaluation yet")
    result = _result(folder)
    absolute = result.get("absolute") or {}
    return RunCurve(
        folder,
        config["algo"],
        config["env"],
        config["seed"],
        t_env=np.array([record["t_env"] for record in records]),
        wall_s=np.array([record["wall_s"] for record in records]),
        replay_ratio=np.array([record["replay_ratio"] for record in records]),
        values={
            name: [[float(value) for value in record[key]] for record in records]
            for name, (key, _) in METRICS.items()
            if key in records[0]
        },
        absolute={name: list(map(float, absolute[key])) for name, (_, key) in METRICS.items() if key in absolute},
        result=result,
    )


def find_runs(folders: Iterable[Path]) -> list[RunCurve]:
    """Every run in ``folders`` and below, those without an evaluation left out.

    Raises ``FileNotFoundError`` for a folder that holds none.
    """
    runs: dict[Path, RunCurve] = {}
    for folder in folders:
        configs = sorted(folder.glob(f"**/{CONFIG_FILE}"))
        if not configs:
            raise FileNotFoundError(f"{folder} holds no run: there is no {CONFIG_FILE} in it or below")
        for path in configs:
            try:
                runs[path.parent.resolve()] = read_run(path.parent)
            except ValueError:
                continue
    return list(runs.values())


def group(runs: Sequence[RunCurve]) -> dict[str, dict[str, list[RunCurve]]]:
    """Environment -> algorithm -> its seeds, in the order they come."""
    grouped: dict[str, dict[str, list[RunCurve]]] = {}
    for run in runs:
        grouped.setdefault(run.env, {}).setdefault(run.algo, []).append(run)
    return grouped


def band(runs: Sequence[RunCurve], metric: str, axis: Axis = "steps") -> Band:
    """Mean and interquartile mean over ``runs``, as far as all of them got; each is linear between evaluations."""
    last = min(run.along(axis)[-1] for run in runs)
    first = max(run.along(axis)[0] for run in runs)
    x = np.linspace(first, max(last, first), GRID)
    values = np.stack([np.interp(x, run.along(axis), run.mean(metric)) for run in runs], axis=-1)
    low, high = bootstrap_interval(values)
    return Band(x, values.mean(-1), low, high, interquartile_mean(values), len(runs))


def summarise(runs: Sequence[RunCurve], metric: str) -> dict[str, Any]:
    """What a table says of the seeds of one algorithm: the last evaluation and the absolute metric, for JSON."""
    last = np.array([run.mean(metric)[-1] for run in runs])
    finished = [run for run in runs if metric in run.absolute]
    absolute = np.array([np.mean(run.absolute[metric]) for run in finished])
    hours = float(np.mean([run.wall_s[-1] for run in runs])) / 3600
    steps = float(np.mean([run.t_env[-1] for run in runs]))
    return {
        "seeds": len(runs),
        "steps": int(steps),
        "last": _estimate(last),
        "absolute": _estimate(absolute) if len(absolute) else None,
        "hours": hours,
        "steps_per_s": steps / max(3600 * hours, 1e-9),
        "replay_ratio": float(np.mean([run.replay_ratio[-1] for run in runs])),
    }


def marl_eval(runs: Sequence[RunCurve]) -> dict[str, Any]:
    """The runs in the JSON of marl-eval: environment, task, algorithm, seed, step, metric, a value an episode.

    Beside the metrics stand ``elapsed_time`` in seconds and ``replay_ratio``. The name of an environment is its family.
    """
    data: dict[str, Any] = {}
    for run in runs:
        family, _, task = run.env.partition(":")
        seeds = data.setdefault(family, {}).setdefault(task, {}).setdefault(run.algo, {})
        steps: dict[str, Any] = {}
        for i, t_env in enumerate(run.t_env.tolist()):
            steps[f"step_{i}"] = {
                "step_count": t_env,
                "elapsed_time": float(run.wall_s[i]),
                "replay_ratio": [float(run.replay_ratio[i])],
                **{name: values[i] for name, values in run.values.items()},
            }
        seeds[f"seed_{run.seed}"] = steps | ({"absolute_metrics": run.absolute} if run.absolute else {})
    return data


def _estimate(values: np.ndarray) -> dict[str, Any]:
    low, high = bootstrap_interval(values)
    iqm = float(interquartile_mean(values))
    return {"mean": float(values.mean()), "low": float(low), "high": float(high), "iqm": iqm, "seeds": values.tolist()}


def _result(folder: Path) -> dict[str, Any]:
    path = folder / RESULT_FILE
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return result
