"""Central mixers: joint values without constraints, of WQMIX's central and ResQ's residual utilities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fastmix._modules import check_positive, flat_size, mlp, orthogonal_init_, read_arg
from fastmix.mixers.base import StateMixer
from fastmix.mixers.layers import layers
from fastmix.ops._checks import check_floating, check_tensor
from fastmix.ops.unrestricted import UnrestrictedParams, unrestricted

if TYPE_CHECKING:
    from typing_extensions import Self


class QMixerCentralFF(StateMixer):
    """The unrestricted mixer of WQMIX and ResQ (`modules/mixers/qmix_central_no_hyper.py`; Rashid et al. 2020).

    `Q = net(s, q) + V(s)`: three hidden layers over state and utilities, nothing constrained.

    Args:
        n_agents, state_dim: `A`, `S`.
        central_mixing_embed_dim: hidden width of `net` and `V`.
        central_action_embed: `c`, how many values each action of an agent has.
        use_orthogonal: orthogonal weights and zero biases at the start.

    Keys: `net.{0,2,4,6}`, `V.{0,2}`. Parameter count: `(S+Ac+1)M + 2(M+1)M + (M+1) + (S+1)M + M + 1`.
    """

    def __init__(
        self,
        n_agents: int,
        state_dim: int | Sequence[int],
        central_mixing_embed_dim: int = 256,
        central_action_embed: int = 1,
        use_orthogonal: bool = False,
    ) -> None:
        super().__init__()
        state = flat_size(state_dim)
        check_positive(n_agents=n_agents, state_dim=state, central_mixing_embed_dim=central_mixing_embed_dim)
        check_positive(central_action_embed=central_action_embed)
        self.n_agents = n_agents
        self.state_dim = state
        self.action_embed = central_action_embed
        width = central_mixing_embed_dim
        self.net = mlp(state + n_agents * central_action_embed, width, width, width, 1)
        self.V = mlp(state, width, 1)
        if use_orthogonal:
            orthogonal_init_(self)

    @classmethod
    def from_args(cls, args: Any) -> Self:
        """Reads `n_agents`, `state_shape`, `central_mixing_embed_dim`, `central_action_embed`.

        `use_orthogonal` may be absent (False).
        """
        return cls(
            read_arg(args, "n_agents"),
            read_arg(args, "state_shape"),
            read_arg(args, "central_mixing_embed_dim"),
            read_arg(args, "central_action_embed"),
            use_orthogonal=read_arg(args, "use_orthogonal", False),
        )

    def forward(self, agent_qs: Tensor, states: Tensor) -> Tensor:
        """`agent_qs [..., A, c]`, or `[..., A]` for `c = 1`, and `states [..., S]` -> `[..., 1]`."""
        agent_qs, states = flat_utilities(agent_qs, states, self.n_agents, self.action_embed, self.state_dim)
        return unrestricted(agent_qs, states, UnrestrictedParams(layers(self.net), layers(self.V)))

    def extra_repr(self) -> str:
        """Sizes, for `print(mixer)`."""
        return f"n_agents={self.n_agents}, state_dim={self.state_dim}, action_embed={self.action_embed}"


class QMixerCentralAtten(StateMixer):
    """WQMIX's other central mixer (`modules/mixers/qmix_central_attention.py`).

    `Q = net(x) + V(s)` with `x_k = sum_i w_ik q_i`, where `w` is a softmax over agents of `atten_layer(s)`.

    Args:
        n_agents, state_dim: `A`, `S`.
        central_mixing_embed_dim: number of sums `x`, and hidden width of `net` and `V`.
        hypernet_embed: hidden width of `atten_layer`.

    Keys: `atten_layer.{0,2}`, `net.{0,2,4}`, `V.{0,2}`.
    """

    def __init__(
        self,
        n_agents: int,
        state_dim: int | Sequence[int],
        central_mixing_embed_dim: int = 256,
        hypernet_embed: int = 64,
    ) -> None:
        super().__init__()
        state = flat_size(state_dim)
        check_positive(n_agents=n_agents, state_dim=state, central_mixing_embed_dim=central_mixing_embed_dim)
        check_positive(hypernet_embed=hypernet_embed)
        self.n_agents = n_agents
        self.state_dim = state
        width = central_mixing_embed_dim
        self.atten_layer = mlp(state, hypernet_embed, n_agents * width)
        self.net = mlp(width, width, width, 1)
        self.V = mlp(state, width, 1)

    @classmethod
    def from_args(cls, args: Any) -> Self:
        """Reads `n_agents`, `state_shape`, `central_mixing_embed_dim`, `hypernet_embed`, `central_action_embed`.

        `central_action_embed` must be 1: the public code fails with more.
        """
        if read_arg(args, "central_action_embed") != 1:
            raise ValueError(f"central_action_embed must be 1 for this mixer, got {args.central_action_embed!r}")
        names = ("n_agents", "central_mixing_embed_dim", "hypernet_embed")
        return cls(**{name: read_arg(args, name) for name in names}, state_dim=read_arg(args, "state_shape"))

    def forward(self, agent_qs: Tensor, states: Tensor) -> Tensor:
        """`agent_qs [..., A, 1]` or `[..., A]`, and `states [..., S]` -> `[..., 1]`."""
        agent_qs, states = flat_utilities(agent_qs, states, self.n_agents, 1, self.state_dim)

        def network(inputs: Tensor, net: str) -> Tensor:
            return unrestricted(None, inputs, UnrestrictedParams(layers(self.get_submodule(net))))

        weights = network(states, "atten_layer").unflatten(-1, (self.n_agents, -1)).softmax(-2)
        return network((weights * agent_qs.unsqueeze(-1)).sum(-2), "net") + network(states, "V")

    def extra_repr(self) -> str:
        """Sizes, for `print(mixer)`."""
        return f"n_agents={self.n_agents}, state_dim={self.state_dim}"


def flat_utilities(
    agent_qs: Tensor, states: Tensor, n_agents: int, action_embed: int, state_dim: int
) -> tuple[Tensor, Tensor]:
    """`[..., A * c]` and `[..., S]` from the forms central mixers take; raises where the sizes do not agree."""
    check_tensor("agent_qs", agent_qs)
    check_floating("agent_qs", agent_qs)
    check_tensor("states", states)
    tails = [(n_agents, action_embed), (n_agents,)] if action_embed == 1 else [(n_agents, action_embed)]
    for tail in tails:
        rank = agent_qs.dim() - len(tail)
        if rank < 0 or agent_qs.shape[rank:] != tail:
            continue
        lead = agent_qs.shape[:rank]
        if states.shape[:rank] == lead and states.shape[rank:].numel() == state_dim:
            return agent_qs.reshape(*lead, n_agents * action_embed), states.reshape(*lead, state_dim)
    wanted = f"[..., {n_agents}, {action_embed}]" + (f" or [..., {n_agents}]" if action_embed == 1 else "")
    raise ValueError(
        f"agent_qs and states must be {wanted} and [..., {state_dim}] with the same leading sizes, "
        f"got shapes {tuple(agent_qs.shape)} and {tuple(states.shape)}"
    )
