"""Several runs, one after another or in processes; a sweep that was stopped goes on where it was."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastmix.train.checkpoint import write_json
from fastmix.train.config import TrainConfig
from fastmix.train.logging import progress_bar
from fastmix.train.trainer import RESULT_FILE, Interrupted, Progress, Trainer

SWEEP_FILE = "sweep.json"

log = logging.getLogger(__name__)

# Adds what only the trained algorithm can tell to a run's result. A module-level function: it travels to processes.
Report = Callable[[Trainer], dict[str, Any]]


@dataclass(frozen=True)
class Run:
    """One training run of a sweep and the folder it lives in."""

    config: TrainConfig
    folder: Path


def run_all(
    runs: Sequence[Run],
    *,
    workers: int,
    t_max: int,
    report: Report | None = None,
    progress: bool = True,
    description: str = "train",
    announce: Callable[[str], None] = log.info,
) -> list[dict[str, Any]]:
    """The results of ``runs``, in their order.

    Finished runs are read from their ``result.json``, begun ones continue from their newest checkpoint, and so do those
    that had ended short of ``t_max``, the length of every run. ``workers`` runs train at the same time, in spawned
    processes when there is more than one. Raises what a run raises, and ``Interrupted`` when one was told to stop.
    """
    if workers < 1:
        raise ValueError(f"workers is {workers}; it must be at least 1")
    with progress_bar(t_max * len(runs), description, enabled=progress) as bar:
        results = {i: result for i, run in enumerate(runs) if (result := _finished(run, t_max)) is not None}
        pending = [i for i in range(len(runs)) if i not in results]
        steps = [t_max if i in results else 0 for i in range(len(runs))]

        def show() -> None:
            bar.update(min(sum(steps), t_max * len(runs)) - int(bar.n or 0))

        show()
        if workers == 1 or len(pending) == 1:
            for i in pending:

                def on_progress(t_env: int, i: int = i) -> bool:
                    steps[i] = t_env
                    show()
                    return False

                results[i] = run_one(runs[i], report, on_progress=on_progress, announce=announce)
        elif pending:
            results |= _in_processes(runs, pending, workers, report, steps, show)
    return [results[i] for i in range(len(runs))]


def run_one(
    run: Run,
    report: Report | None = None,
    *,
    on_progress: Progress | None = None,
    announce: Callable[[str], None] = log.info,
) -> dict[str, Any]:
    """Train one run to its end and write its ``result.json``."""
    torch.set_num_threads(run.config.threads)
    trainer = Trainer(run.config, run.folder, on_progress=on_progress, announce=announce)
    try:
        result = trainer.run()
        if report is not None:
            result |= report(trainer)
    finally:
        trainer.close()
    write_json(run.folder / RESULT_FILE, result)
    return result


def new_folder(parent: Path) -> Path:
    """A folder ``run-1``, ``run-2``, ... under ``parent`` that nobody else has; created."""
    parent.mkdir(parents=True, exist_ok=True)
    taken = [int(path.name[4:]) for path in parent.glob("run-*") if path.name[4:].isdigit()]
    number = max(taken, default=0) + 1
    while True:
        folder = parent / f"run-{number}"
        try:
            folder.mkdir()
        except FileExistsError:
            number += 1
        else:
            return folder


def save_sweep(folder: Path, command: str, runs: Sequence[Run], **extra: Any) -> None:
    """Write down what a sweep consists of, so that :func:`load_sweep` can go on with it in another process."""
    listed = [{"folder": str(run.folder.relative_to(folder)), "config": run.config.to_json()} for run in runs]
    write_json(folder / SWEEP_FILE, {"command": command, **extra, "runs": listed})


def load_sweep(folder: Path, command: str) -> tuple[list[Run], dict[str, Any]]:
    """The runs of the sweep in ``folder`` and what else was saved with it.

    Raises ``FileNotFoundError`` where there is no sweep, ``ValueError`` where another command made it.
    """
    path = folder / SWEEP_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder} cannot be resumed: there is no {SWEEP_FILE} in it")
    saved = json.loads(path.read_text(encoding="utf-8"))
    if saved.pop("command") != command:
        raise ValueError(f"{folder} was not made by fastmix {command}; resume it with the command that made it")
    return [Run(TrainConfig.from_json(run["config"]), folder / run["folder"]) for run in saved.pop("runs")], saved


def default_workers(n_runs: int) -> int:
    """As many runs at the same time as there are CPUs for this process."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(n_runs, cpus))


def _finished(run: Run, t_max: int) -> dict[str, Any] | None:
    path = run.folder / RESULT_FILE
    if not path.is_file():
        return None
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return result if result["t_env"] >= t_max else None


def _in_processes(
    runs: Sequence[Run],
    pending: list[int],
    workers: int,
    report: Report | None,
    steps: list[int],
    show: Callable[[], None],
) -> dict[int, dict[str, Any]]:
    # Spawned, not forked: forking a process whose torch has started threads can hang.
    context = multiprocessing.get_context("spawn")
    shared = context.Array("q", [*steps, 0], lock=False)  # environment steps of each run, and whether to stop
    pool = ProcessPoolExecutor(
        min(workers, len(pending)), mp_context=context, initializer=_start_worker, initargs=(shared, os.getpid())
    )
    futures: dict[Future[dict[str, Any]], int] = {pool.submit(_work, i, runs[i], report): i for i in pending}
    results: dict[int, dict[str, Any]] = {}
    waiting = set(futures)
    try:
        while waiting:
            done, waiting = wait(waiting, timeout=0.2, return_when=FIRST_COMPLETED)
            results |= {futures[future]: future.result() for future in done}
            steps[:] = shared[:-1]
            show()
    except KeyboardInterrupt:
        # The terminal sent the signal to the workers too; this reaches the runs that were only about to start.
        shared[-1] = True
        raise Interrupted("stopped; every run is in its newest checkpoint") from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return results


_worker: dict[str, Any] = {}


def _start_worker(shared: Any, parent: int) -> None:
    _worker.update(shared=shared, parent=parent)


def _work(i: int, run: Run, report: Report | None) -> dict[str, Any]:
    def on_progress(t_env: int) -> bool:
        if os.getppid() != _worker["parent"]:
            # The sweep was killed. Whoever resumes it must not find a second writer in this folder.
            os._exit(1)
        _worker["shared"][i] = t_env
        return bool(_worker["shared"][-1])

    return run_one(run, report, on_progress=on_progress)
