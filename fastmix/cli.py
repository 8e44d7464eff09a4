"""The command line: ``fastmix train | evaluate | reproduce | report | bench | profile | doctor``.

Each command is a module with ``add_arguments(parser)`` and ``run(args) -> int``, imported only when it is the one asked
for: ``fastmix --help`` loads neither torch nor anything that needs it.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
from collections.abc import Sequence
from typing import Final

from fastmix import __version__

# command -> (module, help)
COMMANDS: Final[dict[str, tuple[str, str]]] = {
    "train": ("fastmix.experiments.train", "train an algorithm on an environment, one seed or several"),
    "evaluate": ("fastmix.experiments.evaluate", "play greedy episodes with what a run has learnt"),
    "reproduce": (
        "fastmix.experiments.reproduce",
        "run a table or figure of the papers and print ours beside theirs",
    ),
    "report": ("fastmix.experiments.report", "learning curves and a table of runs, over their seeds"),
    "bench": ("fastmix.experiments.bench", "time a learner step against the same step written the public way"),
    "profile": ("fastmix.experiments.profile", "where a learner step, or a function of yours, spends its time"),
    "doctor": ("fastmix.doctor", "what is installed, what works, and the command that mends the rest"),
}
EPILOG: Final = """\
examples:
  fastmix train --algo qmix --env matrix:resq1 --seeds 5
  fastmix train --algo vdn --env matrix:@payoff.json --lr 5e-4 --t-max 40000
  fastmix train --resume runs/matrix-resq1/qmix/run-1
  fastmix evaluate runs/matrix-resq1/qmix/run-1 --checkpoint best
  fastmix reproduce matrix1
  fastmix reproduce prey --algos qmix powqmix --punishments 0 -2 --seeds 2 --steps 1000000
  fastmix report runs/prey-p-2

fastmix <command> --help lists a command's options."""

# What a user can mend: printed as one sentence. Anything else is a bug of ours and keeps its traceback.
USER_ERRORS: Final = (ValueError, FileNotFoundError, ImportError, MemoryError, FloatingPointError)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0 done, 1 failed, 2 wrong arguments, 130 stopped."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(
        prog="fastmix",
        description="Value-factorisation multi-agent reinforcement learning with fused kernels.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"fastmix {__version__}")
    parser.add_argument("--debug", action="store_true", help="log more, and show tracebacks of wrong settings")
    subparsers = parser.add_subparsers(dest="command", metavar="command", title="commands")
    asked_for = next((word for word in argv if not word.startswith("-")), None)
    module = None
    for name, (path, text) in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=text, allow_abbrev=False)
        if name == asked_for:
            module = importlib.import_module(path)
            module.add_arguments(subparser)
    args = parser.parse_args(argv)
    if module is None:
        parser.print_help()
        return 2
    logging.basicConfig(format="%(name)s: %(message)s")
    logging.getLogger("fastmix").setLevel(logging.DEBUG if args.debug else logging.WARNING)
    try:
        status: int = module.run(args)
    except KeyboardInterrupt as stopped:
        print(f"\nfastmix {args.command}: {str(stopped) or 'stopped'}", file=sys.stderr)
        return 130
    except USER_ERRORS as error:
        if args.debug:
            raise
        print(f"fastmix {args.command}: {error}", file=sys.stderr)
        return 2 if isinstance(error, (ValueError, FileNotFoundError)) else 1
    return status


if __name__ == "__main__":
    sys.exit(main())
