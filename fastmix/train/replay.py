"""Replay over whole episodes: a ring that stores every number once.

Observations are kept once a step; last actions and agent ids are derived, never stored; availability is one bit an
action; actions take one byte where they fit. Everything is allocated at construction and nothing grows afterwards.

Beside the ring of ``capacity`` episodes there is one spare row for each parallel copy of the environment. A rollout
writes its running episodes straight into the spare rows, and a finished episode enters the ring by swapping row
numbers: no episode is ever copied, and sampling never sees a half-written one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fastmix.algorithms import EpisodeBatch, Scheme
from fastmix.train.memory import available_memory, human_bytes

ObsDtype = Literal["float32", "float16"]


@dataclass(frozen=True)
class Prioritised:
    """pymarl2's proportional prioritised replay.

    Priorities to the power ``alpha``, importance weights to the power ``-beta``, and beta grown linearly from ``beta``
    to 1 over ``t_max`` environment steps.
    """

    alpha: float = 0.6
    beta: float = 0.4
    t_max: int = 1

    def __post_init__(self) -> None:
        for name in ("alpha", "beta"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"per_{name} is {getattr(self, name)}; it must be between 0 and 1")

    def beta_at(self, t_env: int) -> float:
        """Beta after ``t_env`` environment steps."""
        return min(1.0, self.beta + (1.0 - self.beta) * t_env / max(1, self.t_max))


class ReplayBuffer:
    """A ring of ``capacity`` episodes for ``n_writers`` parallel copies of an environment described by ``scheme``.

    An episode of L transitions occupies the steps 0..L: step L holds the final observation, with reward, action and
    terminated flag zero. Steps beyond L are zero in every field, availability included.

    Raises ``MemoryError`` before allocating when the buffer does not fit into the memory that is available.
    """

    def __init__(
        self,
        scheme: Scheme,
        capacity: int,
        n_writers: int = 1,
        *,
        seed: int = 0,
        bucket: int = 16,
        obs_dtype: ObsDtype = "float32",
        prioritised: Prioritised | None = None,
    ) -> None:
        if capacity < 1:
            raise ValueError(f"buffer_size is {capacity}; it must be at least 1 episode")
        if n_writers < 1:
            raise ValueError(f"n_writers is {n_writers}; it must be at least 1")
        if bucket < 1:
            raise ValueError(f"bucket is {bucket}; it must be at least 1 step")
        if obs_dtype not in ("float32", "float16"):
            raise ValueError(f"obs_dtype is {obs_dtype!r}; it must be 'float32' or 'float16'")
        check_memory(replay_bytes(scheme, capacity, n_writers, obs_dtype=obs_dtype), capacity)
        self.scheme = scheme
        self.capacity = capacity
        self.n_writers = n_writers
        self.bucket = bucket
        self.index = 0  # where the next episode goes (pymarl: buffer_index)
        self.count = 0  # episodes stored (pymarl: episodes_in_buffer)
        self.prioritised = prioritised
        self._rng = np.random.default_rng(seed)
        fields = _fields(scheme, obs_dtype)
        rows = capacity + n_writers
        self._tensors = {
            name: torch.zeros((rows, scheme.episode_limit + 1, *shape), dtype=dtype)
            for name, (shape, dtype) in fields.items()
        }
        # numpy views of the same memory: a write of a few rows costs a quarter of what it costs through torch.
        self._arrays = {name: tensor.numpy() for name, tensor in self._tensors.items()}
        self._ring = np.arange(capacity)  # position in the ring -> row
        self._writer_rows = np.arange(capacity, rows)  # copy of the environment -> the row it is writing
        # Filled steps (L+1) of each row. For a row being written: how much of its previous episode is still there.
        self._n_filled = np.zeros(rows, dtype=np.int64)
        self._steps = np.arange(scheme.episode_limit + 1)
        self._priorities = np.zeros(capacity)  # already to the power alpha
        self._max_priority = 1.0

    @property
    def nbytes(self) -> int:
        """Bytes of the episode storage."""
        return sum(array.nbytes for array in self._arrays.values())

    def can_sample(self, batch_size: int) -> bool:
        """Whether ``sample(batch_size)`` has enough episodes."""
        return self.count >= batch_size

    # ---- writing a running episode (rollout) ----

    def write_observations(self, steps: np.ndarray, obs: np.ndarray, states: np.ndarray, avail: np.ndarray) -> None:
        """Store ``obs [E,A,O]``, ``states [E,S]``, ``avail [E,A,U]`` at ``steps [E]`` of the running episodes."""
        at = (self._writer_rows, steps)
        self._arrays["obs"][at] = obs
        self._arrays["states"][at] = states
        self._arrays["avail"][at] = np.packbits(avail, axis=-1, bitorder="little")

    def write_transitions(
        self, steps: np.ndarray, actions: np.ndarray, rewards: np.ndarray, terminated: np.ndarray
    ) -> None:
        """Store ``actions [E,A]``, ``rewards [E]``, ``terminated [E]`` of the transition that leaves ``steps [E]``."""
        at = (self._writer_rows, steps)
        self._arrays["actions"][at] = actions
        self._arrays["rewards"][at] = rewards
        self._arrays["terminated"][at] = terminated

    def commit(self, writers: np.ndarray, lengths: np.ndarray) -> None:
        """Move the finished episodes of the copies ``writers [n]`` into the ring, in that order.

        ``lengths [n]`` is the number of transitions L of each; step L must hold the final observation.
        """
        rows = self._writer_rows[writers]
        for name in ("actions", "rewards", "terminated"):
            self._arrays[name][rows, lengths] = 0
        self._finish_rows(rows, lengths + 1)
        positions = self._claim(len(rows))
        self._writer_rows[writers] = self._ring[positions]
        self._ring[positions] = rows

    # ---- inserting finished episodes ----

    def insert(
        self,
        *,
        obs: np.ndarray,
        states: np.ndarray,
        actions: np.ndarray,
        avail: np.ndarray,
        rewards: np.ndarray,
        terminated: np.ndarray,
        filled: np.ndarray,
    ) -> None:
        """Insert n finished episodes as PyMARL stores them, split where the ring wraps.

        ``obs [n,T,A,O]``, ``states [n,T,S]``, ``actions [n,T,A]``, ``avail [n,T,A,U]``, ``rewards``, ``terminated`` and
        ``filled`` ``[n,T]``, with ``T <= episode_limit + 1`` stored steps; ``filled`` is a non-empty prefix of ones.
        Unlike PyMARL's, an episode batch shorter than the buffer leaves nothing of the replaced episodes behind.
        """
        given = {
            "obs": obs, "states": states, "actions": actions, "rewards": rewards, "terminated": terminated,
            "avail": np.packbits(np.asarray(avail) != 0, axis=-1, bitorder="little"),
        }  # fmt: skip
        filled = np.asarray(filled) != 0
        n, stored = filled.shape
        if n > self.capacity:
            raise ValueError(
                f"insert of {n} episodes into a buffer of {self.capacity}; insert at most that many at once"
            )
        if stored > self.scheme.episode_limit + 1:
            raise ValueError(f"filled has {stored} steps; the buffer holds episode_limit + 1 = {len(self._steps)}")
        for name, value in given.items():
            expected = (n, stored, *self._arrays[name].shape[2:])
            if value.shape != expected:
                raise ValueError(f"{name} has shape {value.shape}; with filled {filled.shape} it must be {expected}")
        n_filled = filled.sum(axis=1)
        if not (filled == (np.arange(stored) < n_filled[:, None])).all() or not n_filled.all():
            raise ValueError("filled must be ones up to the last stored step of an episode and zeros after it")
        rows = self._ring[self._claim(n)]
        for name, value in given.items():
            keep = filled.reshape(n, stored, *(1,) * (value.ndim - 2))
            self._arrays[name][rows, :stored] = np.where(keep, value, 0)
            self._arrays[name][rows, stored:] = 0
        self._n_filled[rows] = n_filled

    # ---- sampling ----

    def sample(self, batch_size: int, *, t_env: int = 0) -> tuple[EpisodeBatch, np.ndarray]:
        """``batch_size`` different episodes as an :class:`EpisodeBatch` on the CPU, and their positions in the ring.

        Uniform without replacement; a buffer that holds exactly ``batch_size`` episodes gives them in order. With
        prioritised replay: stratified by priority, with the importance ``weights`` set. The batch is cut to its longest
        episode, rounded up to a multiple of ``bucket`` steps (at most ``episode_limit``); ``mask`` is 1 on the L
        transitions of each episode, which is PyMARL's ``filled[:, t] * (1 - terminated[:, t-1])`` for every episode
        that ends in a terminal state or at the episode limit.

        Raises ``ValueError`` when the buffer holds fewer episodes.
        """
        if not 1 <= batch_size <= self.count:
            raise ValueError(f"batch_size is {batch_size}; the buffer holds {self.count} episodes")
        positions, weights = self._draw(batch_size, t_env)
        rows = self._ring[positions]
        n_filled = self._n_filled[rows]
        longest = int(n_filled.max()) - 1
        length = min(-(-max(longest, 1) // self.bucket) * self.bucket, self.scheme.episode_limit)
        return self._gather(rows, n_filled, length, weights), positions

    def update_priorities(self, positions: np.ndarray, td_errors: Tensor, mask: Tensor) -> None:
        """New priorities of the episodes at ``positions [B]`` from ``td_errors [B,T,K]`` and ``mask [B,T,1]``.

        ``(sum_t |td| m / sqrt(sum_t m)) + 1e-6``, summed over K as well; pymarl2's rule. Reads the errors back to the
        host, which is what prioritised replay costs.
        """
        if self.prioritised is None:
            raise ValueError("update_priorities needs a buffer built with prioritised=Prioritised(...)")
        total = (td_errors.abs() * mask).sum(dim=(1, 2))
        priorities = (total / mask.sum(dim=(1, 2)).clamp_min(1).sqrt()).double().cpu().numpy() + 1e-6
        self._priorities[positions] = priorities**self.prioritised.alpha
        self._max_priority = max(self._max_priority, float(priorities.max()))

    # ---- checkpoints ----

    def state_dict(self, steps: np.ndarray) -> dict[str, Any]:
        """Everything in the buffer, without the unused part of the storage.

        ``steps [E]`` is how far each running episode is: step ``steps[e]`` is the last one written.
        """
        used = self._ring[: self.count]
        longest = int(max(self._n_filled[used].max(initial=1), steps.max(initial=0) + 1))
        rows = torch.from_numpy(np.concatenate([used, self._writer_rows]))
        # What a running episode's row still holds of its predecessor would be cleared at commit: clear it in the copy.
        stale = torch.arange(longest) > torch.from_numpy(steps)[:, None]
        episodes = {}
        for name, tensor in self._tensors.items():
            episodes[name] = tensor[:, :longest].index_select(0, rows)
            episodes[name][self.count :][stale] = 0
        return {
            "episodes": episodes,
            "n_filled": self._n_filled[used],
            "index": self.index,
            "priorities": self._priorities[: self.count].copy(),
            "max_priority": self._max_priority,
            "rng": self._rng.bit_generator.state,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` of a buffer of the same scheme, capacity and number of writers returned."""
        n_filled = np.asarray(state["n_filled"])
        self.count = len(n_filled)
        self.index = int(state["index"])
        self._ring = np.arange(self.capacity)
        self._writer_rows = np.arange(self.capacity, self.capacity + self.n_writers)
        self._n_filled[:] = 0
        self._n_filled[: self.count] = n_filled
        for name, tensor in self._tensors.items():
            saved = state["episodes"][name]
            longest = saved.shape[1]
            # A row being written may hold anything up to `longest`; so says its n_filled, and commit clears the rest.
            self._n_filled[self.capacity :] = longest
            tensor.zero_()
            tensor[: self.count, :longest] = saved[: self.count]
            tensor[self.capacity :, :longest] = saved[self.count :]
        self._priorities[: self.count] = np.asarray(state["priorities"])
        self._max_priority = float(state["max_priority"])
        self._rng.bit_generator.state = state["rng"]

    # ---- helpers ----

    def _claim(self, n: int) -> np.ndarray:
        """The next n positions of the ring; moves ``index`` and ``count`` on as PyMARL does."""
        positions = (self.index + np.arange(n)) % self.capacity
        self.count = min(self.capacity, max(self.count, self.index + n))
        self.index = (self.index + n) % self.capacity
        if self.prioritised is not None:
            self._priorities[positions] = self._max_priority**self.prioritised.alpha
        return positions

    def _finish_rows(self, rows: np.ndarray, n_filled: np.ndarray) -> None:
        """Zero what longer predecessors left behind, and record the lengths."""
        left_over = self._n_filled[rows]
        if (left_over > n_filled).any():
            for row, start, end in zip(rows.tolist(), n_filled.tolist(), left_over.tolist(), strict=True):
                for array in self._arrays.values():
                    array[row, start:end] = 0
        self._n_filled[rows] = n_filled

    def _draw(self, batch_size: int, t_env: int) -> tuple[np.ndarray, Tensor | None]:
        if self.prioritised is None:
            if self.count == batch_size:
                return np.arange(batch_size), None
            return self._rng.choice(self.count, batch_size, replace=False, shuffle=False), None
        cumulative = np.cumsum(self._priorities[: self.count])
        total = cumulative[-1]
        mass = (np.arange(batch_size) + self._rng.random(batch_size)) * (total / batch_size)
        positions = np.minimum(np.searchsorted(cumulative, mass, side="right"), self.count - 1)
        beta = self.prioritised.beta_at(t_env)
        # ((p_i / sum) n)^-beta / max_weight, where the smallest priority has the largest weight.
        weights = (self._priorities[positions] / self._priorities[: self.count].min()) ** -beta
        return positions, torch.from_numpy(weights).float().view(-1, 1, 1)

    def _gather(self, rows: np.ndarray, n_filled: np.ndarray, length: int, weights: Tensor | None) -> EpisodeBatch:
        # Observations are the bulk: torch copies them with all its threads. The rest is small, and numpy's calls are
        # several times cheaper than torch's; with one-step games they would outweigh everything else.
        index, stored = torch.from_numpy(rows), length + 1
        obs, states = (self._tensors[name][:, :stored].index_select(0, index) for name in ("obs", "states"))
        actions, avail, rewards, terminated = (
            self._arrays[name][rows, :stored] for name in ("actions", "avail", "rewards", "terminated")
        )
        filled = self._steps[:stored] < n_filled[:, None]
        last_actions = np.full(actions.shape, -1, dtype=np.int64)
        np.copyto(last_actions[:, 1:], actions[:, :-1], where=filled[:, 1:, None])
        avail = np.unpackbits(avail, axis=-1, count=self.scheme.n_actions, bitorder="little").view(np.bool_)
        return EpisodeBatch(
            obs=obs.float(),
            states=states.float(),
            actions=torch.from_numpy(actions.astype(np.int64)),
            last_actions=torch.from_numpy(last_actions),
            avail_actions=torch.from_numpy(avail),
            rewards=torch.from_numpy(np.ascontiguousarray(rewards[:, :length, None])),
            terminated=torch.from_numpy(terminated[:, :length, None].astype(np.float32)),
            mask=torch.from_numpy(filled[:, 1:, None].astype(np.float32)),
            weights=weights,
        )


def replay_bytes(scheme: Scheme, capacity: int, n_writers: int, *, obs_dtype: ObsDtype = "float32") -> int:
    """Bytes that ``ReplayBuffer`` of these arguments allocates for episodes."""
    a_step = sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in _fields(scheme, obs_dtype).values())
    return (capacity + n_writers) * (scheme.episode_limit + 1) * a_step


def describe_memory(n_bytes: int, capacity: int, scheme: Scheme) -> str:
    """The sentence that announces a buffer before it is allocated."""
    available = available_memory()
    of = f" of {human_bytes(available)} available" if available is not None else ""
    return (
        f"replay buffer: {capacity} episodes of up to {scheme.episode_limit} steps take {human_bytes(n_bytes)}{of} "
        "(touched as it fills)"
    )


def check_memory(n_bytes: int, capacity: int) -> None:
    """Raise ``MemoryError`` with what to do about it when ``n_bytes`` do not fit into the available memory."""
    available = available_memory()
    if available is not None and n_bytes > available:
        fits = capacity * available // n_bytes
        raise MemoryError(
            f"a replay buffer of {capacity} episodes takes {human_bytes(n_bytes)}, and {human_bytes(available)} of "
            f"memory are available; lower --buffer-size (about {int(0.9 * fits)} episodes fit) or store "
            "--replay-obs-dtype float16"
        )


def _fields(scheme: Scheme, obs_dtype: ObsDtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """What one step of an episode stores: name -> (shape, dtype)."""
    floats = getattr(torch, obs_dtype)
    a, u = scheme.n_agents, scheme.n_actions
    actions = torch.uint8 if u <= 2**8 else torch.int16 if u <= 2**15 else torch.int32
    return {
        "obs": ((a, scheme.obs_dim), floats),
        "states": ((scheme.state_dim,), floats),
        "actions": ((a,), actions),
        "avail": ((a, -(-u // 8)), torch.uint8),
        "rewards": ((), torch.float32),
        "terminated": ((), torch.bool),
    }
