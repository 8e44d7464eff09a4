"""The command line, from words to files."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from fastmix.cli import COMMANDS, main
from fastmix.train.logging import read_metrics

QUICK = ["--workers", "1", "--no-progress", "--batch-size", "16", "--buffer-size", "64", "--test-nepisode", "2"]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_train_writes_prints_and_evaluates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(
            [
                "train",
                "--algo",
                "qmix",
                "--env",
                "matrix:resq1",
                "--seeds",
                "2",
                "--t-max",
                "400",
                "--lr",
                "2e-3",
                *QUICK,
            ]
        )
        == 0
    )
    text = capsys.readouterr().out
    for part in (
        "replay buffer: 64 episodes",
        "replay ratio 2",
        "seed 0: greedy ",
        "seed 1: greedy ",
        "Q_tot",
        "payoff",
    ):
        assert part in text, part
    assert "average of 2 seeds" in text and "of 2 seeds (95 % interval" in text
    folder = tmp_path / "runs" / "matrix-resq1" / "qmix" / "run-1"
    assert str(folder.relative_to(tmp_path)) in text
    expected = {"summary.json", "sweep.json", "seed-0", "seed-1"}
    if importlib.util.find_spec("matplotlib"):
        expected.add("figure.png")
    assert files(folder) == expected
    assert files(folder / "seed-1") >= {"config.json", "metrics.jsonl", "checkpoints", "result.json"}
    config = json.loads((folder / "seed-1" / "config.json").read_text())
    assert config["algorithm"]["lr"] == 2e-3 and config["train"]["seed"] == 1
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["game"]["seeds"] == 2 and summary["game"]["optimum"] == ["AA"]
    assert [s["game"]["greedy"] for s in summary["seeds"]] == [
        json.loads((folder / f"seed-{i}" / "result.json").read_text())["game"]["greedy"] for i in (0, 1)
    ]
    last = [r for r in read_metrics(folder / "seed-0" / "metrics.jsonl") if "test_return_mean" in r][-1]

    assert main(["evaluate", str(folder), "--episodes", "3", "--json"]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [r["t_env"] for r in records] == [400, 400]
    assert records[0]["return_mean"] == pytest.approx(last["test_return_mean"])
    assert records[0]["game"] == summary["seeds"][0]["game"]
    assert main(["evaluate", str(folder / "seed-1"), "--checkpoint", "best"]) == 0
    assert "over 32 greedy episodes" in capsys.readouterr().out

    # A second sweep of the same settings gets a folder of its own; the first one resumes to the same end.
    assert main(["train", "--algo", "qmix", "--t-max", "40", *QUICK]) == 0
    assert files(folder.parent) == {"run-1", "run-2"}
    (folder / "seed-1" / "result.json").unlink()
    (folder / "summary.json").unlink()
    again = ["train", "--resume", str(folder), "--workers", "1", "--no-progress"]
    assert main([*again, "--no-graphs", "--replay-device", "cpu"]) == 0  # what suits the machine may change
    again = json.loads((folder / "summary.json").read_text())
    assert again["game"] == summary["game"]

    # It goes on to a later end, not to an earlier one.
    longer = ["train", "--resume", str(folder), "--workers", "1", "--no-progress", "--t-max"]
    assert main([*longer, "480"]) == 0
    again = json.loads((folder / "summary.json").read_text())
    assert again["t_max"] == 480 and [seed["t_env"] for seed in again["seeds"]] == [480, 480]
    assert main(["train", "--resume", str(folder), "--workers", "1", "--no-progress"]) == 0
    assert json.loads((folder / "summary.json").read_text()) == again
    capsys.readouterr()
    assert main([*longer, "100"]) == 2
    assert f"--t-max is 100; the runs in {folder} are of 480 steps" in capsys.readouterr().err


def test_a_users_game_of_three_agents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my game.json").write_text(
        json.dumps({"payoff": [[[1, 0], [0, 0]], [[0, 0], [0, 3]]], "noise_std": 0.1})
    )
    assert main(["train", "--algo", "vdn", "--env", "matrix:@my game.json", "--t-max", "200", *QUICK]) == 0
    text = capsys.readouterr().out
    assert "Q_3: " in text and "joint action" in text and "heat maps are for games of two agents" in text
    folder = tmp_path / "runs" / "matrix-my-game" / "vdn" / "run-1"
    # The game is found from any folder.
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["evaluate", str(folder)]) == 0


def test_reproduce_sets_ours_beside_the_papers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--seeds", "2", "--t-max", "1000", "--algos", "vdn", "qmix", "--workers", "1", "--no-progress"]
    assert main(["reproduce", "matrix1", *words]) == 0
    text = capsys.readouterr().out
    for part in ("vdn: optimum found by", "qmix: optimum found by", "POWQMIX, table 1", "-23.23"):
        assert part in text, part
    assert "no paper has a table of it" in text and "of 2 seeds (95 % interval" in text
    assert "papers claim" in text and "largest distance of a learned joint value" in text
    folder = tmp_path / "runs" / "reproduce" / "matrix1" / "run-1"
    result = json.loads((folder / "matrix1.json").read_text())
    uniform = {"epsilon_start": 1.0, "epsilon_finish": 1.0, "batch_size_run": 8}
    assert result["protocol"] == {"t_max": 1000, "preset": "paper", "overrides": {"vdn": uniform, "qmix": uniform}}
    assert result["algorithms"]["qmix"]["claim"]["papers"] == "not found"
    assert result["algorithms"]["vdn"]["claim"] == {"papers": "-", "verdict": "-"}
    assert set(result["algorithms"]["qmix"]["largest_errors"]) == {"Q_tot"}
    assert (folder / "matrix1.md").read_text().count("\n| `") == 2
    assert set(result["algorithms"]) == {"vdn", "qmix"}
    assert result["algorithms"]["qmix"]["papers"][0]["tables"]["Q_tot"][0] == [-8.11, -8.1, None]
    config = json.loads((folder / "qmix" / "seed-1" / "config.json").read_text())
    assert config["algorithm"]["batch_size_run"] == 8 and config["algorithm"]["epsilon_finish"] == 1.0
    log = [r for r in read_metrics(folder / "qmix" / "seed-1" / "metrics.jsonl") if "epsilon" in r]
    assert {r["epsilon"] for r in log} == {1.0}
    (folder / "qmix" / "seed-1" / "result.json").unlink()
    assert main(["reproduce", "--resume", str(folder), "--workers", "1"]) == 0
    assert (
        json.loads((folder / "matrix1.json").read_text())["algorithms"]["qmix"]["average"]
        == result["algorithms"]["qmix"]["average"]
    )


def test_reproduce_sets_distributions_beside_the_true_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--seeds", "1", "--t-max", "300", "--algos", "ddn", "resq", "--workers", "1", "--no-progress"]
    assert main(["reproduce", "matrix3", *words]) == 0
    text = capsys.readouterr().out
    for part in ("E[Z_jt]", "ResQ appendix, table 3", "(papers' tables: 0.63)", "distance of learned distributions"):
        assert part in text, part
    folder = tmp_path / "runs" / "reproduce" / "matrix3" / "run-1"
    ours = json.loads((folder / "matrix3.json").read_text())["algorithms"]
    assert len(ours["ddn"]["average"]["quantiles"][0][0]) == 32
    assert len(ours["ddn"]["distribution_distance"]) == 3
    assert ours["resq"]["distribution_distance"] is None and "quantiles" not in ours["resq"]["average"]
    assert (folder / "matrix3-distributions.png").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "--algo", "nope"], "nope"),
        (["train", "--env", "matrix:nope"], "env is 'matrix:nope'"),
        (["train", "--lr", "-1"], "lr"),
        (["train", "--seeds", "0"], "--seeds is 0; it must be at least 1"),
        (["train", "--workers", "-2"], "--workers is -2"),
        (["train", "--resume", "nowhere"], "there is no sweep.json"),
        (["train", "--resume", "nowhere", "--lr", "1e-3"], "--lr cannot be given with --resume"),
        (["train", "--resume", "nowhere", "--batch-size", "3"], "--batch-size cannot be given with --resume"),
        (["train", "--device", "quantum"], "device is 'quantum'"),
        (["reproduce"], "matrix1, matrix2, matrix3"),
        (["reproduce", "matrix1", "--algos", "nope"], "--algos has 'nope'"),
        (["evaluate", "nowhere"], "holds no run"),
    ],
)
def test_wrong_words_are_one_sentence_and_leave_nothing(
    tmp_path: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    captured = capsys.readouterr()
    assert (
        message in captured.err and captured.err.startswith(f"fastmix {words[0]}: ") and captured.err.count("\n") == 1
    )
    assert list(tmp_path.iterdir()) == []


def test_too_large_a_buffer_is_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--buffer-size", "10000000000000"]) == 1
    assert "lower --buffer-size" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_others_results_are_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    assert main(["train", "--out", "mine", "--t-max", "8"]) == 2
    assert "not empty" in capsys.readouterr().err
    assert files(tmp_path / "mine") == {"thesis.txt"}


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(ValueError, match="seeds"):
        main(["--debug", "train", "--seeds", "0"])


def test_unknown_options_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--learning-rate", "1"])
    assert stopped.value.code == 2
    assert "--learning-rate" in capsys.readouterr().err


def test_options_are_not_abbreviated(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--batch", "1"])
    assert "unrecognized arguments: --batch" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    assert f"usage: fastmix {command}" in capsys.readouterr().out


def test_no_command_prints_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    text = capsys.readouterr().out
    assert all(command in text for command in COMMANDS)


def test_help_needs_no_torch() -> None:
    code = """
import sys
from fastmix.cli import main
try:
    main(["--help"])
except SystemExit:
    sys.exit("torch" in sys.modules or "numpy" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    assert "fastmix reproduce matrix1" in done.stdout


def test_python_dash_m() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fastmix", "--version"], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 0 and done.stdout.startswith("fastmix ")


def test_stopping_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fastmix.train.trainer import Trainer

    real = Trainer._round

    def round_then_ctrl_c(self: Trainer) -> None:
        real(self)
        self._stop = True

    monkeypatch.setattr(Trainer, "_round", round_then_ctrl_c)
    assert main(["train", "--t-max", "80", *QUICK]) == 130
    error = capsys.readouterr().err
    assert "stopped at 8 of 80" in error
    command = error.strip().split("go on with: fastmix ")[1].split()
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert main([*command, "--workers", "1"]) == 0
