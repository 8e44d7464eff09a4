"""QMIX and the fine-tuned QMIX of pymarl2: one function under the two naming families of the public trainers."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn import functional as F

from fastmix._modules import check_positive, flat_size, mlp, orthogonal_init_, read_arg
from fastmix.mixers.base import StateMixer, check_agent_qs, flat_states
from fastmix.ops._checks import check_choice
from fastmix.ops.monotonic import POSITIVITIES, MonotonicParams, monotonic

if TYPE_CHECKING:
    from typing_extensions import Self


class MonotonicMixer(StateMixer):
    """What `QMixer` and `NMixer` have in common: everything but the names of their layers.

    `Q_tot = elu(sum_i Q_i w1[i, :] + b1) . w2 + v` with `w1 = pos(f1(s))`, `w2 = pos(f2(s))`, `b1` and `v` generated
    from the state (Rashid et al. 2018, "QMIX", section 4; hypernetworks as in PyMARL). Only the weights are made
    non-negative.

    Parameter count: `(S+1)AE + (S+1)E + 2(SE+E) + E + 1` with one-layer hypernets,
    `2(SH+H) + (H+1)AE + (H+1)E + 2(SE+E) + E + 1` with two.
    """

    def __init__(
        self, n_agents: int, state_dim: int | Sequence[int], mixing_embed_dim: int, positivity: str, beta: float
    ) -> None:
        super().__init__()
        state_dim = flat_size(state_dim)
        check_positive(n_agents=n_agents, state_dim=state_dim, mixing_embed_dim=mixing_embed_dim)
        check_choice("positivity", positivity, POSITIVITIES)
        if not beta > 0:
            raise ValueError(f"beta must be positive, got {beta!r}")
        self.n_agents = n_agents
        self.state_dim = state_dim
        self.embed_dim = mixing_embed_dim
        self.positivity = positivity
        self.beta = float(beta)

    def forward(self, agent_qs: Tensor, states: Tensor) -> Tensor:
        """`agent_qs [..., A]`, `states [..., S]` (or `[..., *state_shape]`) -> `q_tot [..., 1]`.

        Raises `ValueError`/`TypeError` naming the argument whose size or dtype is wrong.
        """
        check_agent_qs(agent_qs, self.n_agents)
        states = flat_states(states, agent_qs.shape[:-1], self.state_dim)
        return monotonic(agent_qs, states, self.params(), positivity=self.positivity, beta=self.beta)

    @abc.abstractmethod
    def params(self) -> MonotonicParams:
        """The weights in the order of `fastmix.ops.monotonic`, read from the layers now (not copies)."""

    def k(self, states: Tensor) -> Tensor:
        """Share of each agent in the mix, `[..., A]`: `w1 w2` normalised over agents (pymarl2's helper for analysis).

        Uses absolute values whatever `positivity` is, as pymarl2 does, and ignores the ELU.
        """
        w1, w2, _, _ = self._generate(states)
        shares = (w1.abs() @ w2.abs().unsqueeze(-1)).squeeze(-1)
        return shares / shares.sum(-1, keepdim=True)

    def b(self, states: Tensor) -> Tensor:
        """State-only part of the mix, `[..., 1]`: `b1 . |w2| + v` (pymarl2's helper for analysis; ignores the ELU)."""
        _, w2, b1, v = self._generate(states)
        return (b1 * w2.abs()).sum(-1, keepdim=True) + v

    def _generate(self, states: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Raw `w1 [..., A, E]`, `w2 [..., E]`, `b1 [..., E]`, `v [..., 1]`, which `forward` never builds."""
        p = self.params()

        def weights(hidden_weight: Tensor | None, hidden_bias: Tensor | None, weight: Tensor, bias: Tensor) -> Tensor:
            x = states if hidden_weight is None else F.relu(F.linear(states, hidden_weight, hidden_bias))
            return F.linear(x, weight, bias)

        w1 = weights(p.w1_hidden_weight, p.w1_hidden_bias, p.w1_weight, p.w1_bias)
        w2 = weights(p.w2_hidden_weight, p.w2_hidden_bias, p.w2_weight, p.w2_bias)
        b1 = F.linear(states, p.b1_weight, p.b1_bias)
        v = weights(p.v_hidden_weight, p.v_hidden_bias, p.v_weight, p.v_bias)
        return w1.unflatten(-1, (self.n_agents, self.embed_dim)), w2, b1, v

    def extra_repr(self) -> str:
        """Sizes and positivity, for `print(mixer)`."""
        return f"n_agents={self.n_agents}, state_dim={self.state_dim}, positivity={self.positivity!r}, beta={self.beta}"


class QMixNetworks(nn.Module):
    """The hypernetworks of `QMixer` under its keys, which DMIX has too; `add_networks` makes them."""

    def add_networks(
        self, n_agents: int, state: int, embed: int, layers: int, hidden: int, use_orthogonal: bool
    ) -> None:
        """In the order in which PyMARL draws their weights."""
        self.hyper_w_1 = hypernet(state, n_agents * embed, layers, hidden)
        self.hyper_w_final = hypernet(state, embed, layers, hidden)
        self.hyper_b_1 = nn.Linear(state, embed)
        self.V = mlp(state, embed, 1)
        if use_orthogonal:
            orthogonal_init_(self)

    def params(self) -> MonotonicParams:
        """The weights in the order of `fastmix.ops.monotonic`, read from the layers now (not copies)."""
        return hypernet_params(self.hyper_w_1, self.hyper_w_final, self.hyper_b_1, self.V)


class QMixer(QMixNetworks, MonotonicMixer):
    """QMIX (`modules/mixers/qmix.py` of the PyMARL family). Keys: `hyper_w_1`, `hyper_b_1`, `hyper_w_final`, `V`.

    `hypernet_layers` 1 makes `hyper_w_1` and `hyper_w_final` single linear layers; 2 gives them a hidden layer of
    `hypernet_embed` units (keys `.0` and `.2`). The hidden width of `V` is `mixing_embed_dim`.
    """

    def __init__(
        self,
        n_agents: int,
        state_dim: int | Sequence[int],
        mixing_embed_dim: int = 32,
        hypernet_layers: int = 2,
        hypernet_embed: int = 64,
        positivity: str = "abs",
        beta: float = 1.0,
        use_orthogonal: bool = False,
    ) -> None:
        super().__init__(n_agents, state_dim, mixing_embed_dim, positivity, beta)
        self.add_networks(n_agents, self.state_dim, mixing_embed_dim, hypernet_layers, hypernet_embed, use_orthogonal)

    @classmethod
    def from_args(cls, args: Any) -> Self:
        """Reads `n_agents`, `state_shape`, `mixing_embed_dim` and, with defaults, four more.

        `hypernet_layers` (1 when absent, as in PyMARL), `hypernet_embed` (needed for 2 layers), `abs` (True),
        `use_orthogonal` (False).
        """
        return cls(**qmixer_args(args), positivity="abs" if read_arg(args, "abs", True) else "none")


class QMixerNoAbs(QMixer):
    """`QMixer` without the positivity of its weights (kind `qmix_noabs`; pymarl2 with `abs=False`): not monotonic."""

    def __init__(
        self,
        n_agents: int,
        state_dim: int | Sequence[int],
        mixing_embed_dim: int = 32,
        hypernet_layers: int = 2,
        hypernet_embed: int = 64,
        use_orthogonal: bool = False,
    ) -> None:
        super().__init__(
            n_agents,
            state_dim,
            mixing_embed_dim,
            hypernet_layers,
            hypernet_embed,
            positivity="none",
            use_orthogonal=use_orthogonal,
        )

    @classmethod
    def from_args(cls, args: Any) -> Self:
        """Reads what `QMixer.from_args` reads, except `abs`, which is fixed by the kind."""
        return cls(**qmixer_args(args))


class NMixer(MonotonicMixer):
    """The mixer of fine-tuned QMIX (`modules/mixers/nmix.py`, class `Mixer`, of pymarl2; Hu et al. 2021).

    The function of a two-layer `QMixer` under the keys `hyper_w1.{0,2}`, `hyper_b1.0`, `hyper_w2.{0,2}` and
    `hyper_b2.{0,2}`.
    """

    def __init__(
        self,
        n_agents: int,
        state_dim: int | Sequence[int],
        mixing_embed_dim: int = 32,
        hypernet_embed: int = 64,
        positivity: str = "abs",
        beta: float = 1.0,
        use_orthogonal: bool = False,
    ) -> None:
        super().__init__(n_agents, state_dim, mixing_embed_dim, positivity, beta)
        check_positive(hypernet_embed=hypernet_embed)
        state, embed = self.state_dim, self.embed_dim
        self.hyper_w1 = mlp(state, hypernet_embed, n_agents * embed)
        self.hyper_b1 = nn.Sequential(nn.Linear(state, embed))
        self.hyper_w2 = mlp(state, hypernet_embed, embed)
        self.hyper_b2 = mlp(state, embed, 1)
        if use_orthogonal:
            orthogonal_init_(self)

    @classmethod
    def from_args(cls, args: Any, abs: bool = True) -> Self:
        """Reads `n_agents`, `state_shape`, `mixing_embed_dim`, `hypernet_embed` and, with defaults, three more.

        `qmix_pos_func` ("abs"), `qmix_pos_func_beta` (needed for "softplus"), `use_orthogonal` (False). `abs=False` is
        pymarl2's constructor argument: no positivity at all, whatever `qmix_pos_func` says. `hypernet_layers` is not
        read, as in pymarl2.
        """
        positivity = read_arg(args, "qmix_pos_func", "abs") if abs else "none"
        return cls(
            read_arg(args, "n_agents"),
            read_arg(args, "state_shape"),
            read_arg(args, "mixing_embed_dim"),
            read_arg(args, "hypernet_embed"),
            positivity=positivity,
            beta=read_arg(args, "qmix_pos_func_beta") if positivity == "softplus" else 1.0,
            use_orthogonal=read_arg(args, "use_orthogonal", False),
        )

    def params(self) -> MonotonicParams:
        """See `MonotonicMixer.params`."""
        return hypernet_params(self.hyper_w1, self.hyper_w2, self.hyper_b1[0], self.hyper_b2)


def qmixer_args(args: Any) -> dict[str, Any]:
    """What `QMixer` and the mixers with its layers read from a PyMARL namespace."""
    layers = read_arg(args, "hypernet_layers", 1)
    return {
        "n_agents": read_arg(args, "n_agents"),
        "state_dim": read_arg(args, "state_shape"),
        "mixing_embed_dim": read_arg(args, "mixing_embed_dim"),
        "hypernet_layers": layers,
        # A one-layer namespace need not carry the width of a layer that does not exist.
        "hypernet_embed": read_arg(args, "hypernet_embed") if layers == 2 else 1,
        "use_orthogonal": read_arg(args, "use_orthogonal", False),
    }


def hypernet(state: int, outputs: int, layers: int, hidden: int) -> nn.Module:
    """One of PyMARL's hypernetworks: a linear layer, or two with `hidden` units between them."""
    check_choice("hypernet_layers", layers, (1, 2))
    if layers == 1:
        return nn.Linear(state, outputs)
    check_positive(hypernet_embed=hidden)
    return mlp(state, hidden, outputs)


def hypernet_params(w1: nn.Module, w2: nn.Module, b1: nn.Module, v: nn.Module) -> MonotonicParams:
    """The layers of a mixing network in the order of `fastmix.ops.monotonic`, read now (not copies)."""
    return MonotonicParams._make((*_hypernet(w1), *_hypernet(w2), *_linear(b1), *_hypernet(v)))


def _hypernet(net: nn.Module) -> tuple[Any, ...]:
    if isinstance(net, nn.Sequential):
        hidden, _, output = net  # indexing a Sequential is slow, and this runs at every call
        return (*_linear(hidden), *_linear(output))
    return (None, None, *_linear(net))


def _linear(layer: nn.Module) -> tuple[Any, Any]:
    return layer.weight, layer.bias
