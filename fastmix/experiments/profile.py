"""``fastmix profile``: where a learner step goes, part by part; or any function of yours."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import inspect
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

# The profiler's library announces its starts and stops unless this was set before torch came in.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")

import torch

from fastmix.algorithms import Algorithm, EpisodeBatch, Scheme, make
from fastmix.experiments.bench import steps
from fastmix.testing.bench import cpu_name, environment
from fastmix.testing.profiler import Profile, part, profile, profile_together, summary, table
from fastmix.testing.profiler.measure import Function, check_device
from fastmix.testing.shapes import SHAPES
from fastmix.train.learner import Delivery, Learner
from fastmix.train.rollout import Player

STEP_OPTIONS: Final = {"algo": "qmix", "preset": "pymarl2", "shape": "3m"}  # with their defaults
EPSILON: Final = 0.05  # of the acting that is profiled: exploring costs something too
REPLAY: Final = "graph replay"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``fastmix profile``."""
    parser.description = (
        "Print what one learner step needs: operator dispatches, host time, kernels, synchronisations and memory, by "
        "part. docs/profiling.md says what each number means."
    )
    step = parser.add_argument_group("a learner step")
    step.add_argument("--algo", metavar="NAME", help="algorithm (default: qmix)")
    step.add_argument("--preset", metavar="NAME", help="hyper-parameters: pymarl, pymarl2 (default) or epymarl")
    step.add_argument("--shape", choices=list(SHAPES), help="sizes of the environment (default: 3m)")
    step.add_argument("--batch-size", type=int, metavar="N", help="episodes (default: usual for the shape)")
    step.add_argument("--steps", type=int, metavar="N", help="transitions of the longest episode (default: by shape)")
    step.add_argument("--against", choices=("public",), help="profile the same step written the public way as well")
    step.add_argument(
        "--graphs", action="store_true", help="profile the step replayed as a CUDA graph as well (--device cuda)"
    )
    parser.add_argument(
        "--function",
        metavar="MODULE:NAME",
        help="instead of a learner step: a function of yours, called without arguments; if it returns something that "
        "can be called, that is what is profiled. Modules in the current folder are found",
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="(default: cpu; with --function what the function made use of)"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")
    parser.add_argument("--rounds", type=int, default=25, metavar="N", help="timed calls at most (default: 25)")
    parser.add_argument("--json", metavar="FILE", help="write the measurements as JSON; - prints them and nothing else")
    parser.add_argument(
        "--trace", type=Path, metavar="FILE", help="write a Chrome trace for ui.perfetto.dev (.json or .json.gz)"
    )


def run(args: argparse.Namespace) -> int:
    """Profile, print, write.

    Raises:
        ValueError: settings that cannot be, or do not fit together.
        RuntimeError: the user's function failed.
    """
    for name in ("batch_size", "steps", "threads", "rounds"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
    check_device(args.device)
    threads = torch.get_num_threads()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    try:
        lines, content = _profile_step(args) if args.function is None else _profile_function(args)
    finally:
        torch.set_num_threads(threads)
    as_json = json.dumps(content, indent=2)
    if args.json == "-":
        print(as_json)
        return 0
    if args.json is not None:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        Path(args.json).write_text(as_json + "\n", encoding="utf-8")
        lines.append(f"measurements are in {args.json}")
    if args.trace is not None:
        lines.append(f"the trace is in {args.trace}; ui.perfetto.dev shows it")
    print("\n".join(lines))
    return 0


def load_function(name: str) -> Function:
    """What ``module:name`` names: a function without arguments, or what it returns if that can be called.

    The function is called once to find out, and the current folder is searched for the module too.

    Raises:
        ValueError: no such module or name, or nothing that can be called without arguments.
        RuntimeError: the function failed.
    """
    module_name, colon, path = name.partition(":")
    if not (module_name and colon and path):
        raise ValueError(f"--function is {name!r}; it must be MODULE:NAME, as in mypackage.learner:step")
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there, and what it imports is not
        raise ValueError(f"--function is {name!r}, and there is no module {error.name!r} here or installed") from error
    for attribute in path.split("."):
        if not hasattr(found, attribute):
            raise ValueError(f"--function is {name!r}, and {attribute!r} is not in {module_name}")
        found = getattr(found, attribute)
    _check_callable(name, found)
    function = _guarded(name, found)
    made = function()
    if not callable(made):
        return function
    _check_callable(f"{name}()", made)
    return _guarded(f"what {name} returned", made)


def learner_step(algo: Algorithm, batch: EpisodeBatch, *, graphs: bool = False) -> Function:
    """One training step of ``algo`` on ``batch``, on CUDA with ``graphs`` as the replay of a graph."""
    learner, ready = Learner(algo, graphs=graphs), Delivery("batch", lambda: batch)
    return lambda: learner.step(ready)


def public_step(algo: Algorithm, batch: EpisodeBatch) -> Function:
    """The same step written the public way, from the same weights, with the same names of its parts.

    Raises:
        ValueError: the baselines do not know a setting of ``algo``.
    """
    learner = steps.public_learner(algo, algo.scheme)
    # What each method of the public learner is a part of; the loss is what no other part claims of its method.
    methods = {"_unroll": "unrolls", "_targets": "targets", "_returns": "targets", "_update": "optimiser"}
    for name, part_name in (methods | {"loss": "loss"}).items():
        setattr(learner, name, _named(part_name, getattr(learner, name)))
    for name, call in learner.calls.items():
        if not name.endswith("agent"):
            learner.calls[name] = _named("mixer", call)
    episodes = steps.public_batch(batch, algo.scheme.n_actions)
    return lambda: learner.step(episodes)


def acting_step(algo: Algorithm) -> Function:
    """One joint action of all agents in ``batch_size_run`` environments, which themselves do nothing."""
    n, s = algo.config.batch_size_run, algo.scheme
    env: Any = SimpleNamespace(
        n_envs=n,
        info=s,
        obs=torch.randn(n, s.n_agents, s.obs_dim).numpy(),
        avail=torch.ones(n, s.n_agents, s.n_actions, dtype=torch.bool).numpy(),
        reward=0.0,
        step=lambda actions: None,
    )
    player = Player(env, algo, algo.device)
    generator = torch.Generator(device=algo.device).manual_seed(0)
    return lambda: player.play(EPSILON, generator)


def _profile_step(args: argparse.Namespace) -> tuple[list[str], dict[str, Any]]:
    """What to print, and what to write."""
    algo_name, preset, shape = (getattr(args, name) or default for name, default in STEP_OPTIONS.items())
    device = args.device or "cpu"
    if args.graphs and device != "cuda":
        raise ValueError(f"--graphs needs --device cuda, got {device}")
    sizes = SHAPES[shape]
    episodes, length = args.batch_size or sizes.batch_size, args.steps or sizes.steps
    scheme = Scheme(sizes.n_agents, sizes.n_actions, sizes.obs_dim, sizes.state_dim, length)
    build = functools.partial(make, algo_name, scheme, preset=preset, device=device)
    algo, batch = build(), steps.random_batch(scheme, episodes).to(device)
    functions = {"ours": learner_step(algo, batch)}
    if args.graphs:
        functions["replay"] = learner_step(build(), batch, graphs=True)
    if args.against:
        functions["public"] = public_step(algo, batch)

    profiles = profile_together(functions, rounds=args.rounds, device=device, trace=args.trace)
    if args.graphs:  # a replay is one call of CUDA, in which no part has a name
        replay = profiles["replay"]
        renamed = (dataclasses.replace(p, name=REPLAY) if p.name == "other" else p for p in replay.parts)
        profiles["replay"] = dataclasses.replace(replay, parts=tuple(renamed))
    acting = profile(acting_step(algo), rounds=args.rounds, device=device)

    title = f"{algo_name} ({preset}), {shape}: one step on {episodes} episodes of {length} transitions"
    lines = [title, _where(device), "", table(profiles)]
    for name, found in profiles.items():
        lines += ["", *(f"{name}: {line}" if len(profiles) > 1 else line for line in summary(found))]
    if args.graphs:
        lines.append("parts are those of the step without a graph: what a replay runs has no names")
    lines.append(_acting_text(acting, profiles["replay" if args.graphs else "ours"], algo, length))
    setting = {"algo": algo_name, "preset": preset, "shape": shape, "episodes": episodes, "steps": length}
    return lines, _content(setting, device, profiles | {"acting": acting})


def _profile_function(args: argparse.Namespace) -> tuple[list[str], dict[str, Any]]:
    for name in (*STEP_OPTIONS, "batch_size", "steps", "against", "graphs"):
        if getattr(args, name):
            raise ValueError(f"--{name.replace('_', '-')} cannot be given with --function")
    function = load_function(args.function)
    found = profile(function, rounds=args.rounds, device=args.device, trace=args.trace)
    lines = [args.function, _where(found.device), "", str(found)]
    return lines, _content({"function": args.function}, found.device, {"function": found})


def _acting_text(acting: Profile, step: Profile, algo: Algorithm, length: int) -> str:
    """One acting step, and what all those add up to that come with one learner step."""
    together = length * acting.wall.median
    share = together / (together + step.wall.median)
    n, total = algo.config.batch_size_run, acting.total
    return (
        f"acting in {n} environment{'s' * (n > 1)}: {total.dispatches} dispatches and {total.views} views,"
        f" {1e3 * acting.wall.median:.3f} ms a step; with {length} for every learner step {100 * share:.1f} % of both"
    )


def _content(setting: dict[str, Any], device: str, profiles: Mapping[str, Profile]) -> dict[str, Any]:
    """Everything, as JSON values."""
    found = {name: profile.to_json() for name, profile in profiles.items()}
    return {"environment": environment(device), **setting, "profiles": found}


def _where(device: str) -> str:
    name = torch.cuda.get_device_name() if device == "cuda" else cpu_name()
    threads = torch.get_num_threads()
    return f"{name}, {threads} CPU thread{'s' * (threads > 1)}, torch {torch.__version__}"


def _named(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` as the part ``name``."""

    def call(*args: Any) -> Any:
        with part(name):
            return function(*args)

    return call


def _check_callable(name: str, found: Any) -> None:
    if not callable(found):
        raise ValueError(f"--function must name something to call, and {name} is of type {type(found).__name__}")
    try:
        signature = inspect.signature(found)
    except ValueError:
        return  # compiled code that does not tell
    try:
        signature.bind()
    except TypeError:
        raise ValueError(f"--function must be callable without arguments, and {name} takes {signature}") from None


def _guarded(name: str, function: Callable[[], Any]) -> Callable[[], Any]:
    """``function``, whose errors are bugs to be shown with their traceback and not settings to be mended."""

    def call() -> Any:
        try:
            return function()
        except Exception as error:
            raise RuntimeError(f"{name} failed: {error!r}") from error

    return call
