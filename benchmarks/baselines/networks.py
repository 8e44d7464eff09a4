"""Agent and mixers as plain modules, with PyMARL's parameter names."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class CellAgent(nn.Module):
    """One step of the recurrent agent: ``fc1``, ReLU, GRU cell, optional layer norm, ``fc2``."""

    def __init__(self, n_inputs: int, n_actions: int, hidden_dim: int = 64, use_layer_norm: bool = False) -> None:
        super().__init__()
        self.hidden_dim = hidden_dim
        self.fc1 = nn.Linear(n_inputs, hidden_dim)
        self.rnn = nn.GRUCell(hidden_dim, hidden_dim)
        self.layer_norm = nn.LayerNorm(hidden_dim) if use_layer_norm else nn.Identity()
        self.fc2 = nn.Linear(hidden_dim, n_actions)

    def forward(self, inputs: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """``[N, I]``, ``[N, D]`` -> ``[N, U]``, ``[N, D]``; the carried state is not normalised."""
        hidden = self.rnn(F.relu(self.fc1(inputs)), hidden)
        return self.fc2(self.layer_norm(hidden)), hidden


class SequenceAgent(nn.Module):
    """The same network with `nn.GRU` over the whole sequence and its linear layers around it."""

    def __init__(self, n_inputs: int, n_actions: int, hidden_dim: int = 64) -> None:
        super().__init__()
        self.fc1 = nn.Linear(n_inputs, hidden_dim)
        self.rnn = nn.GRU(hidden_dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, n_actions)

    def forward(self, inputs: Tensor) -> Tensor:
        """``[T, N, I]`` -> ``[T, N, U]`` from a zero state."""
        return self.fc2(self.rnn(F.relu(self.fc1(inputs)))[0])


class VDNMixer(nn.Module):
    """Sum of the utilities."""

    def forward(self, agent_qs: Tensor, states: Tensor) -> Tensor:
        """``[B, T, A]`` -> ``[B, T, 1]``."""
        return agent_qs.sum(2, keepdim=True)


class QMixer(nn.Module):
    """QMIX (Rashid et al. 2018): a linear layer or a two-layer network per hypernetwork, ``abs``, ``bmm``, ``elu``."""

    def __init__(
        self, n_agents: int, state_dim: int, embed_dim: int = 32, hypernet_layers: int = 2, hypernet_embed: int = 64
    ) -> None:
        super().__init__()
        self.n_agents, self.embed_dim = n_agents, embed_dim

        def hypernet(n_outputs: int) -> nn.Module:
            if hypernet_layers == 1:
                return nn.Linear(state_dim, n_outputs)
            return nn.Sequential(nn.Linear(state_dim, hypernet_embed), nn.ReLU(), nn.Linear(hypernet_embed, n_outputs))

        self.hyper_w_1 = hypernet(n_agents * embed_dim)
        self.hyper_w_final = hypernet(embed_dim)
        self.hyper_b_1 = nn.Linear(state_dim, embed_dim)
        self.V = nn.Sequential(nn.Linear(state_dim, embed_dim), nn.ReLU(), nn.Linear(embed_dim, 1))

    def forward(self, agent_qs: Tensor, states: Tensor) -> Tensor:
        """``[B, T, A]``, ``[B, T, S]`` -> ``[B, T, 1]``."""
        episodes = agent_qs.shape[0]
        states = states.reshape(-1, states.shape[-1])
        agent_qs = agent_qs.reshape(-1, 1, self.n_agents)
        w1 = torch.abs(self.hyper_w_1(states)).view(-1, self.n_agents, self.embed_dim)
        b1 = self.hyper_b_1(states).view(-1, 1, self.embed_dim)
        hidden = F.elu(torch.bmm(agent_qs, w1) + b1)
        w_final = torch.abs(self.hyper_w_final(states)).view(-1, self.embed_dim, 1)
        q_tot = torch.bmm(hidden, w_final) + self.V(states).view(-1, 1, 1)
        return q_tot.view(episodes, -1, 1)
