"""How fast an environment is played, and what a training run on it spends its time with."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import torch

from fastmix import envs
from fastmix.envs import BatchedEnv
from fastmix.experiments.bench import baselines, steps
from fastmix.testing.bench import environment
from fastmix.train.config import TrainConfig
from fastmix.train.evaluate import evaluate
from fastmix.train.feed import make_feed
from fastmix.train.learner import Learner
from fastmix.train.plan import Plan, make_replay, scheme_of
from fastmix.train.rollout import Player, Rollout
from fastmix.train.schedules import EpsilonSchedule
from fastmix.train.trainer import make_algorithm

EPSILON: Final = 0.05
"""Exploration of everything measured here: that of the larger part of a training run"""
PARTS: Final = ("environment", "acting", "replay", "learning", "evaluation")


class Clock:
    """Seconds spent in calls, by name."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Begin anew."""
        self.seconds: dict[str, float] = dict.fromkeys(PARTS, 0.0)

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """``call``, whose time is added to ``name``."""

        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self.seconds[name] += time.perf_counter() - start

        return run


class Timed:
    """Stands for ``inner``; the time of the methods in ``parts`` (method -> part) goes to ``clock``."""

    def __init__(self, inner: Any, clock: Clock, parts: dict[str, str]) -> None:
        self._inner = inner
        for method, name in parts.items():
            setattr(self, method, clock.timed(name, getattr(inner, method)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class Training:
    """What the trainer puts together, without checkpoints and logs, and with a clock in each part."""

    def __init__(self, config: TrainConfig) -> None:
        self.plan = Plan.of(config)
        self.clock = Clock()
        settings = self.plan.settings
        self.algo = make_algorithm(config, self.plan.info)
        self._learner = Learner(self.algo)
        self._replay = make_replay(self.plan, config.seed, lambda sentence: None)
        self._feed = make_feed(self._replay, torch.device("cpu"))
        self._generator = torch.Generator().manual_seed(config.seed)
        self.env = envs.make(config.env, settings.batch_size_run, config.seed)
        self._test_env = envs.make(config.env, min(settings.batch_size_run, self.plan.test_nepisode), config.seed + 1)
        timed_env: Any = Timed(self.env, self.clock, {"step": "environment", "reset": "environment"})
        timed_algo: Any = Timed(self.algo, self.clock, {"act": "acting"})
        epsilon = EpsilonSchedule(EPSILON, EPSILON, 0)
        self._rollout = Rollout(Player(timed_env, timed_algo), self._replay, epsilon, self._generator)
        self._step = self.clock.timed("learning", self._learner.step)

    def round(self) -> int:
        """Episodes, and a training step once there are enough; returns the environment steps."""
        size = self.plan.settings.batch_size
        start, before = time.perf_counter(), dict(self.clock.seconds)
        taken = self.collect()
        if self._replay.can_sample(size):
            batch, _ = self._feed.next(size)
            self._step(batch)
        others = sum(self.clock.seconds[name] - before[name] for name in PARTS)
        self.clock.seconds["replay"] += time.perf_counter() - start - others
        return taken

    def collect(self) -> int:
        """A round's episodes; returns the environment steps."""
        return self._rollout.collect(self.plan.settings.batch_size_run, 0)

    def fill(self) -> None:
        """Collect until there is a training batch, and take the first training step."""
        while not self._replay.can_sample(self.plan.settings.batch_size):
            self.collect()
        self.round()

    def evaluate(self) -> None:
        """What is done once every ``plan.test_interval`` steps."""
        evaluate(self.algo, self._test_env, self.plan.test_nepisode, self._generator)

    def close(self) -> None:
        """Release the environments."""
        self.env.close()
        self._test_env.close()


class SingleCopy:
    """One copy of a batched environment behind PyMARL's interface: what the public way plays with here."""

    def __init__(self, env: BatchedEnv) -> None:
        self._env = env

    def reset(self) -> None:
        """Begin an episode."""
        self._env.reset()

    def step(self, actions: torch.Tensor) -> tuple[float, bool, bool]:
        """Reward, terminated, truncated."""
        self._env.step(actions.numpy()[None])
        return float(self._env.reward[0]), bool(self._env.terminated[0]), bool(self._env.truncated[0])

    def get_obs(self) -> list[np.ndarray]:
        """An array for each agent."""
        return list(self._env.obs[0])

    def get_state(self) -> np.ndarray:
        """One array."""
        return np.asarray(self._env.state[0])

    def get_avail_actions(self) -> list[list[int]]:
        """Zeros and ones."""
        avail: list[list[int]] = self._env.avail[0].astype(np.int32).tolist()
        return avail


def measure(
    config: TrainConfig, copies: Sequence[int], threads: Sequence[int], *, rounds: int, seconds: float, public: bool
) -> dict[str, Any]:
    """Everything that ``fastmix bench env`` prints, for JSON.

    Raises:
        ValueError: settings that cannot be, or ``public`` with an algorithm that has no public form.
    """
    if public and config.algo not in steps.WITH_BASELINE:
        raise ValueError(f"--public needs one of the algorithms {', '.join(steps.WITH_BASELINE)}, got {config.algo}")
    speeds = [rollout_speed(config, n, k, seconds) for k in threads for n in copies]
    torch.set_num_threads(max(threads))
    return {
        "environment": environment("cpu"),
        "env": config.env,
        "algo": config.algo,
        "preset": config.preset,
        "rollouts": speeds,
        "training": training_speed(config, rounds, public),
    }


def rollout_speed(config: TrainConfig, copies: int, threads: int, seconds: float) -> dict[str, Any]:
    """Environment steps per second of ``copies`` played by the network into replay, and of the environment therein."""
    torch.set_num_threads(threads)
    overrides = {**config.overrides, "batch_size_run": copies, "buffer_size": copies, "batch_size": 1}
    training = Training(dataclasses.replace(config, overrides=overrides))
    training.collect()  # what is done once is not measured
    training.clock.reset()
    start, taken = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        taken += training.collect()
    elapsed, parts = time.perf_counter() - start, training.clock.seconds
    training.close()
    return {
        "copies": copies,
        "threads": threads,
        "steps_per_s": taken / elapsed,
        "environment_per_s": taken / parts["environment"],
        "shares": {name: parts[name] / elapsed for name in ("environment", "acting")},
    }


def training_speed(config: TrainConfig, rounds: int, public: bool) -> dict[str, Any]:
    """Whole training, evaluation at its usual interval included: ours, and with ``public`` the public way beside it.

    Rounds of both follow each other in turn. Each round collects ``batch_size_run`` episodes and takes a training step.
    """
    ours = Training(config)
    contestants: dict[str, Any] = {"ours": ours}
    if public:
        contestants["public"] = _public_training(ours)
    for contestant in contestants.values():
        contestant.fill()
    ours.clock.reset()
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    taken = dict.fromkeys(contestants, 0)
    for _ in range(rounds):
        for name, contestant in contestants.items():
            start = time.perf_counter()
            taken[name] += contestant.round()
            samples[name].append(time.perf_counter() - start)
    parts = {name: seconds / rounds for name, seconds in ours.clock.seconds.items()}
    interval = ours.plan.test_interval
    result: dict[str, Any] = {}
    for name, contestant in contestants.items():
        start = time.perf_counter()
        contestant.evaluate()
        evaluation = time.perf_counter() - start
        steps_per_round = taken[name] / rounds
        # An evaluation belongs to test_interval steps; a round gets its share of one.
        evaluation *= steps_per_round / interval
        round_s = statistics.median(samples[name]) + evaluation
        result[name] = {"steps_per_s": steps_per_round / round_s, "round_s": round_s, "evaluation_s": evaluation}
    parts["evaluation"] = result["ours"]["evaluation_s"]
    result["ours"]["shares"] = {name: seconds / sum(parts.values()) for name, seconds in parts.items()}
    ours.close()
    if public:
        result["ratio"] = result["ours"]["steps_per_s"] / result["public"]["steps_per_s"]
    return result


def text(content: dict[str, Any]) -> str:
    """What `measure` found, as lines for a terminal."""
    lines = [
        f"{content['env']}, {content['algo']} ({content['preset']})",
        "",
        "copies  threads   steps/s, acting included   environment alone   environment   acting",
    ]
    for speed in content["rollouts"]:
        shares = speed["shares"]
        lines.append(
            f"{speed['copies']:>6}{speed['threads']:>9}{speed['steps_per_s']:>27,.0f}{speed['environment_per_s']:>20,.0f}"
            f"{shares['environment']:>14.0%}{shares['acting']:>9.0%}"
        )
    training = content["training"]
    shares = ", ".join(f"{name} {share:.0%}" for name, share in training["ours"]["shares"].items())
    threads = content["environment"]["threads"]
    lines += ["", f"whole training, {threads} threads: {training['ours']['steps_per_s']:,.0f} steps/s ({shares})"]
    if "public" in training:
        lines.append(
            f"the public way: {training['public']['steps_per_s']:,.0f} steps/s; ours {training['ratio']:.2f} times that"
        )
    return "\n".join(lines)


def _public_training(ours: Training) -> Any:
    """The public way with the settings of ``ours``, its first weights, and the same environment, a copy at a time."""
    settings, info = ours.plan.settings, ours.plan.info
    env = SingleCopy(envs.make(ours.plan.config.env, 1, ours.plan.config.seed))
    return baselines.load("training").PublicTraining(
        env,
        steps.public_learner(ours.algo, scheme_of(info)),
        (info.n_agents, info.n_actions, info.obs_dim, info.state_dim, info.episode_limit),
        batch_size=settings.batch_size,
        batch_size_run=settings.batch_size_run,
        buffer_size=2 * settings.batch_size,  # how many it could hold changes no time
        epsilon=EPSILON,
        test_nepisode=ours.plan.test_nepisode,
    )
