"""Qatten in its two public forms: pymarl2's, and the PyMARL-style one with more options."""

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
    StateMixer,
    attended,
    check_agent_qs,
    flat_states,
)
from fastmix.mixers.layers import grouped, layers
from fastmix.ops._checks import check_choice, check_tensor
from fastmix.ops.attention import AttentionParams, attention

if TYPE_CHECKING:
    from typing_extensions import Self


class AttentionMixer(Mixer):
    """The networks of pymarl2's Qatten and of ResZ's mixers: heads that attend from the state to the agents.

    Head `h` attends from the state to the agents' own features, the first `n_agents * agent_own_state_size` of the
    state; its weight is `w_h = |head(s)|_h`, or 1 unless `weighted`, and `c(s)` is a value of the state's own.

    Args:
        n_agents, state_dim: `A`, `S`.
        agent_own_state_size: how many features of the state are an agent's own.
        n_attention_head: number of heads.
        n_query_embedding_layer1, n_query_embedding_layer2: widths of the query networks; keys have the second.
        n_head_embedding_layer1: hidden width of the network of the heads' weights.
        n_constrant_value: hidden width of `c` (spelled as in pymarl2).
        weighted: whether heads are weighted; the network is there either way and then gets no gradient.
        use_orthogonal: orthogonal weights and zero biases at the start.

    Keys: `query_embedding_layers.{h}.{0,2}`, `key_embedding_layers.{h}`, `head_embedding_layer.{0,2}`,
    `constrant_value_layer.{0,2}`.
    """

    def __init__(
        self,
        n_agents: int,
        state_dim: int | Sequence[int],
        agent_own_state_size: int,
        n_attention_head: int = 4,
        n_query_embedding_layer1: int = 64,
        n_query_embedding_layer2: int = 32,
        n_head_embedding_layer1: int = 64,
        n_constrant_value: int = 32,
        weighted: bool = True,
        use_orthogonal: bool = False,
    ) -> None:
        super().__init__()
        state = flat_size(state_dim)
        check_positive(n_agents=n_agents, state_dim=state, n_attention_head=n_attention_head)
        check_positive(n_query_embedding_layer1=n_query_embedding_layer1)
        check_positive(n_query_embedding_layer2=n_query_embedding_layer2)
        check_positive(n_head_embedding_layer1=n_head_embedding_layer1, n_constrant_value=n_constrant_value)
        check_own("agent_own_state_size", agent_own_state_size, n_agents, state)
        self.n_agents = n_agents
        self.state_dim = state
        self.own_size = agent_own_state_size
        self.weighted = weighted
        heads, embed = range(n_attention_head), n_query_embedding_layer2
        self.query_embedding_layers = nn.ModuleList(mlp(state, n_query_embedding_layer1, embed) for _ in heads)
        self.key_embedding_layers = nn.ModuleList(nn.Linear(agent_own_state_size, embed) for _ in heads)
        self.head_embedding_layer = mlp(state, n_head_embedding_layer1, n_attention_head)
        self.constrant_value_layer = mlp(state, n_constrant_value, 1)
        if use_orthogonal:
            orthogonal_init_(self)

    @classmethod
    def from_args(cls, args: Any) -> Self:
        """Reads `n_agents`, `state_shape` and pymarl2's fields of Qatten; `use_orthogonal` may be absent (False).

        `agent_own_state_size` must be the number that pymarl2 replaces the configuration's `True` by.
        `n_key_embedding_layer1` must equal `n_query_embedding_layer2`, `n_head_embedding_layer2` must equal
        `n_attention_head`. `type` is `"weighted"` or any other string.
        """
        names = (
            "n_agents", "agent_own_state_size", "n_attention_head", "n_query_embedding_layer1",
            "n_query_embedding_layer2", "n_head_embedding_layer1", "n_constrant_value",
        )  # fmt: skip
        options = {name: read_arg(args, name) for name in names}
        for name, same in (
            ("n_key_embedding_layer1", "n_query_embedding_layer2"),
            ("n_head_embedding_layer2", "n_attention_head"),
        ):
            if read_arg(args, name) != options[same]:
                raise ValueError(f"{name} must equal {same} ({options[same]}), got {read_arg(args, name)}")
        return cls(
            **options,
            state_dim=read_arg(args, "state_shape"),
            weighted=read_arg(args, "type") == "weighted",
            use_orthogonal=read_arg(args, "use_orthogonal", False),
        )

    def params(self) -> AttentionParams:
        """The weights in the order of `fastmix.ops.attention`, read from the layers now."""
        return AttentionParams(
            grouped(self.query_embedding_layers),
            grouped(self.key_embedding_layers)[0],
            layers(self.head_embedding_layer) if self.weighted else (),
            layers(self.constrant_value_layer),
        )

    def extra_repr(self) -> str:
        """Sizes, for `print(mixer)`."""
        return (
            f"n_agents={self.n_agents}, state_dim={self.state_dim}, own_size={self.own_size}, weighted={self.weighted}"
        )


class QattenMixer(AttentionMixer, StateMixer):
    """Qatten as in pymarl2 (`modules/mixers/qatten.py`; Yang et al. 2020, "Qatten"); also ResQ's `qatten`.

    `Q_tot = sum_h w_h sum_i p_hi Q_i + c(s)` with `p_h` a softmax over agents; see `AttentionMixer` for the networks
    and their arguments.
    """

    def forward(self, agent_qs: Tensor, states: Tensor) -> Tensor:
        """See `StateMixer.forward`. Raises `ValueError`/`TypeError` naming the argument that is wrong."""
        check_agent_qs(agent_qs, self.n_agents)
        states = flat_states(states, agent_qs.shape[:-1], self.state_dim)
        return attention(agent_qs, states, self.params(), own_size=self.own_size).q_tot


class QattenPymarlMixer(ActionMixer):
    """Qatten in PyMARL's style (`modules/mixers/qatten.py` of `wqmix` and `QPLEX`).

    As `QattenMixer`, with unbiased queries and keys, and options:

    Args:
        n_agents, state_dim: `A`, `S`.
        unit_dim: how many features of the state are an agent's own.
        n_head: number of heads.
        mixing_embed_dim: width of queries and keys, and the hidden width of `V`.
        hypernet_layers: 1 or 2 layers in the query networks and the network of the heads' weights.
        hypernet_embed: their hidden width.
        attend_reg_coef: coefficient of the regulariser.
        nonlinear: the keys also see the utilities; `Q_tot` is then not monotonic in them.
        weighted_head: heads weighted by `|hyper_w_head(s)|`, else by 1.
        state_bias: whether `V(s)` is added.
        mask_dead: agents whose action has index 0 (no-op) are not attended to.

    Keys: `selector_extractors.{h}` (`.weight`, or `.0` and `.2.weight`), `key_extractors.{h}.weight`, `hyper_w_head`
    and `V.{0,2}` where their flags are on.
    """

    def __init__(
        self,
        n_agents: int,
        state_dim: int | Sequence[int],
        unit_dim: int,
        n_head: int = 4,
        mixing_embed_dim: int = 32,
        hypernet_layers: int = 2,
        hypernet_embed: int = 64,
        attend_reg_coef: float = 0.001,
        nonlinear: bool = False,
        weighted_head: bool = False,
        state_bias: bool = True,
        mask_dead: bool = False,
    ) -> None:
        super().__init__()
        state = flat_size(state_dim)
        check_positive(n_agents=n_agents, state_dim=state, n_head=n_head, mixing_embed_dim=mixing_embed_dim)
        check_choice("hypernet_layers", hypernet_layers, (1, 2))
        check_own("unit_dim", unit_dim, n_agents, state)
        self.n_agents = n_agents
        self.state_dim = state
        self.unit_dim = unit_dim
        self.attend_reg_coef = attend_reg_coef
        self.mask_dead = mask_dead
        self.hyper_w_head: nn.Module | None = None
        self.V: nn.Module | None = None
        if hypernet_layers == 2:
            check_positive(hypernet_embed=hypernet_embed)
        hidden = [hypernet_embed] * (hypernet_layers - 1)
        self.selector_extractors, self.key_extractors = attention_heads(
            state, unit_dim + nonlinear, n_head, mixing_embed_dim, hidden
        )
        if weighted_head:
            self.hyper_w_head = mlp(state, *hidden, n_head) if hidden else nn.Linear(state, n_head)
        if state_bias:
            self.V = mlp(state, mixing_embed_dim, 1)

    @classmethod
    def from_args(cls, args: Any) -> Self:
        """Reads `n_agents`, `state_shape` and the other arguments under their names.

        `hypernet_layers` is 1 when absent, as in PyMARL; `hypernet_embed` is needed for 2.
        """
        names = (
            "n_agents", "unit_dim", "n_head", "mixing_embed_dim", "attend_reg_coef",
            "nonlinear", "weighted_head", "state_bias", "mask_dead",
        )  # fmt: skip
        hypernet_layers = read_arg(args, "hypernet_layers", 1)
        return cls(
            **{name: read_arg(args, name) for name in names},
            state_dim=read_arg(args, "state_shape"),
            hypernet_layers=hypernet_layers,
            hypernet_embed=read_arg(args, "hypernet_embed") if hypernet_layers == 2 else 1,
        )

    def forward(self, agent_qs: Tensor, states: Tensor, actions: Tensor | None = None) -> Attended:
        """`agent_qs [..., A]`, `states [..., S]`, `actions [..., A]` or `[..., A, 1]` (read by `mask_dead` only).

        The regulariser is a mean over all rows, padded ones included, as in PyMARL.
        """
        value = self._attend(agent_qs, states, actions)
        return attended(value, value.q_tot, self.attend_reg_coef)

    def joint(self, agent_qs: Tensor, states: Tensor, actions: Tensor, max_qs: Tensor | None = None) -> JointValue:
        """See `ActionMixer.joint`; `max_qs` is not looked at."""
        return self._attend(agent_qs, states, actions)

    def params(self) -> AttentionParams:
        """The weights in the order of `fastmix.ops.attention`, read from the layers now."""
        return AttentionParams(
            grouped(self.selector_extractors),
            grouped(self.key_extractors)[0],
            () if self.hyper_w_head is None else layers(self.hyper_w_head),
            () if self.V is None else layers(self.V),
        )

    def _attend(self, agent_qs: Tensor, states: Tensor, actions: Tensor | None) -> JointValue:
        check_agent_qs(agent_qs, self.n_agents)
        lead = agent_qs.shape[:-1]
        alive = None
        if self.mask_dead:
            check_tensor("actions", actions)
            assert actions is not None
            if actions.shape not in (agent_qs.shape, (*agent_qs.shape, 1)):
                raise ValueError(
                    f"actions must be indices [..., {self.n_agents}] like agent_qs {tuple(agent_qs.shape)}, "
                    f"got shape {tuple(actions.shape)}"
                )
            alive = actions.reshape(agent_qs.shape) != 0
        out = attention(
            agent_qs, flat_states(states, lead, self.state_dim), self.params(),
            own_size=self.unit_dim, own_grad=True, alive=alive, return_statistics=True,
        )  # fmt: skip
        return JointValue(out.q_tot, logit_squares=out.logit_squares, entropies=out.entropies)

    def extra_repr(self) -> str:
        """Sizes and options, for `print(mixer)`."""
        return (
            f"n_agents={self.n_agents}, state_dim={self.state_dim}, unit_dim={self.unit_dim}, "
            f"attend_reg_coef={self.attend_reg_coef}, mask_dead={self.mask_dead}"
        )


def attention_heads(
    state: int, own: int, n_head: int, embed: int, hidden: Sequence[int]
) -> tuple[nn.ModuleList, nn.ModuleList]:
    """PyMARL's `selector_extractors` (queries) and `key_extractors`, one of each a head."""

    def query() -> nn.Module:
        return mlp(state, *hidden, embed, last_bias=False) if hidden else nn.Linear(state, embed, bias=False)

    queries = nn.ModuleList(query() for _ in range(n_head))
    return queries, nn.ModuleList(nn.Linear(own, embed, bias=False) for _ in range(n_head))


def check_own(name: str, size: int, n_agents: int, state_dim: int) -> None:
    """Raise unless the state has room for `size` own features of each agent; `name` is what messages call it."""
    check_positive(**{name: size})
    if n_agents * size > state_dim:
        raise ValueError(f"{name} must be at most state_dim // n_agents = {state_dim // n_agents}, got {size}")
