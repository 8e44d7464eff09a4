"""fastmix: value-factorisation multi-agent reinforcement learning with fused kernels.

``import fastmix`` is light: it loads neither torch nor the compiled core, and it never creates a CUDA context, so that
environment workers may fork afterwards. The names below are loaded when they are first used.
"""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import fastmix.algorithms as algorithms
    from fastmix import agents as agents
    from fastmix import mixers as mixers
    from fastmix import ops as ops
    from fastmix.backends import backend as backend

__all__ = ["__version__", "backend", "ops", "mixers", "agents", "algorithms"]

try:
    __version__ = version("fastmix")
except PackageNotFoundError:  # a source tree on the path that was never installed
    __version__ = "0+source"

_SUBPACKAGES = ("ops", "mixers", "agents", "algorithms")


def __getattr__(name: str) -> Any:
    """Load a public name on first use (PEP 562)."""
    if name == "backend":
        return importlib.import_module("fastmix.backends").backend
    if name in _SUBPACKAGES:
        return importlib.import_module(f"fastmix.{name}")
    raise AttributeError(f"module 'fastmix' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
