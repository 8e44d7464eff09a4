"""What an algorithm has learnt of a one-step game: utilities, joint values, the greedy joint action, the verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import torch

from fastmix.algorithms import Algorithm
from fastmix.algorithms.distributional import Distributional
from fastmix.envs import MatrixGame, Payoff
from fastmix.experiments.stats import wilson_interval
from fastmix.train.trainer import Trainer

# Joint tables are enumerated: this many joint actions still take a moment only.
MAX_JOINT_ACTIONS = 200_000


@dataclass(frozen=True, eq=False)
class LearnedGame:
    """The learned counterpart of a payoff tensor.

    ``utilities`` holds one array ``[U_i]`` an agent (its own actions only); ``tables`` maps the papers' names of joint
    values (``Q_tot``, and whatever else an algorithm has, such as ``Q_jt`` or ``Q_r``) to arrays of the payoff's shape.
    """

    utilities: list[np.ndarray]
    tables: dict[str, np.ndarray]
    quantiles: np.ndarray | None = None
    """``[*payoff's shape, K]``: the joint return's distribution at ``K`` midpoints, of algorithms that learn one"""

    @property
    def greedy(self) -> tuple[int, ...]:
        """Each agent's best action by its own utility; the lowest index wins ties, as in acting."""
        return tuple(int(np.argmax(q)) for q in self.utilities)

    def is_optimal(self, payoff: Payoff) -> bool:
        """Whether the greedy joint action has the highest mean payoff."""
        return bool(payoff.values[self.greedy] == payoff.optimum)

    def to_json(self, payoff: Payoff) -> dict[str, Any]:
        """For a run's ``result.json``; :meth:`from_json` reads it back."""
        distribution = {} if self.quantiles is None else {"quantiles": self.quantiles.tolist()}
        return {
            "utilities": [q.tolist() for q in self.utilities],
            "tables": {name: table.tolist() for name, table in self.tables.items()},
            **distribution,
            "greedy": payoff.label(self.greedy),
            "greedy_payoff": float(payoff.values[self.greedy]),
            "optimal": self.is_optimal(payoff),
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> LearnedGame:
        """The inverse of ``to_json`` (what is derived is derived again)."""
        return cls(
            [np.array(q, dtype=float) for q in values["utilities"]],
            # Published tables have cells that nobody can read: null, here NaN.
            {name: np.array(table, dtype=float) for name, table in values["tables"].items()},
            np.array(values["quantiles"], dtype=float) if "quantiles" in values else None,
        )


def learned_game(algo: Algorithm, env: MatrixGame, device: torch.device | str = "cpu") -> LearnedGame:
    """Ask ``algo`` for its values of every joint action of ``env``.

    Joint tables are left out of a game with more than ``MAX_JOINT_ACTIONS`` joint actions.
    """
    shape = env.payoff.values.shape
    obs = torch.from_numpy(env.obs[:1]).to(device)
    states = torch.from_numpy(env.state[:1]).to(device)
    avail = torch.from_numpy(env.avail[:1]).to(device)
    last_actions = torch.full((1, len(shape)), -1, dtype=torch.int64, device=device)
    utilities = algo.utilities(obs[:, None], last_actions[:, None])[0, 0]
    tables: dict[str, np.ndarray] = {}
    quantiles: np.ndarray | None = None
    if env.payoff.values.size <= MAX_JOINT_ACTIONS:
        joint = torch.from_numpy(np.indices(shape).reshape(len(shape), -1).T.copy()).to(device)
        copies = [x.expand(len(joint), *x.shape[1:]) for x in (obs, last_actions, avail, states)]
        arguments = [x[:, None] for x in (*copies, joint)]
        values = algo.joint_values(*arguments)
        tables = {name: value.reshape(shape).double().cpu().numpy() for name, value in values.items()}
        if isinstance(algo, Distributional):
            z = next(iter(algo.joint_quantiles(*arguments).values()))
            quantiles = z.reshape(*shape, -1).sort(-1).values.double().cpu().numpy()
    own = [utilities[i, :n].double().cpu().numpy() for i, n in enumerate(shape)]
    return LearnedGame(own, tables, quantiles)


def report(trainer: Trainer) -> dict[str, Any]:
    """What a finished run on a matrix game adds to its ``result.json``; nothing on any other environment."""
    env = trainer.test_env
    if not isinstance(env, MatrixGame):
        return {}
    return {"game": learned_game(trainer.algo, env, trainer.device).to_json(env.payoff)}


def largest_errors(games: Sequence[LearnedGame], payoff: Payoff) -> dict[str, float]:
    """Largest distance of any cell of each table from the mean payoff, over all ``games``."""
    return {
        name: max(float(np.abs(game.tables[name] - payoff.values).max()) for game in games) for name in games[0].tables
    }


def true_quantiles(payoff: Payoff, n: int) -> np.ndarray:
    """``[*payoff's shape, n]``: quantiles of the reward at ``n`` midpoints, which are normal about the mean payoff."""
    standard = [NormalDist().inv_cdf((2 * i + 1) / (2 * n)) for i in range(n)]
    return payoff.values[..., None] + payoff.noise_std * np.array(standard)


def distribution_distances(games: Sequence[LearnedGame], payoff: Payoff) -> np.ndarray | None:
    """``[seeds, *payoff's shape]``: mean distance of learned quantiles from true ones; None without distributions.

    That is the Wasserstein distance between both distributions, as far as so many quantiles tell it.
    """
    learned = [game.quantiles for game in games if game.quantiles is not None]
    if len(learned) < len(games):
        return None
    truth = true_quantiles(payoff, learned[0].shape[-1])
    return np.stack([np.abs(quantiles - truth).mean(-1) for quantiles in learned])


def average(games: Sequence[LearnedGame]) -> LearnedGame:
    """The mean of utilities, tables and quantiles over seeds (of cells that every seed has)."""
    quantiles = [game.quantiles for game in games if game.quantiles is not None]
    return LearnedGame(
        [np.mean([game.utilities[i] for game in games], axis=0) for i in range(len(games[0].utilities))],
        {name: np.mean([game.tables[name] for game in games], axis=0) for name in games[0].tables},
        np.mean(quantiles, axis=0) if len(quantiles) == len(games) else None,
    )


def summarise_games(results: Sequence[dict[str, Any]], payoff: Payoff) -> dict[str, Any]:
    """Average tables and the share of seeds that found the optimum with its 95 % interval, for JSON."""
    games = [LearnedGame.from_json(result["game"]) for result in results]
    found = sum(game.is_optimal(payoff) for game in games)
    distances = distribution_distances(games, payoff)
    return {
        "payoff": payoff.values.tolist(),
        "noise_std": payoff.noise_std,
        "optimum": [payoff.label(joint) for joint in payoff.optimal_actions()],
        "average": average(games).to_json(payoff),
        "largest_errors": largest_errors(games, payoff),
        "distribution_distance": None if distances is None else distances.mean(0).tolist(),
        "found": found,
        "seeds": len(games),
        "wilson_95": list(wilson_interval(found, len(games))),
    }
