"""Whole runs on other people's environments: games that break down, runs that are stopped and go on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastmix import algorithms, envs
from fastmix.cli import main
from fastmix.envs.games import GamesEnv, InProcess
from fastmix.train.config import TrainConfig
from fastmix.train.evaluate import evaluate
from fastmix.train.logging import read_metrics
from fastmix.train.plan import scheme_of
from fastmix.train.trainer import Trainer
from tests.envs.toy import Walk
from tests.starcraft import games, install, wait_until
from tests.train.test_trainer import MATRIX, SMALL, Killed, assert_identical, final_state, killed_after

QUICK = ["--workers", "1", "--no-progress", "--batch-size", "2", "--buffer-size", "20", "--batch-size-run", "2",
         "--rnn-hidden-dim", "8", "--test-nepisode", "2", "--test-interval", "99", "--log-interval", "99"]  # fmt: skip


@pytest.fixture
def ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    install(tmp_path, monkeypatch)
    folder = tmp_path / "ledger"
    folder.mkdir()
    fail(folder, monkeypatch)
    yield folder
    assert wait_until(lambda: not games(folder)), "a game outlived its run"


def fail(ledger: Path, monkeypatch: pytest.MonkeyPatch, **how: Any) -> None:
    monkeypatch.setenv("FAKE_SMAC", json.dumps({"ledger": str(ledger), **how}))


def test_failed_episodes_are_counted_and_nothing_else(
    ledger: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail(ledger, monkeypatch, fail="crash", episode=1, step=2, times=2)
    settings = {"batch_size": 2, "buffer_size": 50, "batch_size_run": 2, "rnn_hidden_dim": 8}
    config = TrainConfig(
        algo="qatten", env="smac:3m", t_max=300, test_nepisode=2, test_interval=10_000, overrides=settings
    )
    trainer = Trainer(config, tmp_path / "run")
    result = trainer.run()
    trainer.close()
    assert trainer.algo.config.unit_dim == 4  # what the environment says of its state
    assert result["failed_games"] == 2 and result["env_build"] == "StarCraft II 4.10.0 (build 75689)"
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    # The first evaluation plays one episode a copy: both failures are of exploring episodes.
    assert sum(record.get("failed_episodes", 0) for record in records) + trainer.rollout.stats.failed == 2
    batch, _ = trainer.replay.sample(trainer.replay.count)
    assert trainer.replay.count == result["episodes"] + trainer.rollout.surplus
    # A battle ends in a true end; a dropped one would not, or would be as short as nobody can win or lose.
    lengths = batch.mask.sum(1).flatten()
    assert (batch.terminated.sum(1) == 1).all() and (lengths >= 6).all()


def test_a_game_that_keeps_failing_stops_the_run_which_goes_on_later(
    ledger: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fail(ledger, monkeypatch, fail="crash", episode=2, step=1, times=100)
    out = tmp_path / "run"
    arguments = ["train", "--algo", "vdn", "--env", "smac:3m,patience=1", "--t-max", "200", "--out", str(out), *QUICK]
    assert main(arguments) == 1
    said = capsys.readouterr().err
    assert "smac:3m,patience=1: the game of copy" in said and "because the game crashed in a step" in said
    assert f"what was learnt is saved, go on with: fastmix train --resume {out}" in said
    (saved,) = (out / "seed-0" / "checkpoints").iterdir()
    assert saved.stat().st_size > 1000
    fail(ledger, monkeypatch)
    assert main(["train", "--resume", str(out), "--no-progress", "--workers", "1"]) == 0
    said = capsys.readouterr().out
    assert "[StarCraft II 4.10.0 (build 75689)]; 1 games broke down" in said
    result = json.loads((out / "seed-0" / "result.json").read_text())
    assert result["t_env"] >= 200 and result["failed_games"] == 1


def test_evaluation_begins_no_episode_that_does_not_count() -> None:
    env = make_walk_env("x", 3, 0)
    algo = algorithms.make("vdn", scheme_of(env.info), rnn_hidden_dim=8)
    for n_episodes in (7, 2, 5):
        before = env._episode.sum()
        stats = evaluate(algo, env, n_episodes, torch.Generator())
        assert len(stats.lengths) == n_episodes
        # One reset of all at the start, of which each copy may play one.
        assert env._episode.sum() - before == max(n_episodes, 3)


def test_replays_are_saved_where_there_are_any(
    ledger: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, replays = tmp_path / "run", tmp_path / "replays"
    assert main(["train", "--algo", "vdn", "--env", "smac:3m", "--t-max", "40", "--out", str(out), *QUICK]) == 0
    capsys.readouterr()
    assert main(["evaluate", str(out), "--episodes", "2", "--save-replays", str(replays), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["env_build"] == "StarCraft II 4.10.0 (build 75689)"
    assert sorted(record["replays"]) == sorted(map(str, (replays / "seed-0").iterdir())) and len(record["replays"]) == 2
    out = tmp_path / "matrix"
    assert main(["train", "--algo", "vdn", "--env", "matrix:resq1", "--t-max", "40", "--out", str(out), *QUICK]) == 0
    assert main(["evaluate", str(out), "--save-replays", str(replays)]) == 2
    assert "matrix:resq1 has no replays to save" in capsys.readouterr().err


def make_walk_env(spec: str, n_envs: int, seed: int) -> GamesEnv:
    return GamesEnv("walk:x", InProcess(Walk, n_envs, seed), seed, replayable=True)


def test_a_killed_run_ends_as_one_that_was_never_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Games that cannot be saved are played again from their seeds and actions."""
    monkeypatch.setitem(envs.REGISTRY, "walk", make_walk_env)
    config = replace(MATRIX, env="walk:x", t_max=400, checkpoint_interval=50, algo="vdn", overrides=SMALL)
    whole = Trainer(config, tmp_path / "whole")
    whole.run()
    with pytest.raises(Killed):
        Trainer(config, tmp_path / "killed", on_progress=killed_after(170)).run()
    resumed = Trainer(config, tmp_path / "killed")
    assert 0 < resumed.counters.t_env < 400 and (resumed.rollout.player.steps > 0).any()
    resumed.run()
    assert_identical(final_state(whole), final_state(resumed))
