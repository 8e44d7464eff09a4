"""What commands with several runs share: their options, the folder, the start, the way on after a stop."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fastmix.errors import EnvironmentFailed
from fastmix.experiments.matrix import report
from fastmix.train.config import TrainConfig
from fastmix.train.plan import Plan
from fastmix.train.sweep import Run, default_workers, load_sweep, new_folder, run_all, save_sweep
from fastmix.train.trainer import Interrupted


def add_sweep_arguments(parser: argparse.ArgumentParser, *, default_seeds: int, default_out: str) -> None:
    """Declare the options that every command with several runs has."""
    add = parser.add_argument_group("sweep").add_argument
    add("--seeds", type=int, metavar="N", help=f"how many seeds to train (default: {default_seeds})")
    add("--workers", type=int, metavar="N", help="runs at the same time, in processes (default: all CPUs)")
    add("--out", type=Path, metavar="DIR", help=f"folder for everything written (default: {default_out})")
    add("--resume", type=Path, metavar="DIR", help="go on with the runs in DIR, wherever they were stopped")
    add("--no-progress", action="store_true", help="no progress bar (there is none without a terminal)")


@dataclass(frozen=True)
class Sweep:
    """Checked runs, ready to go. ``plan`` is that of the first one; all take as many steps."""

    command: str
    folder: Path
    runs: list[Run]
    workers: int
    plan: Plan
    progress: bool
    extra: dict[str, Any] = field(default_factory=dict)

    def train(self, description: str) -> list[dict[str, Any]]:
        """The results of all runs, in order; a stop says how to go on."""
        try:
            return run_all(
                self.runs,
                workers=self.workers,
                t_max=self.plan.t_max,
                report=report,
                progress=self.progress,
                description=description,
            )
        except Interrupted as stopped:
            raise Interrupted(f"{stopped}; {self._way_on}") from None
        except EnvironmentFailed as failed:
            raise EnvironmentFailed(f"{failed}; what was learnt is saved, {self._way_on}") from failed

    @property
    def _way_on(self) -> str:
        return f"go on with: fastmix {self.command} --resume {self.folder}"


def start(
    args: argparse.Namespace, command: str, configs: Mapping[str, TrainConfig], parent: Path, **extra: Any
) -> Sweep:
    """A new sweep: everything is checked first, then its folder is made. ``configs`` maps subfolders to settings.

    The folder is ``--out``, or a new one under ``parent``; ``extra`` is kept for :func:`resume`. Raises ``ValueError``
    and relatives for settings that cannot be, and when ``--out`` already holds something.
    """
    workers, plan = _check(args, list(configs.values()))
    if args.out is not None and args.out.exists() and any(args.out.iterdir()):
        raise ValueError(f"--out is {args.out}, which is not empty; name another folder, or go on with it by --resume")
    folder = args.out or new_folder(parent)
    folder.mkdir(parents=True, exist_ok=True)
    runs = [Run(config, folder / name) for name, config in configs.items()]
    save_sweep(folder, command, runs, **extra)
    return Sweep(command, folder, runs, workers, plan, not args.no_progress, extra)


def resume(
    args: argparse.Namespace, command: str, settings: Sequence[str], changes: Mapping[str, Any] | None = None
) -> Sweep:
    """The sweep in ``--resume``, with the settings it has but for ``changes`` (of `TrainConfig.CHANGEABLE`).

    With another ``t_max`` its runs go on to so many steps, those that had ended too. ``settings`` names the other
    options that were given all the same. Raises ``ValueError`` for any of those and for a ``t_max`` that would shorten
    the runs, ``FileNotFoundError`` where there is no sweep.
    """
    for name in (*settings, *(name for name in ("seeds", "out") if getattr(args, name) is not None)):
        flag = "--" + name.replace("_", "-")
        raise ValueError(f"{flag} cannot be given with --resume: {args.resume} keeps the settings it was started with")
    runs, extra = load_sweep(args.resume, command)
    before, changes = runs[0].config, changes or {}
    runs = [replace(run, config=replace(run.config, **changes)) for run in runs]
    workers, plan = _check(args, [run.config for run in runs])
    plan.check_goes_on(before, args.resume)
    if "t_max" in changes:
        save_sweep(args.resume, command, runs, **extra)
    return Sweep(command, args.resume, runs, workers, plan, not args.no_progress, extra)


def positive(args: argparse.Namespace, name: str, default: int) -> int:
    """The option ``name``, at least 1."""
    value = getattr(args, name)
    if value is None:
        return default
    if value < 1:
        raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
    return int(value)


def _check(args: argparse.Namespace, configs: Sequence[TrainConfig]) -> tuple[int, Plan]:
    """Workers, and the plan of the first run; every algorithm is checked, with the memory of parallel runs."""
    workers = positive(args, "workers", default_workers(len(configs)))
    one_of_each = {(config.algo, config.env): config for config in configs}.values()
    plans = [Plan.of(config, n_parallel=min(workers, len(configs))) for config in one_of_each]
    return workers, plans[0]
