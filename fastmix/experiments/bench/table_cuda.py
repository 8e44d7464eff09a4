"""The table of all speeds that fastmix sets out to reach on a CUDA device, with the least ratio asked of each.

Parts can be measured in runs of their own and joined: compiling takes most of the time, and a fault on the device ends
a process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Final

import torch

from fastmix.experiments.bench import cases, steps
from fastmix.experiments.bench.cases import Setting
from fastmix.experiments.bench.report import Planned

HIGH: Final = Setting("cuda", precision="high")
HIGHEST: Final = Setting("cuda")
BFLOAT16: Final = Setting("cuda", precision="high", autocast=torch.bfloat16)

_MIXED: Final = (("5m_vs_6m", 15_360), ("MMM2", 15_360), ("5m_vs_6m", 61_440), ("MMM2", 61_440))
"""Sizes of `monotonic` that have goals."""
_UNROLLED: Final = tuple((episodes, steps) for steps in (60, 120) for episodes in (32, 64, 128, 256))
"""Episodes of ten agents, and steps, of `recurrent`: 320 to 2,560 rows."""
_GOAL_STEPS: Final = ("5m_vs_6m", "MMM2")
_STEPS: Final = (*_GOAL_STEPS, "3m")
_HALF: Final = 0.5
"""Ours may take twice the floor."""


def plan(
    parts: Sequence[str], shapes: Sequence[str] = (), precision: str | None = None, goals: bool = False
) -> Iterator[Planned]:
    """The cases of these ``parts``, in the order given.

    Args:
        parts: names of parts.
        shapes: if any, only these; what has no such shape stays.
        precision: if given, only this; what has no products stays.
        goals: only what has goals.
    """
    for part in parts:
        for planned in _PARTS[part]():
            shape = planned.given("shape")
            unwanted = shape is not None and (
                (shapes and shape not in shapes) or (precision and planned.given("setting").name != precision)
            )
            if not unwanted and (planned.goals or not goals):
                yield planned


def _monotonic() -> Iterator[Planned]:
    for train in (True, False):
        for shape, rows in _MIXED:
            goals = {"eager": 6.0, "eager graph": 6.0, "floor": _HALF} if train else {"floor": _HALF}
            yield Planned(partial(cases.monotonic, shape, rows, train, HIGH, ()), goals)
    for setting in (HIGHEST, BFLOAT16):
        for train in (True, False):
            for shape, rows in _MIXED:
                yield Planned(partial(cases.monotonic, shape, rows, train, setting, ()))
    for train in (True, False):
        for shape, rows in (("5m_vs_6m", 1_920), ("MMM2", 1_920), ("3m", 15_360), ("27m_vs_30m", 15_360)):
            yield Planned(partial(cases.monotonic, shape, rows, train, HIGH, ()))


def _recurrent() -> Iterator[Planned]:
    for setting in (HIGH, HIGHEST):
        for train in (True, False):
            for episodes, length in _UNROLLED:
                least = 4.0 if episodes == 256 else 8.0
                build = partial(cases.recurrent, "MMM2", train, setting, (), episodes, length, False)
                yield Planned(build, {"gru": least, "gru graph": least})


def _step() -> Iterator[Planned]:
    for setting in (HIGH, HIGHEST):
        for shape in _STEPS:
            goals = {"eager": 20.0} if shape in _GOAL_STEPS else {}
            yield Planned(partial(steps.step, "qmix", shape, *_batch(shape), ("eager",), setting=setting), goals)


def _small() -> Iterator[Planned]:
    """61,440 rows of transitions, and a batch of the usual size."""
    for episodes, length in ((512, 120), (32, 60)):
        goals = {"floor": _HALF} if episodes == 512 else {}
        recursion = {"eager": 50.0} if episodes == 512 else {}
        yield Planned(partial(cases.returns, episodes, length, HIGHEST), goals | recursion)
        for agents, actions in ((10, 18), (5, 12)):
            sizes = (episodes, length, agents, actions)
            yield Planned(partial(cases.select, *sizes, False, HIGHEST), goals)
            yield Planned(partial(cases.select, *sizes, True, HIGHEST), goals)
        yield Planned(partial(cases.td_loss, episodes, length, HIGHEST), goals)
    for n in (8, 32):
        yield Planned(partial(cases.quantile, 128, 120, n, HIGHEST), {"eager": 10.0})


def _compile() -> Iterator[Planned]:
    for shape in _GOAL_STEPS:
        yield _compiled_step(shape, "compile", {"compile": 3.0})
    for shape, rows in _MIXED:
        yield Planned(partial(cases.monotonic, shape, rows, True, HIGH, ("compile",)), {"compile graph": 2.5})
    yield Planned(partial(cases.recurrent, "MMM2", True, HIGH, ("compile",), 32, 60))
    for n in (8, 32):
        yield Planned(partial(cases.quantile, 128, 120, n, HIGHEST, ("compile",)), {"compile": 3.0})
    yield _compiled_step("3m", "compile")


def _autotune() -> Iterator[Planned]:
    for shape, rows in _MIXED:
        yield Planned(partial(cases.monotonic, shape, rows, True, HIGH, ("autotune",)), {"autotune graph": 2.5})
    for shape in _GOAL_STEPS:
        yield _compiled_step(shape, "autotune", {"autotune": 3.0})


def _whole() -> Iterator[Planned]:
    yield _compiled_step("5m_vs_6m", steps.WHOLE)


def _compiled_step(shape: str, how: str, goals: Mapping[str, float] | None = None) -> Planned:
    return Planned(partial(steps.step, "qmix", shape, *_batch(shape), (how,), setting=HIGH), goals or {})


def _batch(shape: str) -> tuple[int, int]:
    """Episodes and transitions of the steps that have goals."""
    return (128, 120) if shape == "MMM2" else (32, 60)


_PARTS: Final[dict[str, Callable[[], Iterator[Planned]]]] = {
    "monotonic": _monotonic,
    "recurrent": _recurrent,
    "step": _step,
    "small": _small,
    "compile": _compile,
    "autotune": _autotune,
    "whole": _whole,
}
