"""The training loop: collect episodes, step the algorithm, copy targets, evaluate, log, checkpoint.

One round is PyMARL's: ``batch_size_run`` finished episodes, then ``updates_per_round`` gradient steps. Everything that
decides the future of a run is in its checkpoint, so a run killed at any moment resumes and ends with the same weights,
bit for bit, as one that was never killed.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastmix import algorithms, envs
from fastmix.algorithms import Algorithm
from fastmix.envs import BatchedEnv, EnvInfo, ExternalEnv
from fastmix.errors import EnvironmentFailed
from fastmix.train import checkpoint
from fastmix.train.config import TrainConfig
from fastmix.train.evaluate import evaluate
from fastmix.train.feed import make_feed
from fastmix.train.learner import Learner
from fastmix.train.logging import RunLogger
from fastmix.train.plan import Plan, make_replay, overrides_of, scheme_of
from fastmix.train.rollout import EpisodeStats, Player, Rollout

log = logging.getLogger(__name__)

ABSOLUTE_FACTOR = 10
"""Episodes of the evaluation at the end, of the best networks, as a multiple of those of the others."""

CONFIG_FILE, RESULT_FILE, BEST_FILE, CHECKPOINT_FOLDER = "config.json", "result.json", "best.safetensors", "checkpoints"


# Told the environment steps so far; returns whether to stop, as a signal would.
Progress = Callable[[int], bool]


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop (SIGINT, SIGTERM); its state is in the newest checkpoint."""


@dataclasses.dataclass
class Counters:
    """Where a run is. All of it is in the checkpoint."""

    t_env: int = 0
    episodes: int = 0
    updates: int = 0
    last_target_update: int = 0  # in episodes
    last_test: int | None = None  # in environment steps, as the rest
    last_log: int = 0
    last_checkpoint: int = 0
    best_return: float | None = None
    wall_s: float = 0.0
    log_offset: int = 0


class Trainer:
    """One run of one seed in ``folder``.

    The constructor checks every setting and builds everything in memory; it writes nothing. A folder that already holds
    checkpoints of the same config is continued from the newest one; one of another config raises ``ValueError``.
    ``on_progress`` is called after every round, ``announce`` with what a user wants to know before a long run starts.
    """

    def __init__(
        self,
        config: TrainConfig,
        folder: Path,
        *,
        on_progress: Progress | None = None,
        announce: Callable[[str], None] = log.info,
    ) -> None:
        self.config = config
        self.folder = folder
        self._on_progress = on_progress or (lambda t_env: False)
        self._stop = False
        seeds = _seeds(config.seed)

        plan = Plan.of(config)
        _check_folder(folder, plan)
        for sentence in plan.sentences():
            announce(sentence)
        n_envs = plan.settings.batch_size_run
        self.plan, self.t_max = plan, plan.t_max
        self.algo = make_algorithm(config, plan.info)
        self.device = torch.device(config.device)
        self.learner = Learner(self.algo, graphs=config.graphs)
        self.replay = make_replay(plan, seeds["replay"], announce)
        self.feed = make_feed(self.replay, self.device)
        self.rollout = Rollout(
            Player(envs.make(config.env, n_envs, seeds["env"]), self.algo, self.device),
            self.replay,
            plan.epsilon,
            _generator(self.device, seeds["explore"]),
            stored_termination=config.stored_termination,
        )
        self.test_env = envs.make(config.env, min(n_envs, plan.test_nepisode), seeds["test_env"])
        self._test_generator = _generator(self.device, seeds["test_explore"])
        # Nothing of ours draws from torch's global generator; an algorithm may, so its state belongs to the run.
        torch.manual_seed(seeds["torch"])
        self.counters = Counters()
        self._stats: dict[str, Tensor] = {}
        self._test: dict[str, float] = {}
        self._logged_updates = 0
        saved = checkpoint.list_checkpoints(folder / CHECKPOINT_FOLDER)
        if saved:
            self.load_state_dict(checkpoint.load(saved[-1]))
            announce(f"resuming from {saved[-1]} at {self.counters.t_env} environment steps")

    def run(self) -> dict[str, Any]:
        """Train to ``t_max`` and return what came of it (also for a run that had already ended).

        Raises ``Interrupted`` after SIGINT or SIGTERM, once the round is done and checkpointed, ``EnvironmentFailed``,
        checkpointed too, when the games keep breaking down, and ``FloatingPointError`` when the loss is no longer
        finite.
        """
        config, counters = self.config, self.counters
        self.folder.mkdir(parents=True, exist_ok=True)
        for folder in (self.folder, self.folder / CHECKPOINT_FOLDER):
            checkpoint.sweep_up(folder)
        checkpoint.write_json(self.folder / CONFIG_FILE, self.plan.description)
        logger = RunLogger(
            self.folder, tensorboard=config.tensorboard, offset=counters.log_offset, t_env=counters.t_env
        )
        self._clock = time.perf_counter()
        self._logged_at, self._logged_updates = counters.t_env, counters.updates
        self._logged_wall = counters.wall_s
        with self._stopping_on_signals():
            try:
                while counters.t_env < self.t_max:
                    self._evaluate_if_due(logger)
                    self._round()
                    if self._log_is_due():
                        self._log(logger)
                    asked = self._on_progress(counters.t_env)
                    stop = asked or self._stop  # looked at once: a signal may come at any moment
                    due = counters.t_env - counters.last_checkpoint >= config.checkpoint_interval
                    if due or stop:
                        self._checkpoint(logger)
                    if stop:
                        raise Interrupted(f"stopped at {counters.t_env} of {self.t_max} environment steps")
                if counters.last_test != counters.t_env:
                    self._evaluate(logger)
                if counters.last_checkpoint != counters.t_env:
                    self._checkpoint(logger)
            except EnvironmentFailed:
                self._checkpoint(logger)
                raise
            finally:
                logger.close()
        absolute = self._absolute_metric()
        return {
            "seed": config.seed,
            "t_env": counters.t_env,
            "episodes": counters.episodes,
            "updates": counters.updates,
            "wall_s": round(counters.wall_s, 3),
            "best_return": counters.best_return,
            **self._test,
            **_origin(self.rollout.player.env, self.test_env),
            "absolute": absolute,
        }

    def close(self) -> None:
        """Release the environments."""
        self.rollout.player.env.close()
        self.test_env.close()

    def state_dict(self) -> dict[str, Any]:
        """The whole run: networks, targets, optimiser, replay, counters, running episodes, every random state."""
        state = {
            "algo": self.algo.state_dict(),
            "counters": dataclasses.asdict(self.counters),
            "replay": self.replay.state_dict(self.rollout.player.steps),
            "rollout": self.rollout.state_dict(),
            "train_stats": dataclasses.asdict(self.rollout.stats),
            "test": self._test,
            "test_env": self.test_env.state_dict(),
            "test_generator": self._test_generator.get_state(),
            "torch_rng": torch.get_rng_state(),
        }
        if self.device.type == "cuda":
            state["cuda_rng"] = torch.cuda.get_rng_state(self.device)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of ``state_dict``."""
        self.algo.load_state_dict(state["algo"])
        self.counters = Counters(**state["counters"])
        self.replay.load_state_dict(state["replay"])
        self.rollout.load_state_dict(state["rollout"])
        self.rollout.stats = EpisodeStats(**state["train_stats"])
        self._test = state["test"]
        self.test_env.load_state_dict(state["test_env"])
        self._test_generator.set_state(state["test_generator"])
        torch.set_rng_state(state["torch_rng"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)

    # ---- one round ----

    def _round(self) -> None:
        counters, settings = self.counters, self.algo.config
        counters.t_env += self.rollout.collect(settings.batch_size_run, counters.t_env)
        if self.replay.can_sample(settings.batch_size):
            for left in reversed(range(self.config.updates_per_round)):
                # Only what will be logged is worked out.
                self._update(detailed=self._log_is_due() and not left)
                # In a ring that is not full the next choice depends on how many episodes this round's successor adds.
                if left or self.replay.count == self.replay.capacity:
                    self.feed.prefetch(settings.batch_size)
        counters.episodes += settings.batch_size_run

    def _update(self, *, detailed: bool) -> None:
        counters, settings = self.counters, self.algo.config
        batch, positions = self.feed.next(settings.batch_size, t_env=counters.t_env)
        self._stats = self.learner.step(batch, detailed=detailed)
        counters.updates += 1
        if settings.use_per:
            self.replay.update_priorities(positions, self._stats["td_error"], self._stats["mask"])
        # PyMARL hands its learner the number of episodes before this round, and compares after the optimiser step.
        if counters.episodes - counters.last_target_update >= settings.target_update_interval:
            self.algo.update_targets()
            counters.last_target_update = counters.episodes

    # ---- what happens now and then ----

    def _evaluate_if_due(self, logger: RunLogger) -> None:
        last = self.counters.last_test
        if last is None or self.counters.t_env - last >= self.plan.test_interval:
            self._evaluate(logger)

    def _evaluate(self, logger: RunLogger) -> None:
        counters = self.counters
        stats = evaluate(self.algo, self.test_env, self.plan.test_nepisode, self._test_generator, device=self.device)
        self._test = stats.summary("test_")
        counters.last_test = counters.t_env
        self._tick()
        each = {"test_returns": stats.returns} | ({} if stats.won is None else {"test_won": stats.won})
        cost = {"wall_s": counters.wall_s, "replay_ratio": self._replay_ratio()}
        logger.write(counters.t_env, {**self._test, **each, **cost})
        result = self._test["test_return_mean"]
        # A network that has learnt nothing may be lucky; it is nobody's best.
        if counters.updates and (counters.best_return is None or result > counters.best_return):
            counters.best_return = result
            state = {"algo": self.algo.state_dict(), "t_env": counters.t_env, **self._test}
            checkpoint.save(self.folder / BEST_FILE, state)

    def _absolute_metric(self) -> dict[str, Any] | None:
        """The best networks on ten times the episodes; None where nothing was learnt.

        The protocol of R. Gorsane et al., "Towards a standardised performance evaluation protocol for cooperative
        MARL", 2022. Environment and random numbers are its own, so it is the same for a run that was resumed.
        """
        path = self.folder / BEST_FILE
        if self.counters.best_return is None or not path.is_file():
            return None
        seeds = _seeds(self.config.seed)
        best = checkpoint.load(path)
        algo = make_algorithm(self.config, self.plan.info)
        algo.load_state_dict(best["algo"])
        n_episodes = ABSOLUTE_FACTOR * self.plan.test_nepisode
        generator = _generator(self.device, seeds["absolute_explore"])
        if isinstance(self.test_env, ExternalEnv):
            self.close()  # games may be large, and those of the run are over
        env = envs.make(self.config.env, self.test_env.n_envs, seeds["absolute_env"])
        try:
            stats = evaluate(algo, env, n_episodes, generator, device=self.device)
        finally:
            env.close()
        won = {} if stats.won is None else {"won": stats.won}
        return {"t_env": best["t_env"], **stats.summary(""), "returns": stats.returns, **won}

    def _replay_ratio(self) -> float:
        """How often an episode has been learnt from, on average."""
        return self.counters.updates * self.algo.config.batch_size / max(self.counters.episodes, 1)

    def _log_is_due(self) -> bool:
        t_env = self.counters.t_env
        return t_env - self.counters.last_log >= self.config.log_interval or t_env >= self.t_max

    def _log(self, logger: RunLogger) -> None:
        counters = self.counters
        self._tick()
        seconds = max(counters.wall_s - self._logged_wall, 1e-9)
        values = {name: float(value) for name, value in self._stats.items() if value.ndim == 0}
        record = {
            "episodes": counters.episodes,
            "updates": counters.updates,
            "epsilon": self.rollout.epsilon(counters.t_env),
            "replay_ratio": self._replay_ratio(),
            "buffer_episodes": self.replay.count,
            "wall_s": counters.wall_s,
            "env_steps_per_s": (counters.t_env - self._logged_at) / seconds,
            "updates_per_s": (counters.updates - self._logged_updates) / seconds,
            **self.rollout.stats.summary(""),
            **values,
        }
        logger.write(counters.t_env, record)
        self.rollout.stats = EpisodeStats()
        counters.last_log = self._logged_at = counters.t_env
        self._logged_updates, self._logged_wall = counters.updates, counters.wall_s
        loss = values.get("loss")
        if loss is not None and not math.isfinite(loss):
            raise FloatingPointError(
                f"the loss is {loss} at {counters.t_env} environment steps; lower --lr or --grad-norm-clip, and "
                "look for rewards or observations that are not finite"
            )

    def _checkpoint(self, logger: RunLogger) -> None:
        self._tick()
        counters = self.counters
        counters.last_checkpoint, counters.log_offset = counters.t_env, logger.offset
        folder = self.folder / CHECKPOINT_FOLDER
        checkpoint.save(checkpoint.checkpoint_path(folder, counters.t_env), self.state_dict())
        checkpoint.prune(folder, self.config.keep_checkpoints)

    def _tick(self) -> None:
        now = time.perf_counter()
        self.counters.wall_s += now - self._clock
        self._clock = now

    @contextmanager
    def _stopping_on_signals(self) -> Iterator[None]:
        """First SIGINT or SIGTERM: finish the round, checkpoint, stop. Second: as without us."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def stop(number: int, frame: Any) -> None:
            self._stop = True
            signal.signal(number, previous[signal.Signals(number)])

        for number in previous:
            signal.signal(number, stop)
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def make_algorithm(config: TrainConfig, info: EnvInfo) -> Algorithm:
    """The algorithm of ``config`` for an environment of these sizes, freshly initialised from the run's seed."""
    return algorithms.make(
        config.algo,
        scheme_of(info),
        preset=config.preset,
        device=config.device,
        seed=_seeds(config.seed)["algo"],
        **overrides_of(config, info),
    )


def load_run(folder: Path, which: str = "latest") -> tuple[TrainConfig, Algorithm, int]:
    """Config, trained algorithm and environment steps of a run: its ``latest`` checkpoint or its ``best`` evaluation.

    Raises ``FileNotFoundError`` naming what is missing.
    """
    if not (folder / CONFIG_FILE).is_file():
        raise FileNotFoundError(f"{folder} is not a run: there is no {CONFIG_FILE} in it")
    description = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    config = TrainConfig.from_json(description["train"])
    plan = Plan.of(config)
    _check_same(folder, description["algorithm"], plan.description["algorithm"])
    algo = make_algorithm(config, plan.info)
    if which == "best":
        path = folder / BEST_FILE
        t_env = int(checkpoint.load(path, only="t_env")["t_env"])
    else:
        saved = checkpoint.list_checkpoints(folder / CHECKPOINT_FOLDER)
        if not saved:
            raise FileNotFoundError(f"{folder} has no checkpoint yet")
        path = saved[-1]
        t_env = int(checkpoint.load(path, only="counters")["counters"]["t_env"])
    algo.load_state_dict(checkpoint.load(path, only="algo")["algo"])
    return config, algo, t_env


def _origin(*same: BatchedEnv) -> dict[str, Any]:
    """What else a result must say where the environment is somebody else's: its build, and what was dropped."""
    external = [env for env in same if isinstance(env, ExternalEnv)]
    if not external:
        return {}
    builds = sorted({env.build for env in external} - {""})
    return {"env_build": ", ".join(builds), "failed_games": sum(env.failures for env in external)}


def _check_folder(folder: Path, plan: Plan) -> None:
    """A folder that holds a run must hold this one, which may go on beyond its end."""
    path = folder / CONFIG_FILE
    if path.is_file():
        saved = json.loads(path.read_text(encoding="utf-8"))
        for part, values in plan.description.items():
            _check_same(folder, saved.get(part, {}), values)
        plan.check_goes_on(TrainConfig.from_json(saved["train"]), folder)


def _check_same(folder: Path, saved: dict[str, Any], ours: dict[str, Any]) -> None:
    for name in sorted((set(saved) | set(ours)) - TrainConfig.CHANGEABLE):
        if saved.get(name) != ours.get(name):
            raise ValueError(
                f"{folder} holds a run with {name} = {saved.get(name)!r}, and it would now be {ours.get(name)!r}; "
                "continue it with the settings it was started with, or choose another folder"
            )


def _seeds(seed: int) -> dict[str, int]:
    """Independent seeds for everything random in a run, all decided by one number."""
    # New names go to the end: the seeds of the others stay what they were.
    names = (
        "algo", "env", "test_env", "replay", "explore", "test_explore", "torch", "absolute_env", "absolute_explore"
    )  # fmt: skip
    return dict(zip(names, np.random.SeedSequence(seed).generate_state(len(names)).tolist(), strict=True))


def _generator(device: torch.device, seed: int) -> torch.Generator:
    return torch.Generator(device=device).manual_seed(seed)
