"""Time several ways of doing one thing against each other on a machine that is not quiet.

`interleaved` runs every contestant once in each round, so that whatever the machine does meanwhile hits all of them
alike; `speedup` compares them round by round. `peak_memory` and `saved_bytes` measure what a call needs.
"""

from __future__ import annotations

import ctypes
import gc
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Timing:
    """Seconds per call of one contestant; ``n`` rounds were measured."""

    median: float
    p20: float
    p80: float
    n: int
    samples: tuple[float, ...] = field(default=(), repr=False)
    """Seconds per call in each round, in the order of the rounds."""

    def as_milliseconds(self) -> dict[str, float | int]:
        """The summary for a report, without the samples."""
        to_ms = {"median_ms": self.median, "p20_ms": self.p20, "p80_ms": self.p80}
        return {**{name: _significant(1e3 * value) for name, value in to_ms.items()}, "n": self.n}


def interleaved(
    contestants: Mapping[str, Callable[[], object]],
    rounds: int = 25,
    warmup: int = 2,
    min_time: float = 0.0,
    max_time: float = math.inf,
) -> dict[str, Timing]:
    """Time ``contestants`` in turn, round after round, each round beginning with another one.

    Args:
        contestants: name -> call without arguments.
        rounds: rounds to measure.
        warmup: untimed calls of each contestant beforehand (they include compilation), at least 1.
        min_time: seconds a contestant runs in a round at least; short calls are repeated and the sample is their mean.
        max_time: seconds after which no further round begins, once 5 (or ``rounds``) are measured.

    Returns:
        name -> `Timing`, in the order given.

    Raises:
        ValueError: no contestant, or ``rounds`` or ``warmup`` below 1.
    """
    if not contestants:
        raise ValueError("contestants must not be empty")
    if rounds < 1 or warmup < 1:
        raise ValueError(f"rounds and warmup must be at least 1, got {rounds} and {warmup}")
    repeats = {name: _warm_up(call, warmup, min_time) for name, call in contestants.items()}
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    names = list(contestants)
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        for done in range(rounds):
            if done >= min(5, rounds) and time.perf_counter() - start > max_time:
                break
            first = done % len(names)
            for name in names[first:] + names[:first]:
                samples[name].append(_seconds_per_call(contestants[name], repeats[name]))
    finally:
        if collecting:
            gc.enable()
    return {name: summarise(values) for name, values in samples.items()}


def summarise(samples: Iterable[float]) -> Timing:
    """Median and the 20th and 80th percentile (nearest rank) of seconds per call."""
    values = tuple(samples)
    ordered = sorted(values)
    return Timing(
        median=statistics.median(ordered),
        p20=ordered[round(0.2 * (len(ordered) - 1))],
        p80=ordered[round(0.8 * (len(ordered) - 1))],
        n=len(ordered),
        samples=values,
    )


def speedup(baseline: Timing, ours: Timing) -> float:
    """How many times faster ``ours`` is: the median over rounds of the ratio within the round.

    Raises:
        ValueError: the two were not measured in the same rounds.
    """
    if not ours.samples or len(baseline.samples) != len(ours.samples):
        raise ValueError("both timings must come from the same call of interleaved()")
    return statistics.median(b / o for b, o in zip(baseline.samples, ours.samples, strict=True))


def peak_memory(call: Callable[[], object]) -> int | None:
    """Bytes by which the resident set of this process grew at most while ``call`` ran; None where no system call tells.

    Counts everything, whoever allocated it: tensors, workspaces of a compiled core, new pages of thread pools. Free
    heap memory is handed back to the system first, so that it cannot hide an allocation.
    """
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not (status.exists() and clear.exists()):
        return None
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    try:
        clear.write_text("5")  # resets the high-water mark
    except OSError:
        return None
    before = _kib(status, "VmRSS")
    call()
    return max(0, _kib(status, "VmHWM") - before) * 1024


def saved_bytes(forward: Callable[[], Tensor], inputs: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps from forward to backward: each storage once, ``inputs`` (data, parameters) apart."""
    known = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    sizes: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = forward()
    total = sum(sizes.values())
    del result  # kept until here: a storage freed earlier could lend its address to another
    return total


def environment() -> dict[str, Any]:
    """What a measurement depends on: versions, what ran each op and how it was compiled, CPU, threads, load."""
    import fastmix
    from fastmix import backends

    return {
        "fastmix": fastmix.__version__,
        "backends": {op: os.environ.get("FASTMIX_BACKEND") or backends.available(op)[0] for op in backends.TABLE},
        "core": _core(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
        "cpus": os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "settings": {name: os.environ[name] for name in _SETTINGS if name in os.environ},
        "load_average": [round(load, 2) for load in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "command": _command(),
    }


def cpu_name() -> str:
    """The processor's name as the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _command() -> str:
    """The command being run; of files only their names, since folders say nothing outside this machine."""
    program = "fastmix" if Path(sys.argv[0]).name == "__main__.py" else Path(sys.argv[0]).name
    return " ".join([program, *(Path(word).name if "/" in word else word for word in sys.argv[1:])])


_SETTINGS = (
    "FASTMIX_BACKEND",
    "FASTMIX_ISA",
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "MKL_NUM_THREADS",
    "ATEN_CPU_CAPABILITY",
)


def _core() -> dict[str, Any] | None:
    """How the compiled core was built and the instruction set it chose; None without it."""
    from fastmix import backends

    if backends.core_problem() is not None:
        return None
    from fastmix import _core

    return {"isa": _core.isa(), "compiler": _core.compiler, "openmp": _core.openmp}


def _warm_up(call: Callable[[], object], times: int, min_time: float) -> int:
    for _ in range(times):
        seconds = _seconds_per_call(call, 1)
    return max(1, math.ceil(min_time / max(seconds, 1e-7)))


def _seconds_per_call(call: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def _kib(status: Path, key: str) -> int:
    for line in status.read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1])
    raise OSError(f"{status} has no {key}")


def _significant(value: float, digits: int = 4) -> float:
    return float(f"{value:.{digits}g}")
