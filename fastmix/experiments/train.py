"""``fastmix train``: train one algorithm on one environment for several seeds, and say what came of it."""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from fastmix import envs
from fastmix.algorithms import AlgorithmConfig
from fastmix.envs import MatrixGame, Payoff
from fastmix.experiments.figures import Panel, save_panels
from fastmix.experiments.matrix import LearnedGame, average, report
from fastmix.experiments.stats import wilson_interval
from fastmix.experiments.tables import game_text, verdict
from fastmix.train.arguments import add_dataclass_arguments, given
from fastmix.train.checkpoint import write_json
from fastmix.train.config import TrainConfig
from fastmix.train.sweep import Run, default_workers, load_sweep, new_folder, run_all, save_sweep
from fastmix.train.trainer import Interrupted, Plan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``fastmix train``: the run's, the algorithm's, and those of the sweep over seeds."""
    parser.description = "Train an algorithm. The defaults are the field's; everything given here overrides the preset."
    add_sweep_arguments(parser, default_seeds=1, default_out="runs/<env>/<algo>/run-N")
    add_dataclass_arguments(parser.add_argument_group("run"), TrainConfig)
    add_dataclass_arguments(
        parser.add_argument_group("algorithm (defaults come from --preset)"), AlgorithmConfig, show_defaults=False
    )


def add_sweep_arguments(parser: argparse.ArgumentParser, *, default_seeds: int, default_out: str) -> None:
    """Options that every command with several runs has."""
    group = parser.add_argument_group("sweep")
    group.add_argument("--seeds", type=int, metavar="N", help=f"how many seeds to train (default: {default_seeds})")
    group.add_argument(
        "--workers", type=int, metavar="N", help="runs at the same time, in processes (default: the CPUs)"
    )
    group.add_argument(
        "--out", type=Path, metavar="DIR", help=f"folder for everything written (default: {default_out})"
    )
    group.add_argument(
        "--resume", type=Path, metavar="DIR", help="go on with the runs in DIR, wherever they were stopped"
    )
    group.add_argument("--no-progress", action="store_true", help="no progress bar (there is none without a terminal)")


def run(args: argparse.Namespace) -> int:
    """Train, print, write; returns the exit status. Raises ``ValueError`` and relatives for settings that cannot be."""
    settings, overrides = given(args, TrainConfig), given(args, AlgorithmConfig)
    if args.resume is not None:
        no_settings_with_resume(args, [*settings, *overrides])
        folder = args.resume
        runs, _ = load_sweep(folder, "train")
    else:
        config = TrainConfig(**settings, overrides=overrides)
        config = dataclasses.replace(config, env=_absolute(config.env))
        n_seeds = positive(args, "seeds", 1)
        Plan.of(config)  # so that a wrong setting is found before a folder is made
        folder = args.out or new_folder(Path("runs") / _slug(config.env) / config.algo)
        runs = [
            Run(dataclasses.replace(config, seed=config.seed + i), folder / f"seed-{config.seed + i}")
            for i in range(n_seeds)
        ]
        claim(folder)
        save_sweep(folder, "train", runs)
    workers = positive(args, "workers", default_workers(len(runs)))
    config = runs[0].config
    plan = Plan.of(config, n_parallel=min(workers, len(runs)))
    print(f"{config.algo} ({config.preset}) on {config.env}: {len(runs)} seed(s) of {plan.t_max} steps, {folder}")
    for sentence in plan.sentences():
        print(f"  {sentence}")
    with resumable("train", folder):
        results = run_all(
            runs,
            workers=workers,
            t_max=plan.t_max,
            report=report,
            progress=not args.no_progress,
            description=f"{config.algo} {config.env}",
        )
    print_results(results)
    summary: dict[str, Any] = {"algo": config.algo, "env": config.env, "t_max": plan.t_max, "seeds": results}
    written = [folder / "summary.json"]
    env = envs.make(config.env, 1, 0)
    if isinstance(env, MatrixGame):
        summary["game"] = summarise_games(results, env.payoff)
        print()
        print_games(results, env.payoff)
        figure = folder / "figure.png"
        if draw(figure, config.algo, results, env.payoff):
            written.append(figure)
    write_json(folder / "summary.json", summary)
    print("\nwritten: " + ", ".join(map(str, written)) + f"; logs and checkpoints are in {folder}/seed-*")
    return 0


def print_results(results: Sequence[dict[str, Any]]) -> None:
    """One line a seed: greedy return at the end, win rate where there is one, speed."""
    for result in results:
        won = f", win rate {result['test_win_rate']:.2f}" if "test_win_rate" in result else ""
        rate = result["t_env"] / max(result["wall_s"], 1e-9)
        print(
            f"  seed {result['seed']}: greedy return {result['test_return_mean']:.2f}{won} after {result['t_env']} "
            f"steps and {result['updates']} updates in {result['wall_s']:.1f} s ({rate:.0f} steps/s)"
        )


def print_games(results: Sequence[dict[str, Any]], payoff: Payoff) -> None:
    """Payoff and learned tables per seed and on average, and how many seeds found the optimum."""
    games = [LearnedGame.from_json(result["game"]) for result in results]
    for result, game in zip(results, games, strict=True):
        print(f"seed {result['seed']}: {verdict(game, payoff)}")
        print(_indent(game_text(game, payoff)))
    if len(games) > 1:
        mean = average(games)
        print(f"average of {len(games)} seeds: {verdict(mean, payoff)}")
        print(_indent(game_text(mean, payoff)))
    print(f"optimum found by {share_text(games, payoff)}")


def summarise_games(results: Sequence[dict[str, Any]], payoff: Payoff) -> dict[str, Any]:
    """Average tables and the share of seeds that found the optimum with its 95 % interval, for JSON."""
    games = [LearnedGame.from_json(result["game"]) for result in results]
    found = sum(game.is_optimal(payoff) for game in games)
    return {
        "payoff": payoff.values.tolist(),
        "noise_std": payoff.noise_std,
        "optimum": [payoff.label(joint) for joint in payoff.optimal_actions()],
        "average": average(games).to_json(payoff),
        "found": found,
        "seeds": len(games),
        "wilson_95": list(wilson_interval(found, len(games))),
    }


def share_text(games: Sequence[LearnedGame], payoff: Payoff) -> str:
    """``3 of 5 seeds (95 % interval 0.23 to 0.88)``."""
    found = sum(game.is_optimal(payoff) for game in games)
    low, high = wilson_interval(found, len(games))
    return f"{found} of {len(games)} seeds (95 % interval {low:.2f} to {high:.2f})"


def panels_of(title: str, learned: LearnedGame) -> list[Panel]:
    """One heat map for each learned table."""
    return [Panel(f"{title}: {name}", table, [learned.greedy], learned) for name, table in learned.tables.items()]


def draw(path: Path, algo: str, results: Sequence[dict[str, Any]], payoff: Payoff) -> bool:
    """The payoff beside the average tables; says why when there is no figure. Returns whether there is one."""
    if payoff.n_agents != 2:
        print("(no figure: heat maps are for games of two agents)")
        return False
    games = [LearnedGame.from_json(result["game"]) for result in results]
    panels = [
        Panel("payoff", payoff.values, payoff.optimal_actions()),
        *panels_of(f"{algo}, mean of {len(games)}", average(games)),
    ]
    return save_or_say(path, [panels], payoff.actions, f"{algo} on {payoff.name}: {share_text(games, payoff)}")


def save_or_say(path: Path, rows: Sequence[Sequence[Panel]], actions: Sequence[str], title: str) -> bool:
    """``save_panels``, with a sentence where matplotlib is missing."""
    drawn = save_panels(path, rows, actions, title)
    if not drawn:
        print("(no figure: it needs matplotlib, pip install 'fastmix[train]')")
    return drawn


def positive(args: argparse.Namespace, name: str, default: int) -> int:
    """The option ``name``, checked."""
    value = getattr(args, name)
    if value is None:
        return default
    if value < 1:
        raise ValueError(f"--{name} is {value}; it must be at least 1")
    return int(value)


def claim(folder: Path) -> None:
    """Make ``folder``; one that already holds something is somebody's results."""
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise ValueError(f"--out is {folder}, which is not empty; name another folder, or go on with it by --resume")


@contextmanager
def resumable(command: str, folder: Path) -> Iterator[None]:
    """Say how to go on when the sweep in ``folder`` is told to stop."""
    try:
        yield
    except Interrupted as stopped:
        raise Interrupted(f"{stopped}; go on with: fastmix {command} --resume {folder}") from None


def no_settings_with_resume(args: argparse.Namespace, names: Sequence[str]) -> None:
    """A resumed sweep keeps its settings; raise ``ValueError`` when the command line tries to change them."""
    also = [name for name in ("seeds", "out") if getattr(args, name) is not None]
    for name in (*names, *also):
        flag = name.replace("_", "-")
        raise ValueError(
            f"--{flag} cannot be given with --resume: {args.resume} keeps the settings it was started with"
        )


def _absolute(env: str) -> str:
    """A payoff file by its full path, so that a run resumes and evaluates from any folder."""
    family, at, path = env.partition("@")
    return f"{family}@{Path(path).resolve()}" if at else env


def _slug(env: str) -> str:
    """A folder's name for an environment."""
    family, at, path = env.partition("@")
    return re.sub(r"[^A-Za-z0-9_.]+", "-", family + (Path(path).stem if at else "")).strip("-")


def _indent(text: str) -> str:
    return "\n".join("    " + line for line in text.splitlines())


def finite_or_none(array: np.ndarray) -> Any:
    """Nested lists for JSON, with ``None`` for cells that nobody can read."""
    return [finite_or_none(row) for row in array] if array.ndim else (None if np.isnan(array) else float(array))
