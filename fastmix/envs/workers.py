"""Games in processes of their own, with their arrays in shared memory.

Every worker is a fresh interpreter (nothing is forked, and the user's program is not imported again) that leads its own
process group. A worker that hangs, dies, or whose game breaks down is ended with all it started, and a new one takes
its place when its copies are reset.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import IO, Any

import numpy as np

from fastmix.envs.games import Driver, GamesEnv, InProcess, Slots, derive
from fastmix.envs.keywords import take_count
from fastmix.envs.protocol import EnvInfo
from fastmix.envs.worker import load_factory
from fastmix.errors import EnvironmentFailed

CLOSE_S = 10.0  # how long a game may take to end before its process is killed
LOG_LIMIT = 1 << 20  # bytes of a worker's output that are kept

_BOOT = "import sys, json; sys.path[:] = json.loads(sys.argv[2]); import fastmix.envs.worker as w; w.start(sys.argv[1])"
_BUILTIN: dict[str, type[Exception]] = {
    error.__name__: error for error in (ValueError, FileNotFoundError, ImportError, ModuleNotFoundError)
}


@dataclass(frozen=True)
class WorkerSettings:
    """What the workers play and how long they may take, in seconds."""

    factory: str
    """``"module:function"`` of ``function(seed=..., **arguments) -> Game``."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Of the factory; JSON values."""
    variables: Mapping[str, str] = field(default_factory=dict)
    """Environment variables that the workers have besides ours."""
    timeout: float = 60.0
    """For a step, and for a reset of a running game."""
    start_timeout: float = 180.0
    """For the start of a worker, and for its first reset, which launches the game."""


def make_games_env(
    name: str, factory: str, arguments: dict[str, Any], options: dict[str, Any], n_envs: int, seed: int
) -> GamesEnv:
    """An environment of ``factory``'s games that can be seeded, which get ``arguments`` and ``options``.

    ``options`` has ``workers`` taken out: that many processes, or this one for 0.
    """
    n_workers = take_count(options, "workers", 0, 0)
    given = arguments | {"options": options}
    driver: Driver
    if n_workers:
        driver = Workers(WorkerSettings(factory, given), n_envs, n_workers, seed)
    else:
        driver = InProcess(lambda seed: load_factory(factory)(seed=seed, **given), n_envs, seed)
    return GamesEnv(name, driver, seed, replayable=True)


class WorkerDied(Exception):  # noqa: N818 - what happened
    """A worker does not answer any more."""


class Workers:
    """The games of ``n_envs`` copies, spread over ``n_workers`` processes.

    Raises what the factory raises: ``ValueError``, ``FileNotFoundError`` and ``ImportError`` as they are, anything else
    as ``RuntimeError``; ``EnvironmentFailed`` where a process ends before its games are made.
    """

    def __init__(self, settings: WorkerSettings, n_envs: int, n_workers: int, seed: int) -> None:
        if not 1 <= n_workers <= n_envs:
            raise ValueError(f"workers is {n_workers}; it must be between 1 and the number of copies, {n_envs}")
        self.build = ""
        self._memory = os.memfd_create("fastmix")  # a nameless file in memory
        shares = [share.tolist() for share in np.array_split(np.arange(n_envs), n_workers)]
        self._workers = [_Worker(settings, rows, n_envs, self._memory, derive(seed, *rows)) for rows in shares]
        self._close = weakref.finalize(self, _close_all, self._workers, self._memory, os.getpid())
        try:
            # All at once: a start takes seconds.
            for worker in self._workers:
                worker.start()
            greetings = [worker.answer() for worker in self._workers]
        except WorkerDied as died:
            self.close()
            raise EnvironmentFailed(f"{settings.factory}: a worker did not start: {died}") from None
        except BaseException:
            self.close()
            raise
        self.info: EnvInfo = greetings[0][0]
        self.knows_victory: bool = greetings[0][1]
        size = Slots.size(self.info, n_envs)
        os.ftruncate(self._memory, size)
        self.slots = Slots.over(mmap.mmap(self._memory, size), self.info, n_envs)

    def reset(self, rows: np.ndarray, seeds: Sequence[int]) -> dict[int, str]:
        """See ``fastmix.envs.games.Driver``. A worker that died is started again first."""
        self._check_open()
        chosen = dict(zip(rows.tolist(), seeds, strict=True))
        asked = [(worker, [row for row in worker.rows if row in chosen]) for worker in self._workers]
        asked = [(worker, mine) for worker, mine in asked if mine]
        reborn = [worker for worker, _ in asked if not worker.alive]
        for worker in reborn:
            worker.start()
        _, unborn = self._answers(reborn)
        asked = [(worker, mine) for worker, mine in asked if worker.alive]
        answers, failed = self._ask([(w, ("reset", mine, [chosen[row] for row in mine])) for w, mine in asked])
        self.build = next(iter(answers), self.build)
        for worker, _ in asked:
            worker.launched = worker.alive
        # A worker that died takes its other copies with it, whether they were asked for or not.
        return unborn | failed

    def step(self, rows: np.ndarray) -> dict[int, str]:
        """See ``fastmix.envs.games.Driver``."""
        running = set(rows.tolist())
        asked = [(worker, [row for row in worker.rows if row in running]) for worker in self._workers]
        return self._ask([(worker, ("step", mine)) for worker, mine in asked if mine])[1]

    def call(self, method: str, *arguments: Any) -> None:
        """Call ``method(row, *arguments)`` of every game. Raises ``RuntimeError`` where one could not do it."""
        _, reasons = self._ask([(worker, ("call", method, *arguments)) for worker in self._workers if worker.alive])
        if reasons:
            raise RuntimeError(f"{method} of copy {min(reasons)}: {reasons[min(reasons)]}")

    def close(self) -> None:
        """End the games and their processes; harmless when that has been done."""
        self._close()

    def _check_open(self) -> None:
        if not self._close.alive:
            raise RuntimeError("the environment has been closed")

    def _ask(self, commands: Sequence[tuple[_Worker, tuple[Any, ...]]]) -> tuple[list[Any], dict[int, str]]:
        self._check_open()
        for worker, command in commands:
            worker.send(command)
        return self._answers([worker for worker, _ in commands])

    def _answers(self, workers: Sequence[_Worker]) -> tuple[list[Any], dict[int, str]]:
        """What the workers answer, and why the rows of those failed that did not."""
        answers: list[Any] = []
        reasons: dict[int, str] = {}
        for worker in workers:
            try:
                answers.append(worker.answer())
            except WorkerDied as died:
                reasons |= dict.fromkeys(worker.rows, str(died))
            except Exception:
                self.close()  # the answers of the others would be taken for those to the next command
                raise
        return answers, reasons


class _Worker:
    """One process and our ends of its pipes."""

    def __init__(self, settings: WorkerSettings, rows: list[int], n_envs: int, memory: int, seed: int) -> None:
        self.settings, self.rows, self.n_envs, self.memory, self.seed = settings, rows, n_envs, memory, seed
        self.generation = 0
        self.process: subprocess.Popen[bytes] | None = None
        self.deadline = 0.0
        self.launched = False  # has answered a reset: its game runs

    @property
    def alive(self) -> bool:
        """Whether there is a process that has not failed yet."""
        return self.process is not None

    def start(self) -> None:
        """Start the process; its answer is what the games are. Each start has other seeds, so that games differ."""
        ours, theirs = Pipe()
        life_theirs, life_ours = os.pipe()
        self.log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed by kill()
        settings = {
            "commands": theirs.fileno(),
            "life": life_theirs,
            "memory": self.memory,
            "parent": os.getpid(),
            "factory": self.settings.factory,
            "arguments": dict(self.settings.arguments),
            "seeds": [derive(self.seed, self.generation, row) for row in self.rows],
            "rows": self.rows,
            "n_envs": self.n_envs,
        }
        # Warnings that the user made errors are not meant for other people's programs.
        variables = {k: v for k, v in os.environ.items() if k != "PYTHONWARNINGS"}
        variables |= {"OMP_NUM_THREADS": "1", **self.settings.variables}
        self.process = subprocess.Popen(
            [sys.executable, "-c", _BOOT, json.dumps(settings), json.dumps(sys.path)],
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=self.log,
            env=variables,
            pass_fds=(theirs.fileno(), life_theirs, self.memory),
            start_new_session=True,
        )
        theirs.close()
        os.close(life_theirs)
        self.pipe: Connection = ours
        self.life = life_ours
        self.generation += 1
        self.launched = False
        self.deadline = time.monotonic() + self.settings.start_timeout

    def send(self, command: tuple[Any, ...]) -> None:
        """Hand over a command; :meth:`answer` tells what came of it."""
        limit = self.settings.timeout if self.launched else self.settings.start_timeout
        self.deadline = time.monotonic() + limit
        with contextlib.suppress(OSError):  # a worker that is gone does not answer either
            self.pipe.send(command)

    def answer(self) -> Any:
        """The answer to the command before. Raises ``WorkerDied`` where there is none, after ending the process."""
        left = self.deadline - time.monotonic()
        if not wait([self.pipe], max(left, 0.0)):
            limit = self.settings.timeout if self.launched else self.settings.start_timeout
            raise self._died(f"it did not answer within {limit:g} s")
        try:
            kind, value = self.pipe.recv()
        except (EOFError, OSError):
            raise self._died(f"its process ended{self._status()}") from None
        if kind == "failed":
            self.kill()
            raise WorkerDied(value)
        if kind == "error":
            name, message, trace = value
            self.kill()
            known = _BUILTIN.get(name)
            raised = known(message) if known else RuntimeError(f"the environment raised {name}: {message}")
            raise raised from RuntimeError(f"in a worker:\n{trace}")
        self._trim_log()
        return value

    def ask_to_close(self) -> None:
        """Let the games end in their own way."""
        if self.process is not None:
            self.deadline = time.monotonic() + CLOSE_S
            with contextlib.suppress(OSError):
                self.pipe.send(("close",))

    def kill(self) -> None:
        """End the process with everything that it started."""
        process, self.process = self.process, None
        if process is None:
            return
        # Before it is waited for, so that its number cannot belong to anybody else.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        self.pipe.close()
        os.close(self.life)
        self.log.close()

    def await_end(self) -> None:
        """After :meth:`ask_to_close`: wait a little, then make sure."""
        if self.process is not None:
            with contextlib.suppress(EOFError, OSError):
                wait([self.pipe], max(self.deadline - time.monotonic(), 0.0))
            self.kill()

    def _died(self, reason: str) -> WorkerDied:
        tail = self._last_words()
        self.kill()
        return WorkerDied(f"{reason} (it said: {tail})" if tail else reason)

    def _status(self) -> str:
        assert self.process is not None
        for _ in range(100):
            # Looked at only: the process keeps its number until its group has been killed.
            ended = os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
            if ended is not None:
                by_itself = ended.si_code == os.CLD_EXITED
                return f" with status {ended.si_status}" if by_itself else f" by {signal.Signals(ended.si_status).name}"
            time.sleep(0.01)
        return ""  # it closed the pipe and lives on

    def _last_words(self) -> str:
        """The last line that the worker or its game wrote."""
        size = os.fstat(self.log.fileno()).st_size
        tail = os.pread(self.log.fileno(), 2000, max(0, size - 2000)).decode(errors="replace")
        return next((line.strip() for line in reversed(tail.splitlines()) if line.strip()), "")

    def _trim_log(self) -> None:
        if os.fstat(self.log.fileno()).st_size > LOG_LIMIT:
            os.ftruncate(self.log.fileno(), 0)
            os.lseek(self.log.fileno(), 0, os.SEEK_SET)  # the worker writes where this says


def _close_all(workers: Sequence[_Worker], memory: int, owner: int) -> None:
    if os.getpid() != owner:
        return  # in a fork: the games are those of the process that it was made of
    for worker in workers:
        worker.ask_to_close()
    for worker in workers:
        worker.await_end()
    os.close(memory)
