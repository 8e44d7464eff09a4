"""``fastmix train``: train one algorithm on one environment for several seeds, and say what came of it."""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastmix import envs
from fastmix.algorithms import AlgorithmConfig
from fastmix.envs import MatrixGame, Payoff
from fastmix.experiments.figures import Panel, panels_of, save_or_say
from fastmix.experiments.matrix import LearnedGame, average, summarise_games
from fastmix.experiments.sweeps import add_sweep_arguments, positive, resume, start
from fastmix.experiments.tables import game_text, share_text, verdict
from fastmix.train.arguments import add_dataclass_arguments, given
from fastmix.train.checkpoint import write_json
from fastmix.train.config import TrainConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``fastmix train``: the run's, the algorithm's, and those of the sweep over seeds."""
    parser.usage = "fastmix train [options]"  # there are too many to be of use in one line
    parser.description = "Train an algorithm. The defaults are the field's; everything given here overrides the preset."
    add_sweep_arguments(parser, default_seeds=1, default_out="runs/<env>/<algo>/run-N")
    add_dataclass_arguments(parser.add_argument_group("run"), TrainConfig)
    add_dataclass_arguments(
        parser.add_argument_group("algorithm (defaults come from --preset)"), AlgorithmConfig, show_defaults=False
    )


def run(args: argparse.Namespace) -> int:
    """Train, print, write; returns the exit status. Raises ``ValueError`` and relatives for settings that cannot be."""
    settings, overrides = given(args, TrainConfig), given(args, AlgorithmConfig)
    if args.resume is not None:
        changes = {name: settings.pop(name) for name in TrainConfig.CHANGEABLE & settings.keys()}
        sweep = resume(args, "train", [*settings, *overrides], changes)
    else:
        config = TrainConfig(**settings, overrides=overrides)
        config = dataclasses.replace(config, env=_absolute(config.env))
        seeds = range(config.seed, config.seed + positive(args, "seeds", 1))
        configs = {f"seed-{seed}": dataclasses.replace(config, seed=seed) for seed in seeds}
        sweep = start(args, "train", configs, Path("runs") / _slug(config.env) / config.algo)
    config, folder, t_max = sweep.runs[0].config, sweep.folder, sweep.plan.t_max
    print(f"{config.algo} ({config.preset}) on {config.env}: {len(sweep.runs)} seed(s) of {t_max} steps, {folder}")
    for sentence in sweep.plan.sentences():
        print(f"  {sentence}")
    results = sweep.train(f"{config.algo} {config.env}")
    print_results(results)
    summary: dict[str, Any] = {"algo": config.algo, "env": config.env, "t_max": t_max, "seeds": results}
    written = [folder / "summary.json"]
    env = envs.make(config.env, 1, 0) if config.env.startswith("matrix:") else None
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
        build = f" [{result['env_build']}]" if result.get("env_build") else ""
        if result.get("failed_games"):
            build += f"; {result['failed_games']} games broke down, and their episodes were dropped"
        rate = result["t_env"] / max(result["wall_s"], 1e-9)
        print(
            f"  seed {result['seed']}: greedy return {result['test_return_mean']:.2f}{won} after {result['t_env']} "
            f"steps and {result['updates']} updates in {result['wall_s']:.1f} s ({rate:.0f} steps/s){build}"
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
    return save_or_say(
        path, [panels], payoff.actions, f"{algo} on {payoff.name}: optimum found by {share_text(games, payoff)}"
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
