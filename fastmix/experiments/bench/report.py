"""Run cases, and show what came out as JSON, as lines of text, or as a markdown table."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Final

import torch

from fastmix.experiments.bench.bounds import Ceilings
from fastmix.experiments.bench.cases import Case, Setting
from fastmix.testing import bench
from fastmix.testing.bench import Rotating, Timing, environment, graphed, interleaved, speedup

ORDER: Final = (
    *("ours graph", "eager", "eager graph", "compile", "compile graph", "autotune"),
    *("gru", "gru graph", "cell", "cell graph", "products", "products graph", "floor", "empty kernel"),
)
"""Columns of a table, those that have an entry."""

_OURS: Final = ("ours", "ours graph")

_CAPTURED_SECONDS: Final = 5e-4
"""of device time a graph should hold at least, so that its own launch does not show"""


@dataclass(frozen=True)
class Effort:
    """How long to measure each case."""

    rounds: int = 31
    warmup: int = 2
    min_time: float = 0.002
    """seconds a contestant runs in a round at least"""
    max_time: float = 8.0
    """seconds a case takes at most, warm-up, compilation and the comparison with the reference apart"""
    ceilings: Ceilings | None = None
    """of the CUDA device that is measured, for the floors"""


@dataclass(frozen=True)
class Planned:
    """A case to build and run, and the least ratio (contestant's time over ours) that is asked of it."""

    build: Callable[[], Case]
    goals: Mapping[str, float] = field(default_factory=dict)


def run(
    plan: Iterable[Planned],
    effort: Effort,
    note: Callable[[dict[str, Any]], object] = lambda result: None,
    tolerant: bool = False,
) -> list[dict[str, Any]]:
    """Build, check and time the cases one after another; progress goes to standard error.

    Args:
        plan: what to run.
        effort: how long.
        note: called with every result as soon as it is there.
        tolerant: a case that cannot be built or run becomes a result that says why, where it would raise otherwise.
    """
    results = []
    for planned in plan:
        try:
            case = planned.build()
            print(case.name, end=" ", file=sys.stderr, flush=True)
            result = measure(case, effort, planned.goals)
            ratios = " ".join(f"{name} {ratio:.2f}x" for name, ratio in result["ratios"].items())
            print(ratios if result["parity"]["passed"] else "DIFFERS FROM THE REFERENCE", file=sys.stderr, flush=True)
        except Exception as error:
            if not tolerant:
                raise
            result = _failed(planned, error)
            print(f"FAILED: {result['note']}", file=sys.stderr, flush=True)
        results.append(result)
        note(result)
    return results


def measure(case: Case, effort: Effort, goals: Mapping[str, float]) -> dict[str, Any]:
    """One entry of a report. Without agreement with the reference there are no timings in it."""
    device = case.setting.device
    timings: dict[str, Timing] = {}
    costs: dict[str, dict[str, Any]] = {}
    absent = dict(case.absent)
    with case.setting.applied():
        error = case.error()
        passed = error <= case.tolerance  # False for NaN
        if passed:
            contestants = dict(case.contestants)
            if device == "cuda":
                contestants = _on_device(case, absent)
                costs = {name: _costs(contestants[name]) for name in ("ours", "eager") if name in contestants}
            timings = interleaved(
                contestants, effort.rounds, effort.warmup, effort.min_time, effort.max_time, device=device
            )
    ratios = {
        name: speedup(timing, timings[_partner(name, timings)]) for name, timing in timings.items() if name != "ours"
    }
    floors = _floors(case, effort.ceilings) if passed else {}
    for name, seconds in floors.items():
        ratios[name] = seconds / timings["ours graph" if "ours graph" in timings else "ours"].median
    measured = {name: timing.as_milliseconds() | costs.get(name, {}) for name, timing in timings.items()}
    return {
        "op": case.op,
        "phase": case.phase,
        "shape": case.shape,
        "sizes": dict(case.sizes),
        "precision": case.setting.name,
        "note": case.note,
        "parity": {"error": error, "tolerance": case.tolerance, "passed": passed},
        "contestants": measured | {name: {"median_ms": 1e3 * seconds} for name, seconds in floors.items()},
        "absent": absent,
        "ratios": {name: round(ratio, 3) for name, ratio in ratios.items()},
        **judge(ratios, goals),
    }


def joined(results: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Results of one case that were measured in several runs as one: later runs add the contestants they have more."""
    cases: dict[tuple[Any, ...], dict[str, Any]] = {}
    for result in results:
        key = (result["op"], result["phase"], result["shape"], *result["sizes"].items(), result.get("precision"))
        known = cases.setdefault(key, result)
        if known is result:
            continue
        for part in ("contestants", "ratios", "absent"):
            known[part] = {**result.get(part, {}), **known.get(part, {})}
        known["absent"] = {name: why for name, why in known["absent"].items() if name not in known["contestants"]}
        known["note"] = "; ".join(dict.fromkeys(note for note in (known["note"], result["note"]) if note))
        if not result["parity"]["passed"]:
            known["parity"] = result["parity"]
        known |= judge(known["ratios"], {**known["goals"], **result["goals"]})
    return list(cases.values())


def judge(ratios: Mapping[str, float], goals: Mapping[str, float]) -> dict[str, Any]:
    """``goals``, and whether all of them are met (None where there are none)."""
    relevant = {name: goal for name, goal in goals.items() if name in ratios or not ratios}
    met = all(name in ratios and ratios[name] >= goal for name, goal in relevant.items())
    return {"goals": relevant, "met": met if relevant else None}


def report(
    results: list[dict[str, Any]], dtype: str, device: str = "cpu", ceilings: Ceilings | None = None
) -> dict[str, Any]:
    """The whole of a measurement: where it ran, what the device can do at most, and the results."""
    limits = {"ceilings": asdict(ceilings)} if ceilings else {}
    return {"environment": environment(device), "dtype": dtype, **limits, "results": results}


def all_agree(results: Iterable[dict[str, Any]]) -> bool:
    """Every case agreed with the reference."""
    return all(result["parity"]["passed"] for result in results)


def text(content: dict[str, Any]) -> str:
    """A few lines for the terminal."""
    lines = [_where(content)]
    for result in content["results"]:
        sizes = ", ".join(f"{key} {value}" for key, value in result["sizes"].items())
        precision = f", {result['precision']}" if _on_gpu(content) else ""
        lines += ["", f"{result['op']} {result['phase']}, {result['shape']} ({sizes}){precision}"]
        if not result["parity"]["passed"]:
            lines.append(f"  not timed: {_why(result)}")
        for name, timing in result["contestants"].items():
            ratio = f"  {result['ratios'][name]:.2f} x ours" if name in result["ratios"] else ""
            spread = f"({timing['p20_ms']:g} to {timing['p80_ms']:g}, {timing['n']} rounds)" if "n" in timing else ""
            lines.append(f"  {name:<14} {timing['median_ms']:>9.4g} ms {spread}{ratio}")
        for name, memory in result.get("memory", {}).items():
            lines.append(
                f"  {name:<14} peak {_mib(memory['peak_bytes'])}, kept for backward {_mib(memory['saved_bytes'])}"
            )
        lines += [f"  {name:<14} absent: {why}" for name, why in result.get("absent", {}).items()]
        if result["note"]:
            lines.append(f"  {result['note']}")
    return "\n".join(lines)


def brief(content: dict[str, Any]) -> str:
    """One line for each case that has a goal, failed or differs: its ratios beside their goals."""
    lines = [_where(content), ""]
    for result in content["results"]:
        if not result["goals"] and result["parity"]["passed"]:
            continue
        sizes = "x".join(map(str, result["sizes"].values()))
        name = " ".join(filter(None, (result["op"], result["phase"], result["shape"], sizes, result["precision"])))
        if not result["parity"]["passed"]:
            lines.append(f"{name}: {_why(result)}")
            continue
        times = [f"{key} {1e3 * result['contestants'][key]['median_ms']:.4g} us" for key in _OURS if _has(result, key)]
        reached = [
            f"{key} {result['ratios'][key]:.2f}x of {goal:g}" if key in result["ratios"] else f"{key} absent"
            for key, goal in result["goals"].items()
        ]
        verdict = "ok" if result["met"] else "NOT MET"
        lines.append(f"{name}: {', '.join(times)}; {', '.join(reached)}; {verdict}")
    return "\n".join(lines)


def markdown(content: dict[str, Any]) -> str:
    """One table for each op and phase: our time, and every contestant's time with its ratio to ours."""
    lines = [_where(content), ""]
    lines += [
        "Median milliseconds; in brackets how many times longer than ours (median of the ratios within each round).",
        "Goal: the least ratio asked for; a goal below 1 allows ours to take longer.",
    ]
    if _on_gpu(content):
        lines += [
            "Columns in a graph, autotune, floor and empty kernel are compared with ours in a graph, the others with"
            " ours launched call by call; error: ours against the float64 reference, as an RMS ratio.",
        ]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for result in content["results"]:
        groups.setdefault((result["op"], result["phase"]), []).append(result)
    for (op, phase), group in groups.items():
        lines += ["", f"### {op}, {phase}", "", *_table(group, _on_gpu(content))]
        lines += [f"\n{note}" for note in sorted({result["note"] for result in group if result["note"]})]
    return "\n".join(lines) + "\n"


def _table(group: Sequence[dict[str, Any]], gpu: bool) -> list[str]:
    names = [name for name in ORDER if any(name in result["ratios"] for result in group)]
    sizes: dict[str, int] = next((result["sizes"] for result in group if result["sizes"]), {})
    header = ["shape", *sizes, *(["precision", "error"] if gpu else []), "ours", *names, "goal", "met"]
    rows = [header, ["---"] * len(header)]
    for result in group:
        cells = [result["shape"], *(f"{result['sizes'][name]:,}" if result["sizes"] else "" for name in sizes)]
        cells += [result["precision"], f"{result['parity']['error']:.1e}"] if gpu else []
        if result["parity"]["passed"]:
            cells += [_amount(result, "ours"), *(_compared(result, name) for name in names)]
        else:
            cells += [_why(result), *("" for _ in names)]
        goals = ", ".join(f"{name} {goal:g}x" for name, goal in result["goals"].items())
        rows.append([*cells, goals, {True: "yes", False: "**no**", None: ""}[result["met"]]])
    return ["| " + " | ".join(row) + " |" for row in rows]


def _why(result: dict[str, Any]) -> str:
    """The reason of a result without timings."""
    if result["parity"]["tolerance"] is None:
        return f"failed: {result['note']}"
    return f"differs from the reference by {result['parity']['error']:.2e}"


def _compared(result: dict[str, Any], name: str) -> str:
    if name in result.get("absent", {}):
        return "absent"
    return f"{_amount(result, name)} ({result['ratios'][name]:.2f}x)" if name in result["ratios"] else ""


def _amount(result: dict[str, Any], name: str) -> str:
    if "memory" in result:
        return _mib(result["memory"][name]["peak_bytes"])
    return f"{result['contestants'][name]['median_ms']:.3g}"


def _mib(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 2**20:.1f} MiB"


def _where(content: dict[str, Any]) -> str:
    e = content["environment"]
    versions = f"{content['dtype']}, torch {e['torch']}, fastmix {e['fastmix']}"
    core = f"core {e['core']['isa']}" if e["core"] else "no compiled core"
    if not _on_gpu(content):
        threads = f"{e['threads']} thread{'s' if e['threads'] > 1 else ''}"
        return f"{e['cpu']}, {threads}, {versions}, {core}"
    g = e["gpu"]
    lines = [f"{g['name']}, driver {g['driver']}, CUDA {g['cuda']}, cuDNN {g['cudnn']}, {versions}, {core}"]
    if "ceilings" in content:
        c = content["ceilings"]
        lines.append(
            f"Measured ceilings: {c['bandwidth'] / 1e12:.2f} TB/s; products {c['float32'] / 1e12:.0f} (float32),"
            f" {c['tf32'] / 1e12:.0f} (tf32), {c['bfloat16'] / 1e12:.0f} (bfloat16) TFLOP/s;"
            f" an empty kernel in a graph {1e6 * c['launch']:.2f} us."
        )
    return "\n".join(lines)


def _on_gpu(content: dict[str, Any]) -> bool:
    return "gpu" in content["environment"]


def _failed(planned: Planned, error: Exception) -> dict[str, Any]:
    """The entry of a case that could not be built or run."""
    what = planned.build
    function = what.func if isinstance(what, partial) else what
    arguments = [*what.args, *what.keywords.values()] if isinstance(what, partial) else []
    plain = [str(argument) for argument in arguments if isinstance(argument, (str, int))]
    return {
        "op": function.__name__,
        "phase": "failed",
        "shape": " ".join(plain),
        "sizes": {},
        "precision": next((a.name for a in arguments if isinstance(a, Setting)), ""),
        "note": f"{type(error).__name__}: {_first_line(error)}",
        "parity": {"error": math.nan, "tolerance": None, "passed": False},
        "contestants": {},
        "absent": {},
        "ratios": {},
        **judge({}, planned.goals),
    }


def _on_device(case: Case, absent: dict[str, str]) -> dict[str, Callable[[], object]]:
    """The contestants that run, and those of them that are captured; why others do not goes into ``absent``."""
    contestants: dict[str, Callable[[], object]] = {}
    for name, call in case.contestants.items():
        try:
            call()
            torch.cuda.synchronize()
            contestants[name] = call
        except Exception as error:
            if name == "ours":
                raise
            absent[name] = _first_line(error)
    for name in case.captured:
        if name not in contestants:
            continue
        try:
            contestants[f"{name} graph"] = _captured(contestants[name])
        except Exception as error:
            absent[f"{name} graph"] = _first_line(error)
    return contestants


def _captured(call: Callable[[], object]) -> bench.Graphed:
    """As many calls in one graph as take half a millisecond, and every set of inputs once unless that is long."""
    seconds = bench.host_time(call, rounds=2)
    sets = len(call.calls) if isinstance(call, Rotating) else 1
    calls = min(100, max(1, math.ceil(_CAPTURED_SECONDS / seconds)))
    if sets * seconds < 50 * _CAPTURED_SECONDS:
        calls = max(calls, sets)
    return graphed(call, calls)


def _costs(call: Callable[[], object]) -> dict[str, Any]:
    """What a call costs beside device time: host time, launches of the core, memory."""
    launches = bench.launch_time(call)
    return {
        "host_us": round(1e6 * bench.host_time(call), 2),
        "launches_us": [round(1e6 * seconds, 2) for seconds in launches],
        "peak_bytes": bench.peak_memory(call, "cuda"),
    }


def _partner(name: str, timings: Mapping[str, Timing]) -> str:
    """Which of ours a contestant is compared with: what runs in a graph with ours in a graph."""
    in_graph = name.endswith(" graph") or name == "autotune"
    return "ours graph" if in_graph and name != "ours graph" and "ours graph" in timings else "ours"


def _has(result: dict[str, Any], name: str) -> bool:
    return name in result["contestants"]


def _floors(case: Case, ceilings: Ceilings | None) -> dict[str, float]:
    if ceilings is None or case.floor is None:
        return {}
    return {"floor": case.floor(ceilings), "empty kernel": ceilings.launch}


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
