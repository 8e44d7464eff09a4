"""The one place that yields the shapes and random inputs of tests and benchmarks."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from fastmix.algorithms import PRESETS, REGISTRY
from fastmix.ops._layers import Layers, Linear
from fastmix.ops.attention import AttentionParams
from fastmix.ops.duplex import DuplexParams, ImportanceParams, RecogniserParams
from fastmix.ops.monotonic import MonotonicParams
from fastmix.ops.recurrent import RecurrentParams
from fastmix.ops.unrestricted import UnrestrictedParams
from fastmix.testing.shapes import SHAPES, Shape

__all__ = [
    "ODD_AGENTS",
    "ODD_EMBEDS",
    "ODD_ROWS",
    "SHAPES",
    "Episodes",
    "Shape",
    "attention_params",
    "duplex_params",
    "episodes",
    "joint_actions",
    "monotonic_params",
    "non_contiguous",
    "odd_shapes",
    "own_presets",
    "recogniser_params",
    "recurrent_params",
    "unrestricted_params",
]

ODD_AGENTS = (1, 2, 27)
ODD_EMBEDS = (1, 31, 32, 33)
"""Around the width of a vector register and of a warp"""
ODD_ROWS = (0, 1, 3, 257)


def own_presets(algorithm: str) -> list[str]:
    """The presets of an algorithm, without the paper's where that is PyMARL's."""
    return [name for name in PRESETS if name != "paper" or name in REGISTRY[algorithm].preset_overrides]


def odd_shapes() -> list[tuple[Shape, int]]:
    """Small shapes at the edges, each with a mixing embed: every odd number of agents with every odd embed."""
    return [(Shape(agents, 5, 7 + agents, 3 + agents), embed) for agents in ODD_AGENTS for embed in ODD_EMBEDS]


def monotonic_params(
    shape: Shape,
    embed: int = 32,
    hypernet_embed: int = 64,
    layers: int = 2,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    requires_grad: bool = True,
) -> MonotonicParams:
    """Weights of a mixing network, uniform in +-1/sqrt(fan_in) as PyTorch initialises them."""
    make = _Uniform(dtype, seed, requires_grad)
    S, A, E, H = shape.state_dim, shape.n_agents, embed, hypernet_embed
    hidden: tuple[Tensor | None, ...] = (make(H, S), make(H, fan_in=S)) if layers == 2 else (None, None)
    hidden2: tuple[Tensor | None, ...] = (make(H, S), make(H, fan_in=S)) if layers == 2 else (None, None)
    width = H if layers == 2 else S
    return MonotonicParams(
        hidden[0],
        hidden[1],
        make(A * E, width),
        make(A * E, fan_in=width),
        hidden2[0],
        hidden2[1],
        make(E, width),
        make(E, fan_in=width),
        make(E, S),
        make(E, fan_in=S),
        make(E, S),
        make(E, fan_in=S),
        make(1, E),
        make(1, fan_in=E),
    )


def recurrent_params(
    inputs: int,
    hidden: int,
    outputs: int,
    *,
    layer_norm: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    requires_grad: bool = True,
) -> RecurrentParams:
    """Weights of a utility network, uniform in +-1/sqrt(fan_in) as PyTorch initialises them."""
    make = _Uniform(dtype, seed, requires_grad)
    return RecurrentParams(
        make(hidden, inputs),
        make(hidden, fan_in=inputs),
        make(3 * hidden, hidden),
        make(3 * hidden, hidden),
        make(3 * hidden, fan_in=hidden),
        make(3 * hidden, fan_in=hidden),
        make(hidden, fan_in=1) if layer_norm else None,
        make(hidden, fan_in=1) if layer_norm else None,
        make(outputs, hidden),
        make(outputs, fan_in=hidden),
    )


def attention_params(
    shape: Shape,
    own_size: int,
    heads: int = 4,
    embed: int = 32,
    hidden: int = 64,
    *,
    layers: int = 2,
    bias: bool = True,
    nonlinear: bool = False,
    weighted: bool = True,
    constant: int = 32,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    requires_grad: bool = True,
) -> AttentionParams:
    """Weights of attention over agents; ``bias`` of queries and keys, ``constant`` the hidden width of V(s), or 0."""
    make = _Uniform(dtype, seed, requires_grad)
    S, between = shape.state_dim, [hidden] * (layers - 1)
    query = make.layers(S, *between, embed, groups=heads)
    (key,) = make.layers(own_size + nonlinear, embed, groups=heads)
    if not bias:
        query, key = (*query[:-1], query[-1]._replace(bias=None)), key._replace(bias=None)
    return AttentionParams(
        query,
        key,
        make.layers(S, *between, heads) if weighted else (),
        make.layers(S, constant, 1) if constant else (),
    )


def duplex_params(
    shape: Shape,
    kernels: int = 4,
    hidden: int = 64,
    layers: int = 2,
    *,
    hypernet_embed: int = 64,
    weighted: bool = True,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    requires_grad: bool = True,
) -> DuplexParams:
    """Weights of QPLEX; `layers` in each of the importance networks, `weighted` for a transform."""
    make = _Uniform(dtype, seed, requires_grad)
    S, A, U, between = shape.state_dim, shape.n_agents, shape.n_actions, [hidden] * (layers - 1)
    return DuplexParams(
        make.layers(S, hypernet_embed, A) if weighted else (),
        make.layers(S, hypernet_embed, A) if weighted else (),
        ImportanceParams(
            make.layers(S, *between, 1, groups=kernels),
            make.layers(S, *between, A, groups=kernels),
            make.layers(S + A * U, *between, A, groups=kernels),
        ),
    )


def recogniser_params(
    shape: Shape,
    embed: int = 32,
    hypernet_embed: int = 64,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    requires_grad: bool = True,
) -> RecogniserParams:
    """Weights of POWQMIX's recogniser."""
    make = _Uniform(dtype, seed, requires_grad)
    S, A, inputs = shape.state_dim, shape.n_agents, shape.state_dim + shape.n_agents * shape.n_actions
    return RecogniserParams(
        make.layers(inputs, hypernet_embed, A * embed),
        make.layers(inputs, hypernet_embed, embed),
        make.layers(S, embed, 1),
    )


def unrestricted_params(
    inputs: int,
    state_dim: int,
    *hidden: int,
    outputs: int = 1,
    constant: int = 0,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    requires_grad: bool = True,
) -> UnrestrictedParams:
    """Weights of an unrestricted network with the given hidden widths; `constant` the hidden width of V(s), or 0."""
    make = _Uniform(dtype, seed, requires_grad)
    return UnrestrictedParams(
        make.layers(inputs, *hidden, outputs), make.layers(state_dim, constant, 1) if constant else ()
    )


def joint_actions(shape: Shape, *leading: int, seed: int = 0) -> Tensor:
    """Random actions `[..., A]`, about one in eight of them none (-1)."""
    g = torch.Generator().manual_seed(seed)
    actions = torch.randint(shape.n_actions, (*leading, shape.n_agents), generator=g)
    return actions.masked_fill(torch.rand(actions.shape, generator=g) < 1 / 8, -1)


class Episodes(NamedTuple):
    """A training batch of ragged episodes; everything after an episode's end is zero, as replay hands it out."""

    obs: Tensor
    """`[B, T+1, A, O]`"""
    states: Tensor
    """`[B, T+1, S]`"""
    actions: Tensor
    """`[B, T+1, A]` int64, available where the step is live"""
    last_actions: Tensor
    """`[B, T+1, A]` int64: the action before, -1 at the first step"""
    avail_actions: Tensor
    """`[B, T+1, A, U]` bool, at least one in every live row, none in padded rows"""
    rewards: Tensor
    """`[B, T, 1]`"""
    terminated: Tensor
    """`[B, T, 1]` 0/1; episode 0 runs into the time limit and has none"""
    mask: Tensor
    """`[B, T, 1]` 0/1"""


def episodes(
    shape: Shape, batch_size: int, steps: int, *, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Episodes:
    """Random ragged episodes of at most `steps` transitions; the first has all of them."""
    g = torch.Generator().manual_seed(seed)
    A, U = shape.n_agents, shape.n_actions
    lengths = torch.randint(1, steps + 1, (batch_size, 1), generator=g)
    lengths[:1] = steps
    time = torch.arange(steps + 1)
    stored = (time <= lengths)[..., None]
    mask = (time[:-1] < lengths)[..., None]
    ended = (time[:-1] == lengths - 1)[..., None]
    ended[:1] = False
    avail = torch.rand(batch_size, steps + 1, A, U, generator=g) < 0.7
    avail[..., 0] |= ~avail.any(-1)
    actions = torch.multinomial(avail.flatten(0, 2).double(), 1, generator=g).view(batch_size, steps + 1, A)
    actions = actions * stored
    last = torch.cat([torch.full_like(actions[:, :1], -1), actions[:, :-1]], 1)
    return Episodes(
        torch.randn(batch_size, steps + 1, A, shape.obs_dim, generator=g, dtype=dtype) * stored[..., None],
        torch.randn(batch_size, steps + 1, shape.state_dim, generator=g, dtype=dtype) * stored,
        actions,
        last,
        avail & stored[..., None],
        torch.randn(batch_size, steps, 1, generator=g, dtype=dtype) * mask,
        ended.to(dtype),
        mask.to(dtype),
    )


def non_contiguous(tensor: Tensor) -> Tensor:
    """The same values with gaps between them: every second element of a larger buffer, axes in reverse memory order."""
    buffer = tensor.new_full((*reversed(tensor.shape), 2), float("nan") if tensor.is_floating_point() else 1)
    view = buffer[..., 0].permute(*reversed(range(tensor.dim())))
    view.copy_(tensor)
    return view


class _Uniform:
    def __init__(self, dtype: torch.dtype, seed: int, requires_grad: bool) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype, self.requires_grad = dtype, requires_grad

    def __call__(self, *size: int, fan_in: int | None = None) -> Tensor:
        bound = (fan_in or size[-1]) ** -0.5
        values = torch.rand(*size, generator=self.generator, dtype=torch.float64) * (2 * bound) - bound
        return values.to(self.dtype).requires_grad_(self.requires_grad)

    def layers(self, *sizes: int, groups: int | None = None) -> Layers:
        group = () if groups is None else (groups,)
        return tuple(
            Linear(self(*group, outputs, inputs), self(*group, outputs, fan_in=inputs))
            for inputs, outputs in pairwise(sizes)
        )
