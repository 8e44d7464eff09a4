"""Greedy evaluation: the same number of episodes in every copy, so that short episodes are not over-represented."""

from __future__ import annotations

import numpy as np
import torch

from fastmix.algorithms import Algorithm
from fastmix.envs import BatchedEnv, ExternalEnv
from fastmix.train.rollout import EpisodeStats, Player


@torch.inference_mode()
def evaluate(
    algo: Algorithm,
    env: BatchedEnv,
    n_episodes: int,
    generator: torch.Generator,
    *,
    device: torch.device | str = "cpu",
) -> EpisodeStats:
    """Play ``n_episodes`` greedy episodes (epsilon 0) from fresh starts.

    Each copy plays its share, decided beforehand: taking the first ``n_episodes`` to finish would favour short ones. An
    episode whose game breaks down is played again. Raises ``ValueError`` for ``n_episodes`` below 1.
    """
    if n_episodes < 1:
        raise ValueError(f"n_episodes is {n_episodes}; it must be at least 1")
    share = n_episodes // env.n_envs + (np.arange(env.n_envs) < n_episodes % env.n_envs)
    still = isinstance(env, ExternalEnv)  # nothing is played that does not count
    player = Player(env, algo, device)
    env.reset()
    stats = EpisodeStats()
    while share.any():
        player.play(0.0, generator)
        failed, finished = player.failed(), player.finished()
        if len(failed):
            stats.failed += len(failed)
            player.restart(failed)
        if len(finished):
            counted = finished[share[finished] > 0]
            stats.add(player, counted)
            share[counted] -= 1
            player.restart(finished[share[finished] > 0] if still else finished)
    return stats
