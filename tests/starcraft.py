"""A made-up installation of StarCraft II, and a package with smac's interface to play on it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

FAKES = Path(__file__).parent / "envs" / "fakes"
"""Holds the packages smac, pysc2 and s2clientprotocol; how to make a game fail stands in smac's."""


def install_game(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the adapter looks for of the game; returns its folder."""
    home = folder / "StarCraftII"
    binary = home / "Versions" / "Base75689" / "SC2_x64"
    maps = home / "Maps" / "SMAC_Maps"
    binary.parent.mkdir(parents=True)
    maps.mkdir(parents=True)
    binary.touch(mode=0o755)
    (maps / "3m.SC2Map").touch()
    monkeypatch.setenv("SC2PATH", str(home))
    return home


def install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The game and the packages."""
    install_game(folder, monkeypatch)
    monkeypatch.syspath_prepend(str(FAKES))


def games(ledger: Path) -> list[int]:
    """The process ids of the games that run."""
    return [pid for pid in (int(path.name[5:]) for path in ledger.glob("game-*")) if _alive(pid)]


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    """Whether ``condition`` came true in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def _alive(pid: int) -> bool:
    try:
        # A process that nobody waits for is dead all the same.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
