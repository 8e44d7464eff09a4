"""QPLEX: duplex dueling with a transform of its own or with attention, and its importance weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from fastmix._modules import check_positive, flat_size, mlp, orthogonal_init_, read_arg
from fastmix.mixers.base import (
    ActionMixer,
    Attended,
    JointValue,
    Mixer,
    attended,
    check_agent_qs,
    flat_states,
    joint_actions,
)
from fastmix.mixers.layers import grouped, layers
from fastmix.mixers.qatten import attention_heads, check_own
from fastmix.ops._checks import check_choice, check_tensor
from fastmix.ops.attention import AttentionParams, attention
from fastmix.ops.duplex import DuplexOutput, DuplexParams, ImportanceParams, duplex, importance
from fastmix.ops.duplex.types import POSITIVE

if TYPE_CHECKING:
    from typing_extensions import Self


class DMAQSIWeight(Mixer):
    """QPLEX's importance weights (`modules/mixers/dmaq_si_weight.py`, class `DMAQ_SI_Weight`).

    `lambda_i = sum_k |key_k(s)| sigmoid(agents_k(s))_i sigmoid(action_k(s, a))_i`, above 0.

    Args:
        n_agents, n_actions, state_dim: `A`, `U`, `S`.
        num_kernel: `K`.
        adv_hypernet_layers: 1, 2 or 3 layers in each of the three networks of a kernel.
        adv_hypernet_embed: their hidden width.
        use_orthogonal: orthogonal weights and zero biases at the start.

    Keys: `{key,agents,action}_extractors.{k}`, with `.0`, `.2`, `.4` for more than one layer. Parameter count:
    `K[(S+1)(1+A) + (S+AU+1)A]` with one layer, `K[2(S+1)F + (S+AU+1)F + (F+1)(1+2A)]` with two of width `F`.
    """

    def __init__(
        self,
        n_agents: int,
        n_actions: int,
        state_dim: int | Sequence[int],
        num_kernel: int = 4,
        adv_hypernet_layers: int = 2,
        adv_hypernet_embed: int = 64,
        use_orthogonal: bool = False,
    ) -> None:
        super().__init__()
        state = flat_size(state_dim)
        check_positive(n_agents=n_agents, n_actions=n_actions, state_dim=state, num_kernel=num_kernel)
        check_choice("adv_hypernet_layers", adv_hypernet_layers, (1, 2, 3))
        if adv_hypernet_layers > 1:
            check_positive(adv_hypernet_embed=adv_hypernet_embed)
        self.n_agents = n_agents
        self.n_actions = n_actions
        self.state_dim = state
        hidden = [adv_hypernet_embed] * (adv_hypernet_layers - 1)

        def extractors(inputs: int, outputs: int) -> nn.ModuleList:
            return nn.ModuleList(
                mlp(inputs, *hidden, outputs) if hidden else nn.Linear(inputs, outputs) for _ in range(num_kernel)
            )

        self.key_extractors = extractors(state, 1)
        self.agents_extractors = extractors(state, n_agents)
        self.action_extractors = extractors(state + n_agents * n_actions, n_agents)
        if use_orthogonal:
            orthogonal_init_(self)

    @classmethod
    def from_args(cls, args: Any) -> Self:
        """Reads `n_agents`, `n_actions`, `state_shape`, `num_kernel` and, with defaults, three more.

        `adv_hypernet_layers` (1), `adv_hypernet_embed` (needed for more than one layer), `use_orthogonal` (False).
        """
        return cls(**_importance_args(args), use_orthogonal=read_arg(args, "use_orthogonal", False))

    def forward(self, states: Tensor, actions: Tensor) -> Tensor:
        """`states [..., S]`, `actions` (see `fastmix.mixers.base.joint_actions`) -> `lambda [N, A]`, `N` all rows."""
        check_tensor("states", states)
        check_tensor("actions", actions)
        rows, A, S = states.numel() // self.state_dim, self.n_agents, self.state_dim
        width = A * self.n_actions if actions.is_floating_point() else A
        if states.numel() != rows * S or actions.numel() != rows * width:
            raise ValueError(
                f"states and actions must be [..., {S}] and [..., {A}] or one-hots [..., {A}, {self.n_actions}], "
                f"got shapes {tuple(states.shape)} and {tuple(actions.shape)}"
            )
        states, actions = states.reshape(rows, S), actions.reshape(rows, width)
        actions = joint_actions(actions, states.shape[:1], A, self.n_actions)
        return importance(states, actions, self.params())

    def params(self) -> ImportanceParams:
        """The weights in the order of `fastmix.ops.duplex`, read from the layers now."""
        return ImportanceParams(
            grouped(self.key_extractors), grouped(self.agents_extractors), grouped(self.action_extractors)
        )

    def extra_repr(self) -> str:
        """Sizes, for `print(mixer)`."""
        return f"n_agents={self.n_agents}, n_actions={self.n_actions}, state_dim={self.state_dim}"


class DMAQer(ActionMixer):
    """QPLEX (`modules/mixers/dmaq_general.py`; Wang et al. 2021, "QPLEX").

    `Q_tot = sum_i Q'_i + sum_i (lambda_i - 1) stop_gradient(Q'_i - M'_i)` with `Q'_i = w_i Q_i + b_i`, and `M'_i` alike
    of the largest utility `M_i`; `w_i = |hyper_w_final(s)|_i + 1e-10`, `b_i = V(s)_i`.

    Args:
        n_agents, n_actions, state_dim, num_kernel, adv_hypernet_layers, adv_hypernet_embed, use_orthogonal: as for
            `DMAQSIWeight`.
        hypernet_embed: hidden width of `hyper_w_final` and `V`.
        weighted_head: False takes the utilities as they are; the two networks are there and get no gradient.
        is_minus_one: False leaves out the `- 1`.

    Keys: `hyper_w_final.{0,2}`, `V.{0,2}`, and those of `DMAQSIWeight` under `si_weight`. Parameter count: that of
    `DMAQSIWeight` and `2[(S+1)H + (H+1)A]`.
    """

    def __init__(
        self,
        n_agents: int,
        n_actions: int,
        state_dim: int | Sequence[int],
        hypernet_embed: int = 64,
        num_kernel: int = 4,
        adv_hypernet_layers: int = 2,
        adv_hypernet_embed: int = 64,
        weighted_head: bool = True,
        is_minus_one: bool = True,
        use_orthogonal: bool = False,
    ) -> None:
        super().__init__()
        self.si_weight = DMAQSIWeight(
            n_agents, n_actions, state_dim, num_kernel, adv_hypernet_layers, adv_hypernet_embed
        )
        check_positive(hypernet_embed=hypernet_embed)
        self.n_agents = n_agents
        self.n_actions = n_actions
        self.state_dim = self.si_weight.state_dim
        self.weighted_head = weighted_head
        self.is_minus_one = is_minus_one
        self.hyper_w_final = mlp(self.state_dim, hypernet_embed, n_agents)
        self.V = mlp(self.state_dim, hypernet_embed, n_agents)
        if use_orthogonal:
            orthogonal_init_(self)

    @classmethod
    def from_args(cls, args: Any) -> Self:
        """Reads `hypernet_embed`, `weighted_head`, `is_minus_one`, and what `DMAQSIWeight.from_args` reads."""
        names = ("hypernet_embed", "weighted_head", "is_minus_one")
        return cls(
            **{name: read_arg(args, name) for name in names},
            **_importance_args(args),
            use_orthogonal=read_arg(args, "use_orthogonal", False),
        )

    def forward(
        self,
        agent_qs: Tensor,
        states: Tensor,
        actions: Tensor | None = None,
        max_q_i: Tensor | None = None,
        is_v: bool = False,
    ) -> Tensor:
        """PyMARL's call: one of the two parts of `joint`, which public learners add up. Returns `[..., 1]`.

        `agent_qs [..., A]`, `states [..., S]`, `actions` (see `fastmix.mixers.base.joint_actions`), `max_q_i [..., A]`.
        `is_v` asks for the values' part, which needs neither actions nor `max_q_i`.
        """
        return self._mix(agent_qs, states, actions, max_q_i, "v" if is_v else "adv").q_tot

    def joint(self, agent_qs: Tensor, states: Tensor, actions: Tensor, max_qs: Tensor) -> JointValue:
        """See `ActionMixer.joint`: both parts and their sum, the state's networks computed once."""
        return JointValue(*self._mix(agent_qs, states, actions, max_qs, "both"))

    def params(self) -> DuplexParams:
        """The weights in the order of `fastmix.ops.duplex`, read from the layers now."""
        scale, shift = (layers(self.hyper_w_final), layers(self.V)) if self.weighted_head else ((), ())
        return DuplexParams(scale, shift, self.si_weight.params())

    def _mix(
        self, agent_qs: Tensor, states: Tensor, actions: Tensor | None, max_qs: Tensor | None, part: str
    ) -> DuplexOutput:
        check_agent_qs(agent_qs, self.n_agents)
        lead = agent_qs.shape[:-1]
        states = flat_states(states, lead, self.state_dim)
        if part == "v":
            actions = max_qs = None
        else:
            check_tensor("actions", actions)
            assert actions is not None
            actions = joint_actions(actions, lead, self.n_agents, self.n_actions)
        return duplex(agent_qs, max_qs, states, actions, self.params(), minus_one=self.is_minus_one, part=part)

    def extra_repr(self) -> str:
        """Sizes and options, for `print(mixer)`."""
        return (
            f"n_agents={self.n_agents}, n_actions={self.n_actions}, state_dim={self.state_dim}, "
            f"weighted_head={self.weighted_head}, is_minus_one={self.is_minus_one}"
        )


class DMAQQattenMixer(ActionMixer):
    """QPLEX whose transform is Qatten's attention (`modules/mixers/dmaq_qatten.py`, class `DMAQ_QattenMixer`).

    As `DMAQer` with `w_i = sum_h |head(s)|_h p_hi + 1e-10` and `b_i = V(s) / n_agents`, attention `p` as in
    `QattenPymarlMixer` with two-layer queries.

    Args:
        n_agents, n_actions, state_dim, num_kernel, adv_hypernet_layers, adv_hypernet_embed: as for `DMAQSIWeight`.
        unit_dim, n_head, mixing_embed_dim, hypernet_embed, attend_reg_coef, nonlinear, weighted_head: as for
            `QattenPymarlMixer`.
        state_bias: False multiplies `V(s)` by 0; the network is there either way.
        is_minus_one: as for `DMAQer`.

    Keys: those of `QattenPymarlMixer` under `attention_weight`, those of `DMAQSIWeight` under `si_weight`.
    """

    def __init__(
        self,
        n_agents: int,
        n_actions: int,
        state_dim: int | Sequence[int],
        unit_dim: int,
        n_head: int = 4,
        mixing_embed_dim: int = 32,
        hypernet_embed: int = 64,
        num_kernel: int = 4,
        adv_hypernet_layers: int = 1,
        adv_hypernet_embed: int = 64,
        attend_reg_coef: float = 0.001,
        nonlinear: bool = False,
        weighted_head: bool = False,
        state_bias: bool = True,
        is_minus_one: bool = True,
    ) -> None:
        super().__init__()
        self.si_weight = DMAQSIWeight(
            n_agents, n_actions, state_dim, num_kernel, adv_hypernet_layers, adv_hypernet_embed
        )
        self.n_agents = n_agents
        self.n_actions = n_actions
        self.state_dim = self.si_weight.state_dim
        self.unit_dim = unit_dim
        self.attend_reg_coef = attend_reg_coef
        self.state_bias = state_bias
        self.is_minus_one = is_minus_one
        self.attention_weight = QattenWeight(
            n_agents, self.state_dim, unit_dim, n_head, mixing_embed_dim, hypernet_embed, nonlinear, weighted_head
        )

    @classmethod
    def from_args(cls, args: Any) -> Self:
        """Reads the arguments under their names, `state_shape`, and what `DMAQSIWeight.from_args` reads.

        `mask_dead` must be False or absent: PyMARL's call for the values' part has no actions to tell the dead by.
        """
        if read_arg(args, "mask_dead", False):
            raise ValueError(f"mask_dead must be False for this mixer, got {args.mask_dead!r}")
        names = (
            "unit_dim", "n_head", "mixing_embed_dim", "hypernet_embed",
            "attend_reg_coef", "nonlinear", "weighted_head", "state_bias", "is_minus_one",
        )  # fmt: skip
        return cls(**{name: read_arg(args, name) for name in names}, **_importance_args(args))

    def forward(
        self,
        agent_qs: Tensor,
        states: Tensor,
        actions: Tensor | None = None,
        max_q_i: Tensor | None = None,
        is_v: bool = False,
    ) -> Attended:
        """PyMARL's call, arguments as for `DMAQer.forward`; the part is the first of what is returned.

        The regulariser is a mean over all rows, padded ones included, as in PyMARL.
        """
        value = self._mix(agent_qs, states, actions, max_q_i, "v" if is_v else "adv")
        return attended(value, value.q_tot, self.attend_reg_coef)

    def joint(self, agent_qs: Tensor, states: Tensor, actions: Tensor, max_qs: Tensor) -> JointValue:
        """See `ActionMixer.joint`."""
        return self._mix(agent_qs, states, actions, max_qs, "both")

    def _mix(
        self, agent_qs: Tensor, states: Tensor, actions: Tensor | None, max_qs: Tensor | None, part: str
    ) -> JointValue:
        check_agent_qs(agent_qs, self.n_agents)
        lead = agent_qs.shape[:-1]
        states = flat_states(states, lead, self.state_dim)
        attention_params = self.attention_weight.params()
        out = attention(
            agent_qs, states, attention_params,
            own_size=self.unit_dim, own_grad=True, return_weights=True, return_statistics=True,
        )  # fmt: skip
        assert out.agent_weights is not None and out.v is not None
        scale, shift = out.agent_weights + POSITIVE, out.v * (float(self.state_bias) / self.n_agents)
        scaled_max = None
        if part == "v":
            actions = None
        else:
            check_tensor("actions", actions)
            check_tensor("max_q_i", max_qs)
            assert actions is not None and max_qs is not None
            actions = joint_actions(actions, lead, self.n_agents, self.n_actions)
            scaled_max = scale * max_qs + shift
        # The transform is done here, and the op's own left out.
        params = DuplexParams((), (), self.si_weight.params())
        mixed = duplex(
            scale * agent_qs + shift, scaled_max, states, actions, params, minus_one=self.is_minus_one, part=part
        )
        return JointValue(*mixed, logit_squares=out.logit_squares, entropies=out.entropies)

    def extra_repr(self) -> str:
        """Sizes and options, for `print(mixer)`."""
        return (
            f"n_agents={self.n_agents}, n_actions={self.n_actions}, state_dim={self.state_dim}, "
            f"attend_reg_coef={self.attend_reg_coef}, state_bias={self.state_bias}, is_minus_one={self.is_minus_one}"
        )


class QattenWeight(nn.Module):
    """The attention of `DMAQQattenMixer`, which holds its parameters (`modules/mixers/dmaq_qatten_weight.py`)."""

    def __init__(
        self,
        n_agents: int,
        state_dim: int,
        unit_dim: int,
        n_head: int,
        mixing_embed_dim: int,
        hypernet_embed: int,
        nonlinear: bool,
        weighted_head: bool,
    ) -> None:
        super().__init__()
        check_positive(n_head=n_head, mixing_embed_dim=mixing_embed_dim, hypernet_embed=hypernet_embed)
        check_own("unit_dim", unit_dim, n_agents, state_dim)
        self.selector_extractors, self.key_extractors = attention_heads(
            state_dim, unit_dim + nonlinear, n_head, mixing_embed_dim, [hypernet_embed]
        )
        self.hyper_w_head = mlp(state_dim, hypernet_embed, n_head) if weighted_head else None
        self.V = mlp(state_dim, mixing_embed_dim, 1)

    def params(self) -> AttentionParams:
        """The weights in the order of `fastmix.ops.attention`, read from the layers now."""
        return AttentionParams(
            grouped(self.selector_extractors),
            grouped(self.key_extractors)[0],
            () if self.hyper_w_head is None else layers(self.hyper_w_head),
            layers(self.V),
        )


def _importance_args(args: Any) -> dict[str, Any]:
    depth = read_arg(args, "adv_hypernet_layers", 1)
    return {
        "n_agents": read_arg(args, "n_agents"),
        "n_actions": read_arg(args, "n_actions"),
        "state_dim": read_arg(args, "state_shape"),
        "num_kernel": read_arg(args, "num_kernel"),
        "adv_hypernet_layers": depth,
        # A one-layer namespace need not carry the width of a layer that does not exist.
        "adv_hypernet_embed": read_arg(args, "adv_hypernet_embed") if depth > 1 else 1,
    }
