"""Which kernels run, how often and for how long: ``python -m benchmarks.profile_gpu --out FOLDER``.

One call of each case under torch's profiler, after warm-up: the learner step launched call by call and replayed, and
training passes of `monotonic` and `recurrent`. Tables go to ``profile.txt``, the same numbers to ``profile.json``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from fastmix.experiments.bench import cases, report, steps, table_cuda
from fastmix.experiments.bench.cases import Case

CALLS = 5
SHOWN = 25


def targets() -> Iterator[tuple[Callable[[], Case], tuple[str, ...]]]:
    """Cases, and the contestants of each to look into."""
    high = table_cuda.HIGH
    for shape, episodes, length in (("5m_vs_6m", 32, 60), ("MMM2", 128, 120)):
        yield partial(steps.step, "qmix", shape, episodes, length, (), setting=high), ("ours graph", "ours")
    for shape, rows in (("5m_vs_6m", 15_360), ("MMM2", 15_360), ("MMM2", 61_440)):
        names = ("ours", "eager") if rows == 15_360 else ("ours",)
        yield partial(cases.monotonic, shape, rows, True, high, ()), names
    for episodes in (32, 128, 256):
        names = ("ours", "gru") if episodes == 128 else ("ours",)
        yield partial(cases.recurrent, "MMM2", True, high, (), episodes, 60, False), names


def kernels(call: Callable[[], object]) -> dict[str, Any]:
    """Kernels, copies and fills of a call: how many, microseconds in each, the most costly first."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiled:
        for _ in range(CALLS):
            call()
        torch.cuda.synchronize()
    events = [event for event in profiled.events() or () if event.device_type == DeviceType.CUDA]
    return summarise([(event.name, event.time_range.start, event.time_range.end) for event in events])


def summarise(events: Sequence[tuple[str, float, float]]) -> dict[str, Any]:
    """What `kernels` returns, from name, begin and end (microseconds) of everything that ran in ``CALLS`` calls."""
    times: dict[str, list[float]] = {}
    for name, begin, end in events:
        times.setdefault(name, []).append(end - begin)
    entries: list[dict[str, Any]] = [
        {"name": name, "calls": len(spans) / CALLS, "us": sum(spans) / CALLS, "us_each": sum(spans) / len(spans)}
        for name, spans in sorted(times.items(), key=lambda item: -sum(item[1]))
    ]
    elapsed = max(e[2] for e in events) - min(e[1] for e in events) if events else 0.0
    return {
        "kernels": len(events) / CALLS,
        "busy_us": sum(entry["us"] for entry in entries),
        "elapsed_us": elapsed / CALLS,
        "entries": entries,
    }


def table(title: str, found: dict[str, Any]) -> str:
    """The numbers of `kernels` as text."""
    lines = [
        f"== {title}",
        f"a call: {found['kernels']:.1f} kernels, {found['busy_us']:.1f} us in them,"
        f" {found['elapsed_us']:.1f} us from the first to the last",
        f"{'us':>9} {'share':>6} {'calls':>7} {'us each':>8}  kernel",
    ]
    for entry in found["entries"][:SHOWN]:
        share = entry["us"] / max(found["busy_us"], 1e-9)
        lines.append(
            f"{entry['us']:>9.2f} {share:>6.1%} {entry['calls']:>7.1f} {entry['us_each']:>8.2f}  {entry['name'][:110]}"
        )
    if len(found["entries"]) > SHOWN:
        lines.append(f"... and {len(found['entries']) - SHOWN} more")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of profile.txt and profile.json")
    out: Path = parser.parse_args().out
    if not torch.cuda.is_available():
        print("needs a CUDA device", file=sys.stderr)
        return 2
    results, status = [], 0
    text = out / "profile.txt"
    text.write_text("")
    for build, names in targets():
        try:
            case = build()
        except Exception as error:
            print(f"not built: {type(error).__name__}: {error}", flush=True)
            status = 1
            continue
        for name in names:
            title = f"{case.name}: {name}"
            if name not in case.contestants:
                print(f"== {title}\nabsent: {case.absent.get(name, 'not a contestant')}", flush=True)
                continue
            try:
                with case.setting.applied():
                    found = kernels(case.contestants[name])
            except Exception as error:
                print(f"== {title}\nfailed: {type(error).__name__}: {error}", flush=True)
                status = 1
                continue
            results.append({"case": case.name, "contestant": name, **found})
            shown = table(title, found)
            print(shown, flush=True)
            with text.open("a") as file:
                file.write(shown + "\n\n")
            content = report.report(results, "float32", "cuda")
            (out / "profile.json").write_text(json.dumps(content, indent=1) + "\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
