"""``smax:MAP``: battles like SMAC's, written in JAX (JaxMARL, Rutherford et al. 2023). SMAX is not SMAC.

Units, maps and the enemy's script are JaxMARL's own, and sizes, rewards and win rates are not those of StarCraft II:
no number of one can be set beside one of the other. Options follow the map, ``smax:3m,enemy_shoots=False``:
``enemy_shoots``, ``attack_mode`` ("closest" or "random") and JaxMARL's options of SMAX (``see_enemy_actions``,
``walls_cause_death``, ``max_steps``, ...).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastmix import requirements
from fastmix.envs.keywords import parse_keywords

if TYPE_CHECKING:
    from fastmix.envs.smax.env import SmaxEnv

__all__ = ["make_smax"]


def make_smax(spec: str, n_envs: int, seed: int) -> SmaxEnv:
    """``spec`` is what follows ``smax:``.

    Raises ``ImportError`` without JaxMARL, and ``ValueError`` for a map or an option that it does not know.
    """
    requirements.demand("smax")
    from fastmix.envs.smax.env import SmaxEnv

    map_name, options = parse_keywords(spec)
    return SmaxEnv(map_name, options, n_envs, seed)
