"""Profiles as text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from fastmix.testing.profiler.measure import Part, Profile


def table(profiles: Mapping[str, Profile]) -> str:
    """The parts of one profile, or of several of one device side by side, one line a part, and their sums.

    Raises:
        ValueError: no profile, or profiles of different devices.
    """
    devices = {profile.device for profile in profiles.values()}
    if len(devices) != 1:
        raise ValueError(f"profiles must be of one device, got {' and '.join(sorted(devices)) or 'none'}")
    several = len(profiles) > 1
    columns = _columns(on_cuda="cuda" in devices, several=several)
    totals = [profile.total for profile in profiles.values()]
    parts = [{(part.name, part.backward): part for part in profile.parts} for profile in profiles.values()]

    def row(label: str, shown: Sequence[Part | None]) -> list[str]:
        pairs = list(zip(shown, totals, strict=True))
        return [label, *("" if p is None else show(p, total) for show in columns.values() for p, total in pairs)]

    rows = [["part", *(title if i == 0 else "" for title in columns for i, _ in enumerate(profiles))]]
    if several:
        rows.append(["", *(name for _ in columns for name in profiles)])
    for name, backward in _merge([list(found) for found in parts]):
        rows.append(row(name + " backward" * backward, [found.get((name, backward)) for found in parts]))
    rows.append(row("total", totals))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]
    return "\n".join([*lines[:-1], "-" * max(map(len, lines)), lines[-1]])


def summary(profile: Profile) -> list[str]:
    """What holds for the whole call, in a few lines."""
    p, host, total = profile, profile.host, profile.total
    lines = [f"host {_ms(host.median)} ms ({_ms(host.p20)} to {_ms(host.p80)}, {host.n} calls)"]
    if p.device == "cuda":
        lines[0] += f", with the device {_ms(p.wall.median)} ms"
    lines[0] += f"; shares are of a traced call, which took {_ms(p.traced_s)} ms"
    if p.device == "cuda":
        lines.append(
            f"synchronisations {total.synchronisations} (torch warns of {p.synchronisation_warnings}),"
            f" copies and fills by the device {p.copies}"
        )
        if total.kernels == 0:
            lines.append("no kernel was recorded: none ran, or CUPTI is out of reach (KINETO_LOG_LEVEL=1 says why)")
    grew = "resident memory" if p.held_bytes is None else f"allocated memory, {_mib(p.held_bytes)} before the call,"
    called = ", ".join(f"{name} {count:,}" for name, count in list(p.operators.items())[:5])
    lines += [f"{grew} grew by {_mib(p.peak_bytes)}", f"most called: {called or 'no operator'}"]
    if p.by_kernel:
        costly = list(p.by_kernel.items())[:3]
        lines.append("most time in: " + ", ".join(f"{_short(name)} {_ms(seconds)} ms" for name, (_, seconds) in costly))
    return lines


def _columns(*, on_cuda: bool, several: bool) -> dict[str, Callable[[Part, Part], str]]:
    """Title of a column -> what it shows of a part of this total."""
    columns: dict[str, Callable[[Part, Part], str]] = {
        "dispatches": lambda part, total: f"{part.dispatches:,}",
        "views": lambda part, total: f"{part.views:,}",
        "host ms": lambda part, total: _ms(part.host_s),
        "host %": lambda part, total: f"{100 * part.share:.1f}",
    }
    if on_cuda:
        columns |= {
            "kernels": lambda part, total: _count(part.kernels),
            "kernel ms": lambda part, total: _ms(part.kernel_s),
            "kernel %": lambda part, total: _percentage(part.kernel_s, total.kernel_s),
            "syncs": lambda part, total: _count(part.synchronisations),
        }
    elif not several:  # the core is ours, and there is nothing to compare it with
        columns |= {
            "core calls": lambda part, total: _count(part.kernels),
            "core ms": lambda part, total: _ms(part.kernel_s),
        }
    return columns


def _merge(orders: Sequence[Sequence[tuple[str, bool]]]) -> list[tuple[str, bool]]:
    """All keys once; those of later orders stand behind what they follow there."""
    merged: list[tuple[str, bool]] = []
    for order in orders:
        at = 0
        for key in order:
            if key in merged:
                at = merged.index(key) + 1
            else:
                merged.insert(at, key)
                at += 1
    return merged


def _count(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _short(name: str) -> str:
    """A kernel's name without the types it was made for."""
    return name.removeprefix("void ").partition("<")[0].partition("(")[0][:40]


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e3 * seconds:.3f}"


def _percentage(value: float | None, total: float | None) -> str:
    return f"{100 * value / total:.1f}" if value is not None and total else "-"


def _mib(size: int | None) -> str:
    return "an unknown amount" if size is None else f"{size / 2**20:.1f} MiB"
