"""Learned tables: computed, averaged, printed, drawn."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fastmix import algorithms, envs
from fastmix.envs import MatrixGame, Payoff
from fastmix.experiments import figures, matrix
from fastmix.experiments.matrix import (
    LearnedGame,
    average,
    distribution_distances,
    largest_errors,
    learned_game,
    true_quantiles,
)
from fastmix.experiments.papers import paper_games
from fastmix.experiments.reproduce import ALGORITHMS
from fastmix.experiments.stats import judge_claim, wilson_interval
from fastmix.experiments.tables import game_text, matrix_block, side_by_side, verdict
from fastmix.train.plan import scheme_of

PAYOFF = Payoff("g", np.array([[8.0, -12.0], [0.0, 7.9]]))
LEARNED = LearnedGame(
    [np.array([0.5, 1.5]), np.array([-0.001, -2000.4])], {"Q_tot": np.array([[1.0, 2.0], [3.456, np.nan]])}
)


def test_tables_are_the_mixed_utilities_of_every_joint_action() -> None:
    env = MatrixGame(Payoff("three", np.arange(12.0).reshape(2, 3, 2)), 1, 0)
    algo = algorithms.make("qmix", scheme_of(env.info))
    learned = learned_game(algo, env)
    obs = torch.ones(1, 1, 3, 5)
    q = algo.utilities(obs)[0, 0]
    assert [len(u) for u in learned.utilities] == [2, 3, 2]
    for i, utilities in enumerate(learned.utilities):
        np.testing.assert_allclose(utilities, q[i, : len(utilities)])
    table = learned.tables["Q_tot"]
    assert table.shape == (2, 3, 2)
    for joint in itertools.product(range(2), range(3), range(2)):
        chosen = torch.stack([q[i, a] for i, a in enumerate(joint)])[None, None]
        mixed = algo.networks["mixer"](chosen, torch.ones(1, 1, 5))
        np.testing.assert_allclose(table[joint], mixed.item(), rtol=1e-5, atol=1e-6)


def test_greedy_is_among_an_agents_own_actions() -> None:
    """An agent with fewer actions has padded outputs; the largest of them must not win."""
    env = MatrixGame(Payoff("narrow", np.array([[1.0, 2.0, 3.0]])), 1, 0)
    algo = algorithms.make("vdn", scheme_of(env.info))
    with torch.no_grad():
        algo.networks["agent"].get_parameter("fc2.bias").copy_(torch.tensor([0.0, 1.0, 50.0]))
    assert learned_game(algo, env).greedy == (0, 2)


def test_independent_learners_have_a_sum_not_a_q_tot() -> None:
    env = envs.make("matrix:resq1", 1, 0)
    assert isinstance(env, MatrixGame)
    assert list(learned_game(algorithms.make("iql", scheme_of(env.info)), env).tables) == ["sum Q_i"]


def test_large_games_have_no_joint_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix, "MAX_JOINT_ACTIONS", 8)
    env = envs.make("matrix:resq1", 1, 0)
    assert isinstance(env, MatrixGame)
    learned = learned_game(algorithms.make("vdn", scheme_of(env.info)), env)
    assert learned.tables == {} and len(learned.utilities) == 2
    assert "Q_1" not in game_text(learned, env.payoff) and "payoff" in game_text(learned, env.payoff)


def test_json_round_trip_and_verdict() -> None:
    saved = json.loads(json.dumps(LEARNED.to_json(PAYOFF)))
    assert (saved["greedy"], saved["greedy_payoff"], saved["optimal"]) == ("BA", 0.0, False)
    back = LearnedGame.from_json(saved)
    np.testing.assert_array_equal(back.utilities[1], LEARNED.utilities[1])
    np.testing.assert_array_equal(back.tables["Q_tot"], LEARNED.tables["Q_tot"])
    assert verdict(LEARNED, PAYOFF) == "greedy BA pays 0; the optimum AA pays 8: not found"
    found = LearnedGame([np.array([1.0, 0.0])] * 2, {})
    assert verdict(found, PAYOFF) == "greedy AA pays 8: optimum found"


def test_ties_in_the_payoff_all_count_as_optimal() -> None:
    payoff = Payoff("ties", np.array([[5.0, 1.0], [1.0, 5.0]]))
    assert LearnedGame([np.array([0.0, 1.0])] * 2, {}).is_optimal(payoff)
    assert not LearnedGame([np.array([0.0, 1.0]), np.array([1.0, 0.0])], {}).is_optimal(payoff)


def test_average() -> None:
    games = [LearnedGame([np.array([float(i), 0.0])] * 2, {"Q_tot": np.full((2, 2), float(i))}) for i in (1, 3)]
    mean = average(games)
    assert mean.utilities[0].tolist() == [2.0, 0.0] and mean.tables["Q_tot"].tolist() == [[2.0, 2.0]] * 2


def test_text_marks_the_greedy_action_and_stays_aligned() -> None:
    text = game_text(LEARNED, PAYOFF)
    lines = text.splitlines()
    assert len(lines) == 3
    assert "*B 1.50" in text and "*A 0.00" in text and "A 0.50" in text and "B -2000" in text
    assert "*3.46" in lines[2] and "?" in lines[2]  # the joint greedy action BA; an unreadable cell
    assert "*8.00" in lines[1]  # the optimum in the payoff
    assert len({line.index("|") for line in lines}) == 1


def test_block_and_columns() -> None:
    block = matrix_block("t", np.array([[1.0, 2.0]]), ("A", "B"), best=[(0, 1)])
    assert block == ["t     A      B", "A  1.00  *2.00"]
    assert side_by_side([["a", "bb"], ["c"]], gap="|") == "a |c\nbb|"


def test_games_of_three_agents_are_listed() -> None:
    values = np.zeros((3, 3, 3))
    values[0, 1, 2], values[2, 2, 2] = 9.0, 4.0
    learned = LearnedGame([np.array([0.0, 0.0, 1.0])] * 3, {"Q_tot": np.ones((3, 3, 3))})
    lines = game_text(learned, Payoff("g", values)).splitlines()
    assert lines[0] == "Q_1: A 0.00  B 0.00  *C 1.00"
    assert "ABC" in lines[4] and "9" in lines[4]
    assert [line for line in lines if line.lstrip().startswith("*")] == [next(line for line in lines if "CCC" in line)]


# ---- the papers' numbers ----


def test_paper_tables_fit_their_games() -> None:
    games = paper_games()
    assert set(games) == {"matrix1", "matrix2", "matrix3"}
    for game in games.values():
        env = envs.make(game.env, 1, 0)
        assert isinstance(env, MatrixGame)
        payoff = env.payoff
        assert game.rows
        for row in game.rows:
            assert all(table.shape == payoff.values.shape for table in row.tables.values())
            learned = row.as_learned()
            if learned is not None:
                assert payoff.label(learned.greedy) == row.greedy, (game.name, row.algorithm)
            greedy = tuple(payoff.actions.index(label) for label in row.greedy)
            assert (payoff.values[greedy] == payoff.optimum) == row.optimal, (game.name, row.algorithm)


def test_paper_values_spot_check() -> None:
    (row,) = paper_games()["matrix1"].of("qmix")
    assert row.utilities is not None
    assert row.utilities[0].tolist() == [-23.23, -0.141, 0.091]
    assert row.tables["Q_tot"][1].tolist() == [-8.1, -0.33, 0.15] and np.isnan(row.tables["Q_tot"][0, 2])
    assert paper_games()["matrix1"].of("vdn") == []


# ---- statistics and figures ----


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    # From the closed form, for example 5 of 5: n / (n + z^2) = 0.5655.
    [(5, 5, 0.5655, 1.0), (0, 5, 0.0, 0.4345), (3, 5, 0.2307, 0.8824), (50, 100, 0.4038, 0.5962)],
)
def test_wilson_interval(successes: int, n: int, low: float, high: float) -> None:
    assert list(wilson_interval(successes, n)) == pytest.approx([low, high], abs=1e-4)


@pytest.mark.parametrize(("successes", "n"), [(1, 0), (-1, 5), (6, 5)])
def test_wilson_interval_needs_a_proportion(successes: int, n: int) -> None:
    with pytest.raises(ValueError, match="successes is"):
        wilson_interval(successes, n)


@pytest.mark.parametrize(
    ("claimed", "found", "verdict"),
    [(True, 10, "agrees"), (True, 9, "agrees"), (True, 8, "open"), (True, 5, "open"), (True, 1, "disagrees"),
     (False, 10, "disagrees"), (False, 2, "open"), (False, 1, "agrees"), (False, 0, "agrees")],
)  # fmt: skip
def test_claims_are_judged_by_intervals(claimed: bool, found: int, verdict: str) -> None:
    assert judge_claim(claimed, found, 10) == verdict


def test_the_papers_claims() -> None:
    """The summary in the specification: who recovers which optimum."""
    games = paper_games()
    names = ("resq", "qtran", "powqmix", "cw_qmix", "ow_qmix", "qplex", "qmix")
    assert [games["matrix1"].claim(name) for name in names] == [True, True, True, True, False, False, False]
    assert [games["matrix2"].claim(name) for name in names] == [True, True, None, False, False, False, None]
    assert games["matrix1"].claim("vdn") is None


def test_the_largest_error_is_of_any_seed_and_cell() -> None:
    close = LearnedGame(LEARNED.utilities, {"Q_tot": PAYOFF.values + 0.25})
    far = LearnedGame(LEARNED.utilities, {"Q_tot": PAYOFF.values - np.array([[0.0, 0.0], [1.5, 0.0]])})
    assert largest_errors([close, far], PAYOFF) == {"Q_tot": 1.5}


def test_figure_is_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is an optional extra")
    panel = figures.Panel("payoff", PAYOFF.values, [(0, 0)])
    learned = figures.Panel("ours", LEARNED.tables["Q_tot"], [LEARNED.greedy], LEARNED)
    path = tmp_path / "deep" / "figure.png"
    assert figures.save_panels(path, [[panel, learned], [panel]], PAYOFF.actions, "title")
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG") and len(content) > 10_000


def test_without_matplotlib_there_is_no_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    panel = figures.Panel("payoff", PAYOFF.values, [(0, 0)])
    assert not figures.save_panels(tmp_path / "figure.png", [[panel]], PAYOFF.actions, "title")
    assert list(tmp_path.iterdir()) == []


# ---- distributions ----


def noisy(mean: float, std: float = 1.0) -> Payoff:
    return Payoff("noisy", np.array([[mean, 0.0], [0.0, 1.0]]), noise_std=std)


def test_true_quantiles_are_those_of_the_normal() -> None:
    quantiles = true_quantiles(noisy(3.0, 2.0), 4)
    assert quantiles.shape == (2, 2, 4)
    # Of the standard normal at 1/8, 3/8, 5/8 and 7/8, from tables.
    standard = np.array([-1.15035, -0.31864, 0.31864, 1.15035])
    np.testing.assert_allclose(quantiles[0, 0], 3 + 2 * standard, atol=1e-4)
    assert (true_quantiles(noisy(3.0, 0.0), 4)[0, 0] == 3).all()


def test_distances_of_distributions() -> None:
    payoff = noisy(3.0)
    truth = true_quantiles(payoff, 8)
    exact, shifted = (LearnedGame(LEARNED.utilities, {}, truth + shift) for shift in (0.0, 0.5))
    distances = distribution_distances([exact, shifted], payoff)
    assert distances is not None
    np.testing.assert_allclose(distances, np.broadcast_to(np.array([0.0, 0.5])[:, None, None], (2, 2, 2)), atol=1e-12)
    assert distribution_distances([exact, LEARNED], payoff) is None
    mean = average([exact, shifted]).quantiles
    assert mean is not None
    np.testing.assert_allclose(mean, truth + 0.25)
    back = LearnedGame.from_json(json.loads(json.dumps(exact.to_json(payoff)))).quantiles
    assert back is not None
    np.testing.assert_array_equal(back, truth)


@pytest.mark.parametrize("name", ["ddn", "dmix", "resz"])
def test_games_of_distributions_have_their_quantiles(name: str) -> None:
    env = envs.make("matrix:stochastic", 1, 0)
    assert isinstance(env, MatrixGame)
    learned = learned_game(algorithms.make(name, scheme_of(env.info)), env)
    assert next(iter(learned.tables)) == "E[Z_jt]"
    assert learned.quantiles is not None and learned.quantiles.shape == (3, 3, 32)
    np.testing.assert_allclose(learned.quantiles.mean(-1), learned.tables["E[Z_jt]"], atol=1e-5)
    assert (np.diff(learned.quantiles, axis=-1) >= 0).all()


def test_the_third_games_claims() -> None:
    game = paper_games()["matrix3"]
    found = {row.algorithm for row in game.rows if row.optimal}
    assert found == {"resq", "resz", "qtran"}
    assert {row.algorithm for row in game.rows} == set(ALGORITHMS["matrix3"])
    env = envs.make(game.env, 1, 0)
    assert isinstance(env, MatrixGame)
    (resz,) = game.of("resz")
    assert resz.largest_error(env.payoff) == pytest.approx(0.65)  # -11.35 for -12


def test_distributions_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is an optional extra")
    payoff = noisy(3.0)
    games = [LearnedGame(LEARNED.utilities, {}, true_quantiles(payoff, 8) + shift) for shift in (0.0, 0.5)]
    path = tmp_path / "deep" / "figure.png"
    assert figures.save_distributions(path, {"dmix": games}, payoff, "title")
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG") and len(content) > 10_000
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    assert not figures.save_distributions(tmp_path / "none.png", {"dmix": games}, payoff, "title")
    assert not (tmp_path / "none.png").exists()
