"""Uninitialised memory that shows: what fastmix allocates with `torch.empty` and its relatives is filled with NaN."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

_FUNCTIONS = ("empty", "empty_like", "empty_strided", "empty_permuted")
_METHODS = ("new_empty", "new_empty_strided")


class Poisoned:
    """How many allocations were filled inside `poisoned_allocations`; a test that expects some asserts on `count`."""

    def __init__(self) -> None:
        self.count = 0


@contextmanager
def poisoned_allocations(package: str = "fastmix") -> Iterator[Poisoned]:
    """Inside the block, uninitialised tensors allocated by modules of `package` hold NaN (integers: largest value).

    A kernel that leaves an element of its output or workspace unwritten then gives NaN instead of what happened to lie
    there. Covers `torch.empty`, `empty_like`, `empty_strided`, `empty_permuted`, `Tensor.new_empty` and
    `new_empty_strided`, called as such; other packages' allocations are untouched. Not for use under `torch.compile`.
    """
    report = Poisoned()
    with ExitStack() as patches:
        for owner, names in ((torch, _FUNCTIONS), (Tensor, _METHODS)):
            for name in names:
                poisoning = _poisoning(getattr(owner, name), report, package)
                patches.enter_context(mock.patch.object(owner, name, poisoning))
        yield report


def poison_(tensor: Tensor) -> Tensor:
    """Fill with NaN; integers with their largest value, booleans with True."""
    with torch.no_grad():
        if tensor.is_floating_point() or tensor.is_complex():
            return tensor.fill_(float("nan"))
        if tensor.dtype == torch.bool:
            return tensor.fill_(True)
        return tensor.fill_(torch.iinfo(tensor.dtype).max)


def _poisoning(allocate: Callable[..., Tensor], report: Poisoned, package: str) -> Callable[..., Tensor]:
    @functools.wraps(allocate)
    def wrapper(*args: Any, **kwargs: Any) -> Tensor:
        tensor = allocate(*args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller == package or caller.startswith(package + "."):
            report.count += 1
            poison_(tensor)
        return tensor

    return wrapper
