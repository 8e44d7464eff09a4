"""The settings of a run. Those of the algorithm (learning rate, batch, epsilon, ...) live in its own config."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from fastmix.algorithms.config import option
from fastmix.train.rollout import StoredTermination
from fastmix.train.schedules import Decay

ReplayDevice = Literal["auto", "cpu", "cuda"]
ReplayObsDtype = Literal["auto", "float32", "float16", "int8"]

# Where neither the user nor the environment says. What SMAC papers train for:
DEFAULT_T_MAX = 2_000_000
DEFAULT_TEST_INTERVAL, DEFAULT_TEST_NEPISODE = 2_000, 32


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a run besides the machine: two runs with equal configs end with equal weights on the
    same machine with the same thread count. Raises ``ValueError`` naming the setting, its value and what it must be.
    """

    CHANGEABLE: ClassVar[frozenset[str]] = frozenset({"graphs", "replay_device", "t_max"})
    """Settings of which a resumed run may have others: those that suit it to its machine and change no number of it,
    and a later end."""

    algo: str = option("qmix", "algorithm, a name of fastmix.algorithms.REGISTRY")
    env: str = option(
        "matrix:resq1",
        "environment: matrix:resq1 (resq2, stochastic, @file.json), prey:p-2 (p-1.5, wqmix, pymarl2, ...), smac:3m, "
        "smax:3m, pettingzoo:mpe2.simple_spread_v3, gym:lbforaging:Foraging-8x8-2p-2f-coop-v3",
    )
    preset: str = option("pymarl2", "set of hyper-parameters the algorithm starts from: pymarl or pymarl2")
    seed: int = option(0, "decides everything random; with --seeds N the runs use seed, seed+1, ...")
    t_max: int | None = option(
        None, f"environment steps (default: what the environment suggests, else {DEFAULT_T_MAX})"
    )
    device: str = option("cpu", "torch device of networks and updates")
    threads: int = option(1, "CPU threads of torch and of the native core in each run")
    updates_per_round: int = option(1, "gradient steps after every batch_size_run finished episodes")
    epsilon_decay: Decay = option("linear", "shape of the epsilon schedule")  # noqa: RUF009 - an immutable Literal
    stored_termination: StoredTermination = option(  # noqa: RUF009
        "true",
        "terminated flag kept in replay: 'true' is what the environment says; 'pymarl' stores a true end at the very "
        "episode limit as a time-out, as PyMARL's runner does",
    )
    bucket: int = option(16, "round batch lengths up to a multiple of this many steps (masked), at most the limit")
    replay_obs_dtype: ReplayObsDtype = option(  # noqa: RUF009
        "auto",
        "storage of observations and states in replay: 'auto' is the smallest that holds those of the environment "
        "exactly, 'float16' rounds them, 'int8' is for environments of small whole numbers only",
    )
    replay_device: ReplayDevice = option(  # noqa: RUF009
        "auto",
        "memory that keeps the episodes: 'cuda' is that of --device, 'cpu' the host's, 'auto' the first that has room; "
        "results are the same",
    )
    graphs: bool = option(
        True, "on CUDA capture the training step once per batch length and replay it; results are the same"
    )
    test_interval: int | None = option(
        None,
        f"environment steps between greedy evaluations (default: what the environment suggests, else "
        f"{DEFAULT_TEST_INTERVAL})",
    )
    test_nepisode: int | None = option(
        None, f"episodes of one evaluation (default: what the environment suggests, else {DEFAULT_TEST_NEPISODE})"
    )
    log_interval: int = option(2000, "environment steps between log records")
    checkpoint_interval: int = option(50_000, "environment steps between checkpoints (one is always taken at the end)")
    keep_checkpoints: int = option(2, "how many of the newest checkpoints to keep")
    tensorboard: bool = option(False, "write TensorBoard events as well as metrics.jsonl (needs fastmix[train])")
    # Settings of the algorithm (fields of AlgorithmConfig) that differ from its preset.
    overrides: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("updates_per_round", "bucket", "log_interval", "checkpoint_interval", "keep_checkpoints",
                     "threads"):  # fmt: skip
            _check(self, name, getattr(self, name) >= 1, "at least 1")
        for name in ("t_max", "test_interval", "test_nepisode"):
            value = getattr(self, name)
            _check(self, name, value is None or value >= 1, "at least 1")
        _check(self, "seed", 0 <= self.seed < 2**32, "between 0 and 2^32 - 1")
        for name, literal in (("epsilon_decay", Decay), ("stored_termination", StoredTermination),
                              ("replay_obs_dtype", ReplayObsDtype), ("replay_device", ReplayDevice)):  # fmt: skip
            choices = literal.__args__  # type: ignore[attr-defined]
            _check(self, name, getattr(self, name) in choices, "one of " + ", ".join(map(repr, choices)))

    def to_json(self) -> dict[str, Any]:
        """As a dictionary of JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> TrainConfig:
        """The inverse of ``to_json``. Raises ``ValueError`` naming a setting that this version does not have."""
        unknown = sorted(set(values) - {f.name for f in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(f"the saved config has the setting {unknown[0]!r}, which this version does not know")
        return cls(**values)


def _check(config: TrainConfig, name: str, ok: bool, must: str) -> None:
    if not ok:
        raise ValueError(f"{name} is {getattr(config, name)!r}; it must be {must}")
