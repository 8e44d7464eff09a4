"""Names for the parts of a training step, which a profiler asks for and everything else passes by."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

Listener = Callable[[str], AbstractContextManager[object]]

_NOTHING = nullcontext()
_listener: Listener | None = None


def part(name: str) -> AbstractContextManager[object]:
    """A ``with`` block that names what runs inside, and its backward pass, for `fastmix.testing.profile`.

    The innermost name counts. Inside what ``torch.compile`` compiled there are no parts, except for the counts of
    dispatches. Where nobody profiles, a block costs about a quarter of a microsecond.
    """
    # Compiled code must not look at the listener, or it would be compiled anew for a profiler.
    if torch.compiler.is_compiling() or _listener is None:
        return _NOTHING
    return _listener(name)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Inside the block every `part` enters what ``listener`` returns for its name."""
    global _listener
    outer, _listener = _listener, listener
    try:
        yield
    finally:
        _listener = outer
