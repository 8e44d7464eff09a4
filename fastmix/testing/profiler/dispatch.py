"""The counter of operator dispatches."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

if TYPE_CHECKING:
    from typing_extensions import Self

_UNMARKED = nullcontext()


class CountDispatches(TorchDispatchMode):
    """Counts the operators, ATen's and custom ones, that reach a backend inside the ``with`` block.

    What counts is what PyTorch hands to a kernel of a device, forward and backward, in whichever thread autograd runs:
    composite operators count as what they are made of on this device (``linear`` as ``t`` and ``addmm``), in-place and
    factory functions count, Python and autograd's own bookkeeping do not. An operator is one dispatch whatever it does
    inside: neither ATen's allocations nor those of a fastmix op are counted. Operators that by their schema only look
    at their argument in another way are kept apart in ``views``. The numbers depend on nothing but the program, the
    device type and the torch release.

    Two things go another way while somebody counts. Native ops go through PyTorch's dispatcher instead of past it,
    which costs time and now and then shows a ``detach`` more; and what ``torch.compile`` compiled runs, and is counted,
    as the eager code it was made from.

    Args:
        mark: entered around every operator with ``view`` or not and its name, for a profiler that wants to see them.
    """

    def __init__(self, mark: Callable[[bool, str], AbstractContextManager[object]] | None = None) -> None:
        super().__init__()
        self.operators: Counter[str] = Counter()
        """name -> calls, views apart."""
        self.views: Counter[str] = Counter()
        """name -> calls of views."""
        self._mark = mark
        self._eager = ExitStack()

    @property
    def total(self) -> int:
        """All calls, views with them."""
        return self.operators.total() + self.views.total()

    def __enter__(self) -> Self:
        """Begin to count."""
        if "torch._dynamo" in sys.modules:  # else nothing is compiled, and importing it takes seconds
            self._eager.enter_context(torch.compiler.set_stance("force_eager"))
        super().__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stop counting."""
        super().__exit__(kind, error, traceback)
        self._eager.close()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Count ``func`` and call it."""
        name, is_view = str(func).removesuffix(".default"), getattr(func, "is_view", False)
        (self.views if is_view else self.operators)[name] += 1
        with _UNMARKED if self._mark is None else self._mark(is_view, name):
            return func(*args, **(kwargs or {}))
