"""Rollouts: replay holds what the environment did, in order, whatever the lengths of the episodes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fastmix import algorithms
from fastmix.algorithms import Algorithm
from fastmix.train.evaluate import evaluate
from fastmix.train.plan import scheme_of
from fastmix.train.replay import ReplayBuffer
from fastmix.train.rollout import EpisodeStats, Player, Rollout, StoredTermination
from fastmix.train.schedules import EpsilonSchedule
from tests.train.ragged import RaggedEnv

GENERATOR_SEED = 5


def make_algo(env: RaggedEnv, **overrides: Any) -> Algorithm:
    return algorithms.make("vdn", scheme_of(env.info), rnn_hidden_dim=8, **overrides)


def make_rollout(
    n_envs: int = 3, *, capacity: int = 200, epsilon: float = 0.5, termination: StoredTermination = "true"
) -> tuple[Rollout, RaggedEnv, ReplayBuffer]:
    env = RaggedEnv(n_envs, seed=2)
    replay = ReplayBuffer(scheme_of(env.info), capacity, n_envs, bucket=1)
    schedule = EpsilonSchedule(epsilon, epsilon, 1)
    generator = torch.Generator().manual_seed(GENERATOR_SEED)
    rollout = Rollout(Player(env, make_algo(env)), replay, schedule, generator, stored_termination=termination)
    return rollout, env, replay


@pytest.mark.parametrize("termination", ["true", "pymarl"])
def test_replay_holds_what_the_environment_did(termination: StoredTermination) -> None:
    rollout, env, replay = make_rollout(termination=termination)
    taken = sum(rollout.collect(8, 0) for _ in range(10))
    assert taken == 3 * sum(len(steps) for (e, _), steps in env.log.items() if e == 0)
    batch, _ = replay.sample(replay.count)
    assert replay.count == 80 + rollout.surplus
    cut, ended_at_limit = 0, 0
    for b in range(replay.count):
        e, k = int(batch.states[b, 0, 0]), int(batch.states[b, 0, 1])
        steps = env.log[(e, k)]
        length = len(steps)
        assert batch.mask[b].sum() == length
        for t in range(length + 1):
            assert batch.states[b, t].tolist() == [e, k, t]
            assert batch.obs[b, t].tolist() == [[e, k, t, a] for a in range(2)]
            # Available unless (u + a + t) % 3 == 0; action 1 always.
            expected = [[(u + a + t) % 3 != 0 or u == 1 for u in range(9)] for a in range(2)]
            assert batch.avail_actions[b, t].tolist() == expected
        for t, step in enumerate(steps):
            assert batch.actions[b, t].tolist() == step["actions"].tolist()
            assert batch.rewards[b, t].item() == pytest.approx(step["reward"])
            stored = step["terminated"] and not (termination == "pymarl" and step["truncated"])
            assert batch.terminated[b, t].item() == stored
        cut += steps[-1]["truncated"] and not steps[-1]["terminated"]
        ended_at_limit += steps[-1]["truncated"] and steps[-1]["terminated"]
    assert cut > 3 and ended_at_limit > 3, "the environment was meant to produce every kind of ending"


def test_episodes_enter_replay_as_they_finish_and_nobody_waits() -> None:
    rollout, env, replay = make_rollout(n_envs=4)
    rollout.collect(40, 0)
    episodes_of_each = env.episode + 1
    assert episodes_of_each.max() - episodes_of_each.min() >= 1
    batch, _ = replay.sample(replay.count)
    order = [(int(s[0]), int(s[1])) for s in batch.states[:, 0]]
    finish_time = {}
    for e in range(4):
        clock = 0
        for k in range(int(env.episode[e])):
            clock += len(env.log[(e, k)])
            finish_time[(e, k)] = (clock, e)
    assert order == sorted(finish_time, key=finish_time.__getitem__)


def test_surplus_episodes_count_towards_the_next_round() -> None:
    rollout, _, replay = make_rollout(n_envs=5)
    finished = 0
    for round_number in range(1, 30):
        rollout.collect(2, 0)
        assert replay.count == 2 * round_number + rollout.surplus
        finished += rollout.surplus > 0
    assert finished > 5


def test_stats_are_those_of_the_finished_episodes() -> None:
    rollout, env, _ = make_rollout()
    rollout.collect(20, 0)
    finished = [steps for steps in env.log.values() if steps[-1]["terminated"] or steps[-1]["truncated"]]
    assert sorted(rollout.stats.lengths) == sorted(len(steps) for steps in finished)
    expected = sorted(sum(step["reward"] for step in steps) for steps in finished)
    np.testing.assert_allclose(sorted(rollout.stats.returns), expected, atol=1e-5)
    summary = rollout.stats.summary("x_")
    assert summary["x_return_mean"] == pytest.approx(np.mean(expected), abs=1e-5)
    assert 0 < summary["x_win_rate"] < 1
    assert EpisodeStats().summary("") == {}


def test_greedy_rollouts_see_their_own_history() -> None:
    """With epsilon 0, the stored actions are those of one whole-sequence pass over the stored episode."""
    rollout, env, replay = make_rollout(epsilon=0.0)
    rollout.collect(20, 0)
    batch, _ = replay.sample(replay.count)
    q = rollout.player.algo.utilities(batch.obs, batch.last_actions)
    greedy = q.masked_fill(~batch.avail_actions, -torch.inf).argmax(-1)
    live = batch.mask.bool().expand(-1, -1, env.AGENTS)
    assert torch.equal(greedy[:, :-1][live], batch.actions[:, :-1][live])


def test_epsilon_follows_environment_steps() -> None:
    rollout, env, _ = make_rollout()
    asked: list[int] = []

    class Spy(EpsilonSchedule):
        def __call__(self, t: int) -> float:
            asked.append(t)
            return super().__call__(t)

    rollout.epsilon = Spy(1.0, 0.0, 1000)
    taken = rollout.collect(5, 600)
    assert asked == list(range(600, 600 + taken, env.n_envs))


class Broken(RaggedEnv):
    """Cuts episodes before the limit, or never ends them."""

    def __init__(self, how: str) -> None:
        super().__init__(2, 0)
        self.how = how

    def step(self, actions: np.ndarray) -> None:
        self.length[:] = 100
        super().step(actions)
        self.truncated[:] = self.t == 3 if self.how == "early" else False


@pytest.mark.parametrize(
    ("how", "message"), [("early", "truncated an episode after 3 steps"), ("never", "runs on after 7 steps")]
)
def test_environments_that_break_their_word(how: str, message: str) -> None:
    env = Broken(how)
    replay = ReplayBuffer(scheme_of(env.info), 5, 2)
    rollout = Rollout(Player(env, make_algo(env)), replay, EpsilonSchedule(1.0, 1.0, 1), torch.Generator())
    with pytest.raises(RuntimeError, match=message):
        rollout.collect(1, 0)


# ---- evaluation ----


@pytest.mark.parametrize(("n_envs", "n_episodes"), [(1, 5), (4, 4), (4, 10), (5, 3)])
def test_evaluation_plays_equal_shares(n_envs: int, n_episodes: int) -> None:
    env = RaggedEnv(n_envs, seed=1)
    stats = evaluate(make_algo(env), env, n_episodes, torch.Generator().manual_seed(0))
    share = [n_episodes // n_envs + (e < n_episodes % n_envs) for e in range(n_envs)]
    counted = [env.log[(e, k)] for e in range(n_envs) for k in range(share[e])]
    assert sorted(stats.lengths) == sorted(map(len, counted))
    np.testing.assert_allclose(
        sorted(stats.returns), sorted(sum(s["reward"] for s in steps) for steps in counted), atol=1e-5
    )


def test_evaluation_is_greedy_and_leaves_exploration_alone() -> None:
    env = RaggedEnv(2, seed=1)
    algo, generator = make_algo(env), torch.Generator().manual_seed(0)
    before = generator.get_state()
    first = evaluate(algo, env, 6, generator)
    assert torch.equal(before, generator.get_state())
    again = evaluate(algo, RaggedEnv(2, seed=1), 6, torch.Generator().manual_seed(123))
    assert first == again


def test_evaluation_needs_episodes() -> None:
    env = RaggedEnv(1, 0)
    with pytest.raises(ValueError, match="n_episodes is 0"):
        evaluate(make_algo(env), env, 0, torch.Generator())
