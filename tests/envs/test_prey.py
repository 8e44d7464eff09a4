"""Predator-prey: the compiled game against the plain one on random rules, published settings, and what it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fastmix import envs
from fastmix.envs import BatchedEnv
from fastmix.envs.prey import Decisions, Preset, PreyEnv, PreyReference, PreyRules, from_public, parse

N_ENVS = 3


def make(n_envs: int = N_ENVS, seed: int = 0, **rules: Any) -> PreyEnv:
    return PreyEnv(Preset(PreyRules(**rules), t_max=1000), n_envs, seed)


def random_rules(seed: int) -> PreyRules:
    """Every rule at random, in worlds small enough that agents and prey meet."""
    rng = np.random.default_rng(seed)

    def flag() -> bool:
        return bool(rng.integers(2))

    n_agents, n_stags, n_hare = (int(n) for n in rng.integers((1, 0, 0), (6, 4, 4)))
    n_stags += n_stags + n_hare == 0
    rows = int(rng.integers(1, 7))
    cols = -(-(n_agents + n_stags + n_hare) // rows) + int(rng.integers(0, 4))
    compat = "released" if flag() else "paper"
    k = int(rng.integers(0, 4))
    return PreyRules(
        world_shape=(rows, cols), toroidal=flag(), n_agents=n_agents, n_stags=n_stags, n_hare=n_hare,
        episode_limit=int(rng.integers(1, 30)), agent_obs=(k, k if compat == "released" else int(rng.integers(0, 4))),
        observe_walls=flag(), observe_ids=flag(),
        agent_move_block=tuple(np.flatnonzero(rng.integers(0, 2, 3)).tolist()) if flag() else (0, 1, 2),
        p_stags_rest=float(rng.choice([0, 0.5, 1])), p_hare_rest=float(rng.choice([0, 0.5, 1])),
        capture_action=bool(rng.integers(4)), capture_action_conditions=tuple(rng.integers(1, 4, 2).tolist()),
        capture_conditions=tuple(rng.integers(0, 4, 2).tolist()), capture_freezes=flag(), remove_frozen=flag(),
        capture_terminal=flag(), prevent_cannibalism=flag(), reward_stag=10.0, reward_hare=1.0,
        reward_collision=float(rng.choice([0, -0.3])), reward_time=float(rng.choice([0, -0.1])),
        miscapture_punishment=float(rng.choice([0, -1.5])), compat=compat,
    )  # fmt: skip


def cells(array: np.ndarray) -> list[tuple[int, int]]:
    return [(int(row), int(col)) for row, col in array]


def assert_same(env: PreyEnv, copy: int, reference: PreyReference) -> None:
    np.testing.assert_array_equal(env.state[copy], reference.get_state())
    np.testing.assert_array_equal(env.obs[copy], np.stack(reference.get_obs()))
    np.testing.assert_array_equal(env.avail[copy], np.array(reference.get_avail_actions(), dtype=bool))
    assert (
        cells(env.agent_pos[copy]) == reference.agent_pos and env.agent_active[copy].tolist() == reference.agent_active
    )
    alive = env.prey_alive[copy]
    assert alive.tolist() == reference.prey_alive
    assert cells(env.prey_pos[copy][alive]) == [c for c, lives in zip(reference.prey_pos, alive, strict=True) if lives]


@pytest.mark.parametrize("seed", range(60))
def test_steps_are_those_of_the_reference(seed: int) -> None:
    rules = random_rules(seed)
    env, rng = PreyEnv(Preset(rules, 1000), N_ENVS, seed), np.random.default_rng(seed)
    references = [PreyReference(rules) for _ in range(N_ENVS)]
    repeated = PreyEnv(Preset(rules, 1000), N_ENVS, seed + 1)
    restart: list[int] = list(range(N_ENVS))
    for _ in range(40):
        for copy in restart:
            references[copy].place(cells(env.agent_pos[copy]), cells(env.prey_pos[copy]))
        repeated.load_state_dict(env.state_dict())
        actions = rng.integers(0, rules.n_actions, (N_ENVS, rules.n_agents))
        actions = np.where(rng.random(actions.shape) < 0.4, rules.n_actions - 1, actions)  # often catch
        env.step(actions)
        for copy, reference in enumerate(references):
            decisions = Decisions(*(a[copy].tolist() for a in (env.agent_order, env.prey_order, env.prey_move)))
            reward, terminated, truncated = reference.step(actions[copy].tolist(), decisions)
            assert reference.decisions == decisions
            assert (env.reward[copy], env.terminated[copy], env.truncated[copy]) == (reward, terminated, truncated)
            assert_same(env, copy, reference)
        repeated.replay(actions, env.agent_order, env.prey_order, env.prey_move)
        for name in ("state", "obs", "avail", "reward", "terminated", "truncated", "agent_pos", "prey_pos", "steps"):
            np.testing.assert_array_equal(getattr(repeated, name), getattr(env, name), err_msg=name)
        restart = np.flatnonzero(env.terminated | env.truncated).tolist()
        env.reset(np.array(restart, dtype=np.int64))


def test_random_rules_meet_every_branch() -> None:
    rules = [random_rules(seed) for seed in range(60)]
    for name in ("toroidal", "observe_walls", "observe_ids", "capture_action", "capture_freezes", "remove_frozen"):
        assert {getattr(r, name) for r in rules} == {True, False}
    assert {r.compat for r in rules} == {"paper", "released"}
    assert any(r.toroidal and 1 in r.world_shape for r in rules)


@pytest.mark.parametrize("n_envs", [1, 70])
def test_seed_decides_everything_and_threads_nothing(n_envs: int) -> None:
    episodes = []
    for threads, seed in ((1, 5), (2, 5), (1, 6)):
        torch.set_num_threads(threads)
        env, rng = envs.make("prey:p-2", n_envs, seed), np.random.default_rng(0)
        trace = [env.state.copy()]
        for _ in range(20):
            env.step(rng.integers(0, 6, (n_envs, 8)))
            trace.append(env.state.copy())
        episodes.append(np.stack(trace))
    np.testing.assert_array_equal(episodes[0], episodes[1])
    assert (episodes[0] != episodes[2]).any()


def test_copies_differ_and_restart_alone() -> None:
    env = envs.make("prey:wqmix", 4, 0)
    assert len({env.state[i].tobytes() for i in range(4)}) == 4
    env.step(np.full((4, 8), 4))
    before = env.state.copy()
    env.reset(np.array([2]))
    assert (env.state[2] != before[2]).any()
    np.testing.assert_array_equal(np.delete(env.state, 2, 0), np.delete(before, 2, 0))


def test_state_dict_carries_the_running_episodes() -> None:
    env, rng = make(seed=1, miscapture_punishment=-2.0), np.random.default_rng(0)
    env.step(rng.integers(0, 6, (N_ENVS, 8)))
    resumed = make(seed=9, miscapture_punishment=-2.0)
    resumed.load_state_dict(env.state_dict())
    for _ in range(30):
        np.testing.assert_array_equal(env.obs, resumed.obs)
        actions = rng.integers(0, 6, (N_ENVS, 8))
        env.step(actions)
        resumed.step(actions)
        np.testing.assert_array_equal(env.reward, resumed.reward)
        env.reset(np.array([0]))
        resumed.reset(np.array([0]))


def test_chance_is_fair() -> None:
    """Spawning, orders and moves are uniform: each count within five standard deviations of its mean."""
    n = 4000
    env = make(n, world_shape=(3, 4), n_agents=1, n_stags=2, agent_move_block=())
    counts = np.bincount(env.agent_pos[:, 0] @ [4, 1], minlength=12)
    assert (abs(counts - n / 12) < 5 * np.sqrt(n / 12)).all()
    env.place(np.tile([[0, 0]], (n, 1, 1)), np.tile([[1, 2], [2, 0]], (n, 1, 1)))
    env.step(np.full((n, 1), 4))
    assert abs((env.prey_order[:, 0] == 0).mean() - 0.5) < 5 * 0.5 / np.sqrt(n)
    moved = np.bincount(env.prey_move[:, 0], minlength=4)  # all four cells around (1, 2) are free, in either order
    assert (abs(moved - n / 4) < 5 * np.sqrt(n * 3 / 16)).all()
    resting = make(n, n_agents=1, n_stags=1, p_stags_rest=0.3)
    resting.step(np.full((n, 1), 4))
    assert abs((resting.prey_move == -1).mean() - 0.3) < 5 * np.sqrt(0.21 / n)


def test_two_catch_a_stag_and_one_is_punished() -> None:
    env = make(1, world_shape=(3, 3), n_agents=2, n_stags=1, miscapture_punishment=-2.0, p_stags_rest=1.0)
    env.place(np.array([[[0, 1], [1, 0]]]), np.array([[[1, 1]]]))
    assert env.avail[0, :, 5].all()
    env.step(np.array([[5, 4]]))
    assert env.reward[0] == -2.0 and not env.terminated[0]
    env.step(np.array([[5, 5]]))
    assert env.reward[0] == 10.0 and env.terminated[0] and not env.truncated[0]
    assert not env.agent_active.any() and not env.state.any() and not env.obs.any()
    np.testing.assert_array_equal(env.avail[0], np.tile(np.arange(6) == 4, (2, 1)))


def test_punished_once_for_each_prey() -> None:
    env = make(1, world_shape=(1, 3), n_agents=1, n_stags=2, miscapture_punishment=-1.5)
    env.place(np.array([[[0, 1]]]), np.array([[[0, 0], [0, 2]]]))
    env.step(np.array([[5]]))
    assert env.reward[0] == -3.0


@pytest.mark.parametrize(("compat", "caught", "seen"), [("paper", True, 1.0), ("released", False, 0.0)])
def test_toroidal_quirk(compat: str, caught: bool, seen: float) -> None:
    rules: dict[str, Any] = {
        "world_shape": (5, 5),
        "toroidal": True,
        "n_agents": 1,
        "n_stags": 0,
        "n_hare": 1,
        "compat": compat,
    }
    env = make(1, agent_obs=(1, 1), p_hare_rest=1.0, **rules)
    env.place(np.array([[[0, 2]]]), np.array([[[4, 2]]]))
    assert env.obs[0, 0].reshape(3, 3, 3)[0, 1, 2] == seen and env.avail[0, 0, 5] == caught
    env.step(np.array([[5]]))
    assert (env.reward[0] == 1.0) == caught


@pytest.mark.parametrize(("compat", "reward"), [("paper", 0.0), ("released", -1.0)])
def test_collision_quirk(compat: str, reward: float) -> None:
    env = make(1, n_agents=1, n_stags=1, reward_collision=-1.0, compat=compat)
    env.place(np.array([[[0, 0]]]), np.array([[[9, 9]]]))
    env.step(np.array([[4]]))
    assert env.reward[0] == reward
    crowd = make(1, n_agents=2, n_stags=1, reward_collision=-1.0, compat=compat)
    crowd.place(np.array([[[0, 0], [0, 1]]]), np.array([[[9, 9]]]))
    crowd.step(np.array([[0, 1]]))  # one walks into the other, unless that has left first
    first_left = crowd.agent_order[0, 0] == 1
    assert crowd.reward[0] == (0.0 if first_left else -1.0)


def test_limit_truncates_also_a_natural_end() -> None:
    env = make(1, world_shape=(1, 3), n_agents=2, n_stags=1, episode_limit=1)
    env.place(np.array([[[0, 0], [0, 2]]]), np.array([[[0, 1]]]))
    env.step(np.array([[5, 5]]))
    assert env.terminated[0] and env.truncated[0]


def test_presets() -> None:
    punished, plain, wqmix = parse("p-2"), parse("p0"), parse("wqmix")
    assert punished.rules == wqmix.rules == from_public({"miscapture_punishment": -2.0, "world_shape": [10, 10]})
    assert plain.rules == parse("pymarl2").rules == PreyRules()
    assert punished.settings == {"obs_agent_id": False, "epsilon_anneal_time": 1_500_000}
    assert plain.settings == {"obs_agent_id": False} and wqmix.settings == {} and wqmix.t_max == 1_000_000
    assert parse("p-1.5").rules.miscapture_punishment == -1.5
    changed = parse("p-1,world_shape=6x7,toroidal=true,n_agents=3,p_hare_rest=.5,agent_move_block=0x1").rules
    assert (changed.world_shape, changed.toroidal, changed.n_agents) == ((6, 7), True, 3)
    assert (changed.p_hare_rest, changed.agent_move_block, changed.miscapture_punishment) == (0.5, (0, 1), -1.0)


def test_sizes_are_those_of_the_public_environment() -> None:
    env = envs.make("prey:pymarl2", 2, 0)
    assert isinstance(env, BatchedEnv)
    info = env.info
    assert (info.n_agents, info.n_actions, info.obs_dim, info.state_dim, info.episode_limit) == (8, 6, 75, 300, 200)
    assert (info.test_interval, info.test_nepisode, info.obs_dtype) == (10_000, 16, "int8")
    assert envs.make("prey:p-2,n_agents=200,world_shape=30x30,observe_ids=true", 1, 0).info.obs_dtype == "float32"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("chess", "it must be like prey:wqmix"),
        ("p2", "write p-2"),
        ("p-2,speed=3", "'speed=3' must be rule=value with one of world_shape"),
        ("p-2,toroidal", "'toroidal' must be rule=value"),
        ("p-2,toroidal=maybe", "toroidal is 'maybe'; it must be true or false"),
        ("p-2,world_shape=6", "world_shape is '6'; it must be numbers like 6x7"),
        ("p-2,n_agents=many", "n_agents is 'many'; it must be a whole number"),
        ("p-2,n_agents=0", "n_agents is 0; it must be at least 1"),
        ("p-2,world_shape=3x3", "a world with room for all 16 agents and prey"),
        ("p-2,world_shape=0x9", "world_shape is (0, 9)"),
        ("p-2,n_stags=0", "n_stags is 0; it must be at least 1"),
        ("p-2,p_stags_rest=1.5", "p_stags_rest is 1.5; it must be a probability"),
        ("p-2,reward_time=nan", "reward_time is nan; it must be finite"),
        ("p-2,agent_move_block=3", "agent_move_block is (3,)"),
        ("p-2,capture_action_conditions=0x1", "capture_action_conditions is (0, 1)"),
        ("p-2,compat=old", "compat is 'old'"),
        ("p-2,compat=released,agent_obs=2x3", "square"),
        ("p-2,episode_limit=0", "episode_limit is 0"),
    ],
)
def test_wrong_settings_are_explained(spec: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        envs.make(f"prey:{spec}", 1, 0)
    assert message in str(caught.value)


def test_unsupported_public_options_are_explained() -> None:
    with pytest.raises(ValueError, match=r"mountain_slope is 0\.5"):
        from_public({"mountain_slope": 0.5})


def test_wrong_calls_are_explained() -> None:
    env = make()
    for actions in (np.zeros((2, 8), np.int64), np.zeros((N_ENVS, 8), np.int32), np.zeros((8, N_ENVS), np.int64).T):
        with pytest.raises(ValueError, match=r"actions must be dense int64 \[n_envs, n_agents\]"):
            env.step(actions)
    for action in (-1, 6):
        with pytest.raises(ValueError, match="action that does not exist"):
            env.step(np.full((N_ENVS, 8), action))
    with pytest.raises(ValueError, match="a copy that does not exist"):
        env.reset(np.array([N_ENVS]))
    with pytest.raises(ValueError, match="a copy twice"):
        env.reset(np.array([0, 0]))
    agents, prey = env.agent_pos.copy(), env.prey_pos.copy()
    with pytest.raises(ValueError, match="two entities"):
        env.place(np.zeros_like(agents), prey)
    with pytest.raises(ValueError, match="outside the world"):
        env.place(agents + 10, prey)
    with pytest.raises(ValueError, match="together shape"):
        env.place(agents[:1], prey[:1])
    env.agent_pos[0, 0] = 10  # whatever is written into the arrays, nothing is read beyond them
    with pytest.raises(ValueError, match="outside the world"):
        env.step(np.zeros((N_ENVS, 8), np.int64))


def test_impossible_decisions_are_refused() -> None:
    env = make(1, n_agents=2, n_stags=1)
    env.place(np.array([[[0, 0], [0, 1]]]), np.array([[[9, 9]]]))
    start = env.state_dict()
    stay, order = np.full((1, 2), 4), np.array([[0, 1]])
    for agent_order, prey_order, move in (
        ([[0, 0]], [[0]], 2),
        ([[0, 1]], [[1]], 2),
        (order, [[0]], 0),
        (order, [[0]], -2),
    ):
        env.load_state_dict(start)
        with pytest.raises(ValueError, match="decisions given for copy 0 cannot be"):
            env.replay(stay, np.array(agent_order), np.array(prey_order), np.array([[move]]))
    env.load_state_dict(start)
    env.replay(stay, order, np.array([[0]]), np.array([[2]]))
    assert env.prey_pos.tolist() == [[[9, 8]]]
