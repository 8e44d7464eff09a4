"""A training run as the public trainers do it: one process, one environment at a time, one agent call a step.

Episodes are played one after another into a batch of tensors, copied into a ring of such batches, drawn from it, and
learnt from by `learner`. Where public trainers differ from each other the cheaper way is taken.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from .learner import PublicBatch, PublicLearner


class SingleEnv(Protocol):
    """PyMARL's interface to one copy of an environment."""

    def reset(self) -> None:
        """Begin an episode."""

    def step(self, actions: Tensor) -> tuple[float, bool, bool]:
        """Joint action ``[A]`` -> reward, whether the game is over, whether the time limit cut it."""

    def get_obs(self) -> list[np.ndarray]:
        """An array for each agent."""

    def get_state(self) -> np.ndarray:
        """One array."""

    def get_avail_actions(self) -> list[list[int]]:
        """A list of zeros and ones for each agent."""


class PublicTraining:
    """Rollout, replay, learner and evaluation of the public way, round by round."""

    def __init__(
        self,
        env: SingleEnv,
        learner: PublicLearner,
        sizes: tuple[int, int, int, int, int],
        *,
        batch_size: int,
        batch_size_run: int,
        buffer_size: int,
        epsilon: float,
        test_nepisode: int,
    ) -> None:
        """``sizes`` are agents, actions, observation, state, episode limit."""
        self.env, self.learner, self.epsilon, self.test_nepisode = env, learner, epsilon, test_nepisode
        self.batch_size, self.batch_size_run, self.buffer_size = batch_size, batch_size_run, buffer_size
        agents, actions, obs, state, limit = sizes
        self._n_actions, self._limit = actions, limit
        self._shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "obs": ((agents, obs), torch.float32), "state": ((state,), torch.float32),
            "actions": ((agents, 1), torch.int64), "onehot": ((agents, actions), torch.float32),
            "avail": ((agents, actions), torch.int32), "reward": ((1,), torch.float32),
            "terminated": ((1,), torch.float32), "filled": ((1,), torch.float32),
        }  # fmt: skip
        self._buffer = self._allocate(buffer_size)
        self._count = self._next = 0

    def round(self) -> int:
        """A round's episodes and a training step; returns the environment steps."""
        steps = 0
        for _ in range(self.batch_size_run):
            episode, length = self.play(self.epsilon)
            self._insert(episode)
            steps += length
        self.learner.step(self.sample())
        return steps

    def fill(self) -> None:
        """Play one episode and store it as often as there are episodes in a batch; take the first training step."""
        episode, _ = self.play(self.epsilon)
        for _ in range(self.batch_size):
            self._insert(episode)
        self.learner.step(self.sample())

    def play(self, epsilon: float) -> tuple[dict[str, Tensor], int]:
        """One episode, and its number of transitions."""
        episode = self._allocate(1)
        self.env.reset()
        agents = episode["obs"].shape[2]
        hidden = torch.zeros(agents, self.learner.agent.hidden_dim)
        t, over = 0, False
        with torch.no_grad():
            while True:
                self._see(episode, t)
                actions, hidden = self._act(episode, t, hidden, 0.0 if over else epsilon)
                episode["actions"][0, t] = actions[:, None]
                if over:
                    return episode, t
                episode["onehot"][0, t].scatter_(1, actions[:, None], 1.0)
                reward, terminated, truncated = self.env.step(actions)
                episode["reward"][0, t] = reward
                episode["terminated"][0, t] = float(terminated and not truncated)
                over = terminated or truncated
                t += 1

    def evaluate(self) -> None:
        """Greedy episodes, one after another."""
        for _ in range(self.test_nepisode):
            self.play(0.0)

    def sample(self) -> PublicBatch:
        """A training batch, cut to its longest episode."""
        chosen = torch.from_numpy(np.random.choice(self._count, self.batch_size, replace=False))
        length = int(self._buffer["filled"][chosen].sum(1).max())
        raw = {name: value[chosen, :length] for name, value in self._buffer.items()}
        mask = raw["filled"][:, :-1].clone()
        mask[:, 1:] *= 1 - raw["terminated"][:, :-2]
        mask *= raw["filled"][:, 1:]  # the last stored step has no transition
        last = torch.zeros_like(raw["onehot"])
        last[:, 1:] = raw["onehot"][:, :-1]
        return PublicBatch(
            raw["obs"], raw["state"], raw["actions"], last, raw["avail"], raw["reward"][:, :-1],
            raw["terminated"][:, :-1], mask,
        )  # fmt: skip

    def _insert(self, episode: dict[str, Tensor]) -> None:
        for name, value in episode.items():
            self._buffer[name][self._next] = value[0]
        self._next = (self._next + 1) % self.buffer_size
        self._count = min(self._count + 1, self.buffer_size)

    def _allocate(self, n: int) -> dict[str, Tensor]:
        return {
            name: torch.zeros((n, self._limit + 1, *shape), dtype=dtype)
            for name, (shape, dtype) in self._shapes.items()
        }

    def _see(self, episode: dict[str, Tensor], t: int) -> None:
        episode["state"][0, t] = torch.as_tensor(self.env.get_state())
        episode["obs"][0, t] = torch.as_tensor(np.array(self.env.get_obs()))
        episode["avail"][0, t] = torch.as_tensor(self.env.get_avail_actions())
        episode["filled"][0, t] = 1.0

    def _act(self, episode: dict[str, Tensor], t: int, hidden: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        config, obs, avail = self.learner.config, episode["obs"][0, t], episode["avail"][0, t]
        inputs: list[Any] = [obs]
        if config.obs_last_action:
            inputs.append(episode["onehot"][0, t - 1] if t > 0 else torch.zeros_like(episode["onehot"][0, 0]))
        if config.obs_agent_id:
            inputs.append(torch.eye(len(obs)))
        q, hidden = self.learner.agent(torch.cat(inputs, dim=1), hidden)
        q[avail == 0] = -float("inf")
        explore = (torch.rand(len(obs)) < epsilon).long()
        chance = torch.distributions.Categorical(avail.float()).sample().long()
        return explore * chance + (1 - explore) * q.max(dim=1)[1], hidden
