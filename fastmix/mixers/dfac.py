"""DFAC's mixers: joint return distributions of the agents' own, as a sum and by mean and shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fastmix._modules import check_positive, flat_size
from fastmix.mixers.base import QuantileMixer, check_agent_zs, flat_states
from fastmix.mixers.qmix import QMixNetworks, qmixer_args
from fastmix.ops.quantile import quantile_mix

if TYPE_CHECKING:
    from typing_extensions import Self


class DDNMixer(QuantileMixer):
    """`Z_tot = sum_i Z_i`, quantile by quantile (`modules/mixers/ddn.py` of DFAC; Sun et al. 2021). No parameters."""

    @classmethod
    def from_args(cls, args: Any) -> Self:
        """DDN reads no field of `args`."""
        return cls()

    def forward(self, agent_qs: Tensor, states: Any = None, target: bool = False) -> Tensor:
        """See `QuantileMixer.forward`; `states` is PyMARL's second argument: unused."""
        check_agent_zs(agent_qs, None)
        return agent_qs.sum(-2, keepdim=True)


class DMixer(QMixNetworks, QuantileMixer):
    """DMIX: means mixed as in QMIX, shapes summed (`modules/mixers/dmix.py` of DFAC; Sun et al. 2021, section 4).

    `Z_tot = M(E[Z_1], ..., E[Z_A], s) + sum_i (Z_i - E[Z_i])` with `M` a `QMixer` of absolute weights, so that
    `E[Z_tot] = M(E[Z_1], ..., E[Z_A], s)`. `E` is the mean over the quantiles given.

    Arguments, keys and parameter count are those of `QMixer`, whose checkpoints load.
    """

    def __init__(
        self,
        n_agents: int,
        state_dim: int | Sequence[int],
        mixing_embed_dim: int = 32,
        hypernet_layers: int = 2,
        hypernet_embed: int = 64,
        use_orthogonal: bool = False,
    ) -> None:
        super().__init__()
        state = flat_size(state_dim)
        check_positive(n_agents=n_agents, state_dim=state, mixing_embed_dim=mixing_embed_dim)
        self.n_agents = n_agents
        self.state_dim = state
        self.embed_dim = mixing_embed_dim
        self.add_networks(n_agents, state, mixing_embed_dim, hypernet_layers, hypernet_embed, use_orthogonal)

    @classmethod
    def from_args(cls, args: Any) -> Self:
        """Reads what `QMixer.from_args` reads, except `abs`: weights are always absolute."""
        return cls(**qmixer_args(args))

    def forward(self, agent_qs: Tensor, states: Tensor, target: bool = False) -> Tensor:
        """See `QuantileMixer.forward`. Raises `ValueError`/`TypeError` naming the argument that is wrong."""
        check_agent_zs(agent_qs, self.n_agents)
        states = flat_states(states, agent_qs.shape[:-2], self.state_dim)
        return quantile_mix(agent_qs, states, self.params()).unsqueeze(-2)

    def extra_repr(self) -> str:
        """Sizes, for `print(mixer)`."""
        return f"n_agents={self.n_agents}, state_dim={self.state_dim}, embed_dim={self.embed_dim}"
