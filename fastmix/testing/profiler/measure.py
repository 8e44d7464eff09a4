"""The passes of a profile: time without instruments, then counting, tracing and memory, each in calls of its own."""

from __future__ import annotations

import gc
import gzip
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final
from unittest import mock

import torch
from torch.profiler import ProfilerActivity

from fastmix import _parts, backends
from fastmix.testing.bench import Timing, interleaved, peak_memory, summarise
from fastmix.testing.profiler.dispatch import CountDispatches
from fastmix.testing.profiler.trace import OTHER, Event, Kernel, Label, Parts, Timeline, cuda_work, load, timeline

Function = Callable[[], object]

# Names of our own events in a trace.
_STEP: Final = "fastmix.step"
_PART: Final = "fastmix.part: "
_DISPATCH: Final = "fastmix.dispatch: "
_VIEW: Final = "fastmix.view: "
_CORE: Final = "fastmix.core: "

_TRACED: Final = 6  # calls in a trace; the first one still warms up, of the others the fastest is read

_mark = torch._C._profiler._RecordFunctionFast  # an event in the trace for half a microsecond, and no dispatch


@dataclass(frozen=True)
class Part:
    """What one part of a function needs in one call. Times are seconds."""

    name: str
    """As given to `part`; ``"other"`` is what has no name."""
    backward: bool
    """Whether this is the backward pass of what ran under that name."""
    dispatches: int
    """Operators that reach a backend, views apart; see `CountDispatches`."""
    views: int
    host_s: float
    """Time of the host: ``share`` of the function's host time."""
    share: float
    """Of the host time of one traced call. The shares of all parts add up to 1."""
    kernels: int | None
    """On CUDA the kernels that the device ran; on the CPU the calls of the compiled core, None without a core."""
    kernel_s: float | None
    """Time in them: of the device, or on the CPU a share of the host time like ``host_s``."""
    synchronisations: int | None
    """Calls of CUDA in which the host waited for the device; None on the CPU."""


@dataclass(frozen=True)
class Profile:
    """One function: its parts in the order in which they first ran, and what holds for the whole call."""

    device: str
    """``"cpu"`` or ``"cuda"``."""
    parts: tuple[Part, ...]
    host: Timing
    """Until the function returns, without instruments."""
    wall: Timing
    """Until the device has finished as well; on the CPU the same."""
    traced_s: float
    """Host time of the traced call that the shares come from, slower than ``host`` by what tracing costs."""
    copies: int | None
    """Copies and fills by the device, which are no kernels; None on the CPU."""
    held_bytes: int | None
    """CUDA memory that was allocated before the call: weights, data, what a graph keeps; None on the CPU."""
    peak_bytes: int | None
    """By how much memory grew at most during the call: allocated memory on CUDA, the resident set on the CPU."""
    operators: dict[str, int]
    """Operator -> dispatches, views with them, the most called first."""
    by_kernel: dict[str, tuple[int, float]]
    """Name of a kernel -> how often it ran, and the seconds in it, the most costly first."""
    runtime: dict[str, int]
    """Function of CUDA's interfaces -> calls by the host; empty on the CPU."""
    synchronisation_warnings: int | None
    """How often ``torch.cuda.set_sync_debug_mode`` warned, a second witness of ``synchronisations``."""

    @property
    def total(self) -> Part:
        """The sum of all parts."""
        p = self.parts
        return Part(
            "total", False, sum(x.dispatches for x in p), sum(x.views for x in p), sum(x.host_s for x in p),
            sum(x.share for x in p), _sum(x.kernels for x in p), _sum(x.kernel_s for x in p),
            _sum(x.synchronisations for x in p),
        )  # fmt: skip

    def __str__(self) -> str:
        """The table of parts and what holds for the whole call."""
        from fastmix.testing.profiler.table import summary, table

        return "\n".join([table({"": self}), "", *summary(self)])

    def to_json(self) -> dict[str, Any]:
        """As a dictionary of JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Profile:
        """The inverse of `to_json`."""
        made: dict[str, Any] = {name: Timing(**{**values[name], "samples": ()}) for name in ("host", "wall")}
        made["parts"] = tuple(Part(**part) for part in values["parts"])
        made["by_kernel"] = {name: (count, seconds) for name, (count, seconds) in values["by_kernel"].items()}
        return cls(**{**values, **made})


def profile(
    function: Function,
    *,
    rounds: int = 25,
    warmup: int = 3,
    max_time: float = 8.0,
    device: str | None = None,
    trace: Path | None = None,
) -> Profile:
    """Profile ``function``, called without arguments; see `profile_together` for the other arguments."""
    functions = {"function": function}
    return profile_together(functions, rounds=rounds, warmup=warmup, max_time=max_time, device=device, trace=trace)[
        "function"
    ]


def profile_together(
    functions: Mapping[str, Function],
    *,
    rounds: int = 25,
    warmup: int = 3,
    max_time: float = 8.0,
    device: str | None = None,
    trace: Path | None = None,
) -> dict[str, Profile]:
    """Profile several functions that do the same in different ways; their times are measured interleaved.

    Each is called many times (``warmup``, ``rounds`` and about ten more), so it must be able to run again and again, as
    a training step is. The backward pass of a part is recognised where the part runs in the thread that calls
    ``profile_together``. Functions that run several threads of their own at the same time are counted right, but their
    parts are not told apart.

    Args:
        functions: name -> function without arguments.
        rounds: timed calls of each at most; timing ends after ``max_time`` seconds, but not before 5 calls.
        warmup: calls beforehand.
        max_time: see ``rounds``.
        device: ``"cpu"`` or ``"cuda"``, where the functions work; None: on CUDA if they have made use of it.
        trace: file for a Chrome trace of the first function, for Perfetto; compressed if its name ends in ``.gz``.

    Returns:
        name -> `Profile`.

    Raises:
        ValueError: no function, fewer than one round or warm-up call, or a device that is not there.
        RuntimeError: a function uses `torch.profiler` itself.
    """
    if not functions:
        raise ValueError("functions must not be empty")
    if rounds < 1 or warmup < 1:
        raise ValueError(f"rounds and warmup must be at least 1, got {rounds} and {warmup}")
    check_device(device)
    for function in functions.values():
        function()
    on_cuda = torch.cuda.is_initialized() if device is None else device == "cuda"
    timings = _times(functions, on_cuda, rounds, warmup, max_time)
    return {
        name: _profile(function, on_cuda, *timings[name], trace if index == 0 else None)
        for index, (name, function) in enumerate(functions.items())
    }


def check_device(device: str | None) -> None:
    """Raise ``ValueError`` unless functions can be profiled on ``device``, as `profile_together` takes it."""
    if device not in (None, "cpu", "cuda"):
        raise ValueError(f"device must be 'cpu', 'cuda' or None, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is 'cuda', and this torch finds no usable GPU (fastmix doctor says why)")


def _times(
    functions: Mapping[str, Function], on_cuda: bool, rounds: int, warmup: int, max_time: float
) -> dict[str, tuple[Timing, Timing]]:
    """Host time and time with the device, of each function."""
    host: dict[str, list[float]] = {name: [] for name in functions}

    def contestant(name: str, function: Function) -> Function:
        def call() -> None:
            start = time.perf_counter()
            function()
            host[name].append(time.perf_counter() - start)
            torch.cuda.synchronize()

        return call if on_cuda else function

    wall = interleaved({n: contestant(n, f) for n, f in functions.items()}, rounds, warmup, max_time=max_time)
    if not on_cuda:
        return {name: (_bare(timing), _bare(timing)) for name, timing in wall.items()}
    return {name: (_bare(summarise(host[name][-timing.n :])), _bare(timing)) for name, timing in wall.items()}


def _profile(function: Function, on_cuda: bool, host: Timing, wall: Timing, keep: Path | None) -> Profile:
    counts, operators = _count(function, on_cuda)
    with nullcontext() if on_cuda else _marked_core():
        traced = _trace(function, on_cuda, _TRACED, keep=keep)
    window = min(traced.windows[1:], key=lambda window: window.duration)
    labels: Counter[Label] = Counter()
    for label, duration in traced.timeline.spans(window.start, window.end):
        labels[label] += duration
    work = cuda_work(traced.events, window.start, window.end, traced.timeline)
    kernels, per_nanosecond = work.kernels, 1e-9
    if not on_cuda:
        kernels = _core_calls(traced, window)
        per_nanosecond = host.median / window.duration
    runs, seconds = Counter(k.label for k in kernels), Counter[Label]()
    by_kernel: dict[str, tuple[int, float]] = {}
    for kernel in kernels:
        seconds[kernel.label] += kernel.nanoseconds
        count, total = by_kernel.get(kernel.name, (0, 0.0))
        by_kernel[kernel.name] = (count + 1, total + per_nanosecond * kernel.nanoseconds)
    has_kernels = on_cuda or backends.core_problem() is None
    parts = []
    for label in sorted({**labels, **counts}, key=lambda label: label == OTHER):
        share = labels[label] / window.duration
        dispatches, views = counts.get(label, (0, 0))
        parts.append(
            Part(
                label.part,
                label.backward,
                dispatches,
                views,
                host_s=share * host.median,
                share=share,
                kernels=runs[label] if has_kernels else None,
                kernel_s=per_nanosecond * seconds[label] if has_kernels else None,
                synchronisations=work.waits[label] if on_cuda else None,
            )
        )
    held, peak = _memory(function, on_cuda)
    return Profile(
        device="cuda" if on_cuda else "cpu",
        parts=tuple(parts),
        host=host,
        wall=wall,
        traced_s=1e-9 * window.duration,
        copies=work.copies if on_cuda else None,
        held_bytes=held,
        peak_bytes=peak,
        operators=operators,
        by_kernel=dict(sorted(by_kernel.items(), key=lambda item: -item[1][1])),
        runtime=dict(work.calls.most_common()),
        synchronisation_warnings=_synchronisation_warnings(function) if on_cuda else None,
    )


def _core_calls(traced: _Traced, window: Event) -> list[Kernel]:
    """Calls of the compiled core, which are the kernels of the CPU."""
    calls = (e for e in traced.events if e.name.startswith(_CORE) and window.start <= e.start < window.end)
    return [Kernel(e.name.removeprefix(_CORE), traced.timeline.label(e.start), e.duration) for e in calls]


def _count(function: Function, on_cuda: bool) -> tuple[dict[Label, tuple[int, int]], dict[str, int]]:
    """Dispatches and views of each part, and of each operator."""
    counter = CountDispatches(lambda is_view, name: _mark((_VIEW if is_view else _DISPATCH) + name))
    traced = _trace(function, on_cuda, 1, around=counter)
    counts: dict[Label, tuple[int, int]] = {}
    for event in traced.events:
        if event.name.startswith((_DISPATCH, _VIEW)):
            label = traced.timeline.label(event.start)
            others, views = counts.get(label, (0, 0))
            is_view = event.name.startswith(_VIEW)
            counts[label] = (others + (not is_view), views + is_view)
    seen = sum(others + views for others, views in counts.values())
    if seen != counter.total:
        raise RuntimeError(f"torch.profiler recorded {seen} of {counter.total} dispatches")
    return counts, dict((counter.operators + counter.views).most_common())


@dataclass(frozen=True)
class _Traced:
    events: list[Event]
    windows: list[Event]
    """One event a call of the function."""
    timeline: Timeline


def _trace(
    function: Function,
    on_cuda: bool,
    calls: int,
    *,
    around: AbstractContextManager[object] = nullcontext(),  # noqa: B008 - has no state
    keep: Path | None = None,
) -> _Traced:
    """``calls`` of the function under `torch.profiler`, each inside ``around``; ``keep`` gets the trace as a file."""
    recorder = _Recorder()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    with (
        torch.profiler.profile(activities=activities, acc_events=True) as profiler,
        mock.patch.object(torch.autograd.profiler, "_prepare_profiler", _refuse_profiler),
        _parts.listening(recorder),
    ):
        for _ in range(calls):
            with _mark(_STEP), around:
                function()
            if on_cuda:
                torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = load(path)
        if keep is not None:
            keep.parent.mkdir(parents=True, exist_ok=True)
            content = path.read_bytes()
            keep.write_bytes(gzip.compress(content) if keep.suffix == ".gz" else content)
    windows = [event for event in events if event.name == _STEP]
    return _Traced(events, windows, timeline(events, recorder.parts, _PART))


def _refuse_profiler(*args: Any, **options: Any) -> None:
    """A second profiler would end the first one, and torch does not survive that."""
    raise RuntimeError("the function uses torch.profiler itself, and only one profiler can run at a time")


class _Recorder:
    """Listens to `part`: an event in the trace, and a note of the nodes of autograd that are made inside."""

    def __init__(self) -> None:
        self.parts = Parts()
        self._stack = [OTHER.part]
        self._thread = threading.get_ident()
        self._note()

    def __call__(self, name: str) -> AbstractContextManager[object]:
        # Another thread numbers its nodes anew.
        return self._part(name) if threading.get_ident() == self._thread else nullcontext()

    @contextmanager
    def _part(self, name: str) -> Iterator[None]:
        self._stack.append(name)
        self._note()
        try:
            with _mark(_PART + name):
                yield
        finally:
            self._stack.pop()
            self._note()

    def _note(self) -> None:
        self.parts.change(torch.autograd._get_sequence_nr(), self._stack[-1])


@contextmanager
def _marked_core() -> Iterator[None]:
    """Inside the block every call of a kernel of the compiled core is an event in the trace."""
    if backends.core_problem() is not None:
        yield
        return
    from fastmix import _core

    def marked(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            with _mark(_CORE + name):
                return kernel(*args)

        return call

    kernels = [
        (name, kernel)
        for name, kernel in vars(_core).items()
        if callable(kernel) and name.startswith(tuple(backends.TABLE))  # beside sizes that the core tells
    ]
    pairs = [(kernel, marked(name, kernel)) for name, kernel in kernels]
    with ExitStack() as patches:
        for stepper in (_core.RecurrentStepperFloat, _core.RecurrentStepperDouble):
            patches.enter_context(mock.patch.object(stepper, "step", marked("recurrent_step", stepper.step)))
        patches.callback(_exchange, [(marked, kernel) for kernel, marked in pairs])
        _exchange(pairs)
        yield


def _exchange(pairs: Sequence[tuple[Any, Any]]) -> None:
    """Put the second of each pair where any dictionary (of a module, or of functions looked up once) has the first."""
    others = {id(one): other for one, other in pairs}
    for holder in gc.get_referrers(*(one for one, _ in pairs)):
        if isinstance(holder, dict):
            for key, value in list(holder.items()):
                if id(value) in others:
                    holder[key] = others[id(value)]


def _memory(function: Function, on_cuda: bool) -> tuple[int | None, int | None]:
    """What was held before a call, and by how much memory grew at most during it."""
    if on_cuda:
        return torch.cuda.memory_allocated(), peak_memory(function, "cuda")
    if backends.core_problem() is None:
        from fastmix import _core

        _core.workspace_clear()  # what the core keeps between calls is memory of the call
    return None, peak_memory(function)


def _synchronisation_warnings(function: Function) -> int:
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            function()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)


def _bare(timing: Timing) -> Timing:
    """Without the samples, which no report needs."""
    return Timing(timing.median, timing.p20, timing.p80, timing.n)


def _sum(values: Iterator[Any]) -> Any:
    """The sum, None where nothing was measured."""
    known = [value for value in values if value is not None]
    return sum(known) if known else None
