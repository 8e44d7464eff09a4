"""Time several ways of doing one thing against each other on a machine that is not quiet.

`interleaved` runs every contestant once in each round, so that whatever the machine does meanwhile hits all of them
alike; `speedup` compares them round by round. `peak_memory` and `saved_bytes` measure what a call needs.

On a CUDA device a sample is the time between two events around a batch of calls, begun with an idle device: what a
caller waits for, gaps between launches included. `graphed` tells those gaps from the kernels, `rotating` keeps inputs
from staying in the cache, `host_time` and `launch_time` are what the host pays.
"""

from __future__ import annotations

import ctypes
import gc
import importlib.metadata
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
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
    device: str = "cpu",
) -> dict[str, Timing]:
    """Time ``contestants`` in turn, round after round, each round beginning with another one.

    Args:
        contestants: name -> call without arguments. A `Graphed` one counts for as many calls as it holds.
        rounds: rounds to measure.
        warmup: untimed calls of each contestant beforehand (they include compilation), at least 1.
        min_time: seconds a contestant runs in a round at least; short calls are repeated and the sample is their mean.
        max_time: seconds after which no further round begins, once 5 (or ``rounds``) are measured.
        device: ``"cpu"``, timed by the host's clock, or ``"cuda"``, by events on the current stream.

    Returns:
        name -> `Timing`, in the order given.

    Raises:
        ValueError: no contestant, or ``rounds`` or ``warmup`` below 1.
    """
    if not contestants:
        raise ValueError("contestants must not be empty")
    if rounds < 1 or warmup < 1:
        raise ValueError(f"rounds and warmup must be at least 1, got {rounds} and {warmup}")
    seconds_per_call = _device_seconds if device == "cuda" else _host_seconds
    repeats = {name: _warm_up(call, warmup, min_time, seconds_per_call) for name, call in contestants.items()}
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
                samples[name].append(seconds_per_call(contestants[name], repeats[name]))
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


class Graphed:
    """Calls captured in a CUDA graph; calling it replays them all."""

    def __init__(self, graph: torch.cuda.CUDAGraph, calls: int) -> None:
        self.calls = calls
        self._graph = graph

    def __call__(self) -> None:
        """Queue all of them."""
        self._graph.replay()


def graphed(call: Callable[[], object], calls: int = 1, warmup: int = 3) -> Graphed:
    """Capture ``call``, ``calls`` times one after another, in one CUDA graph.

    Several in a graph hide what its launch costs, so that a replay shows the time of the kernels.

    Raises:
        ValueError: ``calls`` or ``warmup`` below 1.
        RuntimeError: the call does what cannot be captured, such as waiting for the device.
    """
    if calls < 1 or warmup < 1:
        raise ValueError(f"calls and warmup must be at least 1, got {calls} and {warmup}")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warmup):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(calls):
            call()
    return Graphed(graph, calls)


class Rotating:
    """The same computation on several sets of inputs, another set at every call."""

    def __init__(self, calls: Sequence[Callable[[], object]]) -> None:
        self.calls = tuple(calls)
        self._next = 0

    def __call__(self) -> object:
        """Run the next one."""
        call = self.calls[self._next]
        self._next = (self._next + 1) % len(self.calls)
        return call()


def host_time(call: Callable[[], object], rounds: int = 5, seconds: float = 0.02) -> float:
    """Seconds of host time a call of CUDA work takes, the least of ``rounds``; the device is not waited for.

    A round makes at most 50 calls, fewer where they take longer than ``seconds``.
    """
    call()
    torch.cuda.synchronize()
    calls = min(50, max(1, round(seconds / max(_host_seconds(call, 1), 1e-7))))
    best = math.inf
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        best = min(best, (time.perf_counter() - start) / calls)
    torch.cuda.synchronize()
    return best


def launch_time(call: Callable[[], object], calls: int = 100) -> list[float]:
    """Seconds of host time of every launch function of the core that ``call`` queues on a CUDA device, in order.

    Each is called ``calls`` times more with its arguments, from Python as in use; the mean of these is taken.
    """
    from fastmix.ops import _library

    queue_on, seconds = _library.queue_on, []

    def timed(device: torch.device, function: Callable[..., Any], *args: Any) -> Any:
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            queue_on(device, function, *args)
        seconds.append((time.perf_counter() - start) / calls)
        return queue_on(device, function, *args)

    _library.queue_on = timed
    try:
        call()
    finally:
        _library.queue_on = queue_on
    return seconds


def peak_memory(call: Callable[[], object], device: str = "cpu") -> int | None:
    """Bytes by which memory grew at most while ``call`` ran; None where no system call tells.

    On the CPU of the resident set of this process. This counts everything, whoever allocated it: tensors, workspaces of
    a compiled core, new pages of thread pools. Free heap memory is handed back to the system first, so that it cannot
    hide an allocation. On ``"cuda"`` of what torch's allocator has handed out.
    """
    if device == "cuda":
        return _peak_device_memory(call)
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


def environment(device: str = "cpu") -> dict[str, Any]:
    """What a measurement depends on: versions, what ran each op and how it was compiled, processors, threads, load."""
    import fastmix
    from fastmix import backends

    chosen = os.environ.get("FASTMIX_BACKEND")
    return {
        "fastmix": fastmix.__version__,
        "commit": os.environ.get("FASTMIX_COMMIT"),
        "backends": {op: chosen or backends.available(op, device)[0] for op in backends.TABLE},
        **({"gpu": gpu()} if device == "cuda" else {}),
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


def gpu() -> dict[str, Any]:
    """The current CUDA device, and the versions of what drives it."""
    properties = torch.cuda.get_device_properties()
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "triton": _version("triton"),
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


def _warm_up(call: Callable[[], object], times: int, min_time: float, seconds_per_call: Callable[..., float]) -> int:
    for _ in range(times):
        seconds = seconds_per_call(call, 1) * _calls(call)
    return max(1, math.ceil(min_time / max(seconds, 1e-7)))


def _host_seconds(call: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / (repeats * _calls(call))


def _device_seconds(call: Callable[[], object], repeats: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return 1e-3 * start.elapsed_time(end) / (repeats * _calls(call))


def _calls(call: Callable[[], object]) -> int:
    return call.calls if isinstance(call, Graphed) else 1


def _peak_device_memory(call: Callable[[], object]) -> int:
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _driver() -> str | None:
    """The driver's version as its own tool tells it."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    query = [tool, "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    answer = subprocess.run(query, capture_output=True, text=True, check=False)
    return answer.stdout.strip() or None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _kib(status: Path, key: str) -> int:
    for line in status.read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1])
    raise OSError(f"{status} has no {key}")


def _significant(value: float, digits: int = 4) -> float:
    return float(f"{value:.{digits}g}")
