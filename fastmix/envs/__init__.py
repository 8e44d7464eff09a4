"""Batched environments: ``make("matrix:resq1", n_envs=8, seed=0)``."""

from __future__ import annotations

from collections.abc import Callable

from fastmix.envs.custom import make_custom
from fastmix.envs.group_matching import GroupMatching, make_group_matching
from fastmix.envs.matrix import MatrixGame, Payoff, make_matrix
from fastmix.envs.prey import PreyEnv, make_prey
from fastmix.envs.protocol import BatchedEnv, EnvInfo, StateDict

__all__ = ["REGISTRY", "BatchedEnv", "EnvInfo", "GroupMatching", "MatrixGame", "Payoff", "PreyEnv", "StateDict", "make"]

# family -> factory(what follows the colon, n_envs, seed)
REGISTRY: dict[str, Callable[[str, int, int], BatchedEnv]] = {
    "group_matching": make_group_matching,
    "matrix": make_matrix,
    "prey": make_prey,
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
