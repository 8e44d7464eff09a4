"""``fastmix bench env``: what it prints, and that the public way it compares with plays and learns the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fastmix import envs
from fastmix.agents import RNNAgent
from fastmix.cli import main
from fastmix.experiments.bench import baselines, steps
from fastmix.experiments.bench.envs import SingleCopy, Training, training_speed
from fastmix.train.config import TrainConfig
from fastmix.train.plan import Plan, make_replay, scheme_of
from fastmix.train.rollout import Player, Rollout
from fastmix.train.schedules import EpsilonSchedule
from fastmix.train.trainer import make_algorithm

ENV = "prey:p-1,n_agents=3,n_stags=2,world_shape=4x4,episode_limit=7"
OVERRIDES = {"batch_size": 4, "batch_size_run": 2, "buffer_size": 8, "rnn_hidden_dim": 16}
CONFIG = TrainConfig(env=ENV, test_nepisode=3, bucket=1, overrides=OVERRIDES)


def test_the_public_way_plays_and_stores_the_same_episodes() -> None:
    plan = Plan.of(CONFIG)
    algo = make_algorithm(CONFIG, plan.info)
    agent = algo.networks["agent"]
    assert isinstance(agent, RNNAgent)
    agent.fc2.weight.data.mul_(30)  # greedy actions that depend on what is seen
    replay = make_replay(plan, 0, lambda sentence: None)
    rollout = Rollout(
        Player(envs.make(ENV, 1, 5), algo),
        replay,
        EpsilonSchedule(0.0, 0.0, 0),
        torch.Generator(),
        stored_termination="pymarl",
    )
    rollout.collect(4, 0)
    info = plan.info
    public = baselines.load("training").PublicTraining(
        SingleCopy(envs.make(ENV, 1, 5)), steps.public_learner(algo, scheme_of(info)),
        (info.n_agents, info.n_actions, info.obs_dim, info.state_dim, info.episode_limit),
        batch_size=4, batch_size_run=4, buffer_size=4, epsilon=0.0, test_nepisode=1,
    )  # fmt: skip
    for _ in range(4):
        public._insert(public.play(0.0)[0])
    ours, _ = replay.sample(4)
    theirs = public.sample()
    order = [int((theirs.state[:, 0] == state).all(-1).nonzero()) for state in ours.states[:, 0]]
    mask = ours.mask
    assert torch.equal(mask, theirs.mask[order]) and mask.sum() > 8
    assert torch.equal(ours.obs, theirs.obs[order]) and torch.equal(ours.states, theirs.state[order])
    assert torch.equal(ours.rewards * mask, theirs.reward[order] * mask)
    assert torch.equal(ours.terminated * mask, theirs.terminated[order] * mask)
    live = mask.squeeze(-1).bool()
    assert torch.equal(ours.actions[:, :-1][live], theirs.actions[order].squeeze(-1)[:, :-1][live])
    assert torch.equal(ours.avail_actions[:, :-1][live].int(), theirs.avail_actions[order][:, :-1][live])


def test_training_is_timed_part_by_part() -> None:
    result = training_speed(CONFIG, rounds=2, public=True)
    assert result["ratio"] == pytest.approx(result["ours"]["steps_per_s"] / result["public"]["steps_per_s"])
    shares = result["ours"]["shares"]
    assert sum(shares.values()) == pytest.approx(1.0) and all(share > 0 for share in shares.values())


def test_only_full_batches_are_learnt_from() -> None:
    training = Training(CONFIG)
    training.round()
    assert training.algo.updates == 0 and training.clock.seconds["learning"] == 0
    training.fill()
    assert training.algo.updates >= 1
    training.close()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "env", "matrix:resq1", "--copies", "2", "--threads", "1", "--rounds", "1", "--seconds", "0.05"]
    assert main([*words, "--json", str(tmp_path / "env.json")]) == 0
    assert "whole training, 1 threads" in capsys.readouterr().out
    content = json.loads((tmp_path / "env.json").read_text())
    (speed,) = content["rollouts"]
    assert (speed["copies"], speed["threads"]) == (2, 1) and speed["environment_per_s"] > speed["steps_per_s"] > 0
    assert main([*words, "--algo", "qtran", "--public"]) == 2
    assert "--public needs one of the algorithms" in capsys.readouterr().err
