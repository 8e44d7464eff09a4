"""Batched environments: ``make("matrix:resq1", n_envs=8, seed=0)``.

Importing this loads numpy only: worker processes import it, and need neither torch nor the other families.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fastmix.envs.custom import make_custom
from fastmix.envs.group_matching import GroupMatching, make_group_matching
from fastmix.envs.matrix import MatrixGame, Payoff, make_matrix
from fastmix.envs.protocol import BatchedEnv, EnvInfo, ExternalEnv, StateDict

if TYPE_CHECKING:
    from fastmix.envs.prey import PreyEnv

__all__ = [
    "REGISTRY",
    "BatchedEnv",
    "EnvInfo",
    "ExternalEnv",
    "GroupMatching",
    "MatrixGame",
    "Payoff",
    "PreyEnv",
    "StateDict",
    "make",
]

Factory = Callable[[str, int, int], BatchedEnv]


def _later(module: str, name: str) -> Factory:
    """The factory ``name`` of ``module``, which is imported when it is first called."""

    def make_it(spec: str, n_envs: int, seed: int) -> BatchedEnv:
        factory: Factory = getattr(importlib.import_module(module), name)
        return factory(spec, n_envs, seed)

    return make_it


# family -> factory(what follows the colon, n_envs, seed)
REGISTRY: dict[str, Factory] = {
    "matrix": make_matrix,
    "group_matching": make_group_matching,
    "prey": _later("fastmix.envs.prey", "make_prey"),
    "smac": _later("fastmix.envs.smac", "make_smac"),
    "smax": _later("fastmix.envs.smax", "make_smax"),
    "pettingzoo": _later("fastmix.envs.pettingzoo", "make_pettingzoo"),
    "gym": _later("fastmix.envs.gym", "make_gym"),
    "python": make_custom,
}


def make(name: str, n_envs: int, seed: int) -> BatchedEnv:
    """``n_envs`` copies of the environment ``name`` (``family:map``); ``seed`` decides everything random in them.

    Raises ``ValueError`` naming what is known when the family or the map does not exist.
    """
    family, colon, spec = name.partition(":")
    if family not in REGISTRY or not colon or not spec:
        known = ", ".join(f"{known}:<name>" for known in REGISTRY)
        raise ValueError(f"env is {name!r}; it must be one of {known} (for example matrix:resq1, prey:p-2)")
    if n_envs < 1:
        raise ValueError(f"n_envs is {n_envs}; it must be at least 1")
    return REGISTRY[family](spec, n_envs, seed)


def __getattr__(name: str) -> Any:
    """Load a public name on first use (PEP 562)."""
    if name == "PreyEnv":
        return importlib.import_module("fastmix.envs.prey").PreyEnv
    raise AttributeError(f"module 'fastmix.envs' has no attribute {name!r}")
