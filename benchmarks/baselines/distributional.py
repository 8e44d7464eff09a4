"""One learner step of DIQL, DDN, DMIX and ResZ as DFAC's and ResQ's learners write it, and their modules.

Every agent call draws its fractions and gives the quantiles of all actions; the ones of the actions taken are gathered
afterwards; the loss builds the tensor of all pairs. As released, ResZ has no targets but those of its central networks.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .learner import NEG, PublicBatch, PublicLearner, masked_mean
from .networks import QMixer
from .operators import quantile_huber_steps


class QuantileAgent(nn.Module):
    """One step of the implicit quantile network behind a GRU cell; all agents of an episode share the fractions."""

    def __init__(self, n_inputs: int, n_actions: int, hidden_dim: int = 64, quantile_embed_dim: int = 64) -> None:
        super().__init__()
        self.hidden_dim, self.quantile_embed_dim = hidden_dim, quantile_embed_dim
        self.fc1 = nn.Linear(n_inputs, hidden_dim)
        self.rnn = nn.GRUCell(hidden_dim, hidden_dim)
        self.phi = nn.Linear(quantile_embed_dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, n_actions)

    def forward(self, inputs: Tensor, hidden: Tensor, fractions: Tensor) -> tuple[Tensor, Tensor]:
        """``[B * A, I]``, ``[B * A, D]``, ``[B, N]`` or ``[B * A, N]`` -> ``[B * A, U, N]``, ``[B * A, D]``."""
        hidden = self.rnn(F.relu(self.fc1(inputs)), hidden)
        rows, n = fractions.shape
        j = torch.arange(self.quantile_embed_dim, dtype=fractions.dtype, device=fractions.device)
        phi = F.relu(self.phi(torch.cos(fractions.view(rows * n, 1) * (math.pi * j))))
        phi = phi.view(rows, 1, n, self.hidden_dim).expand(-1, hidden.shape[0] // rows, -1, -1)
        phi = phi.reshape(hidden.shape[0], n, self.hidden_dim)
        return self.fc2(hidden.unsqueeze(1) * phi).transpose(1, 2), hidden


class SumOfQuantiles(nn.Module):
    """DDN."""

    def forward(self, agent_zs: Tensor, states: Tensor) -> Tensor:
        """``[B, T, A, N]`` -> ``[B, T, 1, N]``."""
        return agent_zs.sum(2, keepdim=True)


class MeanShapeMixer(QMixer):
    """DMIX: QMIX of the means, the sum of the shapes."""

    def forward(self, agent_zs: Tensor, states: Tensor) -> Tensor:
        """``[B, T, A, N]``, ``[B, T, S]`` -> ``[B, T, 1, N]``."""
        means = agent_zs.mean(3, keepdim=True)
        shapes = agent_zs - means
        mixed = super().forward(means.squeeze(3), states)
        return mixed.unsqueeze(3).expand(-1, -1, -1, agent_zs.shape[3]) + shapes.sum(2, keepdim=True)


class QuantileAttention(nn.Module):
    """ResZ's `datten`; without the softmax its residual mixer."""

    def __init__(
        self, n_agents: int, state_dim: int, own_size: int, sizes: tuple[int, int, int, int, int], softmax: bool
    ) -> None:
        super().__init__()
        self.n_agents, self.own_size, self.softmax = n_agents, own_size, softmax
        heads, query, key, head, constant = sizes
        self.key_dim = key
        self.query_embedding_layers = nn.ModuleList(_two_layers(state_dim, query, key) for _ in range(heads))
        self.key_embedding_layers = nn.ModuleList(nn.Linear(own_size, key) for _ in range(heads))
        self.head_embedding_layer = _two_layers(state_dim, head, heads)
        self.constrant_value_layer = _two_layers(state_dim, constant, 1)

    def forward(self, agent_zs: Tensor, states: Tensor) -> Tensor:
        """``[B, T, A, N]``, ``[B, T, S]`` -> ``[B, T, 1, N]``."""
        episodes, _, _, n = agent_zs.shape
        states = states.reshape(-1, states.shape[-1])
        agent_zs = agent_zs.reshape(-1, self.n_agents, n)
        own = states[:, : self.own_size * self.n_agents].view(-1, self.n_agents, self.own_size).detach()
        heads = []
        for query, key in zip(self.query_embedding_layers, self.key_embedding_layers, strict=True):
            logits = torch.bmm(query(states).unsqueeze(1), key(own).transpose(1, 2)) / math.sqrt(self.key_dim)
            weights = F.softmax(logits, dim=2) if self.softmax else logits
            heads.append(torch.bmm(weights, agent_zs))
        head_weights = torch.abs(self.head_embedding_layer(states)).unsqueeze(1)
        z_tot = torch.bmm(head_weights, torch.cat(heads, dim=1))
        return (z_tot + self.constrant_value_layer(states).unsqueeze(1)).view(episodes, -1, 1, n)


class UnrestrictedQuantiles(nn.Module):
    """ResZ's central mixer: two hidden layers over state and all quantiles."""

    def __init__(self, n_agents: int, state_dim: int, n_quantiles: int, embed_dim: int = 128) -> None:
        super().__init__()
        inputs = state_dim + n_agents * n_quantiles
        self.net = nn.Sequential(
            nn.Linear(inputs, embed_dim), nn.ReLU(), nn.Linear(embed_dim, embed_dim), nn.ReLU(),
            nn.Linear(embed_dim, n_quantiles),
        )  # fmt: skip

    def forward(self, agent_zs: Tensor, states: Tensor) -> Tensor:
        """``[B, T, A, N]``, ``[B, T, S]`` -> ``[B, T, 1, N]``."""
        episodes, steps, _, n = agent_zs.shape
        inputs = torch.cat([states, agent_zs.reshape(episodes, steps, -1)], dim=2)
        z_tot: Tensor = self.net(inputs)
        return z_tot.view(episodes, steps, 1, n)


class QuantileLearner(PublicLearner):
    """DMIX and DDN; without a network ``mixer``, DIQL, whose agents draw fractions of their own."""

    def draw(self, name: str, t: int, rows: int, n: int, like: Tensor) -> Tensor:
        """Fractions ``[rows, n]`` of the agent ``name`` at the step ``t``."""
        return torch.rand(rows, n, dtype=like.dtype, device=like.device)

    def loss(self, batch: PublicBatch) -> Tensor:
        """The quantile loss of the mixed distribution."""
        config = self.config
        zs, fractions = self._unroll_quantiles("agent", config.n_quantiles, batch)
        z_tot = self._mix_quantiles("mixer", gather_quantiles(zs[:, :-1], batch.actions[:, :-1]), batch.state[:, :-1])
        with torch.no_grad():
            target_zs, _ = self._unroll_quantiles("target_agent", config.n_target_quantiles, batch)
            greedy = self._greedy(zs.detach() if config.double_q else target_zs, batch)
            values = self._mix_quantiles("target_mixer", gather_quantiles(target_zs, greedy), batch.state)
            targets = self._quantile_returns(values, batch)
        at = fractions[:, :-1].view(*z_tot.shape[:2], -1, z_tot.shape[3])
        return config.loss_scale * quantile_huber_steps(z_tot, targets, at, batch.mask)

    def _unroll_quantiles(self, name: str, n: int, batch: PublicBatch) -> tuple[Tensor, Tensor]:
        """``[B, T + 1, A, U, N]`` of the agent ``name``, one call a step, and the fractions ``[B, T + 1, ..., N]``."""
        agent: Any = self.networks[name]
        episodes, steps, n_agents = batch.obs.shape[:3]
        hidden = batch.obs.new_zeros(episodes * n_agents, agent.hidden_dim)
        rows = episodes if "mixer" in self.networks else episodes * n_agents
        outputs, drawn = [], []
        for t in range(steps):
            fractions = self.draw(name, t, rows, n, batch.obs)
            z, hidden = self.calls[name](self._inputs(batch, t), hidden, fractions)
            outputs.append(z.view(episodes, n_agents, -1, n))
            drawn.append(fractions.view(episodes, -1, n))
        return torch.stack(outputs, dim=1), torch.stack(drawn, dim=1)

    def _mix_quantiles(self, name: str, agent_zs: Tensor, states: Tensor) -> Tensor:
        if name not in self.calls:
            return agent_zs
        z_tot: Tensor = self.calls[name](agent_zs, states)
        return z_tot

    def _greedy(self, zs: Tensor, batch: PublicBatch) -> Tensor:
        """``[B, T + 1, A, 1]`` of ``[B, T + 1, A, U, N]``."""
        masked = zs.clone()
        masked[batch.avail_actions == 0] = NEG
        return masked.mean(dim=4).max(dim=3, keepdim=True)[1]

    def _quantile_returns(self, values: Tensor, batch: PublicBatch) -> Tensor:
        """Targets ``[B, T, K, N]`` of values ``[B, T + 1, K, N]``."""
        flat = values.flatten(2)
        targets = self._returns(flat if self.config.td_lambda is not None else flat[:, 1:], batch)
        return targets.view(values.shape[0], -1, *values.shape[2:])


class ResidualQuantileLearner(QuantileLearner):
    """ResZ, with its mask at the same step."""

    def loss(self, batch: PublicBatch) -> Tensor:
        """The losses of the masked sum, of the central distribution, and of residuals above 0."""
        config = self.config
        states, actions, n = batch.state[:, :-1], batch.actions[:, :-1], config.n_quantiles
        zs, fractions = self._unroll_quantiles("agent", n, batch)
        residual_zs, _ = self._unroll_quantiles("residual_agent", n, batch)
        central_zs, _ = self._unroll_quantiles("central_agent", n, batch)
        z_tot = self._mix_quantiles("mixer", gather_quantiles(zs[:, :-1], actions), states)
        z_res = self._mix_quantiles("residual_mixer", gather_quantiles(residual_zs[:, :-1], actions), states)
        z_central = self._mix_quantiles("central_mixer", gather_quantiles(central_zs[:, :-1], actions), states)
        with torch.no_grad():
            target_zs, _ = self._unroll_quantiles("target_central_agent", n, batch)
            greedy = self._greedy(zs.detach() if config.double_q else target_zs, batch)
            values = self._mix_quantiles("target_central_mixer", gather_quantiles(target_zs, greedy), batch.state)
            targets = self._quantile_returns(values, batch)
            is_greedy = (batch.actions == greedy).long().min(dim=2)[0][:, :-1] == 1
        if config.residual_negative_abs:
            z_res = -torch.abs(z_res)
        w_r = torch.where(is_greedy, 0.0, 1.0).to(z_tot.dtype).unsqueeze(3).expand_as(z_tot)
        at = fractions[:, :-1]
        loss = quantile_huber_steps(z_tot + w_r * z_res, targets, at, batch.mask)
        loss = loss + config.central_loss * quantile_huber_steps(z_central, targets, at, batch.mask)
        if not config.residual_negative_abs:
            loss = loss + config.noopt_loss * masked_mean(torch.clamp(z_res.squeeze(2), min=0) ** 2, batch.mask)
        return config.loss_scale * loss


def gather_quantiles(zs: Tensor, actions: Tensor) -> Tensor:
    """``[B, T, A, U, N]`` at ``[B, T, A, 1]``: ``[B, T, A, N]``."""
    index = actions.unsqueeze(4).expand(-1, -1, -1, -1, zs.shape[4])
    return torch.gather(zs, dim=3, index=index).squeeze(3)


def _two_layers(inputs: int, hidden: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))
