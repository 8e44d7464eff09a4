"""``smac:MAP``: the StarCraft Multi-Agent Challenge (Samvelyan et al. 2019) through the package of its authors.

One game a copy, each in a worker process. Options follow the map, ``smac:3m,timeout=30,difficulty=7``: those below, and
every keyword of ``smac.env.StarCraft2Env`` but ``map_name``, ``seed`` and the two of replays.

===============  =======  ============================================================================================
``timeout``      60       seconds a game may take for a step, or for the reset of a game that runs
``start_timeout``  180    seconds the start of a game may take
``patience``     3        failures in a row of one copy that stop the run
===============  =======  ============================================================================================
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastmix import requirements
from fastmix.envs.games import GamesEnv
from fastmix.envs.keywords import parse_keywords, take_count, take_number
from fastmix.envs.workers import Workers, WorkerSettings

__all__ = ["SmacEnv", "make_smac"]

OWN = ("map_name", "seed", "replay_dir", "replay_prefix")  # ours to decide


class SmacEnv(GamesEnv):
    """E games of StarCraft II. One cannot be taken up in its middle: a resumed run begins new episodes."""

    def __init__(self, name: str, workers: Workers, seed: int, *, patience: int) -> None:
        super().__init__(name, workers, seed, replayable=False, patience=patience)
        self._workers = workers

    def save_replays(self, folder: Path) -> list[Path]:
        """Write a recording of every game, with all its episodes until now, into ``folder``; returns the new files.

        StarCraft II of the same build plays them.
        """
        folder.mkdir(parents=True, exist_ok=True)
        before = set(folder.iterdir())
        self._workers.call("save_replay", str(folder.resolve()))
        return sorted(set(folder.iterdir()) - before)


def make_smac(spec: str, n_envs: int, seed: int) -> SmacEnv:
    """``spec`` is what follows ``smac:``.

    Raises ``ImportError`` or ``FileNotFoundError`` saying what is missing and what mends it, and ``ValueError`` for a
    map or an option that smac does not know. A game starts with the first ``reset``.
    """
    map_name, options = parse_keywords(spec)
    for name in OWN:
        if name in options:
            raise ValueError(f"env is 'smac:{spec}'; {name} is not an option of it")
    patience = take_count(options, "patience", 3, 1)
    settings = WorkerSettings(
        factory="fastmix.envs.smac.game:make_game",
        arguments={"map_name": map_name, "options": _checked(options)},
        variables=_variables(),
        timeout=take_number(options, "timeout", 60.0, 0.1),
        start_timeout=take_number(options, "start_timeout", 180.0, 0.1),
    )
    requirements.demand("smac")
    return SmacEnv(f"smac:{spec}", Workers(settings, n_envs, n_envs, seed), seed, patience=patience)


def _checked(options: dict[str, Any]) -> dict[str, Any]:
    """The game names its difficulties by characters, 1 to 9 and A."""
    if "difficulty" in options:
        options["difficulty"] = str(options["difficulty"])
    return options


def _variables() -> dict[str, str]:
    """Messages generated long ago load in the implementation in Python only; it must be asked for before any import."""
    return {"PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION": "python"} if requirements.protobuf_clash() else {}
