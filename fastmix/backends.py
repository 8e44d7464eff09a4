"""Which implementation of an op runs: ``reference``, ``native`` or ``triton``.

The choice is automatic, by device and dtype, from `TABLE`. A choice made by the user (the ``backend=`` argument of an
op, ``with fastmix.backend("..."):`` or the environment variable ``FASTMIX_BACKEND``, read once, in this order of
precedence) works or raises; it never falls back quietly.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Final

import torch

logger = logging.getLogger("fastmix")

NAMES: Final = ("reference", "native", "triton")

# op -> device -> backends, the preferred one first. "native" is the compiled core, "reference" is plain PyTorch and is
# always possible. Source of the order: the op tables of `fastmix bench ops` (benchmarks/results/).
TABLE: Final[dict[str, dict[str, tuple[str, ...]]]] = {
    op: {"cpu": ("native", "reference"), "cuda": ("native", "reference") if op == "returns" else ("reference",)}
    for op in ("select", "returns", "recurrent", "monotonic", "td_loss", "optimise")
}

NATIVE_DTYPES: Final = (torch.float32, torch.float64)

_chosen: str | None = None  # by backend(); a plain global, which torch.compile guards on


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Use the backend ``name`` for every fastmix op inside the ``with`` block; ops that lack it raise."""
    global _chosen
    outer, _chosen = _chosen, _known(name, "backend()")
    try:
        yield
    finally:
        _chosen = outer


def resolve(op: str, tensor: torch.Tensor, explicit: str | None = None) -> str:
    """Name of the backend that runs ``op`` on data like ``tensor``.

    Raises:
        ValueError: an unknown backend name.
        RuntimeError: the user's choice cannot run this op on this device and dtype, with the reason.
    """
    return _resolve(op, tensor.device.type, tensor.dtype, explicit or _chosen)


@cache
def core_problem() -> str | None:
    """Why the compiled core cannot be imported, or None when it can."""
    try:
        from fastmix import _core  # noqa: F401
    except ImportError as error:
        return f"the compiled core cannot be imported ({error}); reinstall fastmix with a C++20 compiler"
    return None


@cache
def cuda_problem() -> str | None:
    """Why the compiled core has no CUDA kernels, or None when it has; asks for no device."""
    from fastmix import _core

    if _core.cuda:
        return None
    return "the compiled core was built without CUDA; install a CUDA toolkit (nvcc) and reinstall fastmix"


def available(op: str, device: str = "cpu") -> tuple[str, ...]:
    """Backends that can run ``op`` on ``device`` here (float32), the preferred one first."""
    return tuple(
        name for name in TABLE[op].get(device, ("reference",)) if not _obstacle(op, name, device, torch.float32)
    )


@torch.compiler.assume_constant_result  # a constant in compiled code, made by running the function, not by tracing it
def _resolve(op: str, device: str, dtype: torch.dtype, chosen: str | None) -> str:
    return _decide(op, device, dtype, chosen)


@cache
def _decide(op: str, device: str, dtype: torch.dtype, chosen: str | None) -> str:
    chosen = chosen or os.environ.get("FASTMIX_BACKEND") or None
    if chosen is not None:
        reason = _obstacle(op, _known(chosen, "backend"), device, dtype)
        if reason:
            raise RuntimeError(f"backend {chosen!r} was asked for, but {reason}")
        return chosen
    for name in TABLE[op].get(device, ("reference",)):
        reason = _obstacle(op, name, device, dtype)
        if not reason:
            logger.debug("%s on %s %s runs on backend %r", op, device, dtype, name)
            return name
        logger.info("%s on %s %s does not run on backend %r: %s", op, device, dtype, name, reason)
    return "reference"


def _obstacle(op: str, name: str, device: str, dtype: torch.dtype) -> str | None:
    if name == "reference":
        return None
    if name not in TABLE[op].get(device, ()):
        return f"{op} has no {name!r} backend on device {device!r}"
    if dtype not in NATIVE_DTYPES:
        return f"{op} on {name!r} takes {' or '.join(map(str, NATIVE_DTYPES))}, got {dtype}"
    return core_problem() or (cuda_problem() if device == "cuda" else None)


def _known(name: str, argument: str) -> str:
    if name not in NAMES:
        raise ValueError(f"{argument} must be one of {', '.join(NAMES)}, got {name!r}")
    return name
