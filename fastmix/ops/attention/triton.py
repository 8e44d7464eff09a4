"""`attention` on NVIDIA GPUs through Triton.

The networks are library products; the keys' weights are multiplied into the queries' last layer, so that a head's query
comes as the numbers to multiply an agent's own features by, and no key is built. `attend_kernel` does all heads of a
block of rows, `attend_backward_kernel` makes attention again and gives the gradients of what the former read. Nothing
of ``[rows, heads, agents]`` reaches memory, but for the logits' gradients where one of the agents' own features is
wanted. Every result is the same from run to run.

Names: ``A`` agents, ``U`` own features of each, ``H`` heads, ``AP`` agents padded, ``BM`` rows of a program.
"""

# Kernels are written in Triton's language, which has no type annotations.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmix.ops import _library
from fastmix.ops._layers import Layers, Linear, mlp
from fastmix.ops._triton import DISPATCH_KEY, launching, next_power
from fastmix.ops.attention.types import AttentionOutput, AttentionParams

_DEAD = tl.constexpr(-99999999.0)
_LOG_EPS = tl.constexpr(1e-8)


def attention(
    agent_qs: Tensor,
    states: Tensor,
    params: AttentionParams,
    own_size: int,
    own_grad: bool,
    alive: Tensor | None,
    softmax: bool,
    return_weights: bool,
    return_statistics: bool,
) -> AttentionOutput:
    """See `fastmix.ops.attention`; arguments are already checked: ``[N, A]``, ``[N, S]``, and bool ``[N, A]``.

    Attention itself is float32 whatever the dtype, products are in the dtype's precision.
    """
    query = mlp(states, _with_keys(params))
    head = mlp(states, params.head) if params.head else None
    v = mlp(states, params.v) if params.v else None
    summed, weights, squares, entropies = _attend(
        agent_qs, states if own_grad else states.detach(), query, head, alive, own_size,
        params.key.bias is not None, softmax, return_weights, return_statistics,
        params.key.weight.shape[1] ** -0.5,
    )  # fmt: skip
    dtype = agent_qs.dtype
    q_tot = summed.unsqueeze(-1).to(dtype)
    return AttentionOutput(
        q_tot if v is None else q_tot + v,
        weights.to(dtype) if return_weights else None,
        v if return_weights else None,
        squares.to(dtype) if return_statistics else None,
        entropies.to(dtype) if return_statistics else None,
    )


def _with_keys(params: AttentionParams) -> Layers:
    """The queries' network with ``[K | k]`` multiplied into its last layer."""
    *hidden, (weight, bias) = params.query
    key = params.key.weight
    if params.key.bias is not None:
        key = torch.cat([key, params.key.bias.unsqueeze(-1)], -1)
    folded = None if bias is None else torch.bmm(key.mT, bias.unsqueeze(-1)).squeeze(-1)
    return (*hidden, Linear(torch.bmm(key.mT, weight), folded))


# ---------------------------------------------------------------------------------------------------------- the kernels


@triton.jit
def logits_of(
    q, own_ptr, query_ptr, row, agent, live, stride_own, stride_query, stride_feature,
    U: tl.constexpr, BM: tl.constexpr, AP: tl.constexpr, READS_QS: tl.constexpr, BIASED: tl.constexpr, A: tl.constexpr,
):  # fmt: skip
    """Logits ``[BM, AP]`` of the head whose queries begin at ``query_ptr``."""
    both = live[:, None] & (agent < A)[None, :]
    own = own_ptr + row[:, None] * stride_own + agent[None, :] * U
    query = query_ptr + row * stride_query
    logits = tl.zeros((BM, AP), tl.float32)
    for _ in range(U):
        features = tl.load(own, mask=both, other=0.0).to(tl.float32)
        logits += tl.load(query, mask=live, other=0.0).to(tl.float32)[:, None] * features
        own += 1
        query += stride_feature
    if READS_QS:
        logits += tl.load(query, mask=live, other=0.0).to(tl.float32)[:, None] * q
        query += stride_feature
    if BIASED:
        logits += tl.load(query, mask=live, other=0.0).to(tl.float32)[:, None]
    return logits


@triton.jit
def attended(logits, alive_ptr, row, agent, live, scale, A: tl.constexpr, SOFTMAX: tl.constexpr, ALIVE: tl.constexpr):
    """What utilities are multiplied by, before the heads' weights: ``[BM, AP]``, 0 in the padding."""
    scaled = logits * scale
    inside = (agent < A)[None, :]
    if SOFTMAX:
        if ALIVE:
            both = live[:, None] & inside
            alive = tl.load(alive_ptr + row[:, None] * A + agent[None, :], mask=both, other=1)
            scaled = tl.where(alive != 0, scaled, _DEAD)
        scaled = tl.where(inside, scaled, float("-inf"))
        scaled = tl.exp(scaled - tl.max(scaled, 1)[:, None])
        scaled = scaled / tl.sum(scaled, 1)[:, None]
    return tl.where(inside, scaled, 0.0)


@triton.jit(do_not_specialize=["rows"])
def attend_kernel(
    q_ptr, own_ptr, query_ptr, head_ptr, alive_ptr, out_ptr, weights_ptr, squares_ptr, entropies_ptr,
    rows, stride_q, stride_agent, stride_own, stride_head, stride_query, stride_feature, stride_row, stride_weight,
    scale,
    A: tl.constexpr, U: tl.constexpr, H: tl.constexpr, AP: tl.constexpr, BM: tl.constexpr,
    READS_QS: tl.constexpr, BIASED: tl.constexpr, WEIGHTED: tl.constexpr, ALIVE: tl.constexpr,
    SOFTMAX: tl.constexpr, WEIGHTS: tl.constexpr, STATISTICS: tl.constexpr,
):  # fmt: skip
    """The heads' sum of ``BM`` rows, and on request the agents' weights and each head's statistics."""
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    agent = tl.arange(0, AP)
    live = row < rows
    both = live[:, None] & (agent < A)[None, :]
    q = tl.load(q_ptr + row[:, None] * stride_q + agent[None, :] * stride_agent, mask=both, other=0.0).to(tl.float32)
    total = tl.zeros((BM, AP), tl.float32)
    for h in range(H):
        logits = logits_of(
            q, own_ptr, query_ptr + h * stride_head, row, agent, live, stride_own, stride_query, stride_feature,
            U, BM, AP, READS_QS, BIASED, A,
        )  # fmt: skip
        p = attended(logits, alive_ptr, row, agent, live, scale, A, SOFTMAX, ALIVE)
        if WEIGHTED:
            head = tl.load(head_ptr + row * stride_row + h * stride_weight, mask=live, other=0.0).to(tl.float32)
            total += tl.abs(head)[:, None] * p
        else:
            total += p
        if STATISTICS:
            squares = tl.sum(tl.where(both, logits * logits, 0.0), 1) / A
            tl.store(squares_ptr + row * H + h, squares, mask=live)
            tl.store(entropies_ptr + row * H + h, -tl.sum(p * tl.log(p + _LOG_EPS), 1), mask=live)
    tl.store(out_ptr + row, tl.sum(total * q, 1), mask=live)
    if WEIGHTS:
        tl.store(weights_ptr + row[:, None] * A + agent[None, :], total, mask=both)


@triton.jit(do_not_specialize=["rows"])
def attend_backward_kernel(
    q_ptr, own_ptr, query_ptr, head_ptr, alive_ptr,
    grad_ptr, grad_weights_ptr, grad_squares_ptr, grad_entropies_ptr,
    grad_q_ptr, grad_query_ptr, grad_head_ptr, grad_logits_ptr,
    rows, stride_q, stride_agent, stride_own, stride_head, stride_query, stride_feature, stride_row, stride_weight,
    scale,
    A: tl.constexpr, U: tl.constexpr, H: tl.constexpr, AP: tl.constexpr, BM: tl.constexpr,
    READS_QS: tl.constexpr, BIASED: tl.constexpr, WEIGHTED: tl.constexpr, ALIVE: tl.constexpr,
    SOFTMAX: tl.constexpr, WEIGHTS: tl.constexpr, SQUARES: tl.constexpr, ENTROPIES: tl.constexpr, OWN: tl.constexpr,
):  # fmt: skip
    """Gradients of utilities, queries, heads' weights and, with ``OWN``, of the logits, for ``BM`` rows."""
    Q: tl.constexpr = U + READS_QS + BIASED
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    agent = tl.arange(0, AP)
    live = row < rows
    both = live[:, None] & (agent < A)[None, :]
    q = tl.load(q_ptr + row[:, None] * stride_q + agent[None, :] * stride_agent, mask=both, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + row, mask=live, other=0.0)
    grad_total = grad[:, None] * q
    if WEIGHTS:
        grad_total += tl.load(grad_weights_ptr + row[:, None] * A + agent[None, :], mask=both, other=0.0)
    grad_q = tl.zeros((BM, AP), tl.float32)
    for h in range(H):
        query = query_ptr + h * stride_head
        logits = logits_of(
            q, own_ptr, query, row, agent, live, stride_own, stride_query, stride_feature,
            U, BM, AP, READS_QS, BIASED, A,
        )  # fmt: skip
        p = attended(logits, alive_ptr, row, agent, live, scale, A, SOFTMAX, ALIVE)
        grad_p = grad_total
        if WEIGHTED:
            head = tl.load(head_ptr + row * stride_row + h * stride_weight, mask=live, other=0.0).to(tl.float32)
            of_weight = tl.sum(grad_total * p, 1)
            of_head = tl.where(head > 0, of_weight, tl.where(head < 0, -of_weight, 0.0))
            tl.store(grad_head_ptr + row * H + h, of_head, mask=live)
            grad_q += grad[:, None] * tl.abs(head)[:, None] * p
            grad_p *= tl.abs(head)[:, None]
        else:
            grad_q += grad[:, None] * p
        if ENTROPIES:
            entropy = tl.load(grad_entropies_ptr + row * H + h, mask=live, other=0.0)
            grad_p -= entropy[:, None] * (tl.log(p + _LOG_EPS) + p / (p + _LOG_EPS))
        if SOFTMAX:
            grad_logits = scale * p * (grad_p - tl.sum(p * grad_p, 1)[:, None])
            if ALIVE:
                alive = tl.load(alive_ptr + row[:, None] * A + agent[None, :], mask=both, other=1)
                grad_logits = tl.where(alive != 0, grad_logits, 0.0)
        else:
            grad_logits = scale * grad_p
        if SQUARES:
            square = tl.load(grad_squares_ptr + row * H + h, mask=live, other=0.0)
            grad_logits += square[:, None] * (2.0 / A) * logits
        grad_logits = tl.where(both, grad_logits, 0.0)

        grad_query = grad_query_ptr + (h * rows + row) * Q
        own = own_ptr + row[:, None] * stride_own + agent[None, :] * U
        for _ in range(U):
            features = tl.load(own, mask=both, other=0.0).to(tl.float32)
            tl.store(grad_query, tl.sum(grad_logits * features, 1), mask=live)
            own += 1
            grad_query += 1
        if READS_QS:
            tl.store(grad_query, tl.sum(grad_logits * q, 1), mask=live)
            grad_query += 1
            with_q = tl.load(query + row * stride_query + U * stride_feature, mask=live, other=0.0).to(tl.float32)
            grad_q += grad_logits * with_q[:, None]
        if BIASED:
            tl.store(grad_query, tl.sum(grad_logits, 1), mask=live)
        if OWN:
            tl.store(grad_logits_ptr + (h * rows + row)[:, None] * A + agent[None, :], grad_logits, mask=both)
    tl.store(grad_q_ptr + row[:, None] * A + agent[None, :], grad_q, mask=both)


# ------------------------------------------------------------------------------------------------------------- the host


def _block(n_agents: int) -> tuple[int, int]:
    """Agents padded, and rows of a program: 512 numbers of each kind, which four warps hold in registers."""
    padded = next_power(n_agents, 1)
    return padded, max(16, min(128, 512 // padded))


def _constants(
    agent_qs: Tensor,
    query: Tensor,
    head: Tensor | None,
    alive: Tensor | None,
    own_size: int,
    biased: bool,
    softmax: bool,
) -> dict[str, Any]:
    padded, rows = _block(agent_qs.shape[1])
    return {
        "A": agent_qs.shape[1], "U": own_size, "H": query.shape[0], "AP": padded, "BM": rows,
        "READS_QS": query.shape[2] > own_size + biased, "BIASED": biased, "WEIGHTED": head is not None,
        "ALIVE": alive is not None, "SOFTMAX": softmax, "num_warps": 4,
    }  # fmt: skip


def _strides(agent_qs: Tensor, own: Tensor, query: Tensor, head: Tensor | None) -> tuple[int, ...]:
    return *agent_qs.stride(), own.stride(0), *query.stride(), *((0, 0) if head is None else head.stride())


def _bytes(alive: Tensor | None) -> Tensor | None:
    return None if alive is None else alive.view(torch.uint8)


def _forward(
    agent_qs: Tensor,
    own: Tensor,
    query: Tensor,
    head: Tensor | None,
    alive: Tensor | None,
    own_size: int,
    biased: bool,
    softmax: bool,
    return_weights: bool,
    return_statistics: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sum of the heads, and weights and statistics, which are empty where not wanted; all float32."""
    outputs = _forward_fake(
        agent_qs, own, query, head, alive, own_size, biased, softmax, return_weights, return_statistics, scale
    )
    rows = agent_qs.shape[0]
    if rows:
        own = own if own.stride(1) == 1 else own.contiguous()
        constants = _constants(agent_qs, query, head, alive, own_size, biased, softmax)
        with launching(agent_qs):
            attend_kernel[(triton.cdiv(rows, constants["BM"]),)](
                agent_qs, own, query, head, _bytes(alive), *outputs, rows, *_strides(agent_qs, own, query, head), scale,
                **constants, WEIGHTS=return_weights, STATISTICS=return_statistics,
            )  # fmt: skip
    return outputs


def _forward_fake(agent_qs: Tensor, own: Tensor, query: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return_weights, return_statistics = rest[5:7]
    rows, statistics = agent_qs.shape[0], (agent_qs.shape[0], query.shape[0]) if return_statistics else (0,)
    weights = tuple(agent_qs.shape) if return_weights else (0,)
    new = [agent_qs.new_empty(shape, dtype=torch.float32) for shape in ((rows,), weights, statistics, statistics)]
    return new[0], new[1], new[2], new[3]


def _backward_forward(
    grad: Tensor,
    grad_weights: Tensor | None,
    grad_squares: Tensor | None,
    grad_entropies: Tensor | None,
    agent_qs: Tensor,
    own: Tensor,
    query: Tensor,
    head: Tensor | None,
    alive: Tensor | None,
    own_size: int,
    biased: bool,
    softmax: bool,
    wants_own: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of utilities, queries, heads' weights and logits (the last two empty where there are none)."""
    grads = _new_grads(agent_qs, query, head, wants_own)
    rows = agent_qs.shape[0]
    if rows:
        own = own if own.stride(1) == 1 else own.contiguous()
        given = [None if g is None else g.contiguous() for g in (grad, grad_weights, grad_squares, grad_entropies)]
        constants = _constants(agent_qs, query, head, alive, own_size, biased, softmax)
        with launching(agent_qs):
            attend_backward_kernel[(triton.cdiv(rows, constants["BM"]),)](
                agent_qs, own, query, head, _bytes(alive), *given, *grads,
                rows, *_strides(agent_qs, own, query, head), scale,
                **constants, WEIGHTS=grad_weights is not None, SQUARES=grad_squares is not None,
                ENTROPIES=grad_entropies is not None, OWN=wants_own,
            )  # fmt: skip
    return grads


def _new_grads(
    agent_qs: Tensor, query: Tensor, head: Tensor | None, wants_own: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    heads, rows, width = query.shape
    logits = (heads, rows, agent_qs.shape[1]) if wants_own else (0,)
    shapes = (agent_qs.shape, (heads, rows, width), (0,) if head is None else (rows, heads), logits)
    new = [agent_qs.new_empty(shape, dtype=torch.float32) for shape in shapes]
    return new[0], new[1], new[2], new[3]


def _backward_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _new_grads(args[4], args[6], args[7], args[12])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.wants = (ctx.needs_input_grad[1], inputs[8], inputs[9])
    ctx.settings, ctx.scale = inputs[5:8], inputs[10]
    ctx.save_for_backward(*inputs[:5])


def _backward(
    ctx: Any,
    grad: Tensor | None,
    grad_weights: Tensor | None,
    grad_squares: Tensor | None,
    grad_entropies: Tensor | None,
) -> tuple[Tensor | None, ...]:
    agent_qs, own, query, head, alive = ctx.saved_tensors
    wants_own, weights, statistics = ctx.wants
    grad_weights = grad_weights if weights else None
    grad_squares, grad_entropies = (g if statistics else None for g in (grad_squares, grad_entropies))
    if grad is None and grad_weights is None and grad_squares is None and grad_entropies is None:
        return (None,) * 11
    grad = agent_qs.new_zeros(agent_qs.shape[0], dtype=torch.float32) if grad is None else grad
    grad_q, grad_query, grad_head, grad_logits = _attend_backward(
        grad, grad_weights, grad_squares, grad_entropies, agent_qs, own, query, head, alive, *ctx.settings, wants_own,
        ctx.scale,
    )  # fmt: skip
    grad_own = _own_gradient(grad_logits, query, own, ctx.settings[0]) if wants_own else None
    return (
        grad_q.to(agent_qs.dtype), grad_own, grad_query.to(query.dtype),
        None if head is None else grad_head.to(head.dtype), *(None,) * 7,
    )  # fmt: skip


def _own_gradient(grad_logits: Tensor, query: Tensor, own: Tensor, own_size: int) -> Tensor:
    """Of the state, from its part that is the agents' own features: zeros behind it."""
    rows, n_agents = grad_logits.shape[1:]
    features = torch.einsum("hna,hnu->nau", grad_logits, query[..., :own_size].float()).flatten(1)
    rest = features.new_zeros(rows, own.shape[1] - n_agents * own_size)
    return torch.cat([features, rest], 1).to(own.dtype)


_attend_backward = _library.define(
    "attention_triton_backward",
    "(Tensor grad, Tensor? grad_weights, Tensor? grad_squares, Tensor? grad_entropies, Tensor agent_qs, Tensor own,"
    " Tensor query, Tensor? head, Tensor? alive, int own_size, bool biased, bool softmax, bool wants_own, float scale)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _backward_forward,
    _backward_fake,
    devices=(DISPATCH_KEY,),
)
_attend = _library.define(
    "attention_triton",
    "(Tensor agent_qs, Tensor own, Tensor query, Tensor? head, Tensor? alive, int own_size, bool biased, bool softmax,"
    " bool return_weights, bool return_statistics, float scale) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    setup_context=_setup_context,
    backward=_backward,
    devices=(DISPATCH_KEY,),
)
