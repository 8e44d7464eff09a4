"""Several seeds: one after another or in processes, stopped and gone on with."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastmix.train import sweep
from fastmix.train.config import TrainConfig
from fastmix.train.sweep import Run, load_sweep, new_folder, run_all, save_sweep
from fastmix.train.trainer import Trainer

CONFIG = TrainConfig(
    algo="vdn", t_max=64, test_nepisode=2, overrides={"batch_size": 8, "buffer_size": 32, "rnn_hidden_dim": 8}
)
CLOCK = ("wall_s",)


def runs_in(folder: Path, n: int = 3) -> list[Run]:
    return [Run(replace(CONFIG, seed=i), folder / f"seed-{i}") for i in range(n)]


def without_clock(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in result.items() if k not in CLOCK} for result in results]


def weight_sum(trainer: Trainer) -> dict[str, Any]:
    return {"weights": float(trainer.algo.networks["agent"].fc1.weight.detach().sum())}  # type: ignore[union-attr, operator]


def test_processes_and_one_after_another_agree(tmp_path: Path) -> None:
    alone = run_all(runs_in(tmp_path / "a"), workers=1, t_max=64, report=weight_sum)
    together = run_all(runs_in(tmp_path / "b"), workers=2, t_max=64, report=weight_sum)
    assert without_clock(alone) == without_clock(together)
    assert [result["seed"] for result in alone] == [0, 1, 2]
    assert len({result["weights"] for result in alone}) == 3
    assert json.loads((tmp_path / "b" / "seed-2" / "result.json").read_text()) == together[2]


def test_finished_runs_are_read_and_begun_ones_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = runs_in(tmp_path)
    first = run_all(runs, workers=1, t_max=64)
    (runs[1].folder / "result.json").unlink()
    trained: list[int] = []
    real = sweep.run_one

    def noted(run: Run, *args: Any, **kwargs: Any) -> dict[str, Any]:
        trained.append(run.config.seed)
        return real(run, *args, **kwargs)

    monkeypatch.setattr(sweep, "run_one", noted)
    again = run_all(runs, workers=1, t_max=64)
    assert trained == [1]
    assert again[0] == first[0] and again[2] == first[2]
    assert without_clock(again) == without_clock(first)


def test_a_failing_run_fails_the_sweep(tmp_path: Path) -> None:
    runs = runs_in(tmp_path, 2)
    runs[0].folder.mkdir()
    (runs[0].folder / "config.json").write_text(
        json.dumps({"train": replace(CONFIG, seed=9).to_json(), "algorithm": {}})
    )
    with pytest.raises(ValueError, match="seed = 9, and it would now be 0"):
        run_all(runs, workers=1, t_max=64)


def test_sweeps_are_written_down(tmp_path: Path) -> None:
    runs = runs_in(tmp_path)
    save_sweep(tmp_path, "train", runs, game="x")
    assert load_sweep(tmp_path, "train") == (runs, {"game": "x"})
    with pytest.raises(ValueError, match="not made by fastmix reproduce"):
        load_sweep(tmp_path, "reproduce")
    with pytest.raises(FileNotFoundError, match=r"no sweep\.json"):
        load_sweep(tmp_path / "seed-0", "train")


def test_new_folders_are_new(tmp_path: Path) -> None:
    assert [new_folder(tmp_path / "a").name for _ in range(3)] == ["run-1", "run-2", "run-3"]
    (tmp_path / "a" / "run-12").mkdir()
    (tmp_path / "a" / "run-x").mkdir()
    assert new_folder(tmp_path / "a").name == "run-13"


def test_workers_must_be_positive(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="workers is 0"):
        run_all(runs_in(tmp_path), workers=0, t_max=64)
    assert sweep.default_workers(1) == 1 <= sweep.default_workers(100)
