"""Run cases, and show what came out as JSON, as lines of text, or as a markdown table."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from fastmix.experiments.bench.cases import Case
from fastmix.testing.bench import environment, interleaved, speedup

ORDER: Final = ("eager", "compile", "gru", "cell", "products")
"""Columns of a table, those that have an entry."""


@dataclass(frozen=True)
class Effort:
    """How long to measure each case."""

    rounds: int = 31
    warmup: int = 2
    min_time: float = 0.002
    """seconds a contestant runs in a round at least"""
    max_time: float = 8.0
    """seconds a case takes at most, warm-up, compilation and the comparison with the reference apart"""


@dataclass(frozen=True)
class Planned:
    """A case to build and run, and the least ratio (contestant's time over ours) that is asked of it."""

    build: Callable[[], Case]
    goals: Mapping[str, float] = field(default_factory=dict)


def run(plan: Iterable[Planned], effort: Effort) -> list[dict[str, Any]]:
    """Build, check and time the cases one after another; progress goes to standard error."""
    results = []
    for planned in plan:
        case = planned.build()
        print(case.name, end=" ", file=sys.stderr, flush=True)
        result = measure(case, effort, planned.goals)
        ratios = " ".join(f"{name} {ratio:.2f}x" for name, ratio in result["ratios"].items())
        print(ratios if result["parity"]["passed"] else "DIFFERS FROM THE REFERENCE", file=sys.stderr, flush=True)
        results.append(result)
    return results


def measure(case: Case, effort: Effort, goals: Mapping[str, float]) -> dict[str, Any]:
    """One entry of a report. Without agreement with the reference there are no timings in it."""
    error = case.error()
    passed = error <= case.tolerance  # False for NaN
    timings = {}
    if passed:
        timings = interleaved(case.contestants, effort.rounds, effort.warmup, effort.min_time, effort.max_time)
    ratios = {name: speedup(timing, timings["ours"]) for name, timing in timings.items() if name != "ours"}
    return {
        "op": case.op,
        "phase": case.phase,
        "shape": case.shape,
        "sizes": dict(case.sizes),
        "note": case.note,
        "parity": {"error": error, "tolerance": case.tolerance, "passed": passed},
        "contestants": {name: timing.as_milliseconds() for name, timing in timings.items()},
        "ratios": {name: round(ratio, 3) for name, ratio in ratios.items()},
        **judge(ratios, goals),
    }


def judge(ratios: Mapping[str, float], goals: Mapping[str, float]) -> dict[str, Any]:
    """``goals``, and whether all of them are met (None where there are none)."""
    relevant = {name: goal for name, goal in goals.items() if name in ratios or not ratios}
    met = all(name in ratios and ratios[name] >= goal for name, goal in relevant.items())
    return {"goals": relevant, "met": met if relevant else None}


def report(results: list[dict[str, Any]], dtype: str) -> dict[str, Any]:
    """The whole of a measurement: where it ran, and its results."""
    return {"environment": environment(), "dtype": dtype, "results": results}


def all_agree(results: Iterable[dict[str, Any]]) -> bool:
    """Every case agreed with the reference."""
    return all(result["parity"]["passed"] for result in results)


def text(content: dict[str, Any]) -> str:
    """A few lines for the terminal."""
    lines = [_where(content)]
    for result in content["results"]:
        sizes = ", ".join(f"{key} {value}" for key, value in result["sizes"].items())
        lines += ["", f"{result['op']} {result['phase']}, {result['shape']} ({sizes})"]
        if not result["parity"]["passed"]:
            lines.append(f"  not timed: differs from the reference by {result['parity']['error']:.2e}")
        for name, timing in result["contestants"].items():
            ratio = f"  {result['ratios'][name]:.2f} x ours" if name in result["ratios"] else ""
            spread = f"({timing['p20_ms']:g} to {timing['p80_ms']:g}, {timing['n']} rounds)"
            lines.append(f"  {name:<9} {timing['median_ms']:>9.4g} ms {spread}{ratio}")
        for name, memory in result.get("memory", {}).items():
            lines.append(
                f"  {name:<9} peak {_mib(memory['peak_bytes'])}, kept for backward {_mib(memory['saved_bytes'])}"
            )
        if result["note"]:
            lines.append(f"  {result['note']}")
    return "\n".join(lines)


def markdown(content: dict[str, Any]) -> str:
    """One table for each op and phase: our time, and every contestant's time with its ratio to ours."""
    lines = [_where(content), ""]
    lines += [
        "Median milliseconds; in brackets how many times longer than ours (median of the ratios within each round).",
        "Goal: the least ratio asked for; a goal below 1 allows ours to take longer.",
    ]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for result in content["results"]:
        groups.setdefault((result["op"], result["phase"]), []).append(result)
    for (op, phase), group in groups.items():
        lines += ["", f"### {op}, {phase}", "", *_table(group)]
        lines += [f"\n{note}" for note in sorted({result["note"] for result in group if result["note"]})]
    return "\n".join(lines) + "\n"


def _table(group: Sequence[dict[str, Any]]) -> list[str]:
    names = [name for name in ORDER if any(name in result["ratios"] for result in group)]
    header = ["shape", *group[0]["sizes"], "ours", *names, "goal", "met"]
    rows = [header, ["---"] * len(header)]
    for result in group:
        cells = [result["shape"], *(f"{value:,}" for value in result["sizes"].values())]
        if result["parity"]["passed"]:
            cells += [_amount(result, "ours"), *(_compared(result, name) for name in names)]
        else:
            cells += ["differs from the reference", *("" for _ in names)]
        goals = ", ".join(f"{name} {goal:g}x" for name, goal in result["goals"].items())
        rows.append([*cells, goals, {True: "yes", False: "**no**", None: ""}[result["met"]]])
    return ["| " + " | ".join(row) + " |" for row in rows]


def _compared(result: dict[str, Any], name: str) -> str:
    return f"{_amount(result, name)} ({result['ratios'][name]:.2f}x)" if name in result["ratios"] else ""


def _amount(result: dict[str, Any], name: str) -> str:
    if "memory" in result:
        return _mib(result["memory"][name]["peak_bytes"])
    return f"{result['contestants'][name]['median_ms']:.3g}"


def _mib(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 2**20:.1f} MiB"


def _where(content: dict[str, Any]) -> str:
    e = content["environment"]
    threads = f"{e['threads']} thread{'s' if e['threads'] > 1 else ''}"
    core = f"core {e['core']['isa']}" if e["core"] else "no compiled core"
    return f"{e['cpu']}, {threads}, {content['dtype']}, torch {e['torch']}, fastmix {e['fastmix']}, {core}"
