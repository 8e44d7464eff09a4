from __future__ import annotations

import pytest

from fastmix.train.schedules import EpsilonSchedule


def test_linear_ends_and_middle() -> None:
    schedule = EpsilonSchedule(1.0, 0.05, 100)
    assert schedule(0) == 1.0
    assert schedule(50) == pytest.approx(0.525)
    assert schedule(100) == pytest.approx(0.05, rel=1e-12)
    assert schedule(10**9) == 0.05


def test_exponential_is_between_start_and_finish_and_reaches_finish() -> None:
    schedule = EpsilonSchedule(0.5, 0.05, 100, "exp")
    values = [schedule(t) for t in range(0, 300, 10)]
    assert values[0] == 0.5
    assert values == sorted(values, reverse=True)
    assert schedule(100) == pytest.approx(0.05)
    assert values[-1] == 0.05


@pytest.mark.parametrize("decay", ["linear", "exp"])
def test_constant_exploration(decay: str) -> None:
    schedule = EpsilonSchedule(1.0, 1.0, 100, decay)  # type: ignore[arg-type]
    assert {schedule(t) for t in (0, 1, 50, 10**6)} == {1.0}


def test_no_annealing() -> None:
    assert EpsilonSchedule(1.0, 0.1, 0)(0) == 0.1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1.5, 0.1, 10), "epsilon_start is 1.5"),
        ((1.0, -0.1, 10), "epsilon_finish is -0.1"),
        ((0.1, 0.5, 10), "must not exceed epsilon_start"),
        ((1.0, 0.1, -1), "epsilon_anneal_time is -1"),
        ((1.0, 0.1, 10, "cosine"), "epsilon_decay is 'cosine'"),
        ((1.0, 0.0, 10, "exp"), "never reaches it"),
    ],
)
def test_wrong_settings(arguments: tuple[float, float, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EpsilonSchedule(*arguments)
