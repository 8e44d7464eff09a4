"""Where replay keeps its episodes: every number once, in host memory or on the device that learns from them.

Observations are kept once a step; last actions and agent ids are derived, never stored; availability is one bit an
action; actions take one byte where they fit. Everything is allocated at construction and nothing grows afterwards.

An episode is written step by step into a row of host memory. Host storage has one such row for each parallel copy of
the environment beside the ring, and a finished episode enters the ring by swapping row numbers: it is never copied.
Device storage copies it once, when it is finished. Either way reading never sees a half-written episode.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from fastmix.algorithms import EpisodeBatch, Scheme
from fastmix.train.memory import pinned

ObsDtype = Literal["float32", "float16", "int8"]
Fields = dict[str, Tensor]

TRANSITION = ("actions", "rewards", "terminated")
"""Fields of the transition that leaves a step; the others are seen at the step itself."""


@dataclass(frozen=True)
class Layout:
    """What is stored of every step of an episode, in which shapes and dtypes."""

    scheme: Scheme
    obs_dtype: ObsDtype = "float32"

    def __post_init__(self) -> None:
        if self.obs_dtype not in get_args(ObsDtype):
            raise ValueError(f"obs_dtype is {self.obs_dtype!r}; it must be one of {', '.join(get_args(ObsDtype))}")

    @property
    def fields(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Name -> (shape, dtype) of one step."""
        floats = getattr(torch, self.obs_dtype)
        a, u = self.scheme.n_agents, self.scheme.n_actions
        actions = torch.uint8 if u <= 2**8 else torch.int16 if u <= 2**15 else torch.int32
        return {
            "obs": ((a, self.scheme.obs_dim), floats),
            "states": ((self.scheme.state_dim,), floats),
            "actions": ((a,), actions),
            "avail": ((a, -(-u // 8)), torch.uint8),
            "rewards": ((), torch.float32),
            "terminated": ((), torch.bool),
        }

    @property
    def steps(self) -> int:
        """Steps of a row: the transitions of the longest episode, and its final observation."""
        return self.scheme.episode_limit + 1

    @property
    def episode_bytes(self) -> int:
        """Bytes of one row."""
        return self.steps * sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in self.fields.values())

    def allocate(self, rows: int, device: torch.device | str = "cpu") -> Fields:
        """Empty (zero) rows, ``[rows, steps, ...]`` each."""
        return {
            name: torch.zeros((rows, self.steps, *shape), dtype=dtype, device=device)
            for name, (shape, dtype) in self.fields.items()
        }

    def shapes(self, batch_size: int, length: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Name -> (shape, dtype) of a batch of ``length`` transitions as `HostStorage.copy_raw` gives it."""
        return {
            name: ((batch_size, _stored(name, length), *shape), dtype) for name, (shape, dtype) in self.fields.items()
        }


class Decoder:
    """Makes of stored fields what an algorithm sees, on their device and without a word from the host."""

    def __init__(self, scheme: Scheme, device: torch.device) -> None:
        actions = torch.arange(scheme.n_actions, device=device)
        self._byte = actions // 8
        self._bit = (1 << actions % 8).to(torch.uint8)
        self._steps = torch.arange(scheme.episode_limit + 1, device=device)
        self._none = torch.full((), -1, device=device)

    def __call__(self, raw: Fields, n_filled: Tensor, weights: Tensor | None) -> EpisodeBatch:
        """The batch of ``raw`` fields (`Layout.shapes`) of episodes with ``n_filled [B]`` stored steps each."""
        actions = raw["actions"].long()
        steps = self._steps[: actions.shape[1]]
        filled = (steps < n_filled.unsqueeze(1)).unsqueeze(2)
        followed = filled & (steps > 0).unsqueeze(1)
        return EpisodeBatch(
            obs=raw["obs"].float(),
            states=raw["states"].float(),
            actions=actions,
            last_actions=torch.where(followed, actions.roll(1, 1), self._none),
            avail_actions=(raw["avail"].index_select(-1, self._byte) & self._bit) != 0,
            rewards=raw["rewards"].unsqueeze(2),
            terminated=raw["terminated"].unsqueeze(2).float(),
            mask=filled[:, 1:].float(),
            weights=weights,
        )


class Storage(abc.ABC):
    """Episodes by their position in the ring, and the running ones by the copy of the environment that plays them."""

    def __init__(self, layout: Layout, capacity: int, host_rows: int, n_writers: int) -> None:
        self.layout = layout
        self.capacity = capacity
        self._host = layout.allocate(host_rows)
        # numpy views of the same memory: a write of a few rows costs a quarter of what it costs through torch.
        self._arrays = {name: tensor.numpy() for name, tensor in self._host.items()}
        self._writer_rows = np.arange(host_rows - n_writers, host_rows)
        # Stored steps (L+1) of each host row. For a row being written: how much of its previous episode is still there.
        self._filled = np.zeros(host_rows, dtype=np.int64)

    @property
    @abc.abstractmethod
    def nbytes(self) -> int:
        """Bytes of all episodes, the running ones included."""

    @abc.abstractmethod
    def n_filled(self, positions: np.ndarray) -> np.ndarray:
        """Stored steps (L+1) of the episodes at ``positions``."""

    @abc.abstractmethod
    def insert(self, positions: np.ndarray, values: dict[str, np.ndarray], n_filled: np.ndarray) -> None:
        """Put ``n`` episodes at ``positions [n]``; ``values [n, T, ...]`` are zero from ``n_filled [n]`` on."""

    @abc.abstractmethod
    def batch(self, positions: np.ndarray, length: int, weights: Tensor | None) -> EpisodeBatch:
        """A copy of the first ``length`` transitions of the episodes at ``positions [B]``, where they are stored."""

    def write(self, steps: np.ndarray, values: dict[str, np.ndarray]) -> None:
        """Store ``values [E, ...]`` at ``steps [E]`` of the running episodes."""
        at = (self._writer_rows, steps)
        for name, value in values.items():
            self._arrays[name][at] = value

    def commit(self, writers: np.ndarray, lengths: np.ndarray, positions: np.ndarray) -> None:
        """Move the episodes of the copies ``writers [n]``, of ``lengths [n]`` transitions, to ``positions [n]``."""
        rows = self._writer_rows[writers]
        for name in TRANSITION:
            self._arrays[name][rows, lengths] = 0  # nothing leaves the last step
        n_filled, left_over = lengths + 1, self._filled[rows]
        if (left_over > n_filled).any():  # what a longer predecessor left behind
            for row, start, end in zip(rows.tolist(), n_filled.tolist(), left_over.tolist(), strict=True):
                for array in self._arrays.values():
                    array[row, start:end] = 0
        self._filled[rows] = n_filled
        self._place(writers, rows, positions)

    def state(self, count: int, steps: np.ndarray) -> Fields:
        """The episodes at positions ``0..count-1``, then the running ones, cut to the longest; in host memory.

        ``steps [E]`` is how far each running episode is: step ``steps[e]`` is the last one written.
        """
        used = np.arange(count)
        longest = int(max(self.n_filled(used).max(initial=1), steps.max(initial=0) + 1))
        # What a running episode's row still holds of its predecessor would be cleared at commit: clear it in the copy.
        ahead = torch.arange(longest) - torch.from_numpy(steps)[:, None]
        writers = torch.from_numpy(self._writer_rows)
        episodes = {}
        for name, host in self._host.items():
            episodes[name] = host.new_empty((count + len(writers), longest, *host.shape[2:]))
            self._copy_finished(name, episodes[name][:count])
            running = torch.index_select(host[:, :longest], 0, writers, out=episodes[name][count:])
            running[ahead >= 0 if name in TRANSITION else ahead > 0] = 0
        return episodes

    def load(self, episodes: Fields, n_filled: np.ndarray) -> None:
        """Restore what `state` gave, from either kind of storage, with the stored steps of its finished episodes."""
        self._clear()
        writers = torch.from_numpy(self._writer_rows)
        for name, saved in episodes.items():
            # A row being written may hold anything up to here; commit clears the rest.
            self._filled[self._writer_rows] = longest = saved.shape[1]
            self._host[name][writers, :longest] = saved[len(n_filled) :]
        self._load_finished({name: saved[: len(n_filled)] for name, saved in episodes.items()}, n_filled)

    @abc.abstractmethod
    def _place(self, writers: np.ndarray, rows: np.ndarray, positions: np.ndarray) -> None:
        """Let the finished host ``rows`` of ``writers`` be the episodes at ``positions``."""

    @abc.abstractmethod
    def _copy_finished(self, name: str, out: Tensor) -> None:
        """Copy a field of the episodes at the first positions into ``out [n, steps, ...]``, in host memory."""

    @abc.abstractmethod
    def _load_finished(self, episodes: Fields, n_filled: np.ndarray) -> None:
        """Put episodes at the first positions of an empty ring."""

    def _clear(self) -> None:
        for tensor in self._host.values():
            tensor.zero_()
        self._filled[:] = 0


class HostStorage(Storage):
    """A ring of ``capacity`` episodes in host memory, with a spare row for each of ``n_writers``."""

    def __init__(self, layout: Layout, capacity: int, n_writers: int) -> None:
        super().__init__(layout, capacity, capacity + n_writers, n_writers)
        self._rows = np.arange(capacity)  # position in the ring -> row
        self._steps = np.arange(layout.steps)

    @property
    def nbytes(self) -> int:
        """See `Storage.nbytes`."""
        return sum(array.nbytes for array in self._arrays.values())

    def n_filled(self, positions: np.ndarray) -> np.ndarray:
        """See `Storage.n_filled`."""
        n_filled: np.ndarray = self._filled[self._rows[positions]]
        return n_filled

    def insert(self, positions: np.ndarray, values: dict[str, np.ndarray], n_filled: np.ndarray) -> None:
        """See `Storage.insert`."""
        rows = self._rows[positions]
        for name, value in values.items():
            stored = value.shape[1]
            self._arrays[name][rows, :stored] = value
            self._arrays[name][rows, stored:] = 0
        self._filled[rows] = n_filled

    def batch(self, positions: np.ndarray, length: int, weights: Tensor | None) -> EpisodeBatch:
        """See `Storage.batch`; the same as `Decoder` makes of the same fields."""
        # Observations are the bulk: torch copies them with all its threads. The rest is small, and numpy's calls are
        # several times cheaper than torch's; with one-step games they would outweigh everything else.
        rows, stored = self._rows[positions], length + 1
        index = torch.from_numpy(rows)
        obs, states = (self._host[name][:, :stored].index_select(0, index) for name in ("obs", "states"))
        actions, avail, rewards, terminated = (
            self._arrays[name][rows, :stored] for name in ("actions", "avail", "rewards", "terminated")
        )
        filled = self._steps[:stored] < self._filled[rows][:, None]
        last_actions = np.full(actions.shape, -1, dtype=np.int64)
        np.copyto(last_actions[:, 1:], actions[:, :-1], where=filled[:, 1:, None])
        avail = np.unpackbits(avail, axis=-1, count=self.layout.scheme.n_actions, bitorder="little").view(np.bool_)
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

    def copy_raw(self, positions: np.ndarray, out: Fields) -> None:
        """Copy the episodes at ``positions [B]`` as they are stored into ``out`` (see `Layout.shapes`)."""
        index = torch.from_numpy(self._rows[positions])
        for name, tensor in out.items():
            torch.index_select(self._host[name][:, : tensor.shape[1]], 0, index, out=tensor)

    def _place(self, writers: np.ndarray, rows: np.ndarray, positions: np.ndarray) -> None:
        self._writer_rows[writers] = self._rows[positions]
        self._rows[positions] = rows

    def _copy_finished(self, name: str, out: Tensor) -> None:
        index = torch.from_numpy(self._rows[: len(out)])
        torch.index_select(self._host[name][:, : out.shape[1]], 0, index, out=out)

    def _load_finished(self, episodes: Fields, n_filled: np.ndarray) -> None:
        rows = self._rows[: len(n_filled)]
        self._filled[rows] = n_filled
        index = torch.from_numpy(rows)
        for name, saved in episodes.items():
            self._host[name][index, : saved.shape[1]] = saved


class DeviceStorage(Storage):
    """A ring of ``capacity`` episodes on ``device``, with a row in host memory for each of ``n_writers``."""

    def __init__(self, layout: Layout, capacity: int, n_writers: int, device: torch.device) -> None:
        super().__init__(layout, capacity, n_writers, n_writers)
        self.device = device
        self._ring = layout.allocate(capacity, device)
        self._ring_filled = np.zeros(capacity, dtype=np.int64)
        self._decode = Decoder(layout.scheme, device)

    @property
    def nbytes(self) -> int:
        """See `Storage.nbytes`."""
        return sum(t.numel() * t.element_size() for fields in (self._ring, self._host) for t in fields.values())

    def n_filled(self, positions: np.ndarray) -> np.ndarray:
        """See `Storage.n_filled`."""
        n_filled: np.ndarray = self._ring_filled[positions]
        return n_filled

    def insert(self, positions: np.ndarray, values: dict[str, np.ndarray], n_filled: np.ndarray) -> None:
        """See `Storage.insert`."""
        index = torch.from_numpy(positions).to(self.device)
        for name, ring in self._ring.items():
            # Rounded by numpy, as every other episode: torch rounds float64 to float16 by way of float32.
            value = values[name].astype(self._arrays[name].dtype)
            stored = value.shape[1]
            ring[index, :stored] = torch.from_numpy(value).to(self.device)
            ring[index, stored:] = 0
        self._ring_filled[positions] = n_filled

    def batch(self, positions: np.ndarray, length: int, weights: Tensor | None) -> EpisodeBatch:
        """See `Storage.batch`."""
        on_device = torch.from_numpy(np.stack([positions, self._ring_filled[positions]])).to(self.device)
        weights = None if weights is None else weights.to(self.device)
        return self.read(on_device[0], on_device[1], length, weights)

    def read(self, positions: Tensor, n_filled: Tensor, length: int, weights: Tensor | None) -> EpisodeBatch:
        """`batch` for what is on the device already, ``positions [B]`` and their ``n_filled [B]``: capturable."""
        raw = {name: ring[:, : _stored(name, length)].index_select(0, positions) for name, ring in self._ring.items()}
        return self._decode(raw, n_filled, weights)

    def _place(self, writers: np.ndarray, rows: np.ndarray, positions: np.ndarray) -> None:
        for row, position in zip(rows.tolist(), positions.tolist(), strict=True):
            # Zeros follow the episode in its host row, and overwrite what a longer one left on the device.
            extent = max(self._filled[row], self._ring_filled[position])
            for name, ring in self._ring.items():
                # By way of pinned memory: the copy is queued, and the row can be written again at once.
                ring[position, :extent].copy_(pinned(self._host[name][row, :extent], self.device), non_blocking=True)
            self._ring_filled[position] = self._filled[row]

    def _copy_finished(self, name: str, out: Tensor) -> None:
        for part in self._parts(len(out)):
            out[part].copy_(self._ring[name][part, : out.shape[1]])

    def _load_finished(self, episodes: Fields, n_filled: np.ndarray) -> None:
        self._ring_filled[:] = 0
        self._ring_filled[: len(n_filled)] = n_filled
        for name, saved in episodes.items():
            self._ring[name].zero_()
            for part in self._parts(len(n_filled)):
                self._ring[name][part, : saved.shape[1]].copy_(saved[part])

    def _parts(self, n: int) -> Iterator[slice]:
        """A few episodes at a time: what is not contiguous travels by way of a copy, for which there may be no room."""
        for start in range(0, n, 64):
            yield slice(start, min(start + 64, n))


def _stored(name: str, length: int) -> int:
    """Steps that a batch of ``length`` transitions takes of a field; nothing is earned after the last transition."""
    return length if name in ("rewards", "terminated") else length + 1
