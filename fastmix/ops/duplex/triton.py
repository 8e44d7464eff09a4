"""`duplex` and `importance` on NVIDIA GPUs through Triton.

The products are the library's: first layers that read the state are one product, later layers one batched product for
all kernels of a network; autograd knows how to go back through them. Kernels do what is between: those of
`fastmix.ops._joint_triton` add the weights of the joint action to a first layer; `combine_kernel` makes the parts of
the joint value of what the networks give, `spread_kernel` the gradients of all these. Every result is the same from run
to run.

Names: ``A`` agents, ``K`` kernels; ``AP`` is ``A`` padded, ``BM`` rows at once.
"""

# Kernels are written in Triton's language, which has no type annotations.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from fastmix.ops import _joint_triton as joint
from fastmix.ops import _library
from fastmix.ops._layers import Layers
from fastmix.ops._triton import DISPATCH_KEY, launching, next_power
from fastmix.ops.duplex.types import POSITIVE, DuplexOutput, DuplexParams, ImportanceParams


def duplex(
    agent_qs: Tensor,
    max_qs: Tensor | None,
    states: Tensor,
    actions: Tensor | None,
    params: DuplexParams,
    minus_one: bool,
    part: str,
) -> DuplexOutput:
    """See `fastmix.ops.duplex`; arguments are already checked: ``[N, A]`` and ``[N, S]`` give ``[N, 1]``.

    Products have the dtype of the arguments, float32 in the precision torch is set to; everything else is float32.
    """
    wants_v = part != "adv"
    scale, shift, *networks = _networks(states, actions, params, wants_v, part != "v")
    max_qs = None if max_qs is None or part == "v" else max_qs.detach()
    v, adv = _combine(agent_qs, max_qs, scale, shift, *networks, minus_one, wants_v)
    if part == "both":
        return DuplexOutput(v + adv, v, adv)
    return DuplexOutput(v, v, None) if wants_v else DuplexOutput(adv, None, adv)


def importance(states: Tensor, actions: Tensor, params: ImportanceParams) -> Tensor:
    """See `fastmix.ops.duplex.importance`; arguments are already checked: ``[N, S]`` and ``[N, A]`` give ``[N, A]``."""
    networks = _networks(states, actions, DuplexParams((), (), params), False, True)
    weights: Tensor = _combine(None, None, *networks, False, False)[1]
    return weights


# -------------------------------------------------------------------------------------------------------- the networks


def _networks(
    states: Tensor, actions: Tensor | None, params: DuplexParams, wants_v: bool, wants_adv: bool
) -> list[Tensor | None]:
    """What scale, shift, key, agents and action give: ``[N, A]``, or ``[K, N, 1 or A]``; None where absent."""
    key, agents, action = params.importance if wants_adv else ((), (), ())
    reading_states: list[Layers] = [params.scale, params.shift if wants_v else (), key, agents]
    outputs: list[Tensor | None] = [None] * 4
    for deep in (True, False):  # a hidden layer wants its ReLU, an output none
        chosen = [i for i, network in enumerate(reading_states) if network and (len(network) > 1) == deep]
        if not chosen:
            continue
        first = [reading_states[i][0] for i in chosen]
        weights = [layer.weight.reshape(-1, states.shape[1]) for layer in first]
        biases = [layer.bias.reshape(-1) for layer in first if layer.bias is not None]
        z = F.linear(states, _side_by_side(weights), _side_by_side(biases))
        pieces = (F.relu(z, inplace=True) if deep else z).split([len(weight) for weight in weights], 1)
        for i, piece in zip(chosen, pieces, strict=True):
            outputs[i] = _later_layers(piece, reading_states[i])
    return [*outputs, None if actions is None or not action else _action_network(states, actions, action)]


def _side_by_side(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _action_network(states: Tensor, actions: Tensor, layers: Layers) -> Tensor:
    S, inputs = states.shape[1], layers[0].weight.shape[-1]
    weight, bias = layers[0].weight.reshape(-1, inputs), layers[0].bias
    table = weight[:, S:].t().contiguous()
    z: Tensor = joint.gather(
        F.linear(states, weight[:, :S], None if bias is None else bias.reshape(-1)), actions, table
    )
    return _later_layers(F.relu(z, inplace=True) if len(layers) > 1 else z, layers)


def _later_layers(x: Tensor, layers: Layers) -> Tensor:
    """From the first layer's outputs ``[N, K * features]``."""
    grouped = layers[0].weight.dim() == 3
    if grouped:
        x = x.unflatten(1, layers[0].weight.shape[:2]).transpose(0, 1)
    for i, (weight, bias) in enumerate(layers[1:]):
        x = F.relu(x, inplace=True) if i > 0 else x
        if not grouped:
            x = F.linear(x, weight, bias)
        else:
            assert bias is not None
            x = torch.baddbmm(bias.unsqueeze(1), x, weight.mT)
    return x


# ---------------------------------------------------------------------------------------------------------- the kernels


@triton.jit(do_not_specialize=["rows"])
def combine_kernel(
    q_ptr, max_ptr, scale_ptr, shift_ptr, key_ptr, agents_ptr, action_ptr, v_ptr, adv_ptr, weights_ptr,
    rows, stride_scale, stride_shift, stride_key_k, stride_key, stride_agents_k, stride_agents,
    stride_action_k, stride_action, TINY: tl.constexpr,
    A: tl.constexpr, AP: tl.constexpr, K: tl.constexpr, BM: tl.constexpr,
    JOINT: tl.constexpr, SCALED: tl.constexpr, MINUS: tl.constexpr, WANTS_V: tl.constexpr,
):  # fmt: skip
    """The parts of the joint value of ``BM`` rows, or where not ``JOINT`` the importance weights alone."""
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    a = tl.arange(0, AP)
    live = row < rows
    mask = live[:, None] & (a < A)[None, :]
    weights = tl.zeros((BM, AP), tl.float32)
    for k in range(K):
        key = tl.load(key_ptr + k * stride_key_k + row * stride_key, mask=live, other=0.0).to(tl.float32)
        agents = tl.load(agents_ptr + k * stride_agents_k + row[:, None] * stride_agents + a[None, :], mask, 0.0)
        action = tl.load(action_ptr + k * stride_action_k + row[:, None] * stride_action + a[None, :], mask, 0.0)
        both = tl.sigmoid(agents.to(tl.float32)) * tl.sigmoid(action.to(tl.float32))
        weights += (tl.abs(key) + TINY)[:, None] * both
    if JOINT:
        q = tl.load(q_ptr + row[:, None] * A + a[None, :], mask, 0.0).to(tl.float32)
        w = tl.full((BM, AP), 1.0, tl.float32)
        if SCALED:
            w = tl.abs(tl.load(scale_ptr + row[:, None] * stride_scale + a[None, :], mask, 0.0).to(tl.float32)) + TINY
        if WANTS_V:
            value = w * q
            if SCALED:
                value += tl.load(shift_ptr + row[:, None] * stride_shift + a[None, :], mask, 0.0).to(tl.float32)
            tl.store(v_ptr + row, tl.sum(tl.where(mask, value, 0.0), 1), mask=live)
        if K > 0:
            largest = tl.load(max_ptr + row[:, None] * A + a[None, :], mask, 0.0).to(tl.float32)
            adv = w * (q - largest) * (weights - 1.0 if MINUS else weights)
            tl.store(adv_ptr + row, tl.sum(tl.where(mask, adv, 0.0), 1), mask=live)
    else:
        tl.store(weights_ptr + row[:, None] * A + a[None, :], weights, mask=mask)


@triton.jit(do_not_specialize=["rows"])
def spread_kernel(
    q_ptr, max_ptr, scale_ptr, key_ptr, agents_ptr, action_ptr, grad_v_ptr, grad_adv_ptr, grad_weights_ptr,
    dq_ptr, dscale_ptr, dshift_ptr, dkey_ptr, dagents_ptr, daction_ptr,
    rows, stride_scale, stride_key_k, stride_key, stride_agents_k, stride_agents, stride_action_k, stride_action,
    TINY: tl.constexpr, A: tl.constexpr, AP: tl.constexpr, K: tl.constexpr, BM: tl.constexpr,
    JOINT: tl.constexpr, SCALED: tl.constexpr, REACHES_V: tl.constexpr, REACHES_ADV: tl.constexpr,
):  # fmt: skip
    """Gradients of everything that `combine_kernel` read but ``max_qs``, for ``BM`` rows."""
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    a = tl.arange(0, AP)
    live = row < rows
    mask = live[:, None] & (a < A)[None, :]
    own = row[:, None] * A + a[None, :]
    if JOINT:
        q = tl.load(q_ptr + own, mask, 0.0).to(tl.float32)
        w = tl.full((BM, AP), 1.0, tl.float32)
        sign = w
        if SCALED:
            raw = tl.load(scale_ptr + row[:, None] * stride_scale + a[None, :], mask, 0.0).to(tl.float32)
            w = tl.abs(raw) + TINY
            sign = tl.where(raw > 0, 1.0, tl.where(raw < 0, -1.0, raw))
        if REACHES_V:
            grad_v = tl.load(grad_v_ptr + row, mask=live, other=0.0).to(tl.float32)[:, None]
            tl.store(dq_ptr + own, grad_v * w, mask=mask)
            if SCALED:
                tl.store(dscale_ptr + own, grad_v * q * sign, mask=mask)
                tl.store(dshift_ptr + own, grad_v + tl.zeros((BM, AP), tl.float32), mask=mask)
        if REACHES_ADV:
            grad_adv = tl.load(grad_adv_ptr + row, mask=live, other=0.0).to(tl.float32)[:, None]
            grad = grad_adv * (w * (q - tl.load(max_ptr + own, mask, 0.0).to(tl.float32)))
    else:
        grad = tl.load(grad_weights_ptr + own, mask, 0.0).to(tl.float32)
    if REACHES_ADV:
        for k in range(K):
            key = tl.load(key_ptr + k * stride_key_k + row * stride_key, mask=live, other=0.0).to(tl.float32)
            agents = tl.load(agents_ptr + k * stride_agents_k + row[:, None] * stride_agents + a[None, :], mask, 0.0)
            action = tl.load(action_ptr + k * stride_action_k + row[:, None] * stride_action + a[None, :], mask, 0.0)
            x = tl.sigmoid(agents.to(tl.float32))
            y = tl.sigmoid(action.to(tl.float32))
            grad_key = grad * x * y
            both = (tl.abs(key) + TINY)[:, None] * grad_key
            sign_key = tl.where(key > 0, 1.0, tl.where(key < 0, -1.0, key))
            tl.store(dkey_ptr + row, sign_key * tl.sum(tl.where(mask, grad_key, 0.0), 1), mask=live)
            tl.store(dagents_ptr + own, both * (1.0 - x), mask=mask)
            tl.store(daction_ptr + own, both * (1.0 - y), mask=mask)
            dkey_ptr += rows
            dagents_ptr += rows * A
            daction_ptr += rows * A


# ------------------------------------------------------------------------------------------------------------- the host


def _combine_forward(
    agent_qs: Tensor | None,
    max_qs: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    key: Tensor | None,
    agents: Tensor | None,
    action: Tensor | None,
    minus_one: bool,
    wants_v: bool,
) -> tuple[Tensor, Tensor]:
    """Both parts ``[N, 1]``, an empty one where not wanted; without utilities the second is the weights ``[N, A]``."""
    v, adv = _combine_fake(agent_qs, max_qs, scale, shift, key, agents, action, minus_one, wants_v)
    rows, A, K = _sizes(agent_qs, key, action)
    AP, BM = _tile(A)
    scale, shift, key, agents, action = (_dense_columns(x) for x in (scale, shift, key, agents, action))
    if rows:
        with launching(v):
            combine_kernel[(triton.cdiv(rows, BM),)](
                _contiguous(agent_qs), _contiguous(max_qs), scale, shift, key, agents, action, v, adv, adv,
                rows, _stride(scale), _stride(shift), _stride(key, 0), _stride(key), _stride(agents, 0),
                _stride(agents), _stride(action, 0), _stride(action), TINY=POSITIVE,
                A=A, AP=AP, K=K, BM=BM,
                JOINT=agent_qs is not None, SCALED=scale is not None, MINUS=minus_one, WANTS_V=wants_v, num_warps=4,
            )  # fmt: skip
    return v, adv


def _combine_fake(
    agent_qs: Tensor | None,
    max_qs: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    key: Tensor | None,
    agents: Tensor | None,
    action: Tensor | None,
    minus_one: bool,
    wants_v: bool,
) -> tuple[Tensor, Tensor]:
    like = action if agent_qs is None else agent_qs
    assert like is not None
    rows, A = like.shape[-2:]
    v = like.new_empty((rows, 1) if wants_v else (0,))
    if key is None:
        return v, like.new_empty(0)
    return v, like.new_empty(rows, A if agent_qs is None else 1)


def _spread_forward(
    grad_v: Tensor | None,
    grad_adv: Tensor | None,
    agent_qs: Tensor | None,
    max_qs: Tensor | None,
    scale: Tensor | None,
    key: Tensor | None,
    agents: Tensor | None,
    action: Tensor | None,
) -> tuple[Tensor, ...]:
    """Gradients of agent_qs, scale, shift, key, agents and action; those that nothing reaches are empty."""
    grads = _spread_fake(grad_v, grad_adv, agent_qs, max_qs, scale, key, agents, action)
    rows, A, K = _sizes(agent_qs, key, action)
    AP, BM = _tile(A)
    scale, key, agents, action = (_dense_columns(x) for x in (scale, key, agents, action))
    grad_v, grad_adv = _contiguous(grad_v), _contiguous(grad_adv)
    if rows:
        with launching(grads[0]):
            spread_kernel[(triton.cdiv(rows, BM),)](
                _contiguous(agent_qs), _contiguous(max_qs), scale, key, agents, action, grad_v, grad_adv, grad_adv,
                *grads,
                rows, _stride(scale), _stride(key, 0), _stride(key), _stride(agents, 0), _stride(agents),
                _stride(action, 0), _stride(action), TINY=POSITIVE, A=A, AP=AP, K=K, BM=BM,
                JOINT=agent_qs is not None, SCALED=scale is not None, REACHES_V=grad_v is not None,
                REACHES_ADV=grad_adv is not None, num_warps=4,
            )  # fmt: skip
    return grads


def _spread_fake(
    grad_v: Tensor | None,
    grad_adv: Tensor | None,
    agent_qs: Tensor | None,
    max_qs: Tensor | None,
    scale: Tensor | None,
    key: Tensor | None,
    agents: Tensor | None,
    action: Tensor | None,
) -> tuple[Tensor, ...]:
    like = action if agent_qs is None else agent_qs
    assert like is not None
    by_state = None if grad_v is None else scale
    by_kernel = (None, None, None) if grad_adv is None else (key, agents, action)
    qs = None if grad_v is None else agent_qs
    return tuple(like.new_empty(0 if x is None else x.shape) for x in (qs, by_state, by_state, *by_kernel))


def _combine_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    agent_qs, max_qs, scale, _, key, agents, action, _, wants_v = inputs
    ctx.set_materialize_grads(False)
    ctx.wants_v, ctx.wants_adv = wants_v, key is not None
    ctx.save_for_backward(agent_qs, max_qs, scale, key, agents, action)


def _combine_backward(ctx: Any, grad_v: Tensor | None, grad_adv: Tensor | None) -> tuple[Tensor | None, ...]:
    grad_v, grad_adv = grad_v if ctx.wants_v else None, grad_adv if ctx.wants_adv else None
    if grad_v is None and grad_adv is None:
        return (None,) * 9
    tensors = ctx.saved_tensors
    dq, dscale, dshift, *by_kernel = _spread(grad_v, grad_adv, *tensors)
    agent_qs, _, scale, *_ = tensors
    reaches_v, transformed = grad_v is not None, grad_v is not None and scale is not None
    kernels = by_kernel if grad_adv is not None else (None, None, None)
    return (
        dq if reaches_v and agent_qs is not None else None, None, dscale if transformed else None,
        dshift if transformed else None, *kernels, None, None,
    )  # fmt: skip


def _sizes(agent_qs: Tensor | None, key: Tensor | None, action: Tensor | None) -> tuple[int, int, int]:
    """Rows, agents, kernels."""
    like = action if agent_qs is None else agent_qs
    assert like is not None
    return like.shape[-2], like.shape[-1], 0 if key is None else key.shape[0]


def _tile(A: int) -> tuple[int, int]:
    """Agents padded, and rows of a program: 1,024 numbers, eight to a thread."""
    AP = next_power(A, 1)
    return AP, max(1, 1024 // AP)


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _dense_columns(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else _dense_rows(tensor)


def _dense_rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _stride(tensor: Tensor | None, dim: int = -2) -> int:
    return 0 if tensor is None else tensor.stride(dim)


_spread = _library.define(
    "duplex_spread_triton",
    "(Tensor? grad_v, Tensor? grad_adv, Tensor? agent_qs, Tensor? max_qs, Tensor? scale, Tensor? key, Tensor? agents,"
    " Tensor? action) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _spread_forward,
    _spread_fake,
    devices=(DISPATCH_KEY,),
)
_combine = _library.define(
    "duplex_combine_triton",
    "(Tensor? agent_qs, Tensor? max_qs, Tensor? scale, Tensor? shift, Tensor? key, Tensor? agents, Tensor? action,"
    " bool minus_one, bool wants_v) -> (Tensor, Tensor)",
    _combine_forward,
    _combine_fake,
    setup_context=_combine_setup,
    backward=_combine_backward,
    devices=(DISPATCH_KEY,),
)
