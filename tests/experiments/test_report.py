"""Learning curves over seeds: statistics, marl-eval's JSON, the report, and the grid of predator-prey."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastmix.cli import main
from fastmix.experiments.curves import RunCurve, band, find_runs, group, marl_eval, summarise
from fastmix.experiments.report import table
from fastmix.experiments.stats import bootstrap_interval, interquartile_mean


def curve(seed: int, returns: list[float], t_env: list[int], absolute: float | None = None) -> RunCurve:
    return RunCurve(
        Path(f"seed-{seed}"), "qmix", "prey:p-2", seed, np.array(t_env), np.array(t_env) * 3.6,
        np.array(t_env) / 100, {"return": [[value - 1, value + 1] for value in returns]},
        {} if absolute is None else {"return": [absolute]},
    )  # fmt: skip


def test_interquartile_mean_drops_a_quarter_at_each_end() -> None:
    assert interquartile_mean(np.array([100.0, 1, 2, 3, -100])) == 2.0
    assert interquartile_mean(np.arange(8.0)) == np.mean([2, 3, 4, 5])
    assert interquartile_mean(np.array([5.0])) == 5.0
    np.testing.assert_array_equal(interquartile_mean(np.array([[0.0, 1, 2, 9], [4, 4, 4, 4]])), [1.5, 4.0])


def test_bootstrap_interval_covers_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    samples = rng.normal(3.0, 2.0, (400, 30))
    low, high = bootstrap_interval(samples, resamples=500)
    covered = ((low <= 3.0) & (high >= 3.0)).mean()
    assert 0.88 < covered < 0.98
    assert [float(end) for end in bootstrap_interval(np.array([4.0]))] == [4.0, 4.0]
    with pytest.raises(ValueError, match="at least one value"):
        bootstrap_interval(np.empty(0))


def test_band_is_linear_between_evaluations_and_ends_with_the_shortest_run() -> None:
    runs = [curve(0, [0.0, 10.0, 20.0], [0, 1000, 2000]), curve(1, [4.0, 24.0], [0, 1000])]
    steps = band(runs, "return")
    assert (steps.x[0], steps.x[-1], steps.n) == (0, 1000, 2)
    np.testing.assert_allclose(steps.mean, 2 + steps.x / 1000 * 15)
    assert (steps.low <= steps.mean).all() and (steps.mean <= steps.high).all()
    np.testing.assert_allclose([steps.low[-1], steps.high[-1]], [10, 24])
    assert band(runs, "return", "hours").x[-1] == pytest.approx(1.0)


def test_summary_separates_the_last_evaluation_from_the_best_networks() -> None:
    runs = [curve(0, [0.0, 10.0], [0, 2000], absolute=30.0), curve(1, [0.0, 20.0], [0, 2000])]
    summary = summarise(runs, "return")
    assert (summary["last"]["mean"], summary["absolute"]["mean"], summary["absolute"]["seeds"]) == (15.0, 30.0, [30.0])
    assert (summary["hours"], summary["replay_ratio"]) == (pytest.approx(2.0), 20.0)
    assert summary["steps_per_s"] == pytest.approx(2000 / 7200)


def test_builds_of_an_environment_are_told_and_not_mixed_silently() -> None:
    runs = [replace(curve(seed, [0.0], [0]), result={"env_build": f"game {seed}"}) for seed in (1, 2)]
    assert "`smac:3m`: game 1." in table({"smac:3m": {"qmix": runs[:1]}})
    mixed = table({"smac:3m": {"qmix": runs[:1], "vdn": runs[1:]}, "prey:p-2": {"qmix": [curve(0, [0.0], [0])]}})
    assert "`smac:3m`: game 1 and game 2; results of different builds are not comparable." in mixed
    assert not any(line.startswith("`prey") for line in mixed)


def test_marl_eval_has_the_published_layout() -> None:
    data = marl_eval([curve(3, [0.0, 10.0], [0, 2000], absolute=30.0)])
    seed = data["prey"]["p-2"]["qmix"]["seed_3"]
    assert seed["step_1"] == {
        "step_count": 2000, "elapsed_time": pytest.approx(7200.0), "replay_ratio": [20.0], "return": [9.0, 11.0],
    }  # fmt: skip
    assert seed["absolute_metrics"] == {"return": [30.0]}


GRID = [
    "--algos",
    "vdn",
    "--punishments",
    "0",
    "-1",
    "--seeds",
    "2",
    "--steps",
    "700",
    "--workers",
    "1",
    "--no-progress",
]


def test_prey_grid_reports_resumes_and_is_reported_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["reproduce", "prey", *GRID]) == 0
    folder = tmp_path / "runs" / "reproduce" / "prey" / "run-1"
    text = capsys.readouterr().out
    assert "prey:p0, prey:p-1: vdn; 4 runs of 700 steps" in text
    config = json.loads((folder / "p-1" / "vdn" / "seed-1" / "config.json").read_text())["algorithm"]
    assert (config["epsilon_anneal_time"], config["obs_agent_id"], config["td_lambda"]) == (1_500_000, False, 0.6)
    config = json.loads((folder / "p0" / "vdn" / "seed-0" / "config.json").read_text())["algorithm"]
    assert config["epsilon_anneal_time"] == 100_000
    data: dict[str, Any] = json.loads((folder / "marl_eval.json").read_text())["prey"]
    seeds = data["p-1"]["vdn"]
    assert seeds.keys() == {"seed_0", "seed_1"}
    report = json.loads((folder / "report.json").read_text())
    assert report["prey:p-1"]["vdn"]["return"]["seeds"] == 2
    assert (folder / "prey.png").is_file() == bool(importlib.util.find_spec("matplotlib"))

    (folder / "p0" / "vdn" / "seed-0" / "result.json").unlink()
    assert main(["reproduce", "--resume", str(folder), "--workers", "1", "--no-progress"]) == 0
    assert json.loads((folder / "marl_eval.json").read_text())["prey"].keys() == data.keys()
    assert main(["reproduce", "--resume", str(folder), "--punishments", "0"]) == 2
    assert "--punishments cannot be given with --resume" in capsys.readouterr().err

    assert main(["reproduce", "--resume", str(folder), "--steps", "900", "--workers", "1", "--no-progress"]) == 0
    report = json.loads((folder / "report.json").read_text())
    assert report["prey:p-1"]["vdn"]["return"]["steps"] >= 900

    assert main(["report", str(folder), "--out", str(tmp_path / "report")]) == 0
    tables = [(path / "report.md").read_text().splitlines() for path in (tmp_path / "report", folder)]
    assert sorted(tables[0]) == sorted(tables[1])
    assert set(group(find_runs([folder]))) == {"prey:p0", "prey:p-1"}


def test_wrong_arguments_are_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (
        (["report", str(tmp_path)], "holds no run"),
        (["reproduce", "prey", "--punishments", "2"], "it must be 0 or below"),
        (["reproduce", "prey", "--algos", "nope"], "--algos has 'nope'"),
        (["reproduce", "matrix1", "--punishments", "0"], "--punishments belongs to prey"),
    ):
        assert main(words) == 2
        assert message in capsys.readouterr().err
