"""The interface of every utility network."""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from fastmix.ops._checks import check_floating, check_tensor
from fastmix.ops.recurrent import RecurrentOutput

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Self


class Agent(nn.Module, abc.ABC):
    """One network shared by all agents.

    Its input is `[observation, one-hot last action, one-hot agent id]`, in this order, the last two when the trainer
    uses them: `I = O (+ U) (+ A)` features.

    `forward` is one step in PyMARL's signature; `unroll` is a whole sequence in one call and never builds the one-hots'
    tensor where the op behind it can avoid that. Weights are read at every call.
    """

    def __init__(self, input_dim: int, n_actions: int, hidden_dim: int) -> None:
        super().__init__()
        self.input_dim = input_dim
        self.n_actions = n_actions
        self.hidden_dim = hidden_dim

    @classmethod
    @abc.abstractmethod
    def from_args(cls, input_shape: int | Sequence[int], args: Any) -> Self:
        """Build as PyMARL's controllers do: `Agent(input_shape, args)`. Fields and defaults are named by each agent."""

    def init_hidden(self) -> Tensor:
        """Zeros `[1, D]` on the device and in the dtype of the weights; controllers expand it to `[B, A, D]`."""
        return next(self.parameters()).new_zeros(1, self.hidden_dim)

    @abc.abstractmethod
    def forward(self, inputs: Tensor, hidden_state: Tensor) -> tuple[Tensor, Tensor]:
        """One step: `inputs [B * A, I]` or `[B, A, I]` -> `q [..., U]` and the new hidden state `[..., D]`.

        `hidden_state` has `D` features for each row of `inputs`, in any shape that reshapes to `[rows, D]`. Results
        keep the leading shape of `inputs`. Raises `ValueError` where sizes do not agree.
        """

    @abc.abstractmethod
    def unroll(
        self,
        obs: Tensor,
        hidden: Tensor | None = None,
        last_actions: Tensor | None = None,
        agent_ids: bool = False,
        return_hidden_states: bool = False,
    ) -> RecurrentOutput:
        """A whole sequence: `obs [B, T, A, O]`, `hidden [B, A, D]` (None = zeros).

        `last_actions [B, T, A]` int64 (-1 = no action yet) and `agent_ids` add their one-hots to the input.
        Returns `q [B, T, A, U]`, the hidden state after the last step `[B, A, D]` and, when asked, after every step.
        """

    def extra_repr(self) -> str:
        """Sizes, for `print(agent)`."""
        return f"input_dim={self.input_dim}, n_actions={self.n_actions}, hidden_dim={self.hidden_dim}"


def step_rows(inputs: Tensor, hidden_state: Tensor, input_dim: int, hidden_dim: int) -> tuple[Tensor, Tensor]:
    """The arguments of `Agent.forward`, checked, as `[rows, I]` and `[rows, D]`."""
    check_tensor("inputs", inputs)
    check_floating("inputs", inputs)
    check_tensor("hidden_state", hidden_state)
    if inputs.dim() < 1 or inputs.shape[-1] != input_dim:
        raise ValueError(f"inputs must be [..., {input_dim}], got shape {tuple(inputs.shape)}")
    rows = inputs.shape[:-1].numel()
    if hidden_state.numel() != rows * hidden_dim:
        raise ValueError(
            f"hidden_state must hold {hidden_dim} features for each of the {rows} rows of inputs "
            f"{tuple(inputs.shape)}, got shape {tuple(hidden_state.shape)}"
        )
    return inputs.reshape(rows, input_dim), hidden_state.reshape(rows, hidden_dim)
