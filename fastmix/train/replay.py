"""Replay over whole episodes: a ring of them, and which of them a batch is made of.

Where and how they are stored is `fastmix.train.storage`'s business. What is drawn depends on the seed, on the number of
episodes and, with prioritised replay, on their priorities; never on where they are stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastmix.algorithms import EpisodeBatch, Scheme
from fastmix.train.memory import available_memory, free_device_memory, human_bytes
from fastmix.train.storage import DeviceStorage, HostStorage, Layout, ObsDtype


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


@dataclass(frozen=True, eq=False)
class Draw:
    """The episodes of a batch."""

    positions: np.ndarray
    """``[B]``, in the ring."""
    n_filled: np.ndarray
    """``[B]``, stored steps (L+1) of each."""
    length: int
    """Transitions of the batch: those of its longest episode, rounded up to the bucket."""
    weights: Tensor | None
    """``[B, 1, 1]``, importance weights of prioritised replay."""


@dataclass
class _Ahead:
    """A draw made before it was asked for, and what undoes it."""

    draw: Draw
    rng: Any  # state of the generator before it
    count: int
    stale: bool = False  # one of its episodes has been replaced since


class ReplayBuffer:
    """A ring of ``capacity`` episodes for ``n_writers`` parallel copies of an environment described by ``scheme``.

    An episode of L transitions occupies the steps 0..L: step L holds the final observation, with reward, action and
    terminated flag zero. Steps beyond L are zero in every field, availability included.

    ``device`` is where finished episodes are kept, ``None`` for host memory.

    Raises ``MemoryError`` before allocating when the buffer does not fit into the host memory that is available.
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
        device: torch.device | str | None = None,
    ) -> None:
        if capacity < 1:
            raise ValueError(f"buffer_size is {capacity}; it must be at least 1 episode")
        if n_writers < 1:
            raise ValueError(f"n_writers is {n_writers}; it must be at least 1")
        if bucket < 1:
            raise ValueError(f"bucket is {bucket}; it must be at least 1 step")
        layout = Layout(scheme, obs_dtype)
        self.scheme = scheme
        self.capacity = capacity
        self.n_writers = n_writers
        self.bucket = bucket
        self.index = 0  # where the next episode goes (pymarl: buffer_index)
        self.count = 0  # episodes stored (pymarl: episodes_in_buffer)
        self.prioritised = prioritised
        self.storage: HostStorage | DeviceStorage
        if device is None:
            check_memory(replay_bytes(scheme, capacity, n_writers, obs_dtype=obs_dtype), capacity)
            self.storage = HostStorage(layout, capacity, n_writers)
        else:
            self.storage = DeviceStorage(layout, capacity, n_writers, torch.device(device))
        self._rng = np.random.default_rng(seed)
        self._ahead: _Ahead | None = None
        self._priorities = np.zeros(capacity)  # already to the power alpha
        self._max_priority = 1.0

    @property
    def nbytes(self) -> int:
        """Bytes of the episode storage."""
        return self.storage.nbytes

    def can_sample(self, batch_size: int) -> bool:
        """Whether ``sample(batch_size)`` has enough episodes."""
        return self.count >= batch_size

    # ---- writing a running episode (rollout) ----

    def write_observations(self, steps: np.ndarray, obs: np.ndarray, states: np.ndarray, avail: np.ndarray) -> None:
        """Store ``obs [E,A,O]``, ``states [E,S]``, ``avail [E,A,U]`` at ``steps [E]`` of the running episodes."""
        self.storage.write(steps, {"obs": obs, "states": states, "avail": _pack(avail)})

    def write_transitions(
        self, steps: np.ndarray, actions: np.ndarray, rewards: np.ndarray, terminated: np.ndarray
    ) -> None:
        """Store ``actions [E,A]``, ``rewards [E]``, ``terminated [E]`` of the transition that leaves ``steps [E]``."""
        self.storage.write(steps, {"actions": actions, "rewards": rewards, "terminated": terminated})

    def commit(self, writers: np.ndarray, lengths: np.ndarray) -> None:
        """Move the finished episodes of the copies ``writers [n]`` into the ring, in that order.

        ``lengths [n]`` is the number of transitions L of each; step L must hold the final observation.
        """
        self.storage.commit(writers, lengths, self._claim(len(writers)))

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
            "avail": _pack(np.asarray(avail) != 0),
        }  # fmt: skip
        filled = np.asarray(filled) != 0
        n, stored = filled.shape
        layout = self.storage.layout
        if n > self.capacity:
            raise ValueError(
                f"insert of {n} episodes into a buffer of {self.capacity}; insert at most that many at once"
            )
        if stored > layout.steps:
            raise ValueError(f"filled has {stored} steps; the buffer holds episode_limit + 1 = {layout.steps}")
        for name, value in given.items():
            expected = (n, stored, *layout.fields[name][0])
            if value.shape != expected:
                raise ValueError(f"{name} has shape {value.shape}; with filled {filled.shape} it must be {expected}")
        n_filled = filled.sum(axis=1)
        if not (filled == (np.arange(stored) < n_filled[:, None])).all() or not n_filled.all():
            raise ValueError("filled must be ones up to the last stored step of an episode and zeros after it")
        values = {
            name: np.where(filled.reshape(n, stored, *(1,) * (value.ndim - 2)), value, 0)
            for name, value in given.items()
        }
        self.storage.insert(self._claim(n), values, n_filled)

    # ---- sampling ----

    def sample(self, batch_size: int, *, t_env: int = 0) -> tuple[EpisodeBatch, np.ndarray]:
        """``batch_size`` different episodes as an :class:`EpisodeBatch`, and their positions in the ring.

        The batch is a copy, and where the episodes are stored. It is cut to its longest episode, rounded up to a
        multiple of ``bucket`` steps (at most ``episode_limit``); ``mask`` is 1 on the L transitions of each episode,
        which is PyMARL's ``filled[:, t] * (1 - terminated[:, t-1])`` for every episode that ends in a terminal state or
        at the episode limit. Which episodes: see `draw`.
        """
        draw = self.draw(batch_size, t_env=t_env)
        return self.storage.batch(draw.positions, draw.length, draw.weights), draw.positions

    def draw(self, batch_size: int, *, t_env: int = 0) -> Draw:
        """Choose ``batch_size`` different episodes.

        Uniform without replacement; a buffer that holds exactly ``batch_size`` episodes gives them in order. With
        prioritised replay: stratified by priority, with the importance ``weights`` set.

        Raises ``ValueError`` when the buffer holds fewer episodes.
        """
        if not 1 <= batch_size <= self.count:
            raise ValueError(f"batch_size is {batch_size}; the buffer holds {self.count} episodes")
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            if len(ahead.draw.positions) == batch_size and ahead.count == self.count:
                return self._look_up(ahead.draw.positions) if ahead.stale else ahead.draw
            self._rng.bit_generator.state = ahead.rng
        if self.prioritised is not None:
            return self._look_up(*self._choose_by_priority(batch_size, self.prioritised.beta_at(t_env)))
        return self._look_up(self._choose(batch_size))

    def draw_ahead(self, batch_size: int) -> Draw | None:
        """What the next ``draw(batch_size)`` gives unless episodes come in between, so that it can be fetched already.

        If they do, and replace one of these or make the choice larger, ``draw`` gives what it would have given without
        this call, in an object of its own. ``state_dict`` knows nothing of this call either. None with prioritised
        replay, where the next choice depends on the errors of this one, and while there are fewer episodes.
        """
        if self.prioritised is not None or self.count < batch_size:
            return None
        rng = self._rng.bit_generator.state if self._ahead is None else self._ahead.rng
        draw = self.draw(batch_size)
        self._ahead = _Ahead(draw, rng, self.count)
        return draw

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
        """Everything in the buffer, without the unused part of the storage, whose kind does not matter.

        ``steps [E]`` is how far each running episode is: step ``steps[e]`` is the last one written.
        """
        return {
            "episodes": self.storage.state(self.count, steps),
            "n_filled": self.storage.n_filled(np.arange(self.count)),
            "index": self.index,
            "priorities": self._priorities[: self.count].copy(),
            "max_priority": self._max_priority,
            "rng": self._rng.bit_generator.state if self._ahead is None else self._ahead.rng,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` of a buffer of the same scheme, capacity and number of writers returned."""
        n_filled = np.asarray(state["n_filled"])
        self.count = len(n_filled)
        self.index = int(state["index"])
        self.storage.load(state["episodes"], n_filled)
        self._priorities[: self.count] = np.asarray(state["priorities"])
        self._max_priority = float(state["max_priority"])
        self._rng.bit_generator.state = state["rng"]
        self._ahead = None

    # ---- helpers ----

    def _claim(self, n: int) -> np.ndarray:
        """The next n positions of the ring; moves ``index`` and ``count`` on as PyMARL does."""
        positions = (self.index + np.arange(n)) % self.capacity
        self.count = min(self.capacity, max(self.count, self.index + n))
        self.index = (self.index + n) % self.capacity
        if self.prioritised is not None:
            self._priorities[positions] = self._max_priority**self.prioritised.alpha
        if self._ahead is not None:
            self._ahead.stale |= bool(np.isin(positions, self._ahead.draw.positions).any())
        return positions

    def _look_up(self, positions: np.ndarray, weights: Tensor | None = None) -> Draw:
        n_filled = self.storage.n_filled(positions)
        longest = int(n_filled.max()) - 1
        length = min(-(-max(longest, 1) // self.bucket) * self.bucket, self.scheme.episode_limit)
        return Draw(positions, n_filled, length, weights)

    def _choose(self, batch_size: int) -> np.ndarray:
        if self.count == batch_size:
            return np.arange(batch_size)
        return self._rng.choice(self.count, batch_size, replace=False, shuffle=False)

    def _choose_by_priority(self, batch_size: int, beta: float) -> tuple[np.ndarray, Tensor]:
        cumulative = np.cumsum(self._priorities[: self.count])
        total = cumulative[-1]
        mass = (np.arange(batch_size) + self._rng.random(batch_size)) * (total / batch_size)
        positions = np.minimum(np.searchsorted(cumulative, mass, side="right"), self.count - 1)
        # ((p_i / sum) n)^-beta / max_weight, where the smallest priority has the largest weight.
        weights = (self._priorities[positions] / self._priorities[: self.count].min()) ** -beta
        return positions, torch.from_numpy(weights).float().view(-1, 1, 1)


def replay_bytes(scheme: Scheme, capacity: int, n_writers: int, *, obs_dtype: ObsDtype = "float32") -> int:
    """Bytes that a ``ReplayBuffer`` of these arguments, in host memory, allocates for episodes."""
    return (capacity + n_writers) * Layout(scheme, obs_dtype).episode_bytes


def describe_memory(n_bytes: int, capacity: int, scheme: Scheme, device: torch.device | None = None) -> str:
    """The sentence that announces a buffer in host memory or on ``device`` before it is allocated."""
    available = available_memory() if device is None else free_device_memory(device)
    of = f" of {human_bytes(available)} available" if available is not None else ""
    where = "(touched as it fills)" if device is None else f"on {device} (allocated at once)"
    return (
        f"replay buffer: {capacity} episodes of up to {scheme.episode_limit} steps take {human_bytes(n_bytes)}{of} "
        f"{where}"
    )


DEVICE_SHARE = 0.75
"""Of a device's free memory, what episodes may take; the rest is for networks, batches and the training step."""


def fits_on_device(n_bytes: int, device: torch.device) -> str | None:
    """None when ``n_bytes`` of episodes fit on a CUDA ``device``, else the reason why not."""
    free = free_device_memory(device)
    if n_bytes <= DEVICE_SHARE * free:
        return None
    return (
        f"a replay buffer of {human_bytes(n_bytes)} does not fit on {device}: {human_bytes(free)} are free, of which "
        f"it may take {DEVICE_SHARE:.0%}"
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


def _pack(avail: np.ndarray) -> np.ndarray:
    """One bit an action, ``[..., ceil(U / 8)]``."""
    return np.packbits(avail, axis=-1, bitorder="little")
