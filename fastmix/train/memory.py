"""Memory of host and device: how much this process may still take, and how data go from one to the other.

A replay buffer that does not fit is refused with a sentence, not by a crash.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor


def available_memory() -> int | None:
    """Bytes that can be allocated without swapping, or ``None`` where the system does not say.

    The smaller of what the kernel calls available and what is left of this process's control group (containers).
    """
    limits = [limit for limit in (_meminfo_available(), _cgroup_left()) if limit is not None]
    if limits:
        return min(limits)
    names = getattr(os, "sysconf_names", {})
    if "SC_AVPHYS_PAGES" in names and "SC_PAGE_SIZE" in names:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def free_device_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on a CUDA ``device``."""
    free, _ = torch.cuda.mem_get_info(device)
    return free


def pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy of a host ``tensor`` that can travel to ``device`` while the host goes on; itself where that is the host.

    For ``.to(device, non_blocking=True)`` and ``.copy_(..., non_blocking=True)``. The original may be written to at
    once, and the copy be dropped: torch keeps its memory until the device has read it.
    """
    return tensor.pin_memory() if device.type == "cuda" else tensor


def human_bytes(n: int) -> str:
    """``12.3 MB``: decimal units, three digits."""
    value = float(n)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def _meminfo_available() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _cgroup_left() -> int | None:
    for limit_file, usage_file in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            limit = Path(limit_file).read_text(encoding="ascii").strip()
            usage = Path(usage_file).read_text(encoding="ascii").strip()
        except OSError:
            continue
        if limit == "max":
            return None
        return max(0, int(limit) - int(usage))
    return None
