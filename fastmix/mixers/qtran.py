"""QTRAN's joint networks: they judge joint actions, and mix nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from fastmix._modules import check_positive, flat_size, mlp, orthogonal_init_, read_arg
from fastmix.mixers.base import Mixer, flat_states, joint_actions
from fastmix.mixers.layers import layers
from fastmix.ops._checks import check_choice, check_floating, check_tensor
from fastmix.ops.unrestricted import UnrestrictedParams, unrestricted

if TYPE_CHECKING:
    from typing_extensions import Self

ARCHITECTURES = ("qtran_paper", "coma_critic")
SIZES = ("small", "big")


class Batch(Protocol):
    """What QTRAN reads of PyMARL's `EpisodeBatch`; a dict of tensors will do."""

    def __getitem__(self, key: str, /) -> Tensor:
        """`"state" [B, T, S]` and `"actions_onehot" [B, T, A, U]`."""


class QTranBase(Mixer):
    """QTRAN-base (`modules/mixers/qtran.py`; Son et al. 2019, "QTRAN"): a joint value `Q_jt` and a state value `V`.

    Args:
        n_agents, n_actions, state_dim: `A`, `U`, `S`.
        rnn_hidden_dim: `D`, the width of the agents' hidden states.
        mixing_embed_dim: hidden width of `Q` and `V`.
        qtran_arch: `"qtran_paper"`: `Q_jt = Q(s, sum_i enc(h_i, a_i))` of hidden states and actions; `"coma_critic"`:
            `Q_jt = Q(s, a)`, whose `action_encoding` is there and gets no gradient.
        network_size: `"small"`: two hidden layers in `Q` and `V`; `"big"`: three.
        use_orthogonal: orthogonal weights and zero biases at the start.

    Keys: `Q.{0,2,4}` and `V.{0,2,4}` (`"big"`: and `.6`), `action_encoding.{0,2}`.
    """

    def __init__(
        self,
        n_agents: int,
        n_actions: int,
        state_dim: int | Sequence[int],
        rnn_hidden_dim: int = 64,
        mixing_embed_dim: int = 64,
        qtran_arch: str = "qtran_paper",
        network_size: str = "small",
        use_orthogonal: bool = False,
    ) -> None:
        super().__init__()
        state = flat_size(state_dim)
        check_positive(n_agents=n_agents, n_actions=n_actions, state_dim=state)
        check_positive(rnn_hidden_dim=rnn_hidden_dim, mixing_embed_dim=mixing_embed_dim)
        check_choice("qtran_arch", qtran_arch, ARCHITECTURES)
        check_choice("network_size", network_size, SIZES)
        self.n_agents = n_agents
        self.n_actions = n_actions
        self.state_dim = state
        self.hidden_dim = rnn_hidden_dim
        self.arch = qtran_arch
        encoding = rnn_hidden_dim + n_actions
        hidden = [mixing_embed_dim] * (2 if network_size == "small" else 3)
        self.Q = mlp(state + (encoding if qtran_arch == "qtran_paper" else n_agents * n_actions), *hidden, 1)
        self.V = mlp(state, *hidden, 1)
        self.action_encoding = mlp(encoding, encoding, encoding)
        if use_orthogonal:
            orthogonal_init_(self)

    @classmethod
    def from_args(cls, args: Any) -> Self:
        """Reads the arguments under their names, `state_shape`, and `use_orthogonal` (False when absent)."""
        names = ("n_agents", "n_actions", "rnn_hidden_dim", "mixing_embed_dim", "qtran_arch", "network_size")
        return cls(
            **{name: read_arg(args, name) for name in names},
            state_dim=read_arg(args, "state_shape"),
            use_orthogonal=read_arg(args, "use_orthogonal", False),
        )

    def forward(self, batch: Batch, hidden_states: Tensor, actions: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """PyMARL's call: `Q_jt [B * T, 1]` of `actions` (None: those of the batch) and `V [B * T, 1]`.

        `hidden_states [B, T, A, D]`; `actions` as one-hots or indices, see `fastmix.mixers.base.joint_actions`.
        """
        actions = batch["actions_onehot"] if actions is None else actions
        q = self.joint_q(batch["state"], hidden_states, actions)
        states = flat_states(batch["state"], hidden_states.shape[:-2], self.state_dim)
        return q.reshape(-1, 1), self.value(states).reshape(-1, 1)

    def joint_q(self, states: Tensor, hidden_states: Tensor, actions: Tensor) -> Tensor:
        """`states [..., S]`, `hidden_states [..., A, D]`, `actions [..., A]` (or as `joint_actions` takes them).

        Returns `[..., 1]`. Hidden states are looked at by `"qtran_paper"` only.
        """
        check_tensor("hidden_states", hidden_states)
        check_floating("hidden_states", hidden_states)
        if hidden_states.shape[-2:] != (self.n_agents, self.hidden_dim):
            raise ValueError(
                f"hidden_states must be [..., {self.n_agents}, {self.hidden_dim}], got {tuple(hidden_states.shape)}"
            )
        lead = hidden_states.shape[:-2]
        states = flat_states(states, lead, self.state_dim)
        actions = joint_actions(actions, lead, self.n_agents, self.n_actions)
        net = UnrestrictedParams(layers(self.Q))
        if self.arch == "coma_critic":
            return unrestricted(None, states, net, actions=actions)
        encode = UnrestrictedParams(layers(self.action_encoding))
        encoded = unrestricted(None, hidden_states, encode, actions=actions.unsqueeze(-1))
        return unrestricted(encoded.sum(-2), states, net)

    def value(self, states: Tensor) -> Tensor:
        """`V`, `[..., 1]`, of `states [..., S]`."""
        return unrestricted(None, states, UnrestrictedParams(layers(self.V)))

    def extra_repr(self) -> str:
        """Sizes, for `print(mixer)`."""
        return (
            f"n_agents={self.n_agents}, n_actions={self.n_actions}, state_dim={self.state_dim}, "
            f"hidden_dim={self.hidden_dim}, arch={self.arch!r}"
        )


class QTranAlt(Mixer):
    """QTRAN-alt (`modules/mixers/qtran.py`; Son et al. 2019): values of one agent's actions, those of others given.

    Args:
        n_agents, n_actions, state_dim, mixing_embed_dim: as for `QTranBase`.
        network_size: `"small"`: two hidden layers in `Q`, one in `V`; `"big"`: three and two.

    Keys: `Q.{0,2,4}` and `V.{0,2}` (`"big"`: and `Q.6`, `V.4`).
    """

    def __init__(
        self,
        n_agents: int,
        n_actions: int,
        state_dim: int | Sequence[int],
        mixing_embed_dim: int = 64,
        network_size: str = "small",
    ) -> None:
        super().__init__()
        state = flat_size(state_dim)
        check_positive(n_agents=n_agents, n_actions=n_actions, state_dim=state, mixing_embed_dim=mixing_embed_dim)
        check_choice("network_size", network_size, SIZES)
        self.n_agents = n_agents
        self.n_actions = n_actions
        self.state_dim = state
        hidden = [mixing_embed_dim] * (1 if network_size == "small" else 2)
        self.Q = mlp(state + n_agents * n_actions + n_agents, mixing_embed_dim, *hidden, n_actions)
        self.V = mlp(state, *hidden, 1)

    @classmethod
    def from_args(cls, args: Any) -> Self:
        """Reads the arguments under their names, and `state_shape`."""
        names = ("n_agents", "n_actions", "mixing_embed_dim", "network_size")
        return cls(**{name: read_arg(args, name) for name in names}, state_dim=read_arg(args, "state_shape"))

    def forward(self, batch: Batch, masked_actions: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """PyMARL's call: counterfactual values `[B * T * A, U]` and state values `[B * T * A, 1]`, agent fastest.

        Row `(b, t, i)` has the values of agent `i`'s actions with the others' as in the batch, or as in
        `masked_actions`: one-hots `[B, T, A, A, U]`, or anything that reshapes to it, zero in block `i` of row `i`.
        """
        states, one_hots = batch["state"], batch["actions_onehot"]
        check_tensor("masked_actions", one_hots if masked_actions is None else masked_actions)
        A, U = self.n_agents, self.n_actions
        lead = one_hots.shape[:-2]
        states = flat_states(states, lead, self.state_dim)
        itself = torch.eye(A, dtype=states.dtype, device=states.device)
        if masked_actions is None:
            taken = joint_actions(one_hots, lead, A, U).unsqueeze(-2)
            others = torch.where(itself != 0, -1, taken)
        else:
            if masked_actions.numel() != lead.numel() * A * A * U:
                raise ValueError(
                    f"masked_actions must hold one-hots {(*lead, A, A, U)}, got shape {tuple(masked_actions.shape)}"
                )
            others = joint_actions(masked_actions.reshape(*lead, A, A, U), torch.Size((*lead, A)), A, U)
        q = unrestricted(
            itself.expand(*lead, A, A),
            states.unsqueeze(-2).expand(*lead, A, self.state_dim),
            UnrestrictedParams(layers(self.Q)),
            actions=others,
        )
        v = unrestricted(None, states, UnrestrictedParams(layers(self.V)))
        return q.reshape(-1, U), v.unsqueeze(-2).expand(*lead, A, 1).reshape(-1, 1)

    def extra_repr(self) -> str:
        """Sizes, for `print(mixer)`."""
        return f"n_agents={self.n_agents}, n_actions={self.n_actions}, state_dim={self.state_dim}"
