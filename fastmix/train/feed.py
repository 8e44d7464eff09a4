"""How the episodes that replay chose get to the learner, without making the host wait for the device.

| episodes are kept | the learner is | what travels |
|---|---|---|
| in host memory | on the CPU | nothing: the batch is gathered there |
| on the device | on that device | positions: the batch is gathered on the device, inside the captured step |
| in host memory | on a device | the batch as it is stored, through pinned memory and ahead of time where it can be |

The numbers are the same on every road.
"""

from __future__ import annotations

import abc
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastmix.algorithms import EpisodeBatch
from fastmix.train.learner import Delivery
from fastmix.train.memory import pinned
from fastmix.train.replay import Draw, ReplayBuffer
from fastmix.train.storage import Decoder, DeviceStorage, Fields, HostStorage


class Feed(abc.ABC):
    """Brings batches of ``replay`` to a learner."""

    def __init__(self, replay: ReplayBuffer) -> None:
        self.replay = replay

    @abc.abstractmethod
    def next(self, batch_size: int, *, t_env: int = 0) -> tuple[EpisodeBatch | Delivery, np.ndarray]:
        """What the learner steps on, and the positions of its episodes in the ring; see `ReplayBuffer.draw`."""

    def prefetch(self, batch_size: int) -> None:  # noqa: B027 - only one road has something to do
        """Fetch what ``next(batch_size)`` will be, as far as that is known, while the device is busy."""


def make_feed(replay: ReplayBuffer, device: torch.device) -> Feed:
    """The road from ``replay`` to a learner on ``device``."""
    if isinstance(replay.storage, DeviceStorage):
        return ResidentFeed(replay, replay.storage)
    if device.type == "cpu":
        return HostFeed(replay)
    return StreamedFeed(replay, replay.storage, device)


class HostFeed(Feed):
    """From host memory to a learner on the CPU."""

    def next(self, batch_size: int, *, t_env: int = 0) -> tuple[EpisodeBatch | Delivery, np.ndarray]:
        """See `Feed.next`."""
        return self.replay.sample(batch_size, t_env=t_env)


class ResidentFeed(Feed):
    """From the device's memory to a learner on the same device."""

    def __init__(self, replay: ReplayBuffer, storage: DeviceStorage) -> None:
        super().__init__(replay)
        self._storage = storage
        self._indices: dict[int, Tensor] = {}  # by batch size: positions and stored steps of its episodes
        self._weights: dict[int, Tensor] = {}

    def next(self, batch_size: int, *, t_env: int = 0) -> tuple[EpisodeBatch | Delivery, np.ndarray]:
        """See `Feed.next`."""
        draw, device = self.replay.draw(batch_size, t_env=t_env), self._storage.device
        if batch_size not in self._indices:
            self._indices[batch_size] = torch.empty((2, batch_size), dtype=torch.int64, device=device)
            self._weights[batch_size] = torch.empty((batch_size, 1, 1), device=device)
        index = self._indices[batch_size]
        index.copy_(pinned(torch.from_numpy(np.stack([draw.positions, draw.n_filled])), device), non_blocking=True)
        weights = None
        if draw.weights is not None:
            weights = self._weights[batch_size].copy_(pinned(draw.weights, device), non_blocking=True)
        key = (self, batch_size, draw.length, weights is not None)
        return Delivery(key, lambda: self._storage.read(index[0], index[1], draw.length, weights)), draw.positions


@dataclass(frozen=True)
class _Fetched:
    """A batch as it is stored, on its way to the device or there."""

    draw: Draw
    fields: Fields
    arrived: torch.cuda.Event | None


class StreamedFeed(Feed):
    """From host memory to a learner on another device.

    A batch is gathered in a thread into pinned memory and copied on a stream of its own, so that rollouts, the step
    before and the transfer run side by side. It lands in memory of its own and is copied from there to where the
    learner reads it, which on the device costs next to nothing.
    """

    def __init__(self, replay: ReplayBuffer, storage: HostStorage, device: torch.device) -> None:
        super().__init__(replay)
        self._storage = storage
        self._device = device
        self._decode = Decoder(storage.layout.scheme, device)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="fastmix-prefetch")
        self._pending: tuple[Draw, Future[_Fetched]] | None = None
        self._inputs: dict[int, Fields] = {}  # by batch size: flat memory for its longest batch

    def next(self, batch_size: int, *, t_env: int = 0) -> tuple[EpisodeBatch | Delivery, np.ndarray]:
        """See `Feed.next`."""
        draw = self.replay.draw(batch_size, t_env=t_env)
        fetched = self._take_pending(draw) or self._fetch(draw)
        inputs = self._receive(fetched)

        def read() -> EpisodeBatch:
            raw = dict(inputs)
            return self._decode(raw, raw.pop("n_filled"), raw.pop("weights", None))

        return Delivery((self, batch_size, draw.length, draw.weights is not None), read), draw.positions

    def prefetch(self, batch_size: int) -> None:
        """See `Feed.prefetch`."""
        draw = self.replay.draw_ahead(batch_size)
        if draw is not None:
            self._pending = (draw, self._thread.submit(self._fetch, draw))

    def _take_pending(self, draw: Draw) -> _Fetched | None:
        """What was fetched ahead if it is ``draw``. What is not, has been read while it was written to: dropped."""
        pending, self._pending = self._pending, None
        if pending is None:
            return None
        fetched = pending[1].result()
        return fetched if pending[0] is draw else None

    def _fetch(self, draw: Draw) -> _Fetched:
        """Gather and send off; runs in the thread or, when there was nothing to fetch ahead, in the caller."""
        on_cuda = self._stream is not None
        staged = {
            name: torch.empty(shape, dtype=dtype, pin_memory=on_cuda)
            for name, (shape, dtype) in self._storage.layout.shapes(len(draw.positions), draw.length).items()
        }
        self._storage.copy_raw(draw.positions, staged)
        staged["n_filled"] = pinned(torch.from_numpy(draw.n_filled), self._device)
        if draw.weights is not None:
            staged["weights"] = pinned(draw.weights, self._device)
        if self._stream is None:
            return _Fetched(draw, staged, None)
        with torch.cuda.stream(self._stream):
            landed = {name: tensor.to(self._device, non_blocking=True) for name, tensor in staged.items()}
            arrived = torch.cuda.Event()
            arrived.record()
        return _Fetched(draw, landed, arrived)

    def _receive(self, fetched: _Fetched) -> Fields:
        """Copy a batch to where batches of its shape are always read."""
        batch_size, limit = len(fetched.draw.positions), self._storage.layout.scheme.episode_limit
        if batch_size not in self._inputs:
            longest = self._storage.layout.shapes(batch_size, limit)
            longest |= {"n_filled": ((batch_size,), torch.int64), "weights": ((batch_size, 1, 1), torch.float32)}
            self._inputs[batch_size] = {
                name: torch.empty(int(np.prod(shape)), dtype=dtype, device=self._device)
                for name, (shape, dtype) in longest.items()
            }
        if fetched.arrived is not None:
            torch.cuda.current_stream(self._device).wait_event(fetched.arrived)
        inputs = {}
        for name, field in fetched.fields.items():
            inputs[name] = self._inputs[batch_size][name][: field.numel()].view(field.shape)
            inputs[name].copy_(field)
            if fetched.arrived is not None:
                field.record_stream(torch.cuda.current_stream(self._device))
        return inputs
