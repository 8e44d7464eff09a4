"""``fastmix bench``: how fast this machine runs fastmix, and how fast the same computations the public way.

``step`` times one learner step, ``ops`` single operators, ``table`` everything that fastmix sets a goal for. All
contestants run interleaved in one process; a case whose numbers do not agree with the reference is not timed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastmix.testing.shapes import SHAPES

OPS = ("monotonic", "recurrent", "returns", "select", "td_loss")
DTYPES = {"float32": torch.float32, "float64": torch.float64}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommands ``step``, ``ops`` and ``table`` with their options."""
    commands = parser.add_subparsers(dest="bench_command", metavar="WHAT", required=True)
    _add_step(commands.add_parser("step", help="one learner step against the same step the public way"))
    _add_ops(commands.add_parser("ops", help="single operators against plain PyTorch"))
    _add_table(commands.add_parser("table", help="every speed that fastmix sets a goal for, within about ten minutes"))


def run(args: argparse.Namespace) -> int:
    """Measure and print; 1 when something did not agree with the reference.

    Raises:
        ValueError: arguments that do not fit together.
        ImportError: this installation has no baselines to measure against.
    """
    from fastmix.experiments.bench import report

    previous = torch.get_num_threads()
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        measure: Callable[[argparse.Namespace], list[dict[str, Any]]] = args.bench
        content = report.report(measure(args), args.dtype)
    finally:
        torch.set_num_threads(previous)
    if args.json != "-" and args.markdown != "-":
        print(report.text(content))
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
        "--baseline", type=_names, default=("eager",), help="what to compare with: eager, compile or eager,compile"
    )
    _add_common(parser, _measure_step)


def _add_ops(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--op", action="append", choices=OPS, help="operator; may be repeated (default: all)")
    parser.add_argument("--shape", action="append", choices=list(SHAPES), help="sizes; may be repeated (default: all)")
    parser.add_argument(
        "--rows", action="append", type=_positive, help="rows of monotonic and of an acting step (default: 1920, 15360)"
    )
    parser.add_argument("--forward", action="store_true", help="forward without gradients instead of a training pass")
    parser.add_argument("--acting", action="store_true", help="recurrent: single acting steps of --rows rows")
    parser.add_argument(
        "--baseline", type=_names, default=("eager", "compile"), help="eager or eager,compile (default: both)"
    )
    _add_common(parser, _measure_ops)


def _add_table(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--baseline", type=_names, default=("eager", "compile"), help="eager or eager,compile")
    parser.add_argument("--markdown", metavar="FILE", help="write the tables as markdown; - prints them")
    _add_common(parser, _measure_table)
    parser.set_defaults(threads=2, dtype="float32")


def _add_common(parser: argparse.ArgumentParser, measure: Callable[[argparse.Namespace], list[dict[str, Any]]]) -> None:
    parser.add_argument("--threads", type=_positive, help="threads of torch and of fastmix (default: torch's choice)")
    parser.add_argument("--rounds", type=_positive, default=31, help="rounds to measure at most (default: 31)")
    parser.add_argument(
        "--seconds", type=float, default=8.0, help="seconds a case is measured for at most (default: 8)"
    )
    parser.add_argument("--json", metavar="FILE", help="write the measurements as JSON; - prints them")
    if measure is not _measure_table:  # the goals of the table are for float32
        parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    parser.set_defaults(bench=measure, markdown=None)


def _measure_step(args: argparse.Namespace) -> list[dict[str, Any]]:
    from fastmix.experiments.bench import report, steps

    build = partial(
        steps.step, args.algo, args.shape, args.batch, args.steps, args.baseline, args.preset, DTYPES[args.dtype]
    )
    return report.run([report.Planned(build)], _effort(args))


def _measure_ops(args: argparse.Namespace) -> list[dict[str, Any]]:
    from fastmix.experiments.bench import report

    return report.run(_planned_ops(args), _effort(args))


def _measure_table(args: argparse.Namespace) -> list[dict[str, Any]]:
    from fastmix.experiments.bench import table

    return table.run(_effort(args), args.threads, "compile" in args.baseline)


def _planned_ops(args: argparse.Namespace) -> Iterator[Any]:
    from fastmix.experiments.bench import cases
    from fastmix.experiments.bench.report import Planned

    shapes, dtype, train = args.shape or list(SHAPES), DTYPES[args.dtype], not args.forward
    compiled = "compile" in args.baseline
    for op in args.op or OPS:
        for shape in shapes:
            sizes = SHAPES[shape]
            if op == "monotonic":
                for rows in args.rows or (1_920, 15_360):
                    yield Planned(partial(cases.monotonic, shape, rows, train, dtype, compiled))
            elif op == "recurrent" and args.acting:
                for rows in args.rows or (3, 8, 27, 64, 128, 512):
                    yield Planned(partial(cases.acting, shape, rows, dtype))
            elif op == "recurrent":
                yield Planned(partial(cases.recurrent, shape, train, dtype, compiled))
            elif op == "returns":
                yield Planned(partial(cases.returns, sizes.batch_size, sizes.steps, dtype))
            elif op == "select":
                batch = (sizes.batch_size, sizes.steps, sizes.n_agents, sizes.n_actions)
                yield Planned(partial(cases.select, *batch, train, dtype))
            else:
                yield Planned(partial(cases.td_loss, sizes.batch_size, sizes.steps, dtype))


def _effort(args: argparse.Namespace) -> Any:
    from fastmix.experiments.bench.report import Effort

    return Effort(rounds=args.rounds, max_time=args.seconds)


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


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name for name in text.split(",") if name)
    if not set(names) <= {"eager", "compile"}:
        raise argparse.ArgumentTypeError(f"must be eager, compile or eager,compile, got {text!r}")
    return names
