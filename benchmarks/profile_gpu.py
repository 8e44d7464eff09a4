"""Which kernels run, how often and for how long: ``python -m benchmarks.profile_gpu --json FILE [STEP.json ...]``.

Prints a table for each training pass of `monotonic` and `recurrent` and each small op, profiled here as ``fastmix
profile`` does it, and for each learner step that ``fastmix profile --json`` has written.
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

from fastmix.experiments.bench import cases, report, table_cuda
from fastmix.experiments.bench.cases import Case
from fastmix.testing import Profile, profile

SHOWN = 25


def targets() -> Iterator[tuple[Callable[[], Case], tuple[str, ...]]]:
    """Cases, and the contestants of each to look into where they are there; what matters most first."""
    high, highest = table_cuda.HIGH, table_cuda.HIGHEST
    backends = ("ours", "native", "triton", "cudnn")
    for shape, rows in (("MMM2", 61_440), ("5m_vs_6m", 15_360)):
        yield partial(cases.monotonic, shape, rows, True, high, ()), backends
    for episodes in (128, 32):
        yield partial(cases.recurrent, "MMM2", True, high, (), episodes, 60, False), backends
    yield partial(cases.returns, 512, 120, highest), ("ours",)
    yield partial(cases.select, 512, 120, 10, 18, True, highest), ("ours",)
    yield partial(cases.td_loss, 512, 120, highest), ("ours",)
    yield partial(cases.quantile, 512, 120, 32, highest), ("ours",)
    yield partial(cases.monotonic, "MMM2", 61_440, False, high, ()), ("ours",)
    yield partial(cases.recurrent, "MMM2", False, high, (), 128, 60, False), ("ours",)
    for shape, rows in (("MMM2", 15_360), ("5m_vs_6m", 61_440)):
        yield partial(cases.monotonic, shape, rows, True, high, ()), ("ours", "eager")
    for setting in (highest, table_cuda.BFLOAT16):
        yield partial(cases.monotonic, "MMM2", 61_440, True, setting, ()), ("ours",)
    yield partial(cases.recurrent, "MMM2", True, high, (), 256, 60, False), ("ours", "gru")


def kernels(found: Profile) -> str:
    """The kernels of one call, the most costly first."""
    runs = sum(count for count, _ in found.by_kernel.values())
    busy = sum(seconds for _, seconds in found.by_kernel.values())
    lines = [
        f"a call: {runs} kernels, {1e6 * busy:.1f} us in them; host {1e6 * found.host.median:.1f} us,"
        f" with the device {1e6 * found.wall.median:.1f} us",
        f"{'us':>9} {'share':>6} {'runs':>6} {'us each':>8}  kernel",
    ]
    shown = list(found.by_kernel.items())[:SHOWN]
    for name, (count, seconds) in shown:
        share = seconds / max(busy, 1e-12)
        lines.append(f"{1e6 * seconds:>9.2f} {share:>6.1%} {count:>6} {1e6 * seconds / count:>8.2f}  {name[:110]}")
    if len(found.by_kernel) > len(shown):
        lines.append(f"... and {len(found.by_kernel) - len(shown)} more")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("steps", nargs="*", type=Path, help="what fastmix profile --json has written")
    parser.add_argument("--json", type=Path, required=True, help="file for all profiles")
    args = parser.parse_args(arguments)
    results: list[dict[str, Any]] = []

    def show(title: str, contestant: str, found: Profile) -> None:
        print(f"== {title}: {contestant}\n{kernels(found)}\n", flush=True)
        results.append({"case": title, "contestant": contestant, "profile": found.to_json()})
        device = "cuda" if torch.cuda.is_available() else "cpu"
        args.json.write_text(json.dumps(report.report(results, "float32", device), indent=1) + "\n")

    for path in args.steps:
        step = json.loads(path.read_text())
        for name, values in step["profiles"].items():
            show(f"{step['algo']} {step['shape']} {step['episodes']}x{step['steps']}", name, Profile.from_json(values))
    if not torch.cuda.is_available():
        print("needs a CUDA device", file=sys.stderr)
        return 2
    return max((_profile(build, names, show) for build, names in targets()), default=0)


def _profile(build: Callable[[], Case], names: Sequence[str], show: Callable[[str, str, Profile], None]) -> int:
    """Profile contestants of one case; 1 when that failed."""
    try:
        case = build()
        for name in names:
            if name in case.contestants:
                with case.setting.applied():
                    found = profile(case.contestants[name], rounds=5, max_time=1.0, device=case.setting.device)
                show(f"{case.name} {case.backend}".rstrip(), name, found)
    except Exception as error:
        print(f"failed: {build}: {type(error).__name__}: {error}", flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
