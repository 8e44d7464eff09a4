"""Predator-prey (the "stag hunt" of DCG, WQMIX, pymarl2, ResQ and POWQMIX): ``prey:p-2``.

`PreyEnv` runs in the compiled core; `PreyReference` says the same in plain Python, one copy at a time.
"""

from __future__ import annotations

from fastmix.envs.prey.native import PreyEnv
from fastmix.envs.prey.reference import Decisions, PreyReference
from fastmix.envs.prey.rules import ACTIONS, EXAMPLE, PRESETS, Preset, PreyRules, from_public, parse, powqmix_preset

__all__ = [
    "ACTIONS", "EXAMPLE", "PRESETS", "Decisions", "Preset", "PreyEnv", "PreyReference", "PreyRules", "from_public",
    "make_prey", "parse", "powqmix_preset",
]  # fmt: skip


def make_prey(spec: str, n_envs: int, seed: int) -> PreyEnv:
    """``spec`` is what follows ``prey:``, see `parse`."""
    return PreyEnv(parse(spec), n_envs, seed)
