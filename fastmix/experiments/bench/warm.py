"""Run cases without timing them, so that what is compiled at run time lies in its cache when they are timed."""

from __future__ import annotations

import sys
from collections.abc import Hashable, Iterable, Iterator

import torch

from fastmix.experiments.bench.cases import first_line
from fastmix.experiments.bench.report import Planned


def warm(plan: Iterable[Planned]) -> None:
    """Every contestant of the cases once; what fails is told on standard error, and will fail again when it is timed.

    Captured ones are left out: they run what the others run.
    """
    for planned in plan:
        try:
            case = planned.build()
            print(case.name, file=sys.stderr, flush=True)
            for name, call in case.contestants.items():
                if not name.endswith(" graph"):
                    with case.setting.applied():
                        call()
            del case
        except Exception as error:
            print(f"FAILED: {type(error).__name__}: {first_line(error)}", file=sys.stderr, flush=True)
    torch.cuda.synchronize()


def share(plan: Iterable[Planned], index: int, of: int) -> Iterator[Planned]:
    """The cases that process ``index`` (from 0) of ``of`` takes: those that compile the same stay together."""
    groups: dict[Hashable, int] = {}
    for planned in plan:
        key = (planned.build.func, *map(planned.given, ("shape", "setting", "compiled", "against")))
        if groups.setdefault(key, len(groups)) % of == index:
            yield planned
