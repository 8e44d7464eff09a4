"""Statistics of a handful of seeds."""

from __future__ import annotations

import math
from typing import Literal

Verdict = Literal["agrees", "disagrees", "open"]


def wilson_interval(successes: int, n: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Wilson's score interval of a proportion (95 % by default): honest also for 0 of 5 and 5 of 5.

    E. B. Wilson, "Probable inference, the law of succession, and statistical inference", 1927.
    Raises ``ValueError`` unless ``0 <= successes <= n`` and ``n >= 1``.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"successes is {successes} and n is {n}; it must hold that 0 <= successes <= n and n >= 1")
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    # At the ends the bound is exact; rounding must not push it past.
    return (0.0 if successes == 0 else centre - half, 1.0 if successes == n else centre + half)


def judge_claim(claimed: bool, successes: int, n: int) -> Verdict:
    """Whether ``successes`` of ``n`` seeds agree with the claim that the optimum is found (or is not).

    "It is found" is taken to mean by more than half of all seeds: with the whole 95 % interval above one half a claim
    of it agrees and one of the contrary disagrees, below one half the other way round; else it stays open.
    """
    low, high = wilson_interval(successes, n)
    if low <= 0.5 <= high:
        return "open"
    return "agrees" if (low > 0.5) == claimed else "disagrees"
