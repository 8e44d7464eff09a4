"""What runs in a worker process: a few games, moved by commands from a pipe, writing into shared memory.

The process leads a group of its own, to which every program belongs that its games start. It ends the whole group as
soon as the process that made it is gone, in whatever way that one ended.
"""

from __future__ import annotations

import importlib
import mmap
import os
import select
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from fastmix.envs.games import Game, GameFailed, Slots

PARENT_POLL_S = 1.0  # how soon a worker notices where the pipe does not tell it


def main(settings: dict[str, Any]) -> None:
    """Serve until told to close, or until the other end is gone.

    ``settings``: ``commands`` and ``life`` (descriptors of the pipe, and of one whose only writer is the parent),
    ``memory`` (of the shared file), ``parent`` (its process id), ``factory`` ("module:function"), ``arguments`` of it,
    ``seeds`` (one a game), ``rows`` (that of each game) and ``n_envs``.
    """
    threading.Thread(target=_end_with_parent, args=(settings["life"], settings["parent"]), daemon=True).start()
    pipe = Connection(settings["commands"])
    try:
        make = load_factory(settings["factory"])
        games = [make(seed=seed, **settings["arguments"]) for seed in settings["seeds"]]
    except Exception as error:
        pipe.send(_failure(error))
        return
    worker = _Worker(settings, games)
    pipe.send(("ok", (games[0].info, games[0].knows_victory)))
    try:
        while True:
            command, *arguments = pipe.recv()
            if command == "close":
                break
            try:
                pipe.send(("ok", getattr(worker, command)(*arguments)))
            except Exception as error:
                pipe.send(_failure(error))
    finally:
        for game in games:
            game.close()
    pipe.send(("ok", None))


def load_factory(path: str) -> Callable[..., Game]:
    """The function ``"module:function"``."""
    module, _, function = path.partition(":")
    factory: Callable[..., Game] = getattr(importlib.import_module(module), function)
    return factory


class _Worker:
    """The commands, one method each."""

    def __init__(self, settings: dict[str, Any], games: list[Game]) -> None:
        self.memory, self.n_envs = settings["memory"], settings["n_envs"]
        self.games = dict(zip(settings["rows"], games, strict=True))
        self.slots: Slots | None = None

    def reset(self, rows: list[int], seeds: list[int]) -> str:
        """Begin episodes; returns the build of the game, which is known by then."""
        if self.slots is None:
            self.slots = Slots.over(mmap.mmap(self.memory, 0), self.games[rows[0]].info, self.n_envs)
        for row, seed in zip(rows, seeds, strict=True):
            self.slots.begin(row, self.games[row], seed)
        return self.games[rows[0]].build

    def step(self, rows: list[int]) -> None:
        """Take the actions that stand in shared memory."""
        assert self.slots is not None, "step came before reset"
        for row in rows:
            self.slots.advance(row, self.games[row])

    def call(self, method: str, *arguments: Any) -> None:
        """Call a method that only this kind of game has, with the row of each game before the ``arguments``."""
        for row, game in self.games.items():
            getattr(game, method)(row, *arguments)


def _failure(error: Exception) -> tuple[str, Any]:
    if isinstance(error, GameFailed):
        return "failed", str(error)
    return "error", (type(error).__name__, str(error), traceback.format_exc())


def _end_with_parent(life: int, parent: int) -> None:
    """Wait for the end of the parent, then kill the group.

    Nobody ever writes to ``life``: it becomes readable when its only writer is gone.
    """
    while not select.select([life], [], [], PARENT_POLL_S)[0] and os.getppid() == parent:
        pass
    if os.getpgrp() == os.getpid():  # not where somebody runs this by hand
        os.killpg(os.getpgrp(), signal.SIGKILL)
    os._exit(1)


def start(text: str) -> None:
    """Where the process begins: ``text`` is the JSON of :func:`main`'s settings."""
    import json

    sys.argv[1:] = []  # smac reads the command line
    main(json.loads(text))
