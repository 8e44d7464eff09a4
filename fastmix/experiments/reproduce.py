"""``fastmix reproduce``: the papers' matrix games by the papers' protocol, ours beside theirs; and predator-prey."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from fastmix import algorithms, envs
from fastmix.envs import MatrixGame, Payoff
from fastmix.experiments import prey
from fastmix.experiments.figures import Panel, panels_of, save_or_say
from fastmix.experiments.matrix import LearnedGame, average, largest_errors, summarise_games
from fastmix.experiments.papers import PaperGame, PaperRow, paper_games
from fastmix.experiments.stats import judge_claim, wilson_interval
from fastmix.experiments.sweeps import add_sweep_arguments, positive, resume, start
from fastmix.experiments.tables import matrix_block, share_text, side_by_side, verdict
from fastmix.train.checkpoint import write_json
from fastmix.train.config import TrainConfig
from fastmix.train.sweep import Run, load_sweep

# Uniform exploration is stated for matrix 3 (ResQ appendix) and by POWQMIX for matrix 1, 20,000 steps for matrix 3.
# Nothing is stated for matrices 1 and 2 of the ResQ appendix, which get the same. 8 rollouts for everyone make that one
# training step for 8 episodes, 2,500 in all; optimisers, batches and networks are those of each algorithm's own paper.
T_MAX: Final = 20_000
PROTOCOL: Final[dict[str, Any]] = {"epsilon_start": 1.0, "epsilon_finish": 1.0, "batch_size_run": 8}
# POWQMIX has weights 1 and 0 in matrix games, and gives them to CW- and OW-QMIX in its own, matrix 1. The others are in
# the ResQ appendix only, whose tables of CW- and OW-QMIX show that it kept WQMIX's weight of 0.1.
_ONE_AND_NOTHING: Final[dict[str, Any]] = {"w_high": 1.0, "w": 0.0}
WEIGHTS: Final[dict[str, dict[str, dict[str, Any]]]] = {
    "matrix1": {name: _ONE_AND_NOTHING for name in ("powqmix", "powqmix_opt", "cw_qmix", "ow_qmix")},
    "matrix2": {name: _ONE_AND_NOTHING for name in ("powqmix", "powqmix_opt")},
    "matrix3": {name: _ONE_AND_NOTHING for name in ("powqmix", "powqmix_opt")},
}
PRESET: Final = "paper"
DEFAULT_SEEDS: Final = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``fastmix reproduce``."""
    parser.description = (
        f"Train every algorithm on a matrix game of the papers: uniform exploration throughout, {T_MAX} steps, "
        "the weights that the papers use there; then print our tables beside the published ones, and how many seeds "
        "found the optimum beside what the papers claim. Or, with prey, train those of POWQMIX's Figure 2 "
        f"({', '.join(prey.ALGORITHMS)}; {prey.T_MAX} steps) on predator-prey, and draw the curves."
    )
    parser.add_argument("game", nargs="?", choices=_games_known(), help="which game (not with --resume)")
    parser.add_argument("--algos", nargs="+", metavar="NAME", help="only these algorithms (default: see above)")
    parser.add_argument(
        "--preset", choices=list(algorithms.PRESETS), help=f"other settings (default: {PRESET}; prey: {prey.PRESET})"
    )
    parser.add_argument(
        "--t-max", "--steps", type=int, metavar="N",
        help=f"environment steps of each run (default: {T_MAX}; prey: {prey.T_MAX})",
    )  # fmt: skip
    prey.add_arguments(parser)
    add_sweep_arguments(parser, default_seeds=DEFAULT_SEEDS, default_out="runs/reproduce/<game>/run-N")


def run(args: argparse.Namespace) -> int:
    """Train, compare, print, write; returns the exit status."""
    if args.resume is not None:
        game_given = ["game"] if args.game is not None else []
        _, saved = load_sweep(args.resume, "reproduce")
        if saved["game"] == prey.NAME and not game_given:
            return prey.run(args)
        settings = ("algos", "preset", "t_max", "punishments")
        given = game_given + [name for name in settings if getattr(args, name) is not None]
        sweep = resume(args, "reproduce", given)
        game = paper_games()[sweep.extra["game"]]
    else:
        if args.game is None:
            raise ValueError("name a game to reproduce: " + ", ".join(_games_known()))
        if args.game == prey.NAME:
            return prey.run(args)
        if args.punishments is not None:
            raise ValueError(f"--punishments belongs to {prey.NAME}, not to {args.game}")
        game = paper_games()[args.game]
        n_seeds, t_max = positive(args, "seeds", DEFAULT_SEEDS), positive(args, "t_max", T_MAX)
        configs = _configs(game, args.algos, args.preset or PRESET, n_seeds, t_max)
        sweep = start(args, "reproduce", configs, Path("runs") / "reproduce" / game.name, game=game.name)
    runs, folder, t_max = sweep.runs, sweep.folder, sweep.plan.t_max
    names = list(dict.fromkeys(run.config.algo for run in runs))
    print(f"{game.name} ({game.env}): {', '.join(names)}; {len(runs) // len(names)} seed(s) of {t_max} steps, {folder}")
    results = sweep.train(f"reproduce {game.name}")
    env = envs.make(game.env, 1, 0)
    assert isinstance(env, MatrixGame), game.env
    by_algo = {
        name: [result for run, result in zip(runs, results, strict=True) if run.config.algo == name] for name in names
    }
    _print(game, env.payoff, by_algo)
    path = folder / f"{game.name}.json"
    write_json(path, _summary(game, env.payoff, by_algo, runs))
    table = folder / f"{game.name}.md"
    table.write_text("\n".join(_markdown(game, env.payoff, by_algo, runs[0].config)) + "\n", encoding="utf-8")
    written = [path, table]
    rows = [_panels(game, env.payoff, name, results) for name, results in by_algo.items()]
    figure = folder / f"{game.name}.png"
    if save_or_say(figure, rows, env.payoff.actions, f"{game.name}: ours beside the papers' tables"):
        written.append(figure)
    print("\nwritten: " + ", ".join(map(str, written)))
    return 0


def _games_known() -> list[str]:
    return [*sorted(paper_games()), prey.NAME]


def _configs(
    game: PaperGame, names: Sequence[str] | None, preset: str, n_seeds: int, t_max: int
) -> dict[str, TrainConfig]:
    for name in names or ():
        if name not in algorithms.REGISTRY:
            raise ValueError(f"--algos has {name!r}; the algorithms are {', '.join(algorithms.REGISTRY)}")
    return {
        f"{name}/seed-{seed}": TrainConfig(
            name, game.env, preset, seed, t_max, overrides={**PROTOCOL, **WEIGHTS[game.name].get(name, {})}
        )
        for name in dict.fromkeys(names or algorithms.REGISTRY)
        for seed in range(n_seeds)
    }


def _print(game: PaperGame, payoff: Payoff, by_algo: dict[str, list[dict[str, Any]]]) -> None:
    print("\n" + "\n".join(matrix_block("payoff", payoff.values, payoff.actions, best=payoff.optimal_actions())))
    for name, results in by_algo.items():
        games = _games(results)
        print(f"\n{name}: optimum found by {share_text(games, payoff)}; on average {verdict(average(games), payoff)}")
        blocks = _blocks("ours", average(games), payoff)
        for row in game.of(name):
            blocks += _paper_blocks(row, payoff)
        print("\n".join("    " + line for line in side_by_side(blocks).splitlines()))
        if not game.of(name):
            print("    (no paper has a table of it)")
    print(f"\n{'algorithm':<14}{'ours: optimum found':<44}{'papers claim':<16}{'their greedy':<14}verdict")
    for name, results in by_algo.items():
        greedy = ", ".join(dict.fromkeys(row.greedy for row in game.of(name))) or "-"
        claim, judged = _claim(game, name, _games(results), payoff)
        print(f"{name:<14}{share_text(_games(results), payoff):<44}{claim:<16}{greedy:<14}{judged}".rstrip())
    print("\nlargest distance of a learned joint value from the payoff, over seeds and joint actions:")
    for name, results in by_algo.items():
        errors = largest_errors(_games(results), payoff)
        print(f"{name:<14}" + "  ".join(f"{table} {error:.2f}" for table, error in errors.items()))


def _claim(game: PaperGame, name: str, games: Sequence[LearnedGame], payoff: Payoff) -> tuple[str, str]:
    """What the papers claim of an algorithm in words, and whether ours agrees."""
    claim = game.claim(name)
    if claim is None:
        return "-", "-"
    found = sum(learned.is_optimal(payoff) for learned in games)
    return "found" if claim else "not found", judge_claim(claim, found, len(games))


def _markdown(
    game: PaperGame, payoff: Payoff, by_algo: dict[str, list[dict[str, Any]]], config: TrainConfig
) -> list[str]:
    """The comparison as a table for documentation."""
    lines = [
        f"{game.name} (`{game.env}`), preset `{config.preset}`, {config.t_max} environment steps, uniform exploration:",
        "",
        "| algorithm | optimum found | 95 % interval | greedy, seeds | papers: greedy | papers claim | verdict |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, results in by_algo.items():
        games = _games(results)
        found = sum(learned.is_optimal(payoff) for learned in games)
        low, high = wilson_interval(found, len(games))
        ours = Counter(payoff.label(learned.greedy) for learned in games).most_common()
        theirs = ", ".join(dict.fromkeys(row.greedy for row in game.of(name))) or "-"
        claim, judged = _claim(game, name, games, payoff)
        lines.append(
            f"| `{name}` | {found} of {len(games)} | {low:.2f} to {high:.2f} | "
            f"{', '.join(f'{label} {count}' for label, count in ours)} | {theirs} | {claim} | {judged} |"
        )
    return lines


def _blocks(whose: str, learned: LearnedGame, payoff: Payoff) -> list[list[str]]:
    return [
        [whose, *matrix_block(name, table, payoff.actions, utilities=learned.utilities, best=[learned.greedy])]
        for name, table in learned.tables.items()
    ]


def _paper_blocks(row: PaperRow, payoff: Payoff) -> list[list[str]]:
    learned = row.as_learned()
    if learned is not None:
        return _blocks(row.source, learned, payoff)
    best = [tuple(payoff.actions.index(label) for label in row.greedy)]
    return [[row.source, *matrix_block(name, t, payoff.actions, best=best)] for name, t in row.tables.items()]


def _panels(game: PaperGame, payoff: Payoff, name: str, results: Sequence[dict[str, Any]]) -> list[Panel]:
    panels = [Panel("payoff", payoff.values, payoff.optimal_actions())]
    panels += panels_of(f"{name}, mean of {len(results)}", average(_games(results)))
    for row in game.of(name):
        learned = row.as_learned()
        if learned is not None:
            panels += panels_of(row.source, learned)
    return panels


def _summary(
    game: PaperGame, payoff: Payoff, by_algo: dict[str, list[dict[str, Any]]], runs: Sequence[Run]
) -> dict[str, Any]:
    ours = {
        name: {
            **summarise_games(results, payoff),
            "claim": dict(zip(("papers", "verdict"), _claim(game, name, _games(results), payoff), strict=True)),
            "runs": results,
            "papers": [row.to_json() for row in game.of(name)],
        }
        for name, results in by_algo.items()
    }
    config = runs[0].config
    overrides = {run.config.algo: run.config.overrides for run in runs}
    protocol = {"t_max": config.t_max, "preset": config.preset, "overrides": overrides}
    return {"game": game.name, "env": game.env, "protocol": protocol, "algorithms": ours}


def _games(results: Sequence[dict[str, Any]]) -> list[LearnedGame]:
    return [LearnedGame.from_json(result["game"]) for result in results]
