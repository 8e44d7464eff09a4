"""The numbers the papers print for their matrix games (``paper_tables.json``), to be set beside ours."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np

from fastmix.envs import Payoff
from fastmix.experiments.matrix import LearnedGame


@dataclass(frozen=True, eq=False)
class PaperRow:
    """One algorithm in one table of one paper. Cells the published text does not give are NaN."""

    source: str
    algorithm: str
    tables: dict[str, np.ndarray]
    utilities: list[np.ndarray] | None
    greedy: str
    optimal: bool

    def largest_error(self, payoff: Payoff) -> float | None:
        """How far a published joint value of the row is from the payoff at most; cells nobody can read left out."""
        table = next((self.tables[name] for name in ("Q_jt", "Q_tot") if name in self.tables), None)
        return None if table is None else float(np.nanmax(np.abs(table - payoff.values)))

    def as_learned(self) -> LearnedGame | None:
        """The row in the form of our own results, or ``None`` where the paper prints no utilities."""
        return None if self.utilities is None else LearnedGame(self.utilities, self.tables)

    def to_json(self) -> dict[str, Any]:
        """As the file has it: cells that nobody can read are null."""
        return {
            "source": self.source,
            "algorithm": self.algorithm,
            "tables": {name: _cells(table) for name, table in self.tables.items()},
            "utilities": None if self.utilities is None else [q.tolist() for q in self.utilities],
            "greedy": self.greedy,
            "optimal": self.optimal,
        }


@dataclass(frozen=True, eq=False)
class PaperGame:
    """A matrix game of the papers: our environment's name and the published rows."""

    name: str
    env: str
    rows: list[PaperRow]

    def claim(self, algorithm: str) -> bool | None:
        """Whether the papers report that ``algorithm`` finds the optimum; None where they say nothing, or both."""
        verdicts = {row.optimal for row in self.of(algorithm)}
        return verdicts.pop() if len(verdicts) == 1 else None

    def of(self, algorithm: str) -> list[PaperRow]:
        """The published rows of one algorithm, in the papers' order; empty where no paper has it."""
        return [row for row in self.rows if row.algorithm == algorithm]


def paper_games() -> dict[str, PaperGame]:
    """Every game that a paper has a table of, by the name ``fastmix reproduce`` takes."""
    text = resources.files("fastmix.experiments").joinpath("paper_tables.json").read_text(encoding="utf-8")
    return {name: _game(name, values) for name, values in json.loads(text)["games"].items()}


def _game(name: str, values: dict[str, Any]) -> PaperGame:
    return PaperGame(name, values["env"], [_row(row) for row in values["rows"]])


def _row(values: dict[str, Any]) -> PaperRow:
    utilities = values["utilities"]
    return PaperRow(
        values["source"],
        values["algorithm"],
        {name: np.array(table, dtype=float) for name, table in values["tables"].items()},
        None if utilities is None else [np.array(q, dtype=float) for q in utilities],
        values["greedy"],
        values["optimal"],
    )


def _cells(table: np.ndarray) -> list[list[float | None]]:
    return [[None if np.isnan(value) else float(value) for value in row] for row in table]
