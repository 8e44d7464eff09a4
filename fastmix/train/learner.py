"""The learner: one training step at a time, on CUDA as the replay of a graph that holds all of it.

At these sizes a step is hundreds of small kernels, and queueing them costs the host more than running them costs the
device. So the first step of every batch length is captured as a CUDA graph, from the gathering of the episodes to the
optimiser, and later ones are a single launch. Lengths come in buckets (`fastmix.train.replay`), which keeps the graphs
few. What is not captured: copies into the target networks, and whatever is logged.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, fields
from typing import Protocol

import torch
from torch import Tensor

from fastmix.algorithms import Algorithm, EpisodeBatch

Terms = dict[str, Tensor]


@dataclass(frozen=True)
class Delivery:
    """Episodes that lie ready on the learner's device."""

    key: Hashable
    """Deliveries of one key are read in the same way from the same memory, with other numbers in it."""
    read: Callable[[], EpisodeBatch]
    """The batch. Whatever it computes, it computes on the device, so that a graph can hold it."""


class Recording(Protocol):
    """A recorded training step."""

    terms: Terms
    """What `Algorithm.learn` returned; valid from one `replay` to the next of any recording of the same learner."""

    def replay(self) -> None:
        """Do the step again, on the numbers that its memory now holds."""


class Recorder(Protocol):
    """Makes recordings."""

    def __call__(self, learn: Callable[[], Terms], restore: Callable[[], None]) -> Recording:
        """Record what ``learn`` does. It may be run for real beforehand; ``restore`` undoes what it changed."""


class Learner:
    """Steps ``algo``.

    With graphs a batch of every new shape is captured at its first step and replayed from then on: bitwise the results
    of the step without, on the same device. `captures` counts the graphs. The algorithm's tensors have to stay where
    they are, and torch's settings (precision of products, autocast, backends) as they were, once a step is captured.

    Args:
        algo: what learns; its device is where everything happens.
        graphs: whether to capture; without effect where ``algo`` is not on CUDA.
        recorder: what captures, if not CUDA.
    """

    def __init__(self, algo: Algorithm, *, graphs: bool = True, recorder: Recorder | None = None) -> None:
        self.algo = algo
        self.captures = 0
        if recorder is None and graphs and algo.device.type == "cuda":
            recorder = CudaRecorder(algo.device)
        self._recorder = recorder
        if recorder is not None:
            algo.skips_padding = False  # what is recorded must fit every batch of its length
        self._recordings: dict[Hashable, Recording] = {}
        self._inputs: dict[Hashable, EpisodeBatch] = {}

    def step(self, batch: EpisodeBatch | Delivery, *, detailed: bool = False) -> dict[str, Tensor]:
        """`Algorithm.step` on ``batch``. Nothing waits for the device, except while a graph is captured.

        With graphs the returned tensors belong to the graph: the next step overwrites them. Gradients are None then.
        """
        if self._recorder is None:
            episodes = batch.read() if isinstance(batch, Delivery) else batch.to(self.algo.device)
            return self.algo.step(episodes, detailed=detailed)
        delivery = batch if isinstance(batch, Delivery) else self._take(batch)
        recording = self._recordings.get(delivery.key)
        if recording is None:
            recording = self._recordings[delivery.key] = self._record(delivery, self._recorder)
        recording.replay()
        # A replay writes behind autograd's back; whoever keeps something made from the weights watches their versions.
        torch.autograd.graph.increment_version(self.algo.optimiser.parameters)
        return self.algo.finish(recording.terms, detailed=detailed)

    def _take(self, batch: EpisodeBatch) -> Delivery:
        """Copy a batch into memory that batches of its shape share."""
        named = {field.name: getattr(batch, field.name) for field in fields(batch)}
        given = {name: tensor for name, tensor in named.items() if tensor is not None}
        key = tuple((name, tensor.shape, tensor.dtype) for name, tensor in given.items())
        if key not in self._inputs:
            device = self.algo.device
            self._inputs[key] = EpisodeBatch(
                **{name: torch.empty(t.shape, dtype=t.dtype, device=device) for name, t in given.items()}
            )
        inputs = self._inputs[key]
        for name, tensor in given.items():
            getattr(inputs, name).copy_(tensor, non_blocking=True)
        return Delivery(key, lambda: inputs)

    def _record(self, delivery: Delivery, recorder: Recorder) -> Recording:
        state = {name: tensor.clone() for name, tensor in self.algo.state_dict().items()}
        recording = recorder(lambda: self.algo.learn(delivery.read()), lambda: self.algo.load_state_dict(state))
        self.algo.optimiser.zero_grad()  # gradients are the graph's own, and nothing outside may look at them
        self.captures += 1
        return recording


class CudaRecorder:
    """Captures training steps as CUDA graphs that share one memory pool.

    Sharing is safe because graphs of one learner are replayed one after another on one stream, and nothing that a
    replay leaves in the pool is needed once the next one begins.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, learn: Callable[[], Terms], restore: Callable[[], None]) -> _CudaRecording:
        """See `Recorder`."""
        with torch.cuda.device(self._device):
            # Before the capture: libraries make their handles, Triton compiles its kernels, lazy state comes up.
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                for _ in range(WARM_UP_STEPS):
                    learn()
            torch.cuda.current_stream().wait_stream(self._stream)
            restore()
            graph = torch.cuda.CUDAGraph()
            # cuBLAS keeps a workspace for each stream. The graph's must come out of its own pool, where no one else can
            # ever be given that memory, and must not be found by others on this stream later.
            torch._C._cuda_clearCublasWorkspaces()
            try:
                with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                    terms = learn()
            except RuntimeError as error:
                raise RuntimeError(
                    "the training step cannot be captured as a CUDA graph; it runs without one by --no-graphs, or from "
                    "Python by Learner(algo, graphs=False)"
                ) from error
            torch._C._cuda_clearCublasWorkspaces()
            return _CudaRecording(graph, terms)


WARM_UP_STEPS = 2
"""The second takes the roads that the first one opened."""


class _CudaRecording:
    def __init__(self, graph: torch.cuda.CUDAGraph, terms: Terms) -> None:
        self.terms = terms
        self.replay: Callable[[], None] = graph.replay
