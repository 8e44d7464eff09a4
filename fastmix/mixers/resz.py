"""ResZ's mixers of return distributions: weighted sums by attention, and one without constraints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from fastmix._modules import check_positive, flat_size, mlp, orthogonal_init_, read_arg
from fastmix.mixers.base import QuantileMixer, check_agent_zs, flat_states
from fastmix.mixers.layers import layers
from fastmix.mixers.qatten import AttentionMixer
from fastmix.ops.attention import attention
from fastmix.ops.unrestricted import UnrestrictedParams, unrestricted

if TYPE_CHECKING:
    from typing_extensions import Self


class _AttentionZ(AttentionMixer, QuantileMixer):
    softmax: ClassVar[bool]

    def forward(self, agent_qs: Tensor, states: Tensor, target: bool = False) -> Tensor:
        """See `QuantileMixer.forward`. Raises `ValueError`/`TypeError` naming the argument that is wrong."""
        check_agent_zs(agent_qs, self.n_agents)
        states = flat_states(states, agent_qs.shape[:-2], self.state_dim)
        # One set of weights serves every quantile: the op's own sum, of any of them, is not looked at.
        out = attention(
            agent_qs[..., 0].detach(), states, self.params(), own_size=self.own_size, softmax=self.softmax,
            return_weights=True,
        )  # fmt: skip
        assert out.agent_weights is not None and out.v is not None
        return (out.agent_weights.unsqueeze(-1) * agent_qs).sum(-2, keepdim=True) + out.v.unsqueeze(-1)


class DattenMixer(_AttentionZ):
    """ResZ's main mixer `datten` (`modules/mixers/datten.py`; Shen et al. 2022, theorem 4): a weighted sum.

    `Z_tot = sum_h w_h sum_i p_hi Z_i + c(s)` with `p_h` a softmax over agents: no weight is negative, and the same
    weights serve every quantile. See `AttentionMixer` for the networks and their arguments.
    """

    softmax = True


class ResZCentralAtten(_AttentionZ):
    """ResZ's residual mixer `atten` (`modules/mixers/dresq_central_atten.py`; Shen et al. 2022).

    `DattenMixer` without the softmax, `p_hi` being the scaled logit: weights have any sign. Linear in the utilities.
    """

    softmax = False


class ResZCentralFF(QuantileMixer):
    """ResZ's unrestricted mixer of distributions (`modules/mixers/dresq_central.py`; Shen et al. 2022).

    `Z_tot = net(s, Z_1, ..., Z_A)` with two hidden layers. It takes the number of quantiles that it was built for.

    Args:
        n_agents, state_dim: `A`, `S`.
        n_quantiles: `N`.
        central_mixing_embed_dim: hidden width.
        use_orthogonal: orthogonal weights and zero biases at the start.

    Keys: `net.{0,2,4}`. Parameter count: `(S+AN+1)M + (M+1)M + (M+1)N`.
    """

    def __init__(
        self,
        n_agents: int,
        state_dim: int | Sequence[int],
        n_quantiles: int = 8,
        central_mixing_embed_dim: int = 128,
        use_orthogonal: bool = False,
    ) -> None:
        super().__init__()
        state, width = flat_size(state_dim), central_mixing_embed_dim
        check_positive(n_agents=n_agents, state_dim=state, n_quantiles=n_quantiles, central_mixing_embed_dim=width)
        self.n_agents = n_agents
        self.state_dim = state
        self.n_quantiles = n_quantiles
        self.net = mlp(state + n_agents * n_quantiles, width, width, n_quantiles)
        if use_orthogonal:
            orthogonal_init_(self)

    @classmethod
    def from_args(cls, args: Any) -> Self:
        """Reads `n_agents`, `state_shape`, `n_target_quantiles` and `central_mixing_embed_dim`.

        `use_orthogonal` may be absent (False).
        """
        return cls(
            read_arg(args, "n_agents"),
            read_arg(args, "state_shape"),
            read_arg(args, "n_target_quantiles"),
            read_arg(args, "central_mixing_embed_dim"),
            use_orthogonal=read_arg(args, "use_orthogonal", False),
        )

    def forward(self, agent_qs: Tensor, states: Tensor, target: bool = False) -> Tensor:
        """See `QuantileMixer.forward`. Raises `ValueError`/`TypeError` naming the argument that is wrong."""
        check_agent_zs(agent_qs, self.n_agents)
        if agent_qs.shape[-1] != self.n_quantiles:
            raise ValueError(
                f"agent_qs must be [..., n_agents, quantiles] with {self.n_quantiles} quantiles, which the mixer was "
                f"built for, got shape {tuple(agent_qs.shape)}"
            )
        states = flat_states(states, agent_qs.shape[:-2], self.state_dim)
        return unrestricted(agent_qs.flatten(-2), states, UnrestrictedParams(layers(self.net))).unsqueeze(-2)

    def extra_repr(self) -> str:
        """Sizes, for `print(mixer)`."""
        return f"n_agents={self.n_agents}, state_dim={self.state_dim}, n_quantiles={self.n_quantiles}"
