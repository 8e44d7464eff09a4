"""What a batched environment is: E copies of one game that are reset and stepped together.

Arrays are allocated once and overwritten in place, so that a rollout reads them without copies or allocation. They may
be numpy arrays or torch tensors (an environment that lives on a GPU); everything else about them is the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

# Nested dictionaries whose leaves are arrays, tensors or JSON values: what a checkpoint can hold.
StateDict = dict[str, Any]


@dataclass(frozen=True)
class EnvInfo:
    """Sizes of an environment, under the field's names (PyMARL's ``get_env_info``), and how it is usually trained on.

    What a user gives always comes first. ``t_max`` is the number of environment steps a training run takes,
    ``test_interval`` that between evaluations and ``test_nepisode`` the episodes of one; ``None`` leaves them to the
    trainer. ``settings`` are fields of ``AlgorithmConfig`` that published work sets for this environment, over the
    algorithm's preset. ``obs_dtype`` is the smallest type that holds every observation and state exactly, for replay.
    """

    n_agents: int
    n_actions: int
    obs_dim: int
    state_dim: int
    episode_limit: int
    t_max: int | None = None
    test_interval: int | None = None
    test_nepisode: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    obs_dtype: Literal["float32", "int8"] = "float32"


@runtime_checkable
class BatchedEnv(Protocol):
    """E copies of one environment.

    ``obs [E,A,O]`` float32, ``state [E,S]`` float32, ``avail [E,A,U]`` bool (every agent of a running copy has at least
    one available action), ``reward [E]`` float32, ``terminated [E]`` bool, ``truncated [E]`` bool, and ``won [E]`` bool
    (read on finished copies only) or ``None`` where the game knows no victory.

    A copy is finished after a step that sets ``terminated`` (the game is over, no bootstrap) or ``truncated`` (the time
    limit cut it, the value of the last state counts); both may be set. ``truncated`` may only be set at
    ``info.episode_limit``: the return targets of PyMARL take their bootstrap from the last stored step.
    After such a step the rows of ``obs``, ``state`` and ``avail`` hold the final observation until ``reset`` is called
    with that copy's index. Stepping a finished copy is allowed, and its arrays then mean nothing.

    The seed given at construction and the sequence of calls decide everything; ``state_dict`` and ``load_state_dict``
    carry the random state and the running episodes, so that a resumed run draws the same numbers.
    """

    info: EnvInfo
    n_envs: int
    obs: np.ndarray
    state: np.ndarray
    avail: np.ndarray
    reward: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    won: np.ndarray | None

    def reset(self, indices: np.ndarray | None = None) -> None:
        """Start a new episode in the copies ``indices`` (int64), or in all of them."""

    def step(self, actions: np.ndarray) -> None:
        """Advance every copy by the joint actions ``[E,A]`` int64."""

    def state_dict(self) -> StateDict:
        """Everything that decides the future of the copies."""

    def load_state_dict(self, state: StateDict) -> None:
        """Restore what ``state_dict`` of an environment of the same name and number of copies returned."""

    def close(self) -> None:
        """Release processes and files."""
