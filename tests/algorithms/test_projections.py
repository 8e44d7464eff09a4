"""Weighted projections onto monotonic joint values, solved exactly: why CW- and OW-QMIX can miss an optimum.

ResQ's appendix argues (theorem 5, and by its tables) that the weightings of WQMIX do not recover the optimum of every
game while a masked residual does. Here the projection itself is computed in rational arithmetic, without networks or
sampling: of all tables that are monotonic in some utilities, the ones that the weighted loss prefers.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import cache

import pytest

from fastmix.envs.matrix import PAYOFFS
from fastmix.experiments.papers import paper_games

Table = tuple[tuple[Fraction, ...], ...]
Mean = Callable[[Sequence[tuple[Fraction, Fraction]]], Fraction]
"""``(value, weight)`` pairs to the number that the loss prefers for all of them."""


def payoff(name: str) -> Table:
    return tuple(tuple(Fraction(str(value)) for value in row) for row in PAYOFFS[name].values.tolist())


def weighted_mean(pairs: Sequence[tuple[Fraction, Fraction]]) -> Fraction:
    return sum((v * w for v, w in pairs), Fraction(0)) / sum((w for _, w in pairs), Fraction(0))


def expectile(low: Fraction) -> Mean:
    """The minimiser of OW's loss: weight 1 where the value is above (underestimated), ``low`` where it is below."""

    def of(pairs: Sequence[tuple[Fraction, Fraction]]) -> Fraction:
        values = sorted(value for value, _ in pairs)
        for i in range(len(values)):  # the first i + 1 are at most the expectile, the others above it
            below, above = values[: i + 1], values[i + 1 :]
            e = (low * sum(below) + sum(above)) / (low * len(below) + len(above))
            if below[-1] <= e and all(e <= value for value in above):
                return Fraction(e)
        raise AssertionError("an expectile lies between the smallest and the largest value")

    return of


@cache
def upper_sets(rows: int, columns: int) -> list[frozenset[tuple[int, int]]]:
    """The sets of cells that hold with a cell every cell to its right and below."""
    cuts = itertools.product(range(columns + 1), repeat=rows)
    return [
        frozenset((i, j) for i in range(rows) for j in range(cut[i], columns))
        for cut in cuts
        if all(a >= b for a, b in itertools.pairwise(cut))
    ]


def isotonic(values: Table, weights: Table, mean: Mean) -> Table:
    """The table that rises along rows and columns and that the loss prefers, by the max-min formula.

    ``g(x) = max over upper sets U with x of min over lower sets L with x of mean(U & L)``, for every mean that lies
    between those of the parts of a set (Robertson, Wright and Dykstra 1988, "Order restricted statistical inference").
    """
    rows, columns = len(values), len(values[0])
    cells = frozenset(itertools.product(range(rows), range(columns)))
    uppers = upper_sets(rows, columns)
    lowers = [cells - upper for upper in uppers]
    means: dict[frozenset[tuple[int, int]], Fraction] = {}

    def of(part: frozenset[tuple[int, int]]) -> Fraction:
        if part not in means:
            means[part] = mean([(values[i][j], weights[i][j]) for i, j in sorted(part)])
        return means[part]

    def at(x: tuple[int, int]) -> Fraction:
        return max(min(of(u & low) for low in lowers if x in low) for u in uppers if x in u)

    return tuple(tuple(at((i, j)) for j in range(columns)) for i in range(rows))


Actions = frozenset[tuple[int, int]]


def projection(values: Table, weight: Callable[[int, int], Fraction], low: Fraction | None) -> Actions:
    """The greedy joint actions of the best monotonic tables over all orders of both agents' actions: ties and all.

    ``weight`` is each cell's; with ``low`` cells that are overestimated have this one times as much (OW).
    """
    n = len(values)
    best: tuple[Fraction, Actions] | None = None
    for first, second in itertools.product(itertools.permutations(range(n)), repeat=2):
        ordered = tuple(tuple(values[i][j] for j in second) for i in first)
        weights = tuple(tuple(weight(i, j) for j in second) for i in first)
        fit = isotonic(ordered, weights, weighted_mean if low is None else expectile(low))
        loss = Fraction(0)
        for i, j in itertools.product(range(n), repeat=2):
            over = low is not None and fit[i][j] > ordered[i][j]
            loss += weights[i][j] * (low if over and low is not None else 1) * (fit[i][j] - ordered[i][j]) ** 2
        cells = itertools.product(range(n), repeat=2)
        greedy = frozenset((first[i], second[j]) for i, j in cells if fit[i][j] == fit[-1][-1])
        if best is None or loss < best[0]:
            best = loss, greedy
        elif loss == best[0]:
            best = loss, best[1] | greedy
    assert best is not None
    return best[1]


def cw(values: Table, alpha: Fraction) -> Actions:
    """CW-QMIX with a perfect ``Q*``: full weight on the optimum, ``alpha`` elsewhere."""
    optimum = max(itertools.product(range(len(values)), repeat=2), key=lambda cell: values[cell[0]][cell[1]])
    return projection(values, lambda i, j: Fraction(1) if (i, j) == optimum else alpha, None)


def ow(values: Table, alpha: Fraction) -> Actions:
    """OW-QMIX: ``alpha`` where the value is above the target."""
    return projection(values, lambda i, j: Fraction(1), alpha)


OPTIMA = {"resq1": (0, 0), "resq2": (2, 2)}


@pytest.mark.parametrize("weighting", [cw, ow])
@pytest.mark.parametrize("alpha", [Fraction(1), Fraction(1, 2), Fraction(1, 10)], ids=str)
def test_fixed_weights_miss_the_optimum_of_matrix_2(
    weighting: Callable[[Table, Fraction], Actions], alpha: Fraction
) -> None:
    """Also with WQMIX's own 0.1, and under the true ``Q*``: no error of learning is in this."""
    assert OPTIMA["resq2"] not in weighting(payoff("resq2"), alpha)


@pytest.mark.parametrize("weighting", [cw, ow])
def test_weights_that_are_small_enough_only_tie_it_with_others(
    weighting: Callable[[Table, Fraction], Actions],
) -> None:
    """The test above can fail. But then other joint actions, worth -100 among them, are greedy too."""
    greedy = weighting(payoff("resq2"), Fraction(1, 1000))
    assert OPTIMA["resq2"] in greedy
    assert (0, 2) in greedy


def test_matrix_1_needs_a_weight_below_one() -> None:
    assert cw(payoff("resq1"), Fraction(1)) == {(2, 2)}
    for alpha in (Fraction(1, 2), Fraction(1, 10), Fraction(1, 1000)):
        assert cw(payoff("resq1"), alpha) == {OPTIMA["resq1"]}
    assert ow(payoff("resq1"), Fraction(1, 2)) == {(2, 2)}


def test_the_appendix_table_of_cw_qmix_is_the_projection() -> None:
    """Matrix 1: 8 at the optimum, and everywhere else the mean of all other payoffs (published: 8.00 and -5.04)."""
    values = payoff("resq1")
    backwards = tuple(tuple(reversed(row)) for row in reversed(values))  # the optimum last, as the best order has it
    weights = tuple(tuple(Fraction(1) if value == 8 else Fraction(1, 10) for value in row) for row in backwards)
    fit = isotonic(backwards, weights, weighted_mean)
    others = Fraction(-401, 80)
    assert fit == ((others, others, others), (others, others, others), (others, others, Fraction(8)))
    published = next(row.tables["Q_tot"] for row in paper_games()["matrix1"].of("cw_qmix"))
    assert published[0][0] == 8
    assert abs(published[1][1] - float(others)) < 0.03


@pytest.mark.parametrize("name", OPTIMA)
def test_a_masked_residual_represents_every_game(name: str) -> None:
    """ResQ, theorem 2: a constant main value and ``Q_r = Q - max Q <= 0`` give the game, with its optimum greedy."""
    values = payoff(name)
    largest = max(map(max, values))
    residual = [[value - largest for value in row] for row in values]
    assert all(value <= 0 for row in residual for value in row)
    i, j = OPTIMA[name]
    assert residual[i][j] == 0
    assert [[largest + value for value in row] for row in residual] == [list(row) for row in values]


def test_isotonic_regression_is_the_least_squares_fit() -> None:
    """Against averages known by hand: pooled violators, and a table that rises already."""
    f = Fraction
    rising = ((f(0), f(1)), (f(2), f(5)))
    ones = ((f(1), f(1)), (f(1), f(1)))
    assert isotonic(rising, ones, weighted_mean) == rising
    assert isotonic(((f(3), f(1)), (f(4), f(4))), ones, weighted_mean) == ((f(2), f(2)), (f(4), f(4)))
    weights = ((f(3), f(1)), (f(1), f(1)))
    assert isotonic(((f(3), f(1)), (f(4), f(4))), weights, weighted_mean)[0] == (f(5, 2), f(5, 2))
    assert expectile(f(1))([(f(0), f(1)), (f(4), f(1))]) == 2
    assert expectile(f(1, 3))([(f(0), f(1)), (f(4), f(1))]) == 3


def test_a_residual_that_is_a_sum_cannot_complete_a_symmetric_game() -> None:
    """Why ResZ gets its unrestricted residual in matrix games, not the attention of its released configuration.

    With agents of equal values, ``Q_jt(i, j) = a_i + a_j - |c_i + c_j|`` off the greedy joint action. If that is 0 at
    BB and at CC 7.9, then ``a_B = |c_B|`` and ``a_C = |c_C| + 3.95``, and BC is 3.95 at least by the triangle
    inequality.
    """
    for c_b, c_c in itertools.product([Fraction(i, 3) for i in range(-40, 41)], repeat=2):
        a_b, a_c = abs(c_b), abs(c_c) + Fraction(395, 100)
        assert a_b + a_b - abs(c_b + c_b) == 0
        assert a_c + a_c - abs(c_c + c_c) == Fraction(79, 10)
        assert a_b + a_c - abs(c_b + c_c) >= Fraction(395, 100)
