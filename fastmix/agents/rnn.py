"""The recurrent utility network of the PyMARL family."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn import functional as F

from fastmix._modules import check_positive, flat_size, orthogonal_init_, read_arg
from fastmix.agents.base import Agent, step_rows
from fastmix.agents.feed_forward import hidden_width, unroll_rows
from fastmix.ops.recurrent import RecurrentOutput, RecurrentParams, recurrent

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Self


class RNNAgent(Agent):
    """`x = relu(fc1(input))`, `h' = GRUCell(x, h)`, `q = fc2(h')` (`modules/agents/rnn_agent.py` of the PyMARL family).

    Args:
        input_dim, n_actions, hidden_dim: `I`, `U`, `D`.
        use_layer_norm: `q = fc2(LayerNorm(h'))`; the state carried on stays un-normalised (pymarl2's `n_rnn`).
        use_orthogonal: orthogonal `fc1`, and `fc2` with gain `gain`; zero biases. The GRU keeps PyTorch's default.
        gain: see `use_orthogonal`.
        use_rnn: False replaces the GRU by `h' = relu(rnn(x))`, a linear layer under the key `rnn` (EPyMARL).

    Keys: `fc1`, `rnn.{weight_ih, weight_hh, bias_ih, bias_hh}` (or `rnn.{weight, bias}`), `fc2`, `layer_norm` if used.
    Parameter count with GRU: `(I+1)D + 6D^2 + 6D + (D+1)U`.
    """

    def __init__(
        self,
        input_dim: int,
        n_actions: int,
        hidden_dim: int = 64,
        use_layer_norm: bool = False,
        use_orthogonal: bool = False,
        gain: float = 0.01,
        use_rnn: bool = True,
    ) -> None:
        check_positive(input_dim=input_dim, n_actions=n_actions, hidden_dim=hidden_dim)
        super().__init__(input_dim, n_actions, hidden_dim)
        self.fc1 = nn.Linear(input_dim, hidden_dim)
        self.rnn: nn.GRUCell | nn.Linear = (
            nn.GRUCell(hidden_dim, hidden_dim) if use_rnn else nn.Linear(hidden_dim, hidden_dim)
        )
        self.fc2 = nn.Linear(hidden_dim, n_actions)
        self.layer_norm = nn.LayerNorm(hidden_dim) if use_layer_norm else None
        if use_orthogonal:
            orthogonal_init_(self.fc1)
            orthogonal_init_(self.fc2, gain=gain)

    @classmethod
    def from_args(cls, input_shape: int | Sequence[int], args: Any) -> Self:
        """Reads `n_actions`, `rnn_hidden_dim` (`hidden_dim` in EPyMARL) and, with defaults, three more.

        `use_rnn` (True), `use_orthogonal` (False), `gain` (0.01). The kind `rnn` knows no layer norm; `n_rnn` reads it.
        """
        return cls(**_rnn_args(input_shape, args))

    @property
    def is_recurrent(self) -> bool:
        """Whether the agent has a GRU, and so `params`."""
        return isinstance(self.rnn, nn.GRUCell)

    def params(self) -> RecurrentParams:
        """The weights in the order of `fastmix.ops.recurrent`, read from the layers now (not copies).

        Raises `RuntimeError` for `use_rnn=False`, which has no recurrent form.
        """
        if isinstance(self.rnn, nn.Linear):
            raise RuntimeError("an agent built with use_rnn=False has no recurrent parameters")
        norm, rnn = self.layer_norm, self.rnn
        return RecurrentParams(
            self.fc1.weight,
            self.fc1.bias,
            rnn.weight_ih,
            rnn.weight_hh,
            rnn.bias_ih,
            rnn.bias_hh,
            None if norm is None else norm.weight,
            None if norm is None else norm.bias,
            self.fc2.weight,
            self.fc2.bias,
        )

    def forward(self, inputs: Tensor, hidden_state: Tensor) -> tuple[Tensor, Tensor]:
        """See `Agent.forward`."""
        rows, hidden = step_rows(inputs, hidden_state, self.input_dim, self.hidden_dim)
        if isinstance(self.rnn, nn.Linear):
            return self._rows(inputs)
        out = self.unroll(rows[:, None, None], hidden[:, None])
        lead = inputs.shape[:-1]
        return out.q.reshape(*lead, *out.q.shape[3:]), out.hidden.reshape(*lead, self.hidden_dim)

    def unroll(
        self,
        obs: Tensor,
        hidden: Tensor | None = None,
        last_actions: Tensor | None = None,
        agent_ids: bool = False,
        return_hidden_states: bool = False,
    ) -> RecurrentOutput:
        """See `Agent.unroll`."""
        if isinstance(self.rnn, nn.Linear):
            return unroll_rows(self, self._rows, obs, hidden, last_actions, agent_ids, return_hidden_states)
        (output,) = recurrent(
            obs,
            [self.params()],
            None if hidden is None else [hidden],
            last_actions=last_actions,
            agent_ids=agent_ids,
            return_hidden_states=return_hidden_states,
        )
        return self.finish(output)

    def finish(self, output: RecurrentOutput) -> RecurrentOutput:
        """What `unroll` returns, of what `fastmix.ops.recurrent` gave for `params`."""
        return output

    def _rows(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        hidden = F.relu(self.rnn(F.relu(self.fc1(inputs))))
        return self.fc2(hidden if self.layer_norm is None else self.layer_norm(hidden)), hidden


class NRNNAgent(RNNAgent):
    """pymarl2's `n_rnn`: an `RNNAgent` whose layer norm is read from the namespace."""

    @classmethod
    def from_args(cls, input_shape: int | Sequence[int], args: Any) -> Self:
        """Reads what `RNNAgent.from_args` reads, and `use_layer_norm` (False)."""
        return cls(**_rnn_args(input_shape, args), use_layer_norm=read_arg(args, "use_layer_norm", False))


class CentralRNNAgent(RNNAgent):
    """WQMIX's central agent (`modules/agents/central_rnn_agent.py`): `central_action_embed` values for each action.

    An `RNNAgent` whose results `q` have one axis more, `[..., U, c]`; keys are the same, `fc2` has `U * c` rows.
    """

    def __init__(self, input_dim: int, n_actions: int, hidden_dim: int = 64, central_action_embed: int = 1) -> None:
        check_positive(n_actions=n_actions, central_action_embed=central_action_embed)
        super().__init__(input_dim, n_actions * central_action_embed, hidden_dim)
        self.n_actions = n_actions
        self.action_embed = central_action_embed

    @classmethod
    def from_args(cls, input_shape: int | Sequence[int], args: Any) -> Self:
        """Reads `n_actions`, `central_action_embed` and `rnn_hidden_dim`.

        `central_rnn_hidden_dim` is not read, as in the public code.
        """
        names = ("n_actions", "central_action_embed")
        options = {name: read_arg(args, name) for name in names}
        return cls(flat_size(input_shape), hidden_dim=hidden_width(args), **options)

    def finish(self, output: RecurrentOutput) -> RecurrentOutput:
        """See `RNNAgent.finish`: `q [B, T, A, U * c]` becomes `[B, T, A, U, c]`."""
        return output._replace(q=output.q.unflatten(-1, (self.n_actions, self.action_embed)))

    def extra_repr(self) -> str:
        """Sizes, for `print(agent)`."""
        return f"{super().extra_repr()}, action_embed={self.action_embed}"


def _rnn_args(input_shape: int | Sequence[int], args: Any) -> dict[str, Any]:
    return {
        "input_dim": flat_size(input_shape),
        "n_actions": read_arg(args, "n_actions"),
        "hidden_dim": hidden_width(args),
        "use_rnn": read_arg(args, "use_rnn", True),
        "use_orthogonal": read_arg(args, "use_orthogonal", False),
        "gain": read_arg(args, "gain", 0.01),
    }
