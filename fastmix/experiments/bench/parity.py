"""What contestants err by: their results against the reference in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from typing import Final, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastmix.ops.monotonic import MonotonicParams
from fastmix.ops.recurrent import RecurrentParams
from fastmix.testing import rms_ratio

RELATIVE: Final = 2.0
"""Ours may err by this many times what the public way errs by in the same precision."""

# An argument of relu or abs within rounding of zero may take the other side in another summation order. Rows with such
# an argument get no upstream gradient when gradients are compared.
_KINK: Final = 4e-6

Results = tuple[Sequence[Tensor], Sequence[Tensor]]
"""Values and gradients."""


class Error(NamedTuple):
    """Deviation from the reference: the largest RMS ratio of values, and of gradients (0 where there are none)."""

    values: float
    gradients: float = 0.0

    def within(self, allowed: Error) -> bool:
        """Neither is larger; False for NaN."""
        return self.values <= allowed.values and self.gradients <= allowed.gradients

    def allowed(self, floor: Error) -> Error:
        """What ours may err by where the public way errs by this: so much more, and ``floor`` in any case."""
        finite = (error if math.isfinite(error) else 0.0 for error in self)
        return Error(*(max(least, RELATIVE * error) for least, error in zip(floor, finite, strict=True)))


def compared(
    calls: Mapping[str, Callable[[], Results]], exact: Callable[[], Results]
) -> dict[str, Callable[[], Error]]:
    """For each of ``calls`` a function that tells what it errs by; ``exact`` is called once, when it is needed.

    A call may leave out the last values that ``exact`` has.
    """
    exact = cache(exact)

    def error(call: Callable[[], Results]) -> Error:
        (values, gradients), (expected, expected_gradients) = call(), exact()
        return Error(
            largest(map(rms_ratio, values, expected)),
            largest(rms_ratio(*pair) for pair in zip(gradients, expected_gradients, strict=True)),
        )

    return {name: partial(error, call) for name, call in calls.items()}


def largest(errors: Iterable[float]) -> float:
    """`max` that does not pass over NaN; 0 of nothing."""
    values = list(errors)
    return math.nan if any(map(math.isnan, values)) else max(values, default=0.0)


@torch.no_grad()
def near_mixing_kink(states: Tensor, p: MonotonicParams) -> Tensor:
    """``[N, 1]`` bool: rows where relu or abs has an argument within rounding of zero."""
    assert p.w1_hidden_weight is not None and p.w2_hidden_weight is not None  # these cases have two-layer hypernets
    h1 = F.linear(states, p.w1_hidden_weight, p.w1_hidden_bias)
    h2 = F.linear(states, p.w2_hidden_weight, p.w2_hidden_bias)
    arguments = [
        h1,
        h2,
        F.linear(h1.relu(), p.w1_weight, p.w1_bias),
        F.linear(h2.relu(), p.w2_weight, p.w2_bias),
        F.linear(states, p.v_hidden_weight, p.v_hidden_bias),
    ]
    return near_zero(arguments)


def near_zero(arguments: Sequence[Tensor]) -> Tensor:
    """``[N, 1]`` bool: rows where one of the arguments of relu or abs, ``[N, X]``, is within rounding of zero."""
    return torch.stack([(x.abs() < _KINK).any(-1) for x in arguments]).any(0).unsqueeze(-1)


@torch.no_grad()
def near_input_kink(obs: Tensor, p: RecurrentParams) -> Tensor:
    """``[B, 1, A]`` bool: sequences in which relu has an argument within rounding of zero.

    Gradients flow back through a sequence, so one such argument counts for all of it.
    """
    arguments = F.linear(obs, p.fc1_weight, p.fc1_bias)
    return (arguments.abs() < _KINK).any(-1).any(1, keepdim=True)
