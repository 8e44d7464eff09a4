"""The recorded episodes of the public predator-prey, replayed by the compiled game and by the plain one."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from fastmix.envs.prey import Decisions, Preset, PreyEnv, PreyReference, from_public
from fastmix.testing.golden import Golden

_DECISIONS = ("agent_order", "prey_order", "prey_move")


def check_stag_hunt(golden: Golden, setting: object) -> None:
    """Every observation, state, mask, position, flag and reward of every step is exactly the recorded one."""
    a = golden.arrays
    rules = from_public(golden.config["env_full"], compat="released")
    info = golden.config["env_info"]
    env = PreyEnv(Preset(rules, t_max=1), 1, 0)
    sizes = (env.info.n_agents, env.info.n_actions, env.info.obs_dim, env.info.state_dim, env.info.episode_limit)
    assert sizes == tuple(info[k] for k in ("n_agents", "n_actions", "obs_shape", "state_shape", "episode_limit"))
    reference = PreyReference(rules)
    starts = [*a["in/episode_start"].tolist(), len(a["in/action"])]
    for episode, (start, end) in enumerate(pairwise(starts)):
        agents, prey = a["in/agent_pos0"][episode], a["in/prey_pos0"][episode]
        env.place(agents[None], prey[None])
        reference.place(list(map(tuple, agents.tolist())), list(map(tuple, prey.tolist())))
        _compare(a, start + episode, env, reference)
        for step in range(start, end):
            action = a["in/action"][step].astype(np.int64)
            given = [a[f"in/{name}"][step] for name in _DECISIONS]
            env.replay(action[None], *(value[None] for value in given))
            result = reference.step(action.tolist(), Decisions(*(value.tolist() for value in given)))
            recorded = (a["out/reward"][step], a["out/done"][step], a["out/episode_limit"][step])
            assert result[0] == env.reward[0] == recorded[0]
            assert (result[1] or result[2]) == (env.terminated[0] or env.truncated[0]) == recorded[1]
            assert result[2] == env.truncated[0] == recorded[2]
            assert (env.prey_move[0] == -2).sum() == a["out/n_captured"][step]
            assert reference.decisions.prey_move == given[2].tolist()
            _compare(a, step + episode + 1, env, reference)


def _compare(a: dict[str, np.ndarray], row: int, env: PreyEnv, reference: PreyReference) -> None:
    alive = a["out/prey_alive"][row] != 0
    for name, ours, plain in (
        ("obs", env.obs, np.stack(reference.get_obs())),
        ("state", env.state, reference.get_state()),
        ("avail", env.avail, np.array(reference.get_avail_actions(), dtype=bool)),
        ("agent_pos", env.agent_pos, np.array(reference.agent_pos)),
        ("agent_active", env.agent_active, np.array(reference.agent_active)),
        ("prey_alive", env.prey_alive, np.array(reference.prey_alive)),
    ):
        np.testing.assert_array_equal(ours[0], a[f"out/{name}"][row], err_msg=f"{name}, row {row}")
        np.testing.assert_array_equal(plain, a[f"out/{name}"][row], err_msg=f"reference: {name}, row {row}")
    np.testing.assert_array_equal(env.prey_pos[0][alive], a["out/prey_pos"][row][alive], err_msg=f"prey_pos, row {row}")
