"""Which implementation of an op runs: ``reference``, ``native``, ``triton`` or ``cudnn``.

The choice is automatic, by device and dtype, from `TABLE`. A choice made by the user (the ``backend=`` argument of an
op, ``with fastmix.backend("..."):`` or the environment variable ``FASTMIX_BACKEND``, read once, in this order of
precedence) works or raises; it never falls back quietly.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Final

import torch

logger = logging.getLogger("fastmix")

NAMES: Final = ("reference", "native", "triton", "cudnn")

# op -> device -> backends, the preferred one first. "native" is the compiled core, "reference" is plain PyTorch and is
# always possible. Source of the order: benchmarks/results, the CPU's as measured by `fastmix bench table`, a GPU's by
# benchmarks/gpu.sh (without gradients `monotonic` through Triton is up to a tenth faster, at thrice the host time).
TABLE: Final[dict[str, dict[str, tuple[str, ...]]]] = {
    **{
        op: {"cpu": ("native", "reference"), "cuda": ("native", "reference")}
        for op in ("select", "returns", "td_loss", "quantile", "optimise")
    },
    # On the CPU Triton only interprets, for tests, and "cudnn" is PyTorch's own GRU; neither is ever chosen there.
    "monotonic": {"cpu": ("native", "reference", "triton"), "cuda": ("native", "triton", "reference")},
    "recurrent": {"cpu": ("native", "reference", "cudnn"), "cuda": ("native", "cudnn", "reference")},
    # So far plain PyTorch everywhere.
    **{op: {} for op in ("attention", "duplex", "importance", "recognise", "unrestricted")},
}

NATIVE_DTYPES: Final = (torch.float32, torch.float64)
TRITON_DTYPES: Final = (torch.float32, torch.float16, torch.bfloat16)
# Not float16, in which cuDNN 9.19 was off by 8 % on an H200.
CUDNN_DTYPES: Final = (torch.float32, torch.float64, torch.bfloat16)
# Of native kernels on CUDA that multiply on the matrix units: they have float32 only, from compute capability 8.0 on.
MATRIX_OPS: Final = ("monotonic", "recurrent")


class UnavailableError(RuntimeError):
    """The backend that the user chose cannot run this op on this device, dtype or size."""


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


def resolve(op: str, tensor: torch.Tensor, explicit: str | None = None, *, native_limit: str | None = None) -> str:
    """Name of the backend that runs ``op`` on data like ``tensor``.

    ``native_limit`` is why the native backend cannot do this very call, where it does not take every size: the
    automatic choice then goes on to the next backend.

    Raises:
        ValueError: an unknown backend name.
        UnavailableError: the user's choice cannot run this op on this device and dtype, or this very call, with the
            reason.
    """
    return _resolve(op, tensor.device.type, tensor.dtype, explicit or _chosen, native_limit)


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


@cache
def matrix_problem() -> str | None:
    """Why products of ours cannot run on this GPU, or None where they can or where there is none to ask."""
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
        return "its products need a GPU of compute capability 8.0 or newer"
    return None


@cache
def triton_problem(device: str) -> str | None:
    """Why Triton kernels cannot run on ``device``, or None when they can; does not import Triton."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; pip install 'fastmix[triton]'"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device == "cpu":
        return None if interpreted else "Triton runs on the CPU only in its interpreter (TRITON_INTERPRET=1)"
    if interpreted:
        return "TRITON_INTERPRET=1 is set, and Triton's interpreter runs on the CPU"
    return matrix_problem() if device == "cuda" else None


def cudnn_problem(device: str) -> str | None:
    """Why cuDNN's GRU cannot run on ``device``, or None when it can; PyTorch's own takes its place on the CPU."""
    if device == "cpu" or torch.backends.cudnn.is_available():
        return None
    return "this PyTorch has no cuDNN; install one that has, or choose another backend"


def available(op: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[str, ...]:
    """Backends that can run ``op`` on ``device`` here, the preferred one first."""
    return tuple(name for name in TABLE[op].get(device, ("reference",)) if not _obstacle(op, name, device, dtype))


def _resolve(op: str, device: str, dtype: torch.dtype, chosen: str | None, native_limit: str | None) -> str:
    return _decide(op, device, dtype, chosen, native_limit)


# A constant in compiled code, made by running the function, not by tracing it. This is all that
# torch.compiler.assume_constant_result does, which would import torch._dynamo here, and that imports Triton.
_resolve._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _decide(op: str, device: str, dtype: torch.dtype, chosen: str | None, native_limit: str | None = None) -> str:
    def obstacle(name: str) -> str | None:
        return _obstacle(op, name, device, dtype) or (native_limit if name == "native" else None)

    chosen = chosen or os.environ.get("FASTMIX_BACKEND") or None
    if chosen is not None:
        reason = obstacle(_known(chosen, "backend"))
        if reason:
            raise UnavailableError(f"backend {chosen!r} was asked for, but {reason}")
        return chosen
    for name in TABLE[op].get(device, ("reference",)):
        reason = obstacle(name)
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
    on_matrix_units = name == "native" and device == "cuda" and op in MATRIX_OPS
    native_dtypes = NATIVE_DTYPES[:1] if on_matrix_units else NATIVE_DTYPES
    dtypes = {"triton": TRITON_DTYPES, "cudnn": CUDNN_DTYPES}.get(name, native_dtypes)
    if dtype not in dtypes:
        return f"{op} on {name!r} takes {' or '.join(map(str, dtypes))}, got {dtype}"
    if name == "triton":
        return triton_problem(device)
    if name == "cudnn":
        return cudnn_problem(device)
    return (
        core_problem()
        or (cuda_problem() if device == "cuda" else None)
        or (matrix_problem() if on_matrix_units else None)
    )


def _known(name: str, argument: str) -> str:
    if name not in NAMES:
        raise ValueError(f"{argument} must be one of {', '.join(NAMES)}, got {name!r}")
    return name
