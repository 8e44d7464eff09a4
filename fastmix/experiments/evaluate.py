"""``fastmix evaluate``: play greedy episodes with what a run has learnt."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from fastmix import envs
from fastmix.envs import ExternalEnv, MatrixGame
from fastmix.envs.smac import SmacEnv
from fastmix.experiments.matrix import learned_game
from fastmix.experiments.tables import game_text, verdict
from fastmix.train.evaluate import evaluate
from fastmix.train.trainer import CONFIG_FILE, load_run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``fastmix evaluate``."""
    parser.description = "Play greedy episodes with the networks of a run, or of every seed of a sweep."
    parser.add_argument("run", type=Path, metavar="DIR", help="folder of a run (seed-0) or of a sweep (run-1)")
    parser.add_argument("--checkpoint", choices=("latest", "best"), default="latest", help="(default: latest)")
    parser.add_argument("--episodes", type=int, default=32, metavar="N", help="(default: 32)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the environment (default: 0)")
    parser.add_argument(
        "--save-replays",
        type=Path,
        metavar="DIR",
        help="also write the games' own recordings there (smac: one file a copy, for StarCraft II)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object a run instead of text")


def run(args: argparse.Namespace) -> int:
    """Evaluate and print; returns the exit status."""
    folders = [args.run] if (args.run / CONFIG_FILE).is_file() else sorted(args.run.glob(f"**/seed-*/{CONFIG_FILE}"))
    folders = [path.parent if path.name == CONFIG_FILE else path for path in folders]
    if not folders:
        raise FileNotFoundError(f"{args.run} holds no run: neither {CONFIG_FILE} nor seed-*/{CONFIG_FILE} is in it")
    for folder in folders:
        _evaluate(folder, args)
    return 0


def _evaluate(folder: Path, args: argparse.Namespace) -> None:
    config, algo, t_env = load_run(folder, args.checkpoint)
    torch.set_num_threads(config.threads)
    env = envs.make(config.env, min(args.episodes, algo.config.batch_size_run), args.seed)
    if args.save_replays is not None and not isinstance(env, SmacEnv):
        env.close()
        raise ValueError(f"--save-replays is given, and {config.env} has no replays to save")
    generator = torch.Generator(device=config.device).manual_seed(args.seed)
    stats = evaluate(algo, env, args.episodes, generator, device=config.device).summary("")
    record: dict[str, Any] = {"run": str(folder), "algo": config.algo, "env": config.env, "t_env": t_env}
    record |= {"checkpoint": args.checkpoint, "episodes": args.episodes, **stats}
    if isinstance(env, ExternalEnv):
        record["env_build"] = env.build
    if isinstance(env, SmacEnv) and args.save_replays is not None:
        record["replays"] = list(map(str, env.save_replays(args.save_replays / folder.name)))
    learned = learned_game(algo, env, config.device) if isinstance(env, MatrixGame) else None
    if learned is not None and isinstance(env, MatrixGame):
        record["game"] = learned.to_json(env.payoff)
    env.close()
    if args.json:
        print(json.dumps(record))
        return
    won = f", win rate {stats['win_rate']:.2f}" if "win_rate" in stats else ""
    print(
        f"{folder} ({args.checkpoint}, {t_env} steps): return {stats['return_mean']:.2f} "
        f"+- {stats['return_std']:.2f} over {args.episodes} greedy episodes of {stats['ep_length_mean']:.1f} steps{won}"
    )
    for path in record.get("replays", []):
        print(f"  written: {path}")
    if learned is not None and isinstance(env, MatrixGame):
        print(f"  {verdict(learned, env.payoff)}")
        print("\n".join("    " + line for line in game_text(learned, env.payoff).splitlines()))
