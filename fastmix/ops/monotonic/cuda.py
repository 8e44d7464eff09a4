"""`monotonic` through the compiled core on CUDA: float32 and the usual network (see `limit`), else there is Triton.

Forward is two launches, backward four. For backward it keeps the first layers' outputs, 768 bytes a row, and the
weights as the kernels read them; the generated weights never reach memory. All temporaries of a pass are one
allocation, and so are the gradients of the parameters: what PyTorch does per tensor takes longer than a kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, Final

import torch
from torch import Tensor

from fastmix.ops import _library
from fastmix.ops._precision import float32_precision
from fastmix.ops._rows import layout, with_dense_rows
from fastmix.ops.monotonic.arguments import (
    INPUTS,
    POSITIVITY_CODES,
    Sizes,
    dense_params,
    sizes_of,
)
from fastmix.ops.monotonic.types import MonotonicParams

_HIDDEN: Final = 64
_EMBED: Final = 32
_COLUMNS: Final = 2 * _HIDDEN + 2 * _EMBED
"""Of the first layers' outputs: hidden layers of w1 and w2, b1, hidden layer of V; each is padded."""

_MOST_AGENTS: Final = 64
_MOST_FEATURES: Final = 4096


def limit(agent_qs: Tensor, states: Tensor, params: MonotonicParams, positivity: str) -> str | None:
    """Why these kernels cannot take arguments that are checked, or None where they can."""
    hidden = params.w1_hidden_bias
    only = None
    if agent_qs.dtype != torch.float32:
        only = "float32"
    elif torch.is_autocast_enabled("cuda"):
        only = "float32, not autocast's dtype"
    elif hidden is None:
        only = "hypernets of two layers"
    elif positivity not in ("abs", "none"):
        only = "positivity 'abs' and 'none'"
    elif hidden.shape[0] > _HIDDEN:
        only = f"hypernet layers of up to {_HIDDEN}"
    elif params.b1_bias.shape[0] > _EMBED:
        only = f"a mixing embed of up to {_EMBED}"
    elif agent_qs.shape[-1] > _MOST_AGENTS:
        only = f"up to {_MOST_AGENTS} agents"
    elif states.shape[-1] > _MOST_FEATURES:
        only = f"states of up to {_MOST_FEATURES} features"
    return only and f"monotonic on 'native' takes on CUDA only {only}"


def monotonic(agent_qs: Tensor, states: Tensor, params: MonotonicParams, positivity: str) -> Tensor:
    """See `fastmix.ops.monotonic`; arguments are already checked, and within `limit`.

    ``[N, A]`` and ``[N, S]`` give ``[N, 1]``, ``[B, N, A]`` and ``[B, N, S]`` give ``[B, N, 1]``.
    """
    training = _library.wants_grad((agent_qs, states, *params))
    q_tot: Tensor = _monotonic(agent_qs, states, *params, POSITIVITY_CODES[positivity], training)[0]
    return q_tot


def _forward(agent_qs: Tensor, states: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """``q_tot``, and what backward needs: packed weights and, if ``training``, activations ``[rows, 192]``."""
    from fastmix import _core

    params, (positivity, training) = rest[:14], rest[14:]
    sizes, states, (addresses, dense) = (
        sizes_of(states, params),
        with_dense_rows("monotonic", states),
        dense_params(params),
    )
    q_tot = torch.empty((*agent_qs.shape[:-1], 1), dtype=torch.float32, device=agent_qs.device)
    kept = torch.empty(_kept_size(sizes, training), dtype=torch.float32, device=agent_qs.device)
    packed, full = kept.data_ptr(), _full_precision()
    activations = packed + 4 * _packed_size(sizes[1], sizes[4]) if training else 0
    _library.queue_on(agent_qs.device, _core.monotonic_pack_cuda, addresses, packed, sizes, full)
    _library.queue_on(
        agent_qs.device, _core.monotonic_forward_cuda,
        layout(agent_qs), layout(states), packed, q_tot.data_ptr(), activations, sizes, positivity, full,
    )  # fmt: skip
    del dense
    return q_tot, kept


def _backward_forward(grad_q_tot: Tensor, agent_qs: Tensor, states: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """Gradients of agent_qs, states (empty if not wanted) and, one behind the other, the parameters (likewise)."""
    from fastmix import _core

    params, (kept, positivity, wants_states, wants_params) = rest[:14], rest[14:]
    sizes, states = sizes_of(states, params), with_dense_rows("monotonic", states)
    device, queue_on, full = agent_qs.device, _library.queue_on, _full_precision()
    rows, agents = sizes[:2]
    wants_signs = wants_params and positivity == POSITIVITY_CODES["abs"]
    signs_size = (rows * (agents + 1) + 1) // 2 * 4 if wants_signs else 0  # two words each; a multiple of 16 bytes
    parts_size = queue_on(device, _core.monotonic_parts_cuda, sizes, full) if wants_params else 0
    workspace = torch.empty(rows * _COLUMNS + signs_size + parts_size, dtype=torch.float32, device=device)
    grad_qs = torch.empty(agent_qs.shape, dtype=torch.float32, device=device)
    grad_params = torch.empty(_parameters(sizes) if wants_params else 0, dtype=torch.float32, device=device)
    grad_q_tot = grad_q_tot.contiguous()

    packed, grad_activations = kept.data_ptr(), workspace.data_ptr()
    activations = packed + 4 * _packed_size(agents, sizes[4])
    signs = grad_activations + 4 * rows * _COLUMNS if wants_signs else 0
    queue_on(
        device, _core.monotonic_backward_rows_cuda,
        layout(agent_qs), packed, grad_q_tot.data_ptr(), activations, grad_qs.data_ptr(), grad_activations, signs,
        sizes, positivity, full,
    )  # fmt: skip
    if wants_params:
        queue_on(
            device, _core.monotonic_backward_weights_cuda,
            layout(agent_qs), layout(states), grad_q_tot.data_ptr(), activations, grad_activations, signs,
            grad_activations + 4 * (rows * _COLUMNS + signs_size), parts_size, grad_params.data_ptr(),
            sizes, positivity, full,
        )  # fmt: skip
    grad_states = _grad_states(workspace, states, params, sizes) if wants_states else _nothing(states)
    return grad_qs, grad_states, grad_params


def _grad_states(workspace: Tensor, states: Tensor, params: tuple[Tensor, ...], sizes: Sizes) -> Tensor:
    """Rarely wanted, so left to the library: the gradient of the first layers' outputs times their weights."""
    grad = workspace[: sizes[0] * _COLUMNS].view(-1, _COLUMNS)
    total: Tensor | None = None
    for column, index in ((0, 0), (_HIDDEN, 4), (2 * _HIDDEN, 8), (2 * _HIDDEN + _EMBED, 10)):
        weight = params[index]
        part = grad[:, column : column + weight.shape[0]]
        total = part @ weight if total is None else total.addmm_(part, weight)
    assert total is not None
    return total.view(states.shape)


def _kept_size(sizes: Sizes, training: bool) -> int:
    return _packed_size(int(sizes[1]), int(sizes[4])) + (sizes[0] * _COLUMNS if training else 0)


@cache
def _packed_size(agents: int, state_dim: int) -> int:
    from fastmix import _core

    return _core.monotonic_packed_cuda(agents, state_dim)


def _parameters(sizes: Sizes) -> int:
    """How many numbers the 14 parameters have."""
    _, A, E, H, S = sizes
    return (A + 1) * E * (H + 1) + 2 * (H + E) * (S + 1) + E + 1


def _full_precision() -> bool:
    return float32_precision() == "highest"


def _nothing(like: Tensor) -> Tensor:
    return torch.empty(0, dtype=like.dtype, device=like.device)


def _fake(agent_qs: Tensor, states: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    agents = agent_qs.shape[-1]
    sizes = (agent_qs.numel() // agents, agents, 0, 0, states.shape[-1])
    return agent_qs.new_empty((*agent_qs.shape[:-1], 1)), agent_qs.new_empty(_kept_size(sizes, rest[-1]))


def _backward_fake(grad_q_tot: Tensor, agent_qs: Tensor, states: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    params, (wants_states, wants_params) = rest[:14], rest[-2:]
    return (
        agent_qs.new_empty(agent_qs.shape),
        states.new_empty(states.shape if wants_states else (0,)),
        states.new_empty(sum(p.numel() for p in params) if wants_params else 0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    tensors, (ctx.positivity, ctx.training) = inputs[:16], inputs[16:]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    if ctx.training:
        ctx.save_for_backward(*tensors, output[1])


def _backward(ctx: Any, grad_q_tot: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if not ctx.training:
        raise RuntimeError("fastmix::monotonic_cuda was called with training=False and cannot be differentiated")
    if grad_q_tot is None:
        return (None,) * 18
    saved, needs = ctx.saved_tensors, ctx.needs_input_grad
    wants_params = any(needs[2:16])
    grad_qs, grad_states, flat = _monotonic_backward(grad_q_tot, *saved, ctx.positivity, needs[1], wants_params)
    grads: tuple[Tensor | None, ...] = (None,) * 14
    if wants_params:
        grads = tuple(g if n else None for g, n in zip(_split(flat, list(saved[2:16])), needs[2:16], strict=True))
    return (grad_qs if needs[0] else None, grad_states if needs[1] else None, *grads, None, None)


def _split(flat: Tensor, like: list[Tensor]) -> Sequence[Tensor]:
    """Views of ``flat``, one behind the other, shaped like the parameters."""
    if type(flat) is Tensor:  # in one call, which knows no symbolic sizes
        return torch._C._nn.unflatten_dense_tensors(flat, like)
    return [part.view(p.shape) for part, p in zip(flat.split([p.numel() for p in like]), like, strict=True)]


_PARAMS: Final = INPUTS.replace("Tensor?", "Tensor")
_monotonic_backward = _library.define(
    "monotonic_cuda_backward",
    f"(Tensor grad_q_tot, {_PARAMS}, Tensor kept, int positivity, bool wants_states, bool wants_params)"
    " -> (Tensor, Tensor, Tensor)",
    _backward_forward,
    _backward_fake,
    devices=("CUDA",),
)
_monotonic = _library.define(
    "monotonic_cuda",
    f"({_PARAMS}, int positivity, bool training) -> (Tensor, Tensor)",
    _forward,
    _fake,
    setup_context=_setup_context,
    backward=_backward,
    devices=("CUDA",),
)
