"""The distributional utility network of DFAC and ResZ: quantiles of the return in place of its mean."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastmix._modules import check_positive, flat_size, read_arg
from fastmix.agents.base import Agent, step_rows
from fastmix.agents.feed_forward import hidden_width
from fastmix.ops import _checks
from fastmix.ops.quantile import fractions, midpoints
from fastmix.ops.recurrent import RecurrentOutput, RecurrentParams, recurrent

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Self

PURPOSES: Final = ("policy", "target", "approx")
"""What quantiles are for, in the public code's words: the loss, its targets, acting."""


class IQNRNNAgent(Agent):
    r"""Implicit quantile network behind a GRU (`modules/agents/iqn_rnn_agent.py` of DFAC and ResZ)::

        x = relu(fc1(input))        h' = GRUCell(x, h)
        phi(f) = relu(phi(cos(pi j f), j = 0 .. n - 1))
        Z(f) = fc2(h' * phi(f))     for each fraction f

    The GRU does not depend on the fractions. `trunk` (or `params`, for several networks in one call of
    `fastmix.ops.recurrent`) therefore gives the hidden states of a whole sequence, and `quantiles` and `means` make
    what is wanted of them in one product: all quantiles, those of chosen actions only (no other is computed then), or
    the means, which cost one fraction whatever their number, as `fc2` is linear.

    As an `Agent`, its utilities `q` are means over `n_approx_quantiles` fixed midpoints.

    Args:
        input_dim, n_actions, hidden_dim: `I`, `U`, `D`.
        quantile_embed_dim: cosine features `n`.
        n_quantiles, n_target_quantiles, n_approx_quantiles: how many fractions `draw` gives for each of `PURPOSES`.
        per_agent_fractions: each agent draws its own (DIQL); else all agents of an episode share them in each step,
            which mixing them by quantiles asks for.

    Keys: `fc1`, `rnn.{weight_ih, weight_hh, bias_ih, bias_hh}`, `phi`, `fc2`.
    Parameter count: `(I+1)D + 6D^2 + 6D + (n+1)D + (D+1)U`.

    Source: Dabney et al. (2018), IQN; Sun et al. (2021), DFAC.
    """

    def __init__(
        self,
        input_dim: int,
        n_actions: int,
        hidden_dim: int = 64,
        quantile_embed_dim: int = 64,
        n_quantiles: int = 8,
        n_target_quantiles: int = 8,
        n_approx_quantiles: int = 32,
        per_agent_fractions: bool = False,
    ) -> None:
        check_positive(
            input_dim=input_dim, n_actions=n_actions, hidden_dim=hidden_dim, quantile_embed_dim=quantile_embed_dim,
            n_quantiles=n_quantiles, n_target_quantiles=n_target_quantiles, n_approx_quantiles=n_approx_quantiles,
        )  # fmt: skip
        super().__init__(input_dim, n_actions, hidden_dim)
        self.counts = dict(zip(PURPOSES, (n_quantiles, n_target_quantiles, n_approx_quantiles), strict=True))
        self.per_agent_fractions = per_agent_fractions
        self.fc1 = nn.Linear(input_dim, hidden_dim)
        self.rnn = nn.GRUCell(hidden_dim, hidden_dim)
        self.phi = nn.Linear(quantile_embed_dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, n_actions)

    @classmethod
    def from_args(cls, input_shape: int | Sequence[int], args: Any) -> Self:
        """Reads `n_actions`, `rnn_hidden_dim`, `quantile_embed_dim`, `n_quantiles`, `n_target_quantiles`,
        `n_approx_quantiles`, and `per_agent_fractions`, without which a run of the `name` "diql" has them.
        """
        names = ("quantile_embed_dim", "n_quantiles", "n_target_quantiles", "n_approx_quantiles")
        options = {name: read_arg(args, name) for name in names}
        own = read_arg(args, "per_agent_fractions", read_arg(args, "name", "") == "diql")
        return cls(flat_size(input_shape), read_arg(args, "n_actions"), hidden_width(args), **options,
                   per_agent_fractions=own)  # fmt: skip

    def params(self) -> RecurrentParams:
        """The weights of the trunk in the order of `fastmix.ops.recurrent`, read from the layers now (not copies).

        Of what that op gives, the hidden states are meant; its `q`, the output layer without fractions, has no meaning.
        """
        rnn = self.rnn
        return RecurrentParams(
            self.fc1.weight, self.fc1.bias, rnn.weight_ih, rnn.weight_hh, rnn.bias_ih, rnn.bias_hh, None, None,
            self.fc2.weight, self.fc2.bias,
        )  # fmt: skip

    def trunk(
        self,
        obs: Tensor,
        hidden: Tensor | None = None,
        last_actions: Tensor | None = None,
        agent_ids: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Hidden states `[B, T, A, D]` of a whole sequence, and that after its last step `[B, A, D]`.

        Arguments as of `Agent.unroll`.
        """
        start = None if hidden is None else [hidden]
        (output,) = recurrent(
            obs, [self.params()], start, last_actions=last_actions, agent_ids=agent_ids, return_hidden_states=True
        )
        assert output.hidden_states is not None
        return output.hidden_states, output.hidden

    def quantiles(self, hidden_states: Tensor, fractions: Tensor, actions: Tensor | None = None) -> Tensor:
        """Quantiles at `fractions`: `[..., A, U, N]`, or of the given actions only, `[..., A, N]`.

        Args:
            hidden_states: `[..., A, D]`.
            fractions: `[..., N]` with the leading dimensions of `hidden_states`, shared by agents; `[..., A, N]`, each
                agent's own; or `[N]`, the same everywhere.
            actions: `[..., A]` int64.

        Raises `ValueError`, `TypeError` where shapes or dtypes do not agree.
        """
        features = self._features(hidden_states, fractions)  # [..., A or 1, N, D]
        if actions is None:
            scaled = hidden_states.unsqueeze(-2) * features
            return F.linear(scaled, self.fc2.weight, self.fc2.bias).transpose(-1, -2)
        _checks.check_actions(actions, tuple(hidden_states.shape[:-1]), hidden_states)
        chosen = hidden_states * F.embedding(actions, self.fc2.weight)
        bias = F.embedding(actions, self.fc2.bias.unsqueeze(-1))
        if features.shape[-3] == 1:  # shared by agents: one small product for each step
            return chosen @ features.squeeze(-3).transpose(-1, -2) + bias
        return (features @ chosen.unsqueeze(-1)).squeeze(-1) + bias

    def means(self, hidden_states: Tensor, fractions: Tensor) -> Tensor:
        """The mean of `quantiles` over their last axis, `[..., A, U]`: one product, whatever the number of fractions.

        Arguments and errors as of `quantiles`. The most likely use is to choose actions greedily.
        """
        return self.fc2(hidden_states * self._features(hidden_states, fractions).mean(-2))

    def draw(self, purpose: str, key: Tensor, episodes: int, steps: int, n_agents: int, *, stream: int = 0) -> Tensor:
        """Random fractions for `quantiles`, `[B, T, N]`, or `[B, T, A, N]` where each agent has its own.

        Time comes first when they are drawn: a batch padded along time has the same fractions in its real steps.

        Args:
            purpose: one of `PURPOSES`; decides `N`.
            key, stream: see `fastmix.ops.fractions`. A call does not count `key` up.
            episodes, steps, n_agents: `B`, `T`, `A`.
        """
        _checks.check_choice("purpose", purpose, PURPOSES)
        shape = (steps, episodes, *([n_agents] if self.per_agent_fractions else []), self.counts[purpose])
        return fractions(shape, key, stream=stream, dtype=self.fc2.weight.dtype).transpose(0, 1)

    def midpoints(self, purpose: str) -> Tensor:
        """Fixed fractions in place of `draw`, `[N]`."""
        _checks.check_choice("purpose", purpose, PURPOSES)
        weight = self.fc2.weight
        return midpoints(self.counts[purpose], dtype=weight.dtype, device=weight.device)

    def forward(self, inputs: Tensor, hidden_state: Tensor) -> tuple[Tensor, Tensor]:
        """See `Agent.forward`; `q` are means over `n_approx_quantiles` midpoints."""
        rows, hidden = step_rows(inputs, hidden_state, self.input_dim, self.hidden_dim)
        _, after = self.trunk(rows[:, None, None], hidden[:, None])
        lead = inputs.shape[:-1]
        q = self.means(after, self.midpoints("approx"))
        return q.reshape(*lead, self.n_actions), after.reshape(*lead, self.hidden_dim)

    def unroll(
        self,
        obs: Tensor,
        hidden: Tensor | None = None,
        last_actions: Tensor | None = None,
        agent_ids: bool = False,
        return_hidden_states: bool = False,
    ) -> RecurrentOutput:
        """See `Agent.unroll`; `q` are means over `n_approx_quantiles` midpoints."""
        states, after = self.trunk(obs, hidden, last_actions, agent_ids)
        q = self.means(states, self.midpoints("approx"))
        return RecurrentOutput(q, after, states if return_hidden_states else None)

    def extra_repr(self) -> str:
        """Sizes, for `print(agent)`."""
        counts = ", ".join(f"{purpose}={n}" for purpose, n in self.counts.items())
        return f"{super().extra_repr()}, {counts}, per_agent_fractions={self.per_agent_fractions}"

    def _features(self, hidden_states: Tensor, fractions: Tensor) -> Tensor:
        """`phi` `[..., A, N, D]` of fractions; the axis of agents is 1 where they share them."""
        _checks.check_tensor("hidden_states", hidden_states)
        _checks.check_tensor("fractions", fractions)
        if hidden_states.dim() < 2 or hidden_states.shape[-1] != self.hidden_dim:
            raise ValueError(f"hidden_states must be [..., A, {self.hidden_dim}], got {tuple(hidden_states.shape)}")
        agents = hidden_states.shape[:-1]
        _checks.check_floating("fractions", fractions)
        if fractions.dim() < 1 or fractions.shape[-1] < 1 or fractions.shape[:-1] not in ((), agents[:-1], agents):
            raise ValueError(
                f"fractions must be [N], [..., N] or [..., A, N] with [..., A] = {tuple(agents)} and at least one"
                f" fraction, got {tuple(fractions.shape)}"
            )
        j = torch.arange(self.phi.in_features, dtype=fractions.dtype, device=fractions.device)
        features = F.relu(self.phi(torch.cos(fractions.unsqueeze(-1) * (math.pi * j))))
        own = fractions.dim() > 1 and fractions.shape[:-1] == agents
        return features if own else features.unsqueeze(-3)
