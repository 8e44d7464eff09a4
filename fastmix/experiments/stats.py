"""Statistics of a handful of seeds."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np

Statistic = Callable[..., Any]
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


def interquartile_mean(values: np.ndarray, axis: int = -1) -> np.ndarray:
    """Mean of what is left without the lowest and the highest quarter (rounded down), as rliable has it.

    R. Agarwal et al., "Deep reinforcement learning at the edge of the statistical precipice", 2021.
    """
    ordered = np.sort(values, axis=axis)
    n = ordered.shape[axis]
    cut = n // 4
    return np.asarray(np.take(ordered, range(cut, n - cut), axis=axis).mean(axis=axis))


def bootstrap_interval(
    values: np.ndarray, statistic: Statistic = np.mean, *, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Percentile bootstrap interval of ``statistic`` over the last axis of ``values [..., n]``, drawn with ``seed``.

    With a single value the interval is that value: one seed says nothing about others.
    Raises ``ValueError`` where there are no values.
    """
    n = values.shape[-1]
    if n < 1:
        raise ValueError("a bootstrap interval needs at least one value, and there is none")
    chosen = np.random.default_rng(seed).integers(0, n, (resamples, n))
    statistics = statistic(values[..., chosen], axis=-1)
    tail = 100 * (1 - level) / 2
    low, high = np.percentile(statistics, [tail, 100 - tail], axis=-1)
    return np.asarray(low), np.asarray(high)
