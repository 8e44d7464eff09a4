"""Reading a Chrome trace of `torch.profiler`: its events, and which part of a step was running when."""

from __future__ import annotations

import heapq
import json
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

NODE: Final = "autograd::engine::evaluate_function: "
"""What the events of autograd's nodes are called, before the node's name."""

_CALLS: Final = ("cuda_runtime", "cuda_driver")  # categories of the host's calls of CUDA
_COPIES: Final = ("gpu_memcpy", "gpu_memset")  # ... and of what the device does besides kernels
_WAITS: Final = re.compile(r"cu(da)?(Stream|Device|Event|Ctx)Synchronize|cu(da)?Memcpy(?!.*Async).*")
_VERSION: Final = re.compile(r"(_pt[ds][sz])?(_v\d+)?$")  # of a function of CUDA's, behind its name


class Label(NamedTuple):
    """A part of a step, and whether it is the backward pass of what ran under that name."""

    part: str
    backward: bool = False


OTHER: Final = Label("other")


class Event(NamedTuple):
    """Something that took time. In whole nanoseconds, on one clock for host and device."""

    name: str
    category: str
    start: int
    duration: int
    args: dict[str, Any]

    @property
    def end(self) -> int:
        """When it was over."""
        return self.start + self.duration


class Kernel(NamedTuple):
    """One run of a kernel."""

    name: str
    label: Label
    """The part that launched it."""
    nanoseconds: int


class Work(NamedTuple):
    """What some calls of CUDA came to."""

    kernels: list[Kernel]
    waits: Counter[Label]
    """Calls in which the host waited for the device."""
    copies: int
    """Copies and fills by the device."""
    calls: Counter[str]
    """All calls, by their name."""


def load(path: Path) -> list[Event]:
    """The events of a trace file that have a duration, in the order in which they began."""
    content = json.loads(path.read_text(encoding="utf-8"))
    events = [
        Event(e["name"], e.get("cat", ""), round(1000 * e["ts"]), round(1000 * e.get("dur", 0)), e.get("args", {}))
        for e in content["traceEvents"]
        if e.get("ph") == "X"
    ]
    return sorted(events, key=lambda event: (event.start, -event.duration))


class Parts:
    """Which part made which node of autograd: nodes are numbered as they are made, and keep their number."""

    def __init__(self) -> None:
        self._first: list[int] = []
        self._names: list[str] = []

    def change(self, number: int, name: str) -> None:
        """Nodes from ``number`` on are made by the part ``name``."""
        self._first.append(number)
        self._names.append(name)

    def made(self, number: int) -> str:
        """The part that made the node ``number``."""
        index = bisect_right(self._first, number) - 1
        return OTHER.part if index < 0 else self._names[index]


class Timeline:
    """Which of many nested intervals was the innermost one, at any time; `OTHER` where there is none.

    Args:
        intervals: start, end and label. Of two that overlap without nesting, the one that began later counts.
    """

    def __init__(self, intervals: Iterable[tuple[int, int, Label]]) -> None:
        ordered = sorted((i for i in intervals if i[1] > i[0]), key=lambda i: (i[0], -i[1]))
        boundaries = sorted({time for start, end, _ in ordered for time in (start, end)})
        self._times: Sequence[int] = boundaries
        self._labels: list[Label] = []
        active: list[int] = []  # negative indices into ordered, the innermost interval first
        begun = 0
        for time in boundaries:
            while begun < len(ordered) and ordered[begun][0] <= time:
                heapq.heappush(active, -begun)
                begun += 1
            while active and ordered[-active[0]][1] <= time:
                heapq.heappop(active)
            self._labels.append(ordered[-active[0]][2] if active else OTHER)

    def label(self, time: int) -> Label:
        """What ran at ``time``."""
        index = bisect_right(self._times, time) - 1
        return OTHER if index < 0 else self._labels[index]

    def spans(self, start: int, end: int) -> Iterator[tuple[Label, int]]:
        """Everything between ``start`` and ``end``, cut into labelled pieces: label and duration."""
        index = bisect_right(self._times, start)
        time = start
        while time < end:
            until = min(self._times[index], end) if index < len(self._times) else end
            yield self._labels[index - 1] if index else OTHER, until - time
            time, index = until, index + 1


def timeline(events: Iterable[Event], parts: Parts, prefix: str) -> Timeline:
    """Parts by the events called ``prefix`` and their name, backward passes by autograd's nodes.

    The nodes that add a gradient to ``.grad`` have no number of their own; they run right after the node that made the
    gradient, and belong to its part.
    """
    intervals = []
    last = Label(OTHER.part, backward=True)
    for event in events:
        if event.name.startswith(prefix):
            intervals.append((event.start, event.end, Label(event.name.removeprefix(prefix))))
        elif event.name.startswith(NODE):
            number = event.args.get("Sequence number")
            if number is not None:
                last = Label(parts.made(number), backward=True)
            intervals.append((event.start, event.end, last))
    return Timeline(intervals)


def cuda_work(events: Iterable[Event], start: int, end: int, parts: Timeline) -> Work:
    """What the calls of CUDA between ``start`` and ``end`` came to, whenever the device did it.

    A kernel is its launch's, by the number that both carry; all kernels of a graph carry the number of its launch.
    """
    events = list(events)
    calls = [
        e._replace(name=_VERSION.sub("", e.name)) for e in events if e.category in _CALLS and start <= e.start < end
    ]
    labels = {e.args["correlation"]: parts.label(e.start) for e in calls if "correlation" in e.args}
    launched = [(e, labels[e.args["correlation"]]) for e in events if e.args.get("correlation") in labels]
    return Work(
        [Kernel(e.name, label, e.duration) for e, label in launched if e.category == "kernel"],
        Counter(parts.label(e.start) for e in calls if _WAITS.fullmatch(e.name)),
        sum(e.category in _COPIES for e, _ in launched),
        Counter(e.name for e in calls),
    )
