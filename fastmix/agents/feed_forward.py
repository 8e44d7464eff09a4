"""Utility networks without memory, and how they read a whole sequence in one batched call."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn import functional as F

from fastmix._modules import check_positive, flat_size, read_arg
from fastmix.agents.base import Agent, step_rows
from fastmix.ops._checks import check_floating, check_tensor
from fastmix.ops.recurrent import RecurrentOutput
from fastmix.ops.recurrent.reference import build_inputs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Self

# One row of inputs [..., I] to its utilities [..., U] and its last hidden layer [..., D].
RowFunction = Callable[[Tensor], tuple[Tensor, Tensor]]


class FFAgent(Agent):
    """Three linear layers, ReLU between (`modules/agents/ff_agent.py` of PyMARL). Keys `fc1`, `fc2`, `fc3`.

    The hidden state it returns is its second hidden layer; the one it receives is ignored.
    """

    def __init__(self, input_dim: int, n_actions: int, hidden_dim: int = 64) -> None:
        check_positive(input_dim=input_dim, n_actions=n_actions, hidden_dim=hidden_dim)
        super().__init__(input_dim, n_actions, hidden_dim)
        self.fc1 = nn.Linear(input_dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, hidden_dim)
        self.fc3 = nn.Linear(hidden_dim, n_actions)

    @classmethod
    def from_args(cls, input_shape: int | Sequence[int], args: Any) -> Self:
        """Reads `n_actions` and `rnn_hidden_dim` (`hidden_dim` in EPyMARL)."""
        return cls(flat_size(input_shape), read_arg(args, "n_actions"), hidden_width(args))

    def forward(self, inputs: Tensor, hidden_state: Tensor) -> tuple[Tensor, Tensor]:
        """See `Agent.forward`."""
        step_rows(inputs, hidden_state, self.input_dim, self.hidden_dim)
        return self._rows(inputs)

    def unroll(
        self,
        obs: Tensor,
        hidden: Tensor | None = None,
        last_actions: Tensor | None = None,
        agent_ids: bool = False,
        return_hidden_states: bool = False,
    ) -> RecurrentOutput:
        """See `Agent.unroll`. All steps in one call; `hidden` is ignored except for an empty sequence."""
        return unroll_rows(self, self._rows, obs, hidden, last_actions, agent_ids, return_hidden_states)

    def _rows(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        hidden = F.relu(self.fc2(F.relu(self.fc1(inputs))))
        return self.fc3(hidden), hidden


def unroll_rows(
    agent: Agent,
    rows: RowFunction,
    obs: Tensor,
    hidden: Tensor | None,
    last_actions: Tensor | None,
    agent_ids: bool,
    return_hidden_states: bool,
) -> RecurrentOutput:
    """`Agent.unroll` of a network without memory: `rows` applied to every step at once."""
    check_tensor("obs", obs)
    check_floating("obs", obs)
    if obs.dim() != 4:
        raise ValueError(f"obs must be [B, T, A, O], got shape {tuple(obs.shape)}")
    episodes, steps, n_agents, n_obs = obs.shape
    width = n_obs + (0 if last_actions is None else agent.n_actions) + (n_agents if agent_ids else 0)
    if width != agent.input_dim:
        raise ValueError(
            f"obs must leave {agent.input_dim} input features with last actions "
            f"{'off' if last_actions is None else 'on'} and agent ids {'on' if agent_ids else 'off'}, "
            f"got shape {tuple(obs.shape)}, which makes {width}"
        )
    if last_actions is not None and last_actions.shape != obs.shape[:3]:
        raise ValueError(f"last_actions must be [B, T, A] = {tuple(obs.shape[:3])}, got {tuple(last_actions.shape)}")
    q, hidden_states = rows(build_inputs(obs, agent.input_dim, last_actions, agent_ids))
    if steps > 0:
        after = hidden_states[:, -1]
    else:
        after = hidden if hidden is not None else obs.new_zeros(episodes, n_agents, agent.hidden_dim)
    return RecurrentOutput(q, after, hidden_states if return_hidden_states else None)


def hidden_width(args: Any) -> int:
    """`rnn_hidden_dim`, which EPyMARL calls `hidden_dim`."""
    width: int = read_arg(args, "hidden_dim") if not hasattr(args, "rnn_hidden_dim") else args.rnn_hidden_dim
    return width
