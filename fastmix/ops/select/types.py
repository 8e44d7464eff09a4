"""What `select` returns, and the value it gives to what cannot be chosen."""

from __future__ import annotations

from typing import Final, NamedTuple

from torch import Tensor

UNAVAILABLE: Final = -9999999.0
"""Value of an action that is not available, in greedy values and targets (seven nines, as in all public trainers)."""


class Selection(NamedTuple):
    """Greedy actions and what was gathered with them; ``...`` are the leading dimensions of ``agent_qs``."""

    greedy_actions: Tensor
    """``[..., A]`` int64: the available action of highest value, lowest index on ties, 0 where none is available."""
    greedy_qs: Tensor
    """``[..., A]``: its value, `UNAVAILABLE` where none is available; differentiable in ``agent_qs``."""
    chosen_qs: Tensor | None
    """``[..., A]``: value of ``actions``, available or not; differentiable in ``agent_qs``."""
    target_qs: Tensor | None
    """``[..., A]``: ``target_qs`` at the greedy actions, without gradient."""
    all_greedy: Tensor | None
    """``[...]`` bool: every agent took its greedy action."""
