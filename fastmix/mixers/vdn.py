"""VDN: the joint value is the sum of the utilities."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from fastmix.mixers.base import StateMixer, check_agent_qs

if TYPE_CHECKING:
    from typing_extensions import Self


class VDNMixer(StateMixer):
    """`Q_tot = sum_i Q_i` (Sunehag et al. 2018, "Value-Decomposition Networks", eq. 1). No parameters, no state."""

    @classmethod
    def from_args(cls, args: Any) -> Self:
        """VDN reads no field of `args`."""
        return cls()

    def forward(self, agent_qs: Tensor, states: Any = None) -> Tensor:
        """`agent_qs [..., A] -> q_tot [..., 1]`. `states` is PyMARL's second argument (a batch or a state): unused."""
        check_agent_qs(agent_qs, None)
        return agent_qs.sum(-1, keepdim=True)
