"""What stands in for CUDA graphs where there is no GPU: a tape of operator calls that is played again.

Like a graph it knows nothing of Python: a replay calls the recorded operators on the recorded tensors and nothing else,
so whatever a step keeps in Python (a count, a tensor that is exchanged for a new one) stands still.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastmix.train.learner import Terms


class TapeRecorder:
    """A recorder (`fastmix.train.learner.Recorder`) of operator calls, on any device."""

    def __call__(self, learn: Callable[[], Terms], restore: Callable[[], None]) -> Tape:
        learn()  # warm-up, as before a capture
        restore()
        with _Listener() as listener:
            terms = learn()
        restore()  # a capture carries nothing out
        return Tape(terms, listener.calls)


class Tape:
    def __init__(self, terms: Terms, calls: list[tuple[Any, Any, Any, Any]]) -> None:
        self.terms = terms
        self._calls = calls

    @torch.no_grad()
    def replay(self) -> None:
        for operator, args, kwargs, recorded in self._calls:
            again = operator(*args, **kwargs)
            for old, new in zip(tree_leaves(recorded), tree_leaves(again), strict=True):
                # Views, and results of operators in place, are where they were.
                if isinstance(old, Tensor) and old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                    old.copy_(new)


class _Listener(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result
