"""Batched rollouts: one call of the policy moves all E copies of the environment, straight into replay."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch

from fastmix._parts import part
from fastmix.algorithms import Algorithm
from fastmix.envs import BatchedEnv
from fastmix.train.memory import pinned
from fastmix.train.replay import ReplayBuffer
from fastmix.train.schedules import EpsilonSchedule

StoredTermination = Literal["true", "pymarl"]


class Player:
    """E copies of an environment with what the policy carries along: hidden states, last actions, steps, returns."""

    def __init__(self, env: BatchedEnv, algo: Algorithm, device: torch.device | str = "cpu") -> None:
        self.env = env
        self.algo = algo
        self.device = torch.device(device)
        n_envs, n_agents = env.n_envs, env.info.n_agents
        self.hidden = algo.initial_hidden(n_envs)
        self.last_actions = torch.full((n_envs, n_agents), -1, dtype=torch.int64, device=self.device)
        self.steps = np.zeros(n_envs, dtype=np.int64)
        self.returns = np.zeros(n_envs, dtype=np.float64)
        # On the CPU these are views of the environment's own arrays: never copied, always current.
        self._obs, self._avail = torch.as_tensor(env.obs), torch.as_tensor(env.avail)
        # Of an ExternalEnv, or of a wrapper around one.
        self._failed: np.ndarray = getattr(env, "failed", np.zeros(n_envs, dtype=bool))

    def play(self, epsilon: float, generator: torch.Generator) -> np.ndarray:
        """Choose and take one joint action in every copy; returns the actions ``[E,A]`` int64.

        Afterwards ``steps`` counts the transitions of each running episode and ``returns`` sums their rewards.
        """
        with part("acting"):
            # Reading the actions back is all that waits for the device.
            obs, avail = self._send(self._obs), self._send(self._avail)
            chosen, self.hidden = self.algo.act(
                obs, self.last_actions, avail, self.hidden, epsilon=epsilon, generator=generator
            )
            self.last_actions.copy_(chosen)
            actions: np.ndarray = chosen.cpu().numpy()
        self.env.step(actions)
        self.steps += 1
        self.returns += self.env.reward
        return actions

    def failed(self) -> np.ndarray:
        """The copies ``[n]`` whose episode is lost: to be restarted, and otherwise forgotten."""
        return np.flatnonzero(self._failed)

    def finished(self) -> np.ndarray:
        """The copies ``[n]`` whose episode just ended. Raises ``RuntimeError`` where an environment breaks its word."""
        env, limit = self.env, self.env.info.episode_limit
        done = (env.terminated | env.truncated) & ~self._failed
        if (self.steps[~done & ~self._failed] >= limit).any():
            raise RuntimeError(f"the environment runs on after {limit} steps, its episode_limit")
        finished = np.flatnonzero(done)
        early = env.truncated[finished] & (self.steps[finished] < limit)
        if early.any():
            raise RuntimeError(
                f"the environment truncated an episode after {int(self.steps[finished[early][0]])} steps; it must do "
                f"so only at its episode_limit, {limit} (the return targets bootstrap from the last stored step)"
            )
        return finished

    def restart(self, copies: np.ndarray) -> None:
        """Begin new episodes in ``copies [n]``; the others go on undisturbed."""
        self.env.reset(copies)
        self.steps[copies] = 0
        self.returns[copies] = 0.0
        if len(copies) == self.env.n_envs:
            self.last_actions.fill_(-1)
            self.hidden = self.algo.initial_hidden(self.env.n_envs)
            return
        index = self._send(torch.from_numpy(copies))
        self.last_actions.index_fill_(0, index, -1)
        # Out of place: the hidden state belongs to whoever returned it.
        self.hidden = self.hidden.index_copy(0, index, self.algo.initial_hidden(len(copies)))

    def _send(self, tensor: torch.Tensor) -> torch.Tensor:
        return pinned(tensor, self.device).to(self.device, non_blocking=True)


@dataclass
class EpisodeStats:
    """What finished episodes amounted to; ``won`` is ``None`` until an environment reports victories.

    ``failed`` counts the episodes that were dropped because their game broke down; they are in nothing else.
    """

    returns: list[float] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    won: list[bool] | None = None
    failed: int = 0

    def add(self, player: Player, finished: np.ndarray) -> None:
        """Count the episodes that just ended in the copies ``finished [n]``."""
        self.returns += player.returns[finished].tolist()
        self.lengths += player.steps[finished].tolist()
        if player.env.won is not None:
            self.won = (self.won or []) + player.env.won[finished].tolist()

    def summary(self, prefix: str) -> dict[str, float]:
        """``{prefix}return_mean`` and its relatives; nothing when no episode finished."""
        failed = {f"{prefix}failed_episodes": float(self.failed)} if self.failed else {}
        if not self.returns:
            return failed
        values = failed | {
            f"{prefix}return_mean": float(np.mean(self.returns)),
            f"{prefix}return_std": float(np.std(self.returns)),
            f"{prefix}ep_length_mean": float(np.mean(self.lengths)),
        }
        if self.won is not None:
            values[f"{prefix}win_rate"] = float(np.mean(self.won))
        return values


class Rollout:
    """Collects exploring episodes into ``replay``.

    A copy that finishes is restarted at once, so nothing waits for the slowest episode. ``stored_termination`` decides
    the flag that replay keeps: ``"true"`` stores what the environment says; ``"pymarl"`` stores
    ``terminated != episode_limit`` as PyMARL's runner does, which takes an episode that truly ends at the very limit
    for a truncated one and bootstraps from its last state.
    """

    def __init__(
        self,
        player: Player,
        replay: ReplayBuffer,
        epsilon: EpsilonSchedule,
        generator: torch.Generator,
        *,
        stored_termination: StoredTermination = "true",
    ) -> None:
        self.player = player
        self.replay = replay
        self.epsilon = epsilon
        self.generator = generator
        self.stored_termination = stored_termination
        self.stats = EpisodeStats()  # since it was last replaced (by whoever logs)
        self.surplus = 0  # episodes finished beyond what was asked for; they count towards the next call
        player.env.reset()
        self._write_observations()

    @torch.inference_mode()
    def collect(self, n_episodes: int, t_env: int) -> int:
        """Play until ``n_episodes`` more episodes have finished; returns the environment steps taken (all copies).

        Epsilon follows ``t_env`` plus the steps taken here. PyMARL evaluates it with the count at the start of the
        episodes; with one-step games that is the same number.
        """
        player, env, replay = self.player, self.player.env, self.replay
        taken = 0
        while self.surplus < n_episodes:
            at = player.steps.copy()
            actions = player.play(self.epsilon(t_env + taken), self.generator)
            taken += env.n_envs
            stored = env.terminated & ~env.truncated if self.stored_termination == "pymarl" else env.terminated
            replay.write_transitions(at, actions, env.reward, stored)
            self._write_observations()
            finished, failed = player.finished(), player.failed()
            if len(finished):
                replay.commit(finished, player.steps[finished])
                self.stats.add(player, finished)
                self._restart(finished)
                self.surplus += len(finished)
            if len(failed):
                self.stats.failed += len(failed)
                self._restart(failed)
        self.surplus -= n_episodes
        return taken

    def state_dict(self) -> dict[str, Any]:
        """The running episodes and the random states of exploration and environment (replay holds their steps)."""
        player = self.player
        return {
            "env": player.env.state_dict(),
            "obs": player.env.obs.copy(),
            "state": player.env.state.copy(),
            "avail": player.env.avail.copy(),
            "hidden": player.hidden,
            "last_actions": player.last_actions,
            "steps": player.steps.copy(),
            "returns": player.returns.copy(),
            "surplus": self.surplus,
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of ``state_dict``."""
        player = self.player
        player.env.load_state_dict(state["env"])
        player.env.obs[:] = np.asarray(state["obs"])
        player.env.state[:] = np.asarray(state["state"])
        player.env.avail[:] = np.asarray(state["avail"])
        player.hidden = state["hidden"].to(player.device)
        player.last_actions.copy_(state["last_actions"])
        player.steps[:] = np.asarray(state["steps"])
        player.returns[:] = np.asarray(state["returns"])
        self.surplus = int(state["surplus"])
        self.generator.set_state(state["generator"])
        lost = player.failed()
        if len(lost):  # games that cannot be taken up where they were
            self._restart(lost)

    def _restart(self, copies: np.ndarray) -> None:
        self.player.restart(copies)
        self._write_observations()

    def _write_observations(self) -> None:
        env = self.player.env
        self.replay.write_observations(self.player.steps, env.obs, env.state, env.avail)
