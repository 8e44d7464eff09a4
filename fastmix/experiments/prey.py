"""``fastmix reproduce prey``: POWQMIX's Figure 2, predator-prey with three punishments."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from fastmix import algorithms
from fastmix.experiments.curve_figure import Column, save_curves
from fastmix.experiments.curves import group, read_run
from fastmix.experiments.report import write_report
from fastmix.experiments.sweeps import positive, resume, start
from fastmix.train.config import TrainConfig

NAME: Final = "prey"
ALGORITHMS: Final = ("qmix", "qplex", "cw_qmix", "ow_qmix", "resq_vdn", "powqmix")
"""ResQ mixes its main part by a plain sum in predator-prey (its appendix)."""
PUNISHMENTS: Final = (0.0, -2.0, -3.0)
"""Of the three the text names only -3. 0 is one, as epsilon has another schedule elsewhere; -2 is that of WQMIX."""
PRESET: Final = "pymarl2"
T_MAX: Final = 2_050_000
DEFAULT_SEEDS: Final = 5
# A checkpoint holds the replay buffer, close to a gigabyte of it.
CHECKPOINT_INTERVAL: Final = 250_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options that only this experiment has."""
    levels = " ".join(f"{punishment:g}" for punishment in PUNISHMENTS)
    parser.add_argument(
        "--punishments", nargs="+", type=float, metavar="X", help=f"prey: only these punishments (default: {levels})"
    )


def run(args: argparse.Namespace) -> int:
    """Train the grid, print, draw, write; returns the exit status."""
    if args.resume is not None:
        given = [name for name in ("algos", "preset", "punishments") if getattr(args, name) is not None]
        sweep = resume(args, "reproduce", given, {} if args.t_max is None else {"t_max": args.t_max})
    else:
        punishments = PUNISHMENTS if args.punishments is None else args.punishments
        n_seeds, t_max = positive(args, "seeds", DEFAULT_SEEDS), positive(args, "t_max", T_MAX)
        configs = _configs(args.algos or ALGORITHMS, punishments, args.preset or PRESET, n_seeds, t_max)
        sweep = start(args, "reproduce", configs, Path("runs") / "reproduce" / NAME, game=NAME)
    names = list(dict.fromkeys(run.config.algo for run in sweep.runs))
    envs = list(dict.fromkeys(run.config.env for run in sweep.runs))
    print(f"{', '.join(envs)}: {', '.join(names)}; {len(sweep.runs)} runs of {sweep.plan.t_max} steps, {sweep.folder}")
    for sentence in sweep.plan.sentences():
        print(f"  {sentence}")
    sweep.train(f"reproduce {NAME}")
    grouped = group([read_run(run.folder) for run in sweep.runs])
    written = write_report(sweep.folder, grouped)
    figure = sweep.folder / f"{NAME}.png"
    columns = [Column(env, "return", runs) for env, runs in grouped.items()]
    if save_curves(figure, columns, "predator-prey, greedy return; mean over seeds, 95 % bootstrap interval"):
        written.append(figure)
    print("\nwritten: " + ", ".join(map(str, written)))
    return 0


def _configs(
    names: Sequence[str], punishments: Sequence[float], preset: str, n_seeds: int, t_max: int
) -> dict[str, TrainConfig]:
    """Subfolder -> settings. The seeds come first, so that a grid stopped early has all algorithms and punishments."""
    for name in names:
        if name not in algorithms.REGISTRY:
            raise ValueError(f"--algos has {name!r}; the algorithms are {', '.join(algorithms.REGISTRY)}")
    for punishment in punishments:
        if not punishment <= 0:
            raise ValueError(f"--punishments has {punishment:g}; it is added to the reward, so it must be 0 or below")
    common: dict[str, Any] = {"preset": preset, "t_max": t_max, "checkpoint_interval": CHECKPOINT_INTERVAL}
    return {
        f"p{punishment:g}/{name}/seed-{seed}": TrainConfig(name, f"prey:p{punishment:g}", seed=seed, **common)
        for seed in range(n_seeds)
        for punishment in dict.fromkeys(p or 0.0 for p in punishments)
        for name in dict.fromkeys(names)
    }
