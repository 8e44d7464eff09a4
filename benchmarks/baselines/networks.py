"""Agent and mixers as plain modules, with PyMARL's parameter names."""

from __future__ import annotations

import itertools

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

        hidden = [hypernet_embed] * (hypernet_layers - 1)
        self.hyper_w_1 = _network(state_dim, *hidden, n_agents * embed_dim)
        self.hyper_w_final = _network(state_dim, *hidden, embed_dim)
        self.hyper_b_1 = nn.Linear(state_dim, embed_dim)
        self.V = _network(state_dim, embed_dim, 1)

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


class DuplexMixer(nn.Module):
    """QPLEX's DMAQ (Wang et al. 2021): a transform of the utilities, and ``3 * n_kernels`` small importance networks.

    A learner calls it twice, for the values and for the advantages, and adds the two up.
    """

    def __init__(
        self,
        n_agents: int,
        n_actions: int,
        state_dim: int,
        hypernet_embed: int = 64,
        n_kernels: int = 4,
        adv_layers: int = 2,
        adv_embed: int = 64,
        weighted_head: bool = True,
        minus_one: bool = True,
    ) -> None:
        super().__init__()
        self.n_agents, self.weighted_head, self.minus_one = n_agents, weighted_head, minus_one
        self.hyper_w_final = _network(state_dim, hypernet_embed, n_agents)
        self.V = _network(state_dim, hypernet_embed, n_agents)
        self.si_weight = ImportanceWeights(n_agents, n_actions, state_dim, n_kernels, [adv_embed] * (adv_layers - 1))

    def forward(
        self,
        agent_qs: Tensor,
        states: Tensor,
        actions: Tensor | None = None,
        max_q_i: Tensor | None = None,
        is_v: bool = False,
    ) -> Tensor:
        """``[B, T, A]``, ``[B, T, S]``, one-hots ``[B, T, A, U]``, ``[B, T, A]`` -> one part, ``[B, T, 1]``."""
        episodes = agent_qs.shape[0]
        states = states.reshape(-1, states.shape[-1])
        agent_qs = agent_qs.reshape(-1, self.n_agents)
        if self.weighted_head:
            w = torch.abs(self.hyper_w_final(states)) + 1e-10
            v = self.V(states)
            agent_qs = w * agent_qs + v
        if is_v:
            return agent_qs.sum(-1).view(episodes, -1, 1)
        assert actions is not None and max_q_i is not None  # the advantages' part needs both
        max_q_i = max_q_i.reshape(-1, self.n_agents)
        if self.weighted_head:
            max_q_i = w * max_q_i + v
        advantages = (agent_qs - max_q_i).detach()
        importance = self.si_weight(states, actions.reshape(states.shape[0], -1))
        if self.minus_one:
            importance = importance - 1
        return (advantages * importance).sum(-1).view(episodes, -1, 1)


class ImportanceWeights(nn.Module):
    """QPLEX's ``lambda``: each kernel has one network for the state, one for the agents, one for the joint action."""

    def __init__(self, n_agents: int, n_actions: int, state_dim: int, n_kernels: int, hidden: list[int]) -> None:
        super().__init__()
        self.n_agents = n_agents
        both = state_dim + n_agents * n_actions
        self.key_extractors = nn.ModuleList(_network(state_dim, *hidden, 1) for _ in range(n_kernels))
        self.agents_extractors = nn.ModuleList(_network(state_dim, *hidden, n_agents) for _ in range(n_kernels))
        self.action_extractors = nn.ModuleList(_network(both, *hidden, n_agents) for _ in range(n_kernels))

    def forward(self, states: Tensor, actions: Tensor) -> Tensor:
        """``[N, S]``, ``[N, A * U]`` -> ``[N, A]``."""
        both = torch.cat([states, actions], dim=1)
        weights = []
        for key, agents, action in zip(
            self.key_extractors, self.agents_extractors, self.action_extractors, strict=True
        ):
            x_key = torch.abs(key(states)).repeat(1, self.n_agents) + 1e-10
            weights.append(x_key * torch.sigmoid(agents(states)) * torch.sigmoid(action(both)))
        return torch.stack(weights, dim=1).sum(dim=1)


class CentralMixer(nn.Module):
    """The unrestricted mixer of WQMIX and ResQ: three hidden layers over state and utilities, and a state's value."""

    def __init__(self, n_agents: int, state_dim: int, embed_dim: int = 256, action_embed: int = 1) -> None:
        super().__init__()
        self.n_inputs = n_agents * action_embed
        self.net = _network(state_dim + self.n_inputs, embed_dim, embed_dim, embed_dim, 1)
        self.V = _network(state_dim, embed_dim, 1)

    def forward(self, agent_qs: Tensor, states: Tensor) -> Tensor:
        """``[B, T, A]`` or ``[B, T, A, c]``, ``[B, T, S]`` -> ``[B, T, 1]``."""
        episodes = agent_qs.shape[0]
        states = states.reshape(-1, states.shape[-1])
        inputs = torch.cat([states, agent_qs.reshape(-1, self.n_inputs)], dim=1)
        return (self.net(inputs) + self.V(states)).view(episodes, -1, 1)


class Recogniser(nn.Module):
    """POWQMIX's ``Q_r``: generated non-negative weights of the advantages, and a state's value."""

    def __init__(
        self, n_agents: int, n_actions: int, state_dim: int, embed_dim: int = 32, hypernet_embed: int = 64
    ) -> None:
        super().__init__()
        self.n_agents, self.embed_dim = n_agents, embed_dim
        both = state_dim + n_agents * n_actions
        self.hyper_w1 = _network(both, hypernet_embed, n_agents * embed_dim)
        self.hyper_w2 = _network(both, hypernet_embed, embed_dim)
        self.V = _network(state_dim, embed_dim, 1)

    def forward(self, advantages: Tensor, states: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """``[B, T, A]``, ``[B, T, S]``, one-hots ``[B, T, A, U]`` -> ``Q_r`` and ``V``, each ``[B, T, 1]``."""
        episodes = advantages.shape[0]
        states = states.reshape(-1, states.shape[-1])
        both = torch.cat([states, actions.reshape(states.shape[0], -1)], dim=1)
        w1 = torch.abs(self.hyper_w1(both)).view(-1, self.n_agents, self.embed_dim)
        w2 = torch.abs(self.hyper_w2(both)).view(-1, self.embed_dim, 1)
        v = self.V(states)
        q_r = torch.bmm(torch.bmm(advantages.reshape(-1, 1, self.n_agents), w1), w2).view(-1, 1) + v
        return q_r.view(episodes, -1, 1), v.view(episodes, -1, 1)


def _network(*sizes: int) -> nn.Module:
    """Linear layers with ReLU between them; a single one is a bare `nn.Linear`."""
    linear = [nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
    if len(linear) == 1:
        return linear[0]
    layers: list[nn.Module] = [linear[0]]
    for layer in linear[1:]:
        layers += [nn.ReLU(), layer]
    return nn.Sequential(*layers)
