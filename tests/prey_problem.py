"""Predator-prey on random rules: the compiled game and the plain one step by step."""

from __future__ import annotations

import numpy as np

from fastmix.envs.prey import Decisions, Preset, PreyEnv, PreyReference, PreyRules

N_ENVS = 3


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


def play_beside_reference(rules: PreyRules, seed: int) -> None:
    """Some episodes: what a step gives is what the plain game makes of the same decisions, and what a replay gives."""
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
