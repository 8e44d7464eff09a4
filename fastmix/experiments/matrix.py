"""What an algorithm has learnt of a one-step game: utilities, joint values, the greedy joint action, the verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fastmix.algorithms import Algorithm
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

    @property
    def greedy(self) -> tuple[int, ...]:
        """Each agent's best action by its own utility; the lowest index wins ties, as in acting."""
        return tuple(int(np.argmax(q)) for q in self.utilities)

    def is_optimal(self, payoff: Payoff) -> bool:
        """Whether the greedy joint action has the highest mean payoff."""
        return bool(payoff.values[self.greedy] == payoff.optimum)

    def to_json(self, payoff: Payoff) -> dict[str, Any]:
        """For a run's ``result.json``; :meth:`from_json` reads it back."""
        return {
            "utilities": [q.tolist() for q in self.utilities],
            "tables": {name: table.tolist() for name, table in self.tables.items()},
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
    if env.payoff.values.size <= MAX_JOINT_ACTIONS:
        joint = torch.from_numpy(np.indices(shape).reshape(len(shape), -1).T.copy()).to(device)
        copies = [x.expand(len(joint), *x.shape[1:]) for x in (obs, last_actions, avail, states)]
        values = algo.joint_values(*(x[:, None] for x in (*copies, joint)))
        tables = {name: value.reshape(shape).double().cpu().numpy() for name, value in values.items()}
    return LearnedGame([utilities[i, :n].double().cpu().numpy() for i, n in enumerate(shape)], tables)


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


def average(games: Sequence[LearnedGame]) -> LearnedGame:
    """The mean of utilities and tables over seeds (of cells that every seed has)."""
    return LearnedGame(
        [np.mean([game.utilities[i] for game in games], axis=0) for i in range(len(games[0].utilities))],
        {name: np.mean([game.tables[name] for game in games], axis=0) for name in games[0].tables},
    )


def summarise_games(results: Sequence[dict[str, Any]], payoff: Payoff) -> dict[str, Any]:
    """Average tables and the share of seeds that found the optimum with its 95 % interval, for JSON."""
    games = [LearnedGame.from_json(result["game"]) for result in results]
    found = sum(game.is_optimal(payoff) for game in games)
    return {
        "payoff": payoff.values.tolist(),
        "noise_std": payoff.noise_std,
        "optimum": [payoff.label(joint) for joint in payoff.optimal_actions()],
        "average": average(games).to_json(payoff),
        "largest_errors": largest_errors(games, payoff),
        "found": found,
        "seeds": len(games),
        "wilson_95": list(wilson_interval(found, len(games))),
    }
