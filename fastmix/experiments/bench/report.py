"""Run cases, and show what came out as JSON, as lines of text, or as a markdown table."""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Final

import torch

from fastmix.experiments.bench.bounds import Ceilings
from fastmix.experiments.bench.cases import Case, Setting, first_line
from fastmix.experiments.bench.parity import Error
from fastmix.testing import bench
from fastmix.testing.bench import Rotating, Timing, environment, graphed, interleaved, speedup

_GRAPH: Final = " graph"
_BOUNDS: Final = ("floor", "empty kernel")
ORDER: Final = (
    "ours graph",
    *(f"{name}{graph}" for name in ("native", "triton", "cudnn") for graph in ("", _GRAPH)),
    *(f"{name}{graph}" for name in ("eager", "compile", "autotune", "whole") for graph in ("", _GRAPH)),
    *(f"{name}{graph}" for name in ("gru", "cell", "products") for graph in ("", _GRAPH)),
    *_BOUNDS,
)
"""Columns of a table, those that have an entry."""

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

    build: partial[Case]
    goals: Mapping[str, float] = field(default_factory=dict)

    def given(self, name: str) -> Any:
        """The argument ``name`` of ``build``, None where it has none."""
        return inspect.signature(self.build.func).bind(*self.build.args, **self.build.keywords).arguments.get(name)


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
            del case  # before the next one is built: they hold large tensors
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
        errors, allowed = case.measured_errors()
        passed = errors["ours"].within(allowed)
        if passed:
            contestants = dict(case.contestants)
            if device == "cuda":
                contestants = _on_device(case, _wrong(errors, allowed), absent)
                costs = {name: _costs(contestants[name]) for name in ("ours", "eager") if name in contestants}
            timings = interleaved(
                contestants, effort.rounds, effort.warmup, effort.min_time, effort.max_time, device=device
            )
    ratios = {
        name: speedup(timing, timings[_partner(case.main, name, timings)])
        for name, timing in timings.items()
        if name != "ours"
    }
    floors = _floors(case, effort.ceilings) if passed else {}
    for name, seconds in floors.items():
        ratios[name] = seconds / timings[_partner(case.main, name, timings)].median
    measured = {name: timing.as_milliseconds() | costs.get(name, {}) for name, timing in timings.items()}
    return {
        "op": case.op,
        "phase": case.phase,
        "shape": case.shape,
        "sizes": dict(case.sizes),
        "precision": case.setting.name,
        "backend": case.backend,
        "main": case.main,
        "note": case.note,
        "parity": parity(errors, allowed),
        "contestants": measured | {name: {"median_ms": 1e3 * seconds} for name, seconds in floors.items()},
        "absent": absent,
        "ratios": {name: round(ratio, 3) for name, ratio in ratios.items()},
        **judge(ratios, goals),
    }


def parity(errors: Mapping[str, Error], allowed: Error) -> dict[str, Any]:
    """What ours and the others err by, what is allowed, and whether ours passed."""
    ours = errors["ours"]
    others = {name: error for name, error in errors.items() if name != "ours"}
    return {
        "error": ours.values,
        "gradient_error": ours.gradients,
        "others": {name: {"error": e.values, "gradient_error": e.gradients} for name, e in others.items()},
        "tolerance": allowed.values,
        "gradient_tolerance": allowed.gradients,
        "passed": ours.within(allowed),
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
            partner = _partner(result.get("main", "ours"), name, result["contestants"])
            ratio = f"  {result['ratios'][name]:.2f} x {partner}" if name in result["ratios"] else ""
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
    """One line for each case that has a goal, failed or differs: our times, and ratios with their goals behind them.

    An exclamation mark stands behind what was not reached.
    """
    rows = [("case", "backend", "us", "graph us", "ratio/goal, other backends' us, error (eager's)")]
    for result in content["results"]:
        passed = result["parity"]["passed"]
        if not result["goals"] and passed:
            continue
        phase = {"forward": "fwd", "forward+backward": "f+b"}.get(result["phase"], result["phase"])
        sizes = "x".join(str(size) for size in result["sizes"].values())
        words = (result["op"], phase, result["shape"], sizes, result["precision"])
        name = " ".join(dict.fromkeys(filter(None, words)))
        told = ", ".join(_reached(result)) if passed else _why(result)
        rows.append((name, result.get("backend", ""), *(_us(result, key) for key in ("ours", "ours graph")), told))
    widths = [max(map(len, column)) for column in zip(*(row[:-1] for row in rows), strict=True)]
    lines = ["  ".join([*map(str.ljust, row, widths), row[-1]]) for row in rows]
    return "\n".join([_where(content), "", *lines])


def _reached(result: dict[str, Any]) -> Iterator[str]:
    for name, goal in result["goals"].items():
        ratio = result["ratios"].get(name)
        yield f"{name} absent!" if ratio is None else f"{name} {ratio:.3g}/{goal:g}{'' if ratio >= goal else '!'}"
    for name in ("native", "triton", "cudnn"):
        shown = next((key for key in (name + _GRAPH, name) if key in result["contestants"]), None)
        if shown is not None:
            yield f"{shown} {_us(result, shown)}"
    ours, eager = _errors(result)
    yield f"error {ours} ({eager})" if eager else f"error {ours}"


def _errors(result: dict[str, Any]) -> tuple[str, str]:
    """Of ours and of the public way: values, and gradients where there are some."""
    shown = []
    for errors in (result["parity"], result["parity"].get("others", {}).get("eager")):
        numbers = [errors["error"], errors.get("gradient_error") or None] if errors else []
        shown.append(" / ".join(f"{error:.0e}" for error in numbers if error is not None))
    return shown[0], shown[1]


def _us(result: dict[str, Any], name: str) -> str:
    timing = result["contestants"].get(name)
    return "" if timing is None else f"{1e3 * timing['median_ms']:.4g}"


def markdown(content: dict[str, Any]) -> str:
    """One table for each op and phase: our time, and every contestant's time with its ratio to ours."""
    lines = [_where(content), ""]
    lines += [
        "Median milliseconds; in brackets how many times longer than ours (median of the ratios within each round).",
        "Goal: the least ratio asked for; a goal below 1 allows ours to take longer.",
    ]
    if _on_gpu(content):
        lines += [
            "Columns in a graph, floor and empty kernel are compared with ours in a graph, the others with ours ",
            "launched call by call; of learner steps all are compared with ours in a graph, as training runs it.",
            "Errors are RMS ratios to the float64 reference, of values / gradients; eager's is the public way's.",
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
    told = ["precision", "error", "eager's error", "backend"] if gpu else []
    header = ["shape", *sizes, *told, "ours", *names, "goal", "met"]
    rows = [header, ["---"] * len(header)]
    for result in group:
        cells = [result["shape"], *(f"{result['sizes'][name]:,}" if result["sizes"] else "" for name in sizes)]
        cells += [result["precision"], *_errors(result), result.get("backend", "")] if gpu else []
        if result["parity"]["passed"]:
            cells += [_amount(result, "ours"), *(_compared(result, name) for name in names)]
        else:
            cells += [_why(result), *("" for _ in names)]
        goals = ", ".join(f"{name} {goal:g}x" for name, goal in result["goals"].items())
        rows.append([*cells, goals, {True: "yes", False: "**no**", None: ""}[result["met"]]])
    return ["| " + " | ".join(row) + " |" for row in rows]


def _why(result: dict[str, Any]) -> str:
    """The reason of a result without timings."""
    p = result["parity"]
    if p["tolerance"] is None:
        return f"failed: {result['note']}"
    kind = " in a gradient" if p["error"] <= p["tolerance"] else ""
    error, allowed = (p["gradient_error"], p["gradient_tolerance"]) if kind else (p["error"], p["tolerance"])
    return f"differs from the reference{kind} by {error:.2e}, {allowed:.2e} allowed"


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
    function = planned.build.func
    arguments = [*planned.build.args, *planned.build.keywords.values()]
    plain = [str(argument) for argument in arguments if isinstance(argument, (str, int))]
    return {
        "op": function.__name__,
        "phase": "failed",
        "shape": " ".join(plain),
        "sizes": {},
        "precision": next((a.name for a in arguments if isinstance(a, Setting)), ""),
        "backend": "",
        "note": f"{type(error).__name__}: {first_line(error)}",
        "parity": {"error": math.nan, "tolerance": None, "passed": False},
        "contestants": {},
        "absent": {},
        "ratios": {},
        **judge({}, planned.goals),
    }


def _wrong(errors: Mapping[str, Error], allowed: Error) -> dict[str, str]:
    """Backends that may not be timed, and why."""
    return {
        name: f"differs from the reference by {error.values:.2e} / {error.gradients:.2e}"
        for name, error in errors.items()
        if name != "eager" and not error.within(allowed)
    }


def _on_device(case: Case, wrong: Mapping[str, str], absent: dict[str, str]) -> dict[str, Callable[[], object]]:
    """The contestants that run, and those of them that are captured; why others do not goes into ``absent``."""
    contestants: dict[str, Callable[[], object]] = {}
    for name, call in case.contestants.items():
        if name in wrong:
            absent[name] = wrong[name]
            continue
        try:
            call()
            torch.cuda.synchronize()
            contestants[name] = call
        except Exception as error:
            if name == "ours":
                raise
            absent[name] = first_line(error)
    for name in case.captured:
        if name not in contestants:
            continue
        try:
            contestants[name + _GRAPH] = _captured(contestants[name])
        except Exception as error:
            absent[name + _GRAPH] = first_line(error)
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


def _partner(main: str, name: str, timings: Mapping[str, object]) -> str:
    """Which of ours a contestant is compared with: what runs in a graph, and bounds, with ours in a graph."""
    if name == "ours graph":
        return "ours"
    wanted = "ours graph" if name.endswith(_GRAPH) or name in _BOUNDS else main
    return wanted if wanted in timings else "ours"


def _floors(case: Case, ceilings: Ceilings | None) -> dict[str, float]:
    if ceilings is None or case.floor is None:
        return {}
    return dict(zip(_BOUNDS, (case.floor(ceilings), ceilings.launch), strict=True))
