"""``python -m tests.fuzz --seconds 60``: random problems until the time is over; stops at the first difference.

A failure prints op and seed; ``python -m tests.fuzz --op OP --seed SEED --problems 1`` repeats exactly that one.
"""

from __future__ import annotations

import argparse
import sys
import time

from tests.fuzz import core  # before anything of fastmix: it may replace the compiled core


def main() -> int:
    from fastmix import _core
    from tests.fuzz.problems import PROBLEMS, Draw

    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="stop after this time (default: 60)")
    parser.add_argument("--problems", type=int, default=sys.maxsize, help="stop after this many problems of each op")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first problem (default: 0)")
    parser.add_argument("--op", choices=sorted(PROBLEMS), action="append", help="only this op; may be repeated")
    args = parser.parse_args()

    ops = args.op or list(PROBLEMS)
    print(f"core: {core.FILE or _core.__file__} ({_core.isa()}); ops: {', '.join(ops)}", flush=True)
    end, done = time.monotonic() + args.seconds, 0
    while done < args.problems and time.monotonic() < end:
        for op in ops:
            draw = Draw(args.seed + done)
            try:
                PROBLEMS[op](draw)
            except Exception:
                drawn = ", ".join(f"{name}={value}" for name, value in draw.log.items())
                print(f"FAILED: --op {op} --seed {draw.seed} --problems 1\n  {drawn}", file=sys.stderr, flush=True)
                raise
        done += 1
    print(f"{done} problems of each op agree", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
