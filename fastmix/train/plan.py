"""A run before it starts: its settings checked against its environment and this machine, and put into sentences."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastmix import algorithms, envs
from fastmix.algorithms import AlgorithmConfig, Scheme
from fastmix.envs import EnvInfo
from fastmix.train.config import DEFAULT_T_MAX, DEFAULT_TEST_INTERVAL, DEFAULT_TEST_NEPISODE, TrainConfig
from fastmix.train.logging import check_tensorboard
from fastmix.train.memory import human_bytes
from fastmix.train.replay import (
    Prioritised,
    ReplayBuffer,
    check_memory,
    describe_memory,
    fits_on_device,
    replay_bytes,
)
from fastmix.train.schedules import EpsilonSchedule
from fastmix.train.storage import ObsDtype


@dataclasses.dataclass(frozen=True)
class Plan:
    """A checked ``TrainConfig``: what it means for its environment, before anything large or lasting is made."""

    config: TrainConfig
    info: EnvInfo
    settings: AlgorithmConfig
    epsilon: EpsilonSchedule
    t_max: int
    test_interval: int
    test_nepisode: int
    obs_dtype: ObsDtype
    replay_device: torch.device | None
    """Device that keeps the episodes; None for host memory."""
    host_reason: str | None
    """Why a run on a device keeps them in host memory without having been told to; else None."""

    @classmethod
    def of(cls, config: TrainConfig, *, n_parallel: int = 1) -> Plan:
        """Check ``config``, for ``n_parallel`` such runs at the same time.

        Raises ``ValueError``, ``FileNotFoundError`` or ``ImportError`` naming the setting that cannot be, and
        ``MemoryError`` when replay does not fit.
        """
        _check_device(config.device)
        if config.tensorboard:
            check_tensorboard()
        env = envs.make(config.env, 1, 0)
        env.close()
        info = env.info
        settings = algorithms.configure(config.algo, config.preset, **overrides_of(config, info))
        epsilon = EpsilonSchedule(
            settings.epsilon_start, settings.epsilon_finish, settings.epsilon_anneal_time, config.epsilon_decay
        )
        obs_dtype = _obs_dtype(config, info)
        n_bytes = n_parallel * _replay_bytes(settings, info, obs_dtype)
        where, why_not = _place_replay(config, n_bytes)
        if where is None:
            check_memory(n_bytes, settings.buffer_size * n_parallel)
        return cls(
            config,
            info,
            settings,
            epsilon,
            t_max=_length(config, info),
            test_interval=config.test_interval or info.test_interval or DEFAULT_TEST_INTERVAL,
            test_nepisode=config.test_nepisode or info.test_nepisode or DEFAULT_TEST_NEPISODE,
            obs_dtype=obs_dtype,
            replay_device=where,
            host_reason=why_not,
        )

    @property
    def replay_bytes(self) -> int:
        """What replay will allocate."""
        return _replay_bytes(self.settings, self.info, self.obs_dtype)

    @property
    def description(self) -> dict[str, Any]:
        """What ``config.json`` of the run holds."""
        settings: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self.settings)))  # tuples become lists
        return {"train": self.config.to_json(), "algorithm": settings}

    def check_goes_on(self, before: TrainConfig, folder: Path) -> None:
        """Raise ``ValueError`` where this would shorten what ``folder`` holds, begun as ``before``."""
        length = _length(before, self.info)
        if self.t_max < length:
            raise ValueError(f"--t-max is {self.t_max}; the runs in {folder} are of {length} steps, and can only go on")

    def sentences(self) -> list[str]:
        """What a user wants to know before a long run starts: memory, graphs, how often each episode is learnt from."""
        s, updates = self.settings, self.config.updates_per_round
        ratio = updates * s.batch_size / s.batch_size_run
        on_device = []
        if self.host_reason is not None:
            on_device.append(f"{self.host_reason}; it stays in host memory")
        if torch.device(self.config.device).type == "cuda":
            graphs = f"captured as a CUDA graph for every batch length (multiples of {self.config.bucket} steps)"
            on_device.append(f"training step: {graphs if self.config.graphs else 'without CUDA graphs (--no-graphs)'}")
        return [
            describe_memory(self.replay_bytes, s.buffer_size, scheme_of(self.info), self.replay_device),
            *on_device,
            f"replay ratio {ratio:g}: {updates} gradient step{'s' * (updates > 1)} on {s.batch_size} episodes after "
            f"every {s.batch_size_run} collected ({s.batch_size_run} played in parallel)",
        ]


def make_replay(plan: Plan, seed: int, announce: Callable[[str], None]) -> ReplayBuffer:
    """The replay buffer of a run, in host memory after all where the planned device has filled up in the meantime.

    Raises ``MemoryError`` when it was to be on the device and nowhere else.
    """
    config, s = plan.config, plan.settings

    def make(device: torch.device | None) -> ReplayBuffer:
        return ReplayBuffer(
            scheme_of(plan.info),
            s.buffer_size,
            s.batch_size_run,
            seed=seed,
            bucket=config.bucket,
            obs_dtype=plan.obs_dtype,
            prioritised=Prioritised(s.per_alpha, s.per_beta, plan.t_max) if s.use_per else None,
            device=device,
        )

    try:
        return make(plan.replay_device)
    except torch.OutOfMemoryError as error:  # somebody else was quicker
        reason = f"{plan.replay_device} had no room left for the replay buffer of {human_bytes(plan.replay_bytes)}"
        if config.replay_device == "cuda":
            raise MemoryError(f"{reason}; lower --buffer-size, or leave it to --replay-device auto") from error
        announce(f"{reason}; it is in host memory")
        return make(None)


def scheme_of(info: EnvInfo) -> Scheme:
    """The sizes as algorithms take them."""
    return Scheme(info.n_agents, info.n_actions, info.obs_dim, info.state_dim, info.episode_limit)


def overrides_of(config: TrainConfig, info: EnvInfo) -> dict[str, Any]:
    """Settings over those of the algorithm's preset: what is usual for the environment, then what the user gave."""
    return {**info.settings, **config.overrides}


def _length(config: TrainConfig, info: EnvInfo) -> int:
    return config.t_max or info.t_max or DEFAULT_T_MAX


def _obs_dtype(config: TrainConfig, info: EnvInfo) -> ObsDtype:
    if config.replay_obs_dtype == "auto":
        return info.obs_dtype
    if config.replay_obs_dtype == "int8" and info.obs_dtype != "int8":
        raise ValueError(f"replay_obs_dtype is 'int8'; {config.env} has observations that are no small whole numbers")
    return config.replay_obs_dtype


def _replay_bytes(settings: AlgorithmConfig, info: EnvInfo, obs_dtype: ObsDtype) -> int:
    return replay_bytes(scheme_of(info), settings.buffer_size, settings.batch_size_run, obs_dtype=obs_dtype)


def _place_replay(config: TrainConfig, n_bytes: int) -> tuple[torch.device | None, str | None]:
    """Where the episodes of a run go, and the reason where they cannot be on its device."""
    device = torch.device(config.device)
    if device.type != "cuda" and config.replay_device == "cuda":
        raise ValueError(f"replay_device is 'cuda'; with device {config.device!r} it must be 'auto' or 'cpu'")
    if device.type != "cuda" or config.replay_device == "cpu":
        return None, None
    why_not = fits_on_device(n_bytes, device)
    if why_not is None:
        return device, None
    if config.replay_device == "cuda":
        raise MemoryError(f"{why_not}; lower --buffer-size, or leave it to --replay-device auto")
    return None, why_not


def _check_device(name: str) -> None:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device is {name!r}; it must be a torch device such as cpu or cuda:0") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {name!r}, and this torch finds no usable GPU (fastmix doctor says why)")
