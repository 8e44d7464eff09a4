"""What the environments of others need, judged by files: importing some of those packages has side effects."""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final


@dataclass(frozen=True)
class Problem:
    """Something missing or wrong, and the shell command that mends it."""

    what: str
    fix: str
    of_files: bool = False
    """Of a program's files rather than of a Python package."""
    blocking: bool = True
    """Whether nothing works until it is mended."""


def demand(family: str) -> None:
    """Raise for the first thing that an environment of ``family`` lacks: ``FileNotFoundError`` for the game, else
    ``ImportError``; both say what mends it.
    """
    for problem in CHECKS[family]():
        if not problem.blocking:
            continue
        raised = FileNotFoundError if problem.of_files else ImportError
        raise raised(f"{family}: {problem.what}; mend it by: {problem.fix}")


def installed(module: str) -> bool:
    """Whether a top-level module can be found, without importing it."""
    return importlib.util.find_spec(module) is not None


def installed_version(distribution: str) -> str | None:
    """The version of an installed package, ``None`` where there is none."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


_SMAC_GIT = "git+https://github.com/oxwhirl/smac.git"
_GAME_DOWNLOAD = (
    "curl -LO https://blzdistsc2-a.akamaihd.net/Linux/SC2.4.10.zip && unzip -o -P iagreetotheeula SC2.4.10.zip"
)
_MAPS_DOWNLOAD = "curl -LO https://github.com/oxwhirl/smac/releases/download/v0.1-beta1/SMAC_Maps.zip"


def _smac() -> Iterator[Problem]:
    """What the adapter of oxwhirl/smac needs: the right package, the game and the maps."""
    folder = _package_folder("smac")
    if folder is None:
        yield Problem(
            "the package smac is not installed (not the one on PyPI, which is another project)",
            f"pip install {_SMAC_GIT}",
        )
    elif not _is_starcraft_smac(folder):
        which = f"smac {installed_version('smac')}" if installed_version("smac") else "the smac"
        yield Problem(
            f"{which} in {folder.parent} is another project (AutoML's optimiser): it has no StarCraft2Env",
            f"pip uninstall -y smac && pip install {_SMAC_GIT}",
        )
    if not installed("pysc2"):
        yield Problem("the package pysc2 is not installed", "pip install pysc2 s2clientprotocol")
    if installed_version("enum34") is not None:
        what = "enum34, which pysc2 asks for, breaks every Python that has its folder in PYTHONPATH"
        yield Problem(what, "pip uninstall -y enum34", blocking=False)
    yield from _starcraft()


def _package_folder(module: str) -> Path | None:
    spec = importlib.util.find_spec(module)
    return Path(next(iter(spec.submodule_search_locations))) if spec and spec.submodule_search_locations else None


def _is_starcraft_smac(folder: Path) -> bool:
    return (folder / "env" / "starcraft2" / "starcraft2.py").is_file()


def protobuf_clash() -> bool:
    """Whether the compiled protobuf of today (4.21 and newer) cannot load the game's messages, generated long ago.

    ``TypeError: Descriptors cannot be created directly``; its implementation in Python can.
    """
    generated, protobuf = _package_folder("s2clientprotocol"), installed_version("protobuf")
    if generated is None or protobuf is None:
        return False
    try:
        text = (generated / "sc2api_pb2.py").read_text(encoding="utf-8", errors="replace")
    except OSError:  # a package without that file is not the old one
        return False
    old_style = "_descriptor.FieldDescriptor(" in text
    return old_style and tuple(int(part) for part in protobuf.split(".")[:2]) >= (3, 21)


def _starcraft() -> Iterator[Problem]:
    home = Path(os.environ.get("SC2PATH") or "~/StarCraftII").expanduser()
    named = "SC2PATH" if os.environ.get("SC2PATH") else "SC2PATH is not set and"
    if not home.is_dir():
        yield Problem(
            f"StarCraft II is not installed: {named} {home} is no folder"
            " (the password accepts Blizzard's AI and Machine Learning License)",
            f"{_GAME_DOWNLOAD} -d ~ && export SC2PATH=~/StarCraftII",
            of_files=True,
        )
        return
    binaries = sorted(home.glob("Versions/Base*/SC2_x64"))
    if not binaries:
        yield Problem(
            f"no game binary Versions/Base*/SC2_x64 in {home}: an incomplete install",
            f"{_GAME_DOWNLOAD} -d {home.parent}",
            of_files=True,
        )
    for binary in binaries:
        if not os.access(binary, os.X_OK):
            yield Problem(f"the game binary {binary} may not be executed", f"chmod +x {binary}", of_files=True)
    if next((home / "Maps").glob("SMAC_Maps/*.SC2Map"), None) is None:
        yield Problem(
            f"the SMAC maps are not in {home / 'Maps' / 'SMAC_Maps'}",
            f"{_MAPS_DOWNLOAD} && mkdir -p {home / 'Maps'} && unzip -o SMAC_Maps.zip -d {home / 'Maps'}",
            of_files=True,
        )


def _smax() -> Iterator[Problem]:
    if sys.version_info < (3, 11):
        yield Problem(
            f"JaxMARL needs Python 3.11 or newer, this is {platform.python_version()}", "python3.11 -m venv .venv"
        )
    if not installed("jaxmarl"):
        yield Problem("the package jaxmarl is not installed", "pip install jaxmarl==0.2.0")


def _pettingzoo() -> Iterator[Problem]:
    if not installed("pettingzoo"):
        yield Problem("the package pettingzoo is not installed", "pip install 'pettingzoo>=1.24'")


def _gym() -> Iterator[Problem]:
    if not installed("gymnasium"):
        yield Problem("the package gymnasium is not installed", "pip install 'gymnasium>=0.29'")


CHECKS: Final[dict[str, Callable[[], Iterator[Problem]]]] = {
    "smac": _smac,
    "smax": _smax,
    "pettingzoo": _pettingzoo,
    "gym": _gym,
}
"""Family of environments -> what it lacks here."""
