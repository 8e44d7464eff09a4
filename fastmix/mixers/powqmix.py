"""POWQMIX's recogniser of potentially optimal joint actions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fastmix._modules import check_positive, flat_size, mlp, orthogonal_init_, read_arg
from fastmix.mixers.base import Mixer, check_agent_qs, flat_states, joint_actions
from fastmix.mixers.layers import layers
from fastmix.mixers.qplex import DMAQSIWeight
from fastmix.ops.duplex import RecogniserParams, Recognition, recognise
from fastmix.ops.duplex.reference import recogniser_weights
from fastmix.ops.unrestricted import UnrestrictedParams, unrestricted

if TYPE_CHECKING:
    from typing_extensions import Self


class Recogniser(Mixer):
    """`Q_r = sum_i lambda_i (Q_i - max_u Q_i(u)) + V(s)` on fixed utilities (POWQMIX, equation 5).

    `lambda_i = sum_e |W1|_ie |W2|_e`, where both come from hypernetworks over state and joint action. The paper leaves
    open how `W1` and `W2` make `lambda`, and all sizes; these are ours.

    Args:
        n_agents, n_actions, state_dim: `A`, `U`, `S`.
        mixing_embed_dim: `E`, also the hidden width of `V`.
        hypernet_embed: `H`, hidden width of the hypernetworks.
        use_orthogonal: orthogonal weights and zero biases at the start.

    Keys: `hyper_w1.{0,2}`, `hyper_w2.{0,2}`, `V.{0,2}`. Parameter count:
    `2(S+AU+1)H + (H+1)(A+1)E + (S+1)E + E + 1`.
    """

    def __init__(
        self,
        n_agents: int,
        n_actions: int,
        state_dim: int | Sequence[int],
        mixing_embed_dim: int = 32,
        hypernet_embed: int = 64,
        use_orthogonal: bool = False,
    ) -> None:
        super().__init__()
        state = flat_size(state_dim)
        check_positive(n_agents=n_agents, n_actions=n_actions, state_dim=state)
        check_positive(mixing_embed_dim=mixing_embed_dim, hypernet_embed=hypernet_embed)
        self.n_agents = n_agents
        self.n_actions = n_actions
        self.state_dim = state
        inputs = state + n_agents * n_actions
        self.hyper_w1 = mlp(inputs, hypernet_embed, n_agents * mixing_embed_dim)
        self.hyper_w2 = mlp(inputs, hypernet_embed, mixing_embed_dim)
        self.V = mlp(state, mixing_embed_dim, 1)
        if use_orthogonal:
            orthogonal_init_(self)

    @classmethod
    def from_args(cls, args: Any) -> Self:
        """Reads the arguments under their names, `state_shape`, and `use_orthogonal` (False when absent)."""
        names = ("n_agents", "n_actions", "mixing_embed_dim", "hypernet_embed")
        return cls(
            **{name: read_arg(args, name) for name in names},
            state_dim=read_arg(args, "state_shape"),
            use_orthogonal=read_arg(args, "use_orthogonal", False),
        )

    def forward(self, agent_qs: Tensor, states: Tensor, actions: Tensor, max_qs: Tensor) -> Recognition:
        """`agent_qs [..., A]` of `actions`, `max_qs [..., A]` each agent's largest one, `states [..., S]`.

        Returns `Q_r` and `V`, each `[..., 1]`. `actions` as `fastmix.mixers.base.joint_actions` takes them. No gradient
        reaches the utilities.
        """
        check_agent_qs(agent_qs, self.n_agents)
        lead = agent_qs.shape[:-1]
        states = flat_states(states, lead, self.state_dim)
        actions = joint_actions(actions, lead, self.n_agents, self.n_actions)
        return recognise(agent_qs, max_qs, states, actions, self.params())

    def importance(self, states: Tensor, actions: Tensor) -> Tensor:
        """`lambda [..., A]` of `states [..., S]` and `actions`, for analysis."""
        lead = states.shape[:-1]
        states = flat_states(states, lead, self.state_dim).reshape(lead.numel(), self.state_dim)
        actions = joint_actions(actions, lead, self.n_agents, self.n_actions)
        weights = recogniser_weights(states, actions.reshape(lead.numel(), self.n_agents), self.params())
        return weights.reshape(actions.shape)

    def params(self) -> RecogniserParams:
        """The weights in the order of `fastmix.ops.duplex`, read from the layers now."""
        return RecogniserParams(layers(self.hyper_w1), layers(self.hyper_w2), layers(self.V))

    def extra_repr(self) -> str:
        """Sizes, for `print(mixer)`."""
        return f"n_agents={self.n_agents}, n_actions={self.n_actions}, state_dim={self.state_dim}"


class ImportanceRecogniser(Mixer):
    """The recogniser with QPLEX's importance weights for `lambda`, another reading of POWQMIX's equation 5.

    Args:
        n_agents, n_actions, state_dim, mixing_embed_dim, use_orthogonal: as for `Recogniser`.
        hypernet_embed: hidden width of the importance networks.
        num_kernel: how many there are.

    Keys: those of `DMAQSIWeight` under `si_weight`, with two layers, and `V.{0,2}`.
    """

    def __init__(
        self,
        n_agents: int,
        n_actions: int,
        state_dim: int | Sequence[int],
        mixing_embed_dim: int = 32,
        hypernet_embed: int = 64,
        num_kernel: int = 4,
        use_orthogonal: bool = False,
    ) -> None:
        super().__init__()
        check_positive(mixing_embed_dim=mixing_embed_dim)
        self.si_weight = DMAQSIWeight(n_agents, n_actions, state_dim, num_kernel, 2, hypernet_embed)
        self.V = mlp(self.si_weight.state_dim, mixing_embed_dim, 1)
        if use_orthogonal:
            orthogonal_init_(self)

    @classmethod
    def from_args(cls, args: Any) -> Self:
        """Reads what `Recogniser.from_args` reads, and `num_kernel`."""
        names = ("n_agents", "n_actions", "mixing_embed_dim", "hypernet_embed", "num_kernel")
        return cls(
            **{name: read_arg(args, name) for name in names},
            state_dim=read_arg(args, "state_shape"),
            use_orthogonal=read_arg(args, "use_orthogonal", False),
        )

    def forward(self, agent_qs: Tensor, states: Tensor, actions: Tensor, max_qs: Tensor) -> Recognition:
        """See `Recogniser.forward`."""
        lambdas, n_agents = self.si_weight, self.si_weight.n_agents
        check_agent_qs(agent_qs, n_agents)
        lead = agent_qs.shape[:-1]
        states = flat_states(states, lead, lambdas.state_dim)
        v = unrestricted(None, states, UnrestrictedParams(layers(self.V)))
        weights = lambdas(states, joint_actions(actions, lead, n_agents, lambdas.n_actions)).reshape(agent_qs.shape)
        return Recognition((weights * (agent_qs - max_qs).detach()).sum(-1, keepdim=True) + v, v)
