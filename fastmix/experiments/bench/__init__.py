"""``fastmix bench``: how fast this machine runs fastmix, and how fast the same computations the public way.

``step`` times one learner step, ``ops`` single operators, ``table`` everything that fastmix sets a goal for, each on
the CPU or on a CUDA device; ``warm`` fills the caches of what a table compiles, ``join`` makes one report of several
runs, ``env`` times rollouts and whole training on an environment. All contestants run interleaved in one process; a
case whose numbers do not agree with the reference is not timed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from fastmix.testing.shapes import SHAPES

JOINT = ("duplex", "attention", "recognise", "unrestricted")
OPS = ("monotonic", *JOINT, "quantile", "quantile_mix", "recurrent", "returns", "select", "td_loss")
DTYPES = {"float32": torch.float32, "float64": torch.float64}
AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}
BASELINES = ("eager", "compile", "autotune", "whole")
PARTS = ("monotonic", "recurrent", "step", "small", "compile", "autotune")
"""of the table on a CUDA device, what matters most first"""
LONG_PARTS = ("whole",)
"""which are measured only where they are asked for"""
PRECISIONS = ("highest", "high")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommands ``step``, ``ops``, ``table``, ``warm``, ``join`` and ``env`` with their options."""
    commands = parser.add_subparsers(dest="bench_command", metavar="WHAT", required=True)
    _add_step(commands.add_parser("step", help="one learner step against the same step the public way"))
    _add_ops(commands.add_parser("ops", help="single operators against plain PyTorch"))
    _add_table(commands.add_parser("table", help="every speed that fastmix sets a goal for, within about 15 minutes"))
    _add_warm(commands.add_parser("warm", help="compile on a CUDA device what the table compiles, without timing it"))
    _add_join(commands.add_parser("join", help="one report of several, written by --json on one machine"))
    _add_env(commands.add_parser("env", help="rollouts and whole training on an environment"))


def run(args: argparse.Namespace) -> int:
    """Measure and print; 1 when something did not agree with the reference.

    Raises:
        ValueError: arguments that do not fit together.
        ImportError: this installation has no baselines to measure against.
    """
    previous = torch.get_num_threads()
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        bench: Callable[[argparse.Namespace], int] = args.bench
        return bench(args)
    finally:
        torch.set_num_threads(previous)


def _shown(measure: Callable[[argparse.Namespace], dict[str, Any]], args: argparse.Namespace) -> int:
    from fastmix.experiments.bench import report

    content = measure(args)
    if args.json != "-" and args.markdown != "-":
        print(report.brief(content) if args.brief else report.text(content))
    _write(args.json, json.dumps(content, indent=2) + "\n")
    _write(args.markdown, report.markdown(content))
    return 0 if report.all_agree(content["results"]) else 1


def _add_step(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--algo", default="qmix", help="algorithm (default: qmix)")
    parser.add_argument("--preset", default="pymarl2", help="hyper-parameters: pymarl or pymarl2 (default)")
    parser.add_argument("--shape", default="3m", choices=list(SHAPES), help="sizes of the environment (default: 3m)")
    parser.add_argument("--batch", type=_positive, help="episodes in the batch (default: usual for the shape)")
    parser.add_argument("--steps", type=_positive, help="transitions of the longest episode (default: by the shape)")
    parser.add_argument(
        "--baseline",
        type=_names,
        default=("eager",),
        help="what to compare with: names of eager, compile, autotune and whole, which takes minutes (default: eager)",
    )
    _add_common(parser, _measure_step)


def _add_ops(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--op", action="append", choices=OPS, help="operator; may be repeated (default: all)")
    parser.add_argument("--shape", action="append", choices=list(SHAPES), help="sizes; may be repeated (default: all)")
    parser.add_argument(
        "--rows",
        action="append",
        type=_positive,
        help="rows of mixers and an acting step (default: 1920, 15360)",
    )
    parser.add_argument("--forward", action="store_true", help="forward without gradients instead of a training pass")
    parser.add_argument("--acting", action="store_true", help="recurrent: single acting steps of --rows rows")
    parser.add_argument(
        "--baseline",
        type=_names,
        default=("eager", "compile"),
        help="names of eager, compile and, of mixers, autotune (default: eager,compile)",
    )
    _add_common(parser, _measure_ops)


def _add_table(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--baseline", type=_names, default=("eager", "compile"), help="eager or eager,compile")
    _add_selection(parser)
    parser.add_argument("--markdown", metavar="FILE", help="write the tables as markdown; - prints them")
    _add_common(parser, _measure_table)
    parser.set_defaults(threads=2, dtype="float32")


def _add_warm(parser: argparse.ArgumentParser) -> None:
    _add_selection(parser)
    parser.add_argument(
        "--share", type=_share, default=(1, 1), metavar="I/N", help="the I-th of N shares (default: 1/1, everything)"
    )
    parser.set_defaults(bench=_warm, threads=None)


def _add_selection(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("which cases (on a CUDA device)")
    parts = (*PARTS, *LONG_PARTS)
    group.add_argument(
        "--part", action="append", choices=parts, help="only this part; may be repeated (default: all but whole)"
    )
    group.add_argument("--shape", action="append", choices=list(SHAPES), help="only this; may be repeated")
    group.add_argument("--precision", choices=PRECISIONS, help="only products in this precision")
    group.add_argument("--goals", action="store_true", help="only cases that have a goal")


def _add_join(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("reports", nargs="+", metavar="FILE", help="reports to join; the first one's contestants count")
    parser.add_argument("--json", metavar="FILE", help="write the joined report as JSON; - prints it")
    parser.add_argument("--markdown", metavar="FILE", help="write the tables as markdown; - prints them")
    parser.add_argument("--brief", action="store_true", help="print one line for each case that has a goal or failed")
    parser.set_defaults(bench=partial(_shown, _join), threads=None)


def _add_env(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="ENV", help="the environment, such as prey:p-2")
    parser.add_argument("--algo", default="qmix", help="algorithm (default: qmix)")
    parser.add_argument("--preset", default="pymarl2", help="hyper-parameters: pymarl or pymarl2 (default)")
    parser.add_argument(
        "--copies", type=_positive, nargs="+", default=(1, 8, 64), metavar="N", help="copies played (default: 1 8 64)"
    )
    parser.add_argument(
        "--threads", dest="thread_counts", type=_positive, nargs="+", metavar="N",
        help="threads of torch and of fastmix (default: 1, and as many as there are CPUs)",
    )  # fmt: skip
    parser.add_argument("--rounds", type=_positive, default=5, help="rounds of training to time (default: 5)")
    parser.add_argument("--seconds", type=float, default=2.0, help="seconds for each number of copies (default: 2)")
    parser.add_argument("--public", action="store_true", help="time the same training the public way beside it")
    parser.add_argument("--json", metavar="FILE", help="write the measurements as JSON; - prints them")
    parser.set_defaults(bench=_env, threads=None)


def _env(args: argparse.Namespace) -> int:
    from fastmix.experiments.bench import envs
    from fastmix.train.config import TrainConfig
    from fastmix.train.sweep import default_workers

    threads = args.thread_counts or sorted({1, default_workers(sys.maxsize)})
    config = TrainConfig(algo=args.algo, env=args.name, preset=args.preset)
    content = envs.measure(config, args.copies, threads, rounds=args.rounds, seconds=args.seconds, public=args.public)
    if args.json != "-":
        print(envs.text(content))
    _write(args.json, json.dumps(content, indent=2) + "\n")
    return 0


def _add_common(parser: argparse.ArgumentParser, measure: Callable[[argparse.Namespace], dict[str, Any]]) -> None:
    parser.add_argument("--threads", type=_positive, help="threads of torch and of fastmix (default: torch's choice)")
    parser.add_argument("--rounds", type=_positive, default=31, help="rounds to measure at most (default: 31)")
    parser.add_argument(
        "--seconds", type=float, default=8.0, help="seconds a case is measured for at most (default: 8)"
    )
    parser.add_argument("--json", metavar="FILE", help="write the measurements as JSON; - prints them")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to measure (default: cpu)")
    parser.add_argument(
        "--ceilings", metavar="FILE", help="with --device cuda: the device's rates, read from there or written there"
    )
    if measure is not _measure_table:  # the goals of the table are for float32
        parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
        parser.add_argument(
            "--precision",
            choices=PRECISIONS,
            default="highest",
            help="of float32 products on a CUDA device (default: highest)",
        )
        parser.add_argument(
            "--autocast", choices=("none", *AUTOCAST), default="none", help="measure under autocast (default: none)"
        )
    parser.set_defaults(bench=partial(_shown, measure), markdown=None, brief=False)


def _measure_step(args: argparse.Namespace) -> dict[str, Any]:
    from fastmix.experiments.bench import report, steps

    build = partial(
        steps.step, args.algo, args.shape, args.batch, args.steps, args.baseline, args.preset, _setting(args)
    )
    return _report(args, lambda effort: report.run([report.Planned(build)], effort))


def _measure_ops(args: argparse.Namespace) -> dict[str, Any]:
    from fastmix.experiments.bench import report

    return _report(args, lambda effort: report.run(_planned_ops(args), effort))


def _measure_table(args: argparse.Namespace) -> dict[str, Any]:
    from fastmix.experiments.bench import report, table

    if args.device == "cpu":
        for name in ("part", "shape", "precision", "goals"):
            if getattr(args, name):
                raise ValueError(f"--{name} needs --device cuda, got {args.device}")
        return _report(args, lambda effort: table.run(effort, args.threads, "compile" in args.baseline))

    def run(effort: Any) -> list[dict[str, Any]]:
        results: list[dict[str, Any]] = []

        def keep(result: dict[str, Any]) -> None:
            """Write what there is, since a limit of time may end this at any moment."""
            results.append(result)
            content = report.report(results, args.dtype, args.device, effort.ceilings)
            _write(None if args.json == "-" else args.json, json.dumps(content, indent=2) + "\n")

        return report.run(_selected(args), effort, keep, tolerant=True)

    return _report(args, run)


def _selected(args: argparse.Namespace) -> Iterator[Any]:
    """What is planned for a CUDA device, as far as the options ask for it."""
    from fastmix.experiments.bench import table_cuda

    return table_cuda.plan(args.part or PARTS, args.shape or (), args.precision, args.goals)


def _warm(args: argparse.Namespace) -> int:
    from fastmix.experiments.bench.warm import share, warm

    if not torch.cuda.is_available():
        raise ValueError("bench warm needs a CUDA device, and this torch sees none")
    index, of = args.share
    warm(share(_selected(args), index - 1, of))
    return 0


def _join(args: argparse.Namespace) -> dict[str, Any]:
    from fastmix.experiments.bench import report

    contents = [json.loads(Path(name).read_text()) for name in args.reports]
    environment = contents[0]["environment"]
    environment["command"] = [content["environment"]["command"] for content in contents]
    results = [result for content in contents for result in content["results"]]
    return {**contents[0], "environment": environment, "results": report.joined(results)}


def _report(args: argparse.Namespace, run: Callable[[Any], list[dict[str, Any]]]) -> dict[str, Any]:
    """What ``run`` measures, with where and how.

    Raises:
        ValueError: a CUDA device is asked for, and there is none.
    """
    from fastmix.experiments.bench import bounds, report

    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device must be cpu, got cuda: this torch sees no CUDA device")
    ceilings = None
    if args.device == "cuda":
        ceilings = bounds.remembered(Path(args.ceilings)) if args.ceilings else bounds.measured()
    effort = report.Effort(rounds=args.rounds, max_time=args.seconds, ceilings=ceilings)
    return report.report(run(effort), args.dtype, args.device, ceilings)


def _setting(args: argparse.Namespace) -> Any:
    from fastmix.experiments.bench.cases import Setting

    return Setting(args.device, DTYPES[args.dtype], args.precision, AUTOCAST.get(args.autocast))


def _planned_ops(args: argparse.Namespace) -> Iterator[Any]:
    from fastmix.experiments.bench import cases, joint
    from fastmix.experiments.bench.report import Planned

    shapes, setting, train = args.shape or list(SHAPES), _setting(args), not args.forward
    compiled = tuple(name for name in cases.COMPILERS if name in args.baseline)
    for op in args.op or OPS:
        for shape in shapes:
            sizes = SHAPES[shape]
            if op in ("monotonic", *JOINT):
                build = getattr(joint if op in JOINT else cases, op)
                for rows in args.rows or (1_920, 15_360):
                    yield Planned(partial(build, shape, rows, train, setting, compiled))
            elif op == "recurrent" and args.acting:
                for rows in args.rows or (3, 8, 27, 64, 128, 512):
                    yield Planned(partial(cases.acting, shape, rows, setting))
            elif op == "recurrent":
                yield Planned(partial(cases.recurrent, shape, train, setting, compiled))
            elif op == "quantile":
                for n in (8, 32):
                    yield Planned(partial(cases.quantile, sizes.batch_size, sizes.steps, n, setting, compiled))
            elif op == "quantile_mix":
                for rows, n in product(args.rows or (1_920, 15_360), (8, 32)):
                    yield Planned(partial(joint.quantile_mix, shape, rows, n, train, setting, compiled))
            elif op == "returns":
                yield Planned(partial(cases.returns, sizes.batch_size, sizes.steps, setting))
            elif op == "select":
                batch = (sizes.batch_size, sizes.steps, sizes.n_agents, sizes.n_actions)
                yield Planned(partial(cases.select, *batch, train, setting))
            else:
                yield Planned(partial(cases.td_loss, sizes.batch_size, sizes.steps, setting))


def _write(target: str | None, content: str) -> None:
    if target == "-":
        sys.stdout.write(content)
    elif target is not None:
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        Path(target).write_text(content)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _share(text: str) -> tuple[int, int]:
    index, slash, of = text.partition("/")
    if not (slash and index.isdecimal() and of.isdecimal() and 1 <= int(index) <= int(of)):
        raise argparse.ArgumentTypeError(f"must be I/N with I from 1 to N, got {text!r}")
    return int(index), int(of)


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name for name in text.split(",") if name)
    if not set(names) <= set(BASELINES):
        raise argparse.ArgumentTypeError(f"must be names of {', '.join(BASELINES)} with commas between, got {text!r}")
    return names
