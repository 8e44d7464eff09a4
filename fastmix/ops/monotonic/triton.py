"""`monotonic` on NVIDIA GPUs through Triton.

With a gradient, the hypernets' first layers are one library product into ``P [rows, F]``; `mix_kernel` then does second
layer, positivity and mix, one block of rows a program, and leaves the mix before its ELU in ``P`` where ``b1`` was.
Backward generates the weights again: `backward_kernel` writes the gradients of the agents' values and of ``P``,
`weight_gradient_kernel` those of the second layer as partial sums over fixed pieces of the rows, `add_parts_kernel`
adds them in a fixed order, and two library products finish the first layer. Generated weights never reach memory, and
every result is the same from run to run. Without a gradient `mix_kernel` computes the first layer too and there is no
``P``.

One-layer hypernets have no hidden part: there ``P`` holds ``b1`` and ``V``'s hidden layer only, the kernels read the
state where they otherwise read a hidden layer, and backward writes the gradient of the generated weights, since what
remains to be done with it, products with the states and with the weights, is the library's kind of work.

Names: ``A`` agents, ``E`` mixing embed, ``H`` hypernet embed, ``S`` state features, ``K`` inputs of the second layer
(``H``, or ``S`` with one layer); ``EP``, ``KP``, ``SP`` are those sizes padded, ``BM`` rows and ``BK`` inputs at once.
"""

# Kernels are written in Triton's language, which has no type annotations.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmix.ops import _library
from fastmix.ops._triton import (
    DISPATCH_KEY,
    dot,
    dot_precision,
    elu,
    elu_slope,
    has_wide_products,
    launching,
    multiprocessors,
    next_power,
    operand,
    relu,
    softplus,
    softplus_slope,
)
from fastmix.ops.monotonic.types import POSITIVITIES, MonotonicParams


def monotonic(agent_qs: Tensor, states: Tensor, params: MonotonicParams, positivity: str, beta: float) -> Tensor:
    """See `fastmix.ops.monotonic`; arguments are already checked, ``[N, A]`` and ``[N, S]``, and the result is ``[N]``.

    The dtype of ``states`` is the one of products: float32 (in the precision torch is set to), float16 or bfloat16;
    under autocast it is autocast's. Sums and the mix are float32, and so is the result under autocast; otherwise it has
    the dtype of ``agent_qs``.
    """
    device = states.device.type
    if torch.is_autocast_enabled(device):
        dtype = result = torch.get_autocast_dtype(device)
        result = torch.float32
    else:
        dtype, result = states.dtype, agent_qs.dtype
    q_tot: Tensor = _monotonic(
        agent_qs.float(),
        states.to(dtype),
        *params,
        POSITIVITIES.index(positivity),
        beta,
        _library.wants_grad((agent_qs, states, *params)),
    )[0]
    return q_tot.to(result)


# ------------------------------------------------------------------------------------------------------------ the sizes


class Sizes(NamedTuple):
    """Constants of the kernels for one network."""

    A: int
    E: int
    H: int
    S: int
    layers: int
    K: int
    EP: int
    KP: int
    BK: int
    SP: int
    columns: int
    """``F``: of ``P`` and with two layers of its gradient: hidden of w1 and w2 (``KP`` each), b1 and V (``EP`` each)"""
    grad_columns: int
    """Of the gradient kept in memory: ``F``, or with one layer w1 (``A * EP``), w2, b1 and V (``EP`` each)"""


class Launch(NamedTuple):
    """Rows a program takes at a time, warps, and stages of its software pipeline."""

    BM: int
    num_warps: int
    num_stages: int


def plan(A: int, E: int, H: int, S: int, layers: int) -> Sizes:
    """The constants for one network. Sizes that a compiler traces as symbols become numbers; rows may stay symbols."""
    return _plan(int(A), int(E), int(H), int(S), layers)


@lru_cache(maxsize=256)
def _plan(A: int, E: int, H: int, S: int, layers: int) -> Sizes:
    """Padded sizes: powers of two where the kernels hold all of an axis, multiples of a block where they walk along it.

    ``P`` and the packed weights have the padded sizes with zeros in the padding, so that kernels need no masks there.
    """
    EP = next_power(E)
    K = H if layers == 2 else S
    # A hidden layer of 64 is one block, kept for all agents; blocks that are read again for each of them are smaller.
    BK = min(next_power(K), 64 if layers == 2 and EP <= 64 else 32)
    KP = -(-K // BK) * BK
    BS = min(next_power(S), 32)
    SP = -(-S // BS) * BS if layers == 2 else KP
    columns = 2 * KP + 2 * EP if layers == 2 else 2 * EP
    return Sizes(A, E, H, S, layers, K, EP, KP, BK, SP, columns, columns if layers == 2 else (A + 3) * EP)


def forward_launch(rows: int, sizes: Sizes, precision: str, device: torch.device) -> Launch:
    """Tiles of `mix_kernel` after a library product.

    One wave at 15,360 rows is 120 programs of 128 rows; fewer rows get smaller tiles so that every multiprocessor has
    one, down to 16. Three products for one, blocks of the state in flight, or operands in registers as before Hopper
    leave room for half of it.
    """
    wide = has_wide_products(device)
    most = 128 if wide and precision != "tf32x3" and sizes.layers == 2 else 64
    BM = _rows_per_program(rows, most, sizes.EP, device)
    if BM == 32 and sizes.EP <= 32 and sizes.layers == 2:
        BM = 16  # too few for the wide matrix instructions as well, and does not spill
    large = BM == 128 or (BM == 64 and (precision == "tf32x3" or not wide))
    return Launch(BM, 8 if large or sizes.EP > 32 or sizes.layers == 1 else 4, 2)


def fused_launch(rows: int, sizes: Sizes, precision: str, device: torch.device) -> Launch:
    """Tiles of `mix_kernel` with the first layer inside, which holds ``2 * KP + 2 * EP`` accumulators a row."""
    BM = forward_launch(rows, sizes, precision, device).BM
    if precision == "tf32x3" and not has_wide_products(device):
        BM = 16
    return Launch(BM, 8 if BM >= 64 or sizes.EP > 32 or sizes.layers == 1 else 4, 3)


def backward_launch(rows: int, sizes: Sizes, precision: str, device: torch.device) -> Launch:
    """Tiles of `backward_kernel`: beyond 64 rows it spills registers, with ``tf32x3`` beyond 32."""
    BM = _rows_per_program(rows, 32 if precision == "tf32x3" else 64, sizes.EP, device)
    return Launch(BM, 8 if BM == 64 or sizes.EP > 64 or sizes.layers == 1 else 4, 2)


def weight_gradient_launch(sizes: Sizes, precision: str) -> Launch:
    """Tiles of `weight_gradient_kernel`, whose accumulators are ``BK * EP``."""
    if precision == "tf32x3" and sizes.EP > 128:
        return Launch(16, 8, 1)
    return Launch(32, 8 if sizes.EP > 32 else 4, 2)


def _rows_per_program(rows: int, most: int, EP: int, device: torch.device) -> int:
    BM = max(16, most * 32 // max(EP, 32))
    while BM > 16 and rows <= (BM // 2) * multiprocessors(device):
        BM //= 2
    return BM


def _row_blocks_per_part(rows: int, block: int, programs: int, device: torch.device) -> int:
    """How many blocks of rows one program of `weight_gradient_kernel` adds up: a power of two, to compile it rarely.

    Enough programs for eight on each multiprocessor, which wait for memory in turns; each further part is one more
    write and read of all weight gradients.
    """
    blocks = -(-rows // block)
    wanted_parts = max(1, 8 * multiprocessors(device) // programs)
    return min(64, next_power(-(-blocks // wanted_parts), 1))


# ---------------------------------------------------------------------------------------------------------- the kernels


@triton.jit
def positive(z, beta, POSITIVITY: tl.constexpr):
    """A generated weight made non-negative; the codes are indices into `POSITIVITIES`."""
    if POSITIVITY == 0:
        w = tl.abs(z)
    elif POSITIVITY == 1:
        w = softplus(z, beta)
    elif POSITIVITY == 2:
        w = 0.5 * z * z
    else:
        w = z
    return w


@triton.jit
def positive_slope(z, beta, POSITIVITY: tl.constexpr):
    """Derivative of `positive`; that of ``abs`` is 0 at 0."""
    if POSITIVITY == 0:
        slope = tl.where(z > 0, 1.0, tl.where(z < 0, -1.0, 0.0))
    elif POSITIVITY == 1:
        slope = softplus_slope(z, beta)
    elif POSITIVITY == 2:
        slope = z
    else:
        slope = tl.full(z.shape, 1.0, tl.float32)
    return slope


@triton.jit
def load_inputs(
    h_ptr, row, live, stride, k,
    K: tl.constexpr, KP: tl.constexpr, LAYERS: tl.constexpr, PRECISION: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Inputs ``k`` of the second layer: a hidden layer, padded and still without its ReLU, or the state."""
    mask = live[:, None]
    if LAYERS == 1 and K != KP:
        mask = mask & (k < K)[None, :]
    h = tl.load(h_ptr + row[:, None] * stride + k[None, :], mask=mask, other=0.0)
    if LAYERS == 2:
        h = relu(h)
    return operand(h, PRECISION, DTYPE)


@triton.jit
def generate(
    h, h_ptr, row, live, stride, w_ptr, bias_ptr,
    E: tl.constexpr, K: tl.constexpr, EP: tl.constexpr, KP: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
    LAYERS: tl.constexpr, PRECISION: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Generated weights ``[BM, EP]`` before positivity, from the packed weights ``[EP, KP]`` at ``w_ptr``.

    Where one block holds all inputs, ``h`` is that block; otherwise it is read from ``h_ptr`` block by block.
    """
    e = tl.arange(0, EP)
    k = tl.arange(0, BK)
    z = tl.zeros((BM, EP), tl.float32)
    if KP == BK:
        w = tl.load(w_ptr + e[None, :] * KP + k[:, None])
        z = dot(h, w, z, PRECISION)
    else:
        for k0 in range(0, KP, BK):
            block = load_inputs(h_ptr, row, live, stride, k0 + k, K, KP, LAYERS, PRECISION, DTYPE)
            w = tl.load(w_ptr + e[None, :] * KP + (k0 + k)[:, None])
            z = dot(block, w, z, PRECISION)
    bias = tl.load(bias_ptr + e, mask=e < E, other=0.0).to(tl.float32)
    return z + bias[None, :]


@triton.jit(do_not_specialize=["rows"])
def mix_kernel(
    q_ptr, states_ptr, p_ptr, first_ptr, first_bias_ptr, second_ptr,
    w1_bias_ptr, w2_bias_ptr, v_weight_ptr, v_bias_ptr, out_ptr,
    rows, stride_q_row, stride_q_agent, stride_state, beta,
    A: tl.constexpr, E: tl.constexpr, K: tl.constexpr, S: tl.constexpr,
    EP: tl.constexpr, KP: tl.constexpr, SP: tl.constexpr, F: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BS: tl.constexpr,
    LAYERS: tl.constexpr, POSITIVITY: tl.constexpr, PRECISION: tl.constexpr, FUSED: tl.constexpr,
):  # fmt: skip
    """``q_tot`` of ``BM`` rows; ``FUSED`` computes the first layer here, otherwise ``P`` holds it."""
    DTYPE: tl.constexpr = second_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    live = row < rows
    e = tl.arange(0, EP)
    k = tl.arange(0, BK)
    h1 = 0
    h2 = 0
    if FUSED:
        pre = tl.zeros((BM, EP), tl.float32)
        hv = tl.zeros((BM, EP), tl.float32)
        s = tl.arange(0, BS)
        if LAYERS == 2:
            a1 = tl.zeros((BM, KP), tl.float32)
            a2 = tl.zeros((BM, KP), tl.float32)
            for s0 in range(0, SP, BS):
                mask = live[:, None] & ((s0 + s) < S)[None, :]
                x = tl.load(states_ptr + row[:, None] * stride_state + (s0 + s)[None, :], mask=mask, other=0.0)
                x = operand(x, PRECISION, DTYPE)
                first = first_ptr + (s0 + s)[:, None]
                a1 = dot(x, tl.load(first + k[None, :] * SP), a1, PRECISION)
                a2 = dot(x, tl.load(first + (KP + k)[None, :] * SP), a2, PRECISION)
                pre = dot(x, tl.load(first + (2 * KP + e)[None, :] * SP), pre, PRECISION)
                hv = dot(x, tl.load(first + (2 * KP + EP + e)[None, :] * SP), hv, PRECISION)
            h1 = operand(relu(a1 + tl.load(first_bias_ptr + k)[None, :]), PRECISION, DTYPE)
            h2 = operand(relu(a2 + tl.load(first_bias_ptr + KP + k)[None, :]), PRECISION, DTYPE)
        else:
            for s0 in range(0, SP, BS):
                x = load_inputs(states_ptr, row, live, stride_state, s0 + s, S, SP, 1, PRECISION, DTYPE)
                first = first_ptr + (s0 + s)[:, None]
                pre = dot(x, tl.load(first + e[None, :] * SP), pre, PRECISION)
                hv = dot(x, tl.load(first + (EP + e)[None, :] * SP), hv, PRECISION)
        pre += tl.load(first_bias_ptr + F - 2 * EP + e)[None, :].to(tl.float32)
        hv += tl.load(first_bias_ptr + F - EP + e)[None, :].to(tl.float32)
    else:
        p = p_ptr + row[:, None] * F + (F - 2 * EP + e)[None, :]
        pre = tl.load(p, mask=live[:, None], other=0.0).to(tl.float32)
        hv = tl.load(p + EP, mask=live[:, None], other=0.0).to(tl.float32)
    if LAYERS == 2:
        h1_ptr = p_ptr
        h2_ptr = p_ptr + KP
        stride = F
    else:
        h1_ptr = states_ptr
        h2_ptr = states_ptr
        stride = stride_state
    if KP == BK and not (FUSED and LAYERS == 2):
        h1 = load_inputs(h1_ptr, row, live, stride, k, K, KP, LAYERS, PRECISION, DTYPE)
        h2 = load_inputs(h2_ptr, row, live, stride, k, K, KP, LAYERS, PRECISION, DTYPE)

    # Everything from h2 first, so that it is gone when the loop over agents needs registers.
    z = generate(
        h2, h2_ptr, row, live, stride, second_ptr + A * EP * KP, w2_bias_ptr,
        E, K, EP, KP, BM, BK, LAYERS, PRECISION, DTYPE,
    )  # fmt: skip
    w2 = tl.where((e < E)[None, :], positive(z, beta, POSITIVITY), 0.0)
    v_weight = tl.load(v_weight_ptr + e, mask=e < E, other=0.0).to(tl.float32)
    v = tl.sum(relu(hv) * v_weight[None, :], 1) + tl.load(v_bias_ptr).to(tl.float32)

    q_column = q_ptr + row * stride_q_row
    for a in range(A):
        z = generate(
            h1, h1_ptr, row, live, stride, second_ptr + a * EP * KP, w1_bias_ptr + a * E,
            E, K, EP, KP, BM, BK, LAYERS, PRECISION, DTYPE,
        )  # fmt: skip
        q = tl.load(q_column, mask=live, other=0.0)
        q_column += stride_q_agent
        pre += q[:, None] * positive(z, beta, POSITIVITY)
    if not FUSED:
        tl.store(p_ptr + row[:, None] * F + (F - 2 * EP + e)[None, :], pre, mask=live[:, None])
    tl.store(out_ptr + row, tl.sum(elu(pre) * w2, 1) + v, mask=live)


@triton.jit(do_not_specialize=["rows"])
def backward_kernel(
    q_ptr, states_ptr, p_ptr, second_ptr, w1_bias_ptr, w2_bias_ptr, v_weight_ptr, grad_ptr,
    grad_q_ptr, grad_p_ptr, part_ptr,
    rows, stride_q_row, stride_q_agent, stride_state, stride_grad, beta,
    A: tl.constexpr, E: tl.constexpr, K: tl.constexpr,
    EP: tl.constexpr, KP: tl.constexpr, F: tl.constexpr, G: tl.constexpr, PART: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr,
    LAYERS: tl.constexpr, POSITIVITY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the agents' values and of ``P`` (before its ReLU) for ``BM`` rows, and sums of the latter over them.

    Several blocks of hidden units are several programs, each of which generates the weights again. The gradient with
    respect to a generated weight needs no more than the sign (for ``abs``) of what is generated here once more.
    """
    DTYPE: tl.constexpr = second_ptr.dtype.element_ty
    tile = tl.program_id(0)
    block = tl.program_id(1)
    row = tile.to(tl.int64) * BM + tl.arange(0, BM)
    live = row < rows
    e = tl.arange(0, EP)
    k = tl.arange(0, BK)
    own = block * BK + k  # the hidden units whose gradient this program writes
    valid = (e < E)[None, :]
    mask = live[:, None]
    part = part_ptr + tile.to(tl.int64) * PART
    grad_p = grad_p_ptr + row[:, None] * G
    h1 = 0
    h2 = 0
    if LAYERS == 2:
        h1_ptr = p_ptr
        h2_ptr = p_ptr + KP
        stride = F
    else:
        h1_ptr = states_ptr
        h2_ptr = states_ptr
        stride = stride_state
    if KP == BK:
        h1 = load_inputs(h1_ptr, row, live, stride, k, K, KP, LAYERS, PRECISION, DTYPE)
        h2 = load_inputs(h2_ptr, row, live, stride, k, K, KP, LAYERS, PRECISION, DTYPE)

    grad = tl.load(grad_ptr + row * stride_grad, mask=live, other=0.0)[:, None]
    p = p_ptr + row[:, None] * F + (F - 2 * EP + e)[None, :]
    pre = tl.load(p, mask=mask, other=0.0).to(tl.float32)
    z = generate(
        h2, h2_ptr, row, live, stride, second_ptr + A * EP * KP, w2_bias_ptr,
        E, K, EP, KP, BM, BK, LAYERS, PRECISION, DTYPE,
    )  # fmt: skip
    grad_pre = tl.where(valid, grad * positive(z, beta, POSITIVITY) * elu_slope(pre), 0.0)
    grad_z = tl.where(valid, grad * elu(pre) * positive_slope(z, beta, POSITIVITY), 0.0)
    if LAYERS == 2:
        w = tl.load(second_ptr + (A * EP + e)[:, None] * KP + own[None, :])
        grad_h = dot(operand(grad_z, PRECISION, DTYPE), w, tl.zeros((BM, BK), tl.float32), PRECISION)
        h = tl.load(h2_ptr + row[:, None] * F + own[None, :], mask=mask, other=0.0)
        grad_h = tl.where(h > 0, grad_h, 0.0)
        tl.store(grad_p + (KP + own)[None, :], grad_h, mask=mask)
        tl.store(part + KP + own, tl.sum(grad_h, 0))
    else:
        tl.store(grad_p + (A * EP + e)[None, :], grad_z, mask=mask)
        tl.store(part + A * EP + e, tl.sum(grad_z, 0))
    if block == 0:
        hv = tl.load(p + EP, mask=mask, other=0.0).to(tl.float32)
        v_weight = tl.load(v_weight_ptr + e, mask=e < E, other=0.0).to(tl.float32)
        grad_hv = tl.where(hv > 0, grad * v_weight[None, :], 0.0)
        tl.store(grad_p + (G - 2 * EP + e)[None, :], grad_pre, mask=mask)
        tl.store(grad_p + (G - EP + e)[None, :], grad_hv, mask=mask)
        tl.store(part + G - 2 * EP + e, tl.sum(grad_pre, 0))
        tl.store(part + G - EP + e, tl.sum(grad_hv, 0))
        tl.store(part + G + e, tl.sum(grad * relu(hv), 0))
        end = tl.arange(0, 16)
        tl.store(part + G + EP + end, tl.where(end == 0, tl.sum(tl.reshape(grad, (BM,)), 0), 0.0))

    grad_h = tl.zeros((BM, BK), tl.float32)
    q_column = q_ptr + row * stride_q_row
    for a in range(A):
        z = generate(
            h1, h1_ptr, row, live, stride, second_ptr + a * EP * KP, w1_bias_ptr + a * E,
            E, K, EP, KP, BM, BK, LAYERS, PRECISION, DTYPE,
        )  # fmt: skip
        q = tl.load(q_column, mask=live, other=0.0)
        q_column += stride_q_agent
        grad_q = tl.sum(grad_pre * positive(z, beta, POSITIVITY), 1)
        tl.store(grad_q_ptr + row * A + a, grad_q, mask=live & (block == 0))
        grad_z = q[:, None] * grad_pre * positive_slope(z, beta, POSITIVITY)
        if LAYERS == 2:
            w = tl.load(second_ptr + (a * EP + e)[:, None] * KP + own[None, :])
            grad_h = dot(operand(grad_z, PRECISION, DTYPE), w, grad_h, PRECISION)
        else:
            tl.store(grad_p + (a * EP + e)[None, :], grad_z, mask=mask)
            tl.store(part + a * EP + e, tl.sum(grad_z, 0))
    if LAYERS == 2:
        h = tl.load(h1_ptr + row[:, None] * F + own[None, :], mask=mask, other=0.0)
        grad_h = tl.where(h > 0, grad_h, 0.0)
        tl.store(grad_p + own[None, :], grad_h, mask=mask)
        tl.store(part + own, tl.sum(grad_h, 0))


@triton.jit(do_not_specialize=["rows"])
def weight_gradient_kernel(
    q_ptr, p_ptr, grad_p_ptr, grad_ptr, second_ptr, w1_bias_ptr, w2_bias_ptr, part_ptr,
    rows, stride_q_row, stride_q_agent, stride_grad, beta,
    A: tl.constexpr, E: tl.constexpr, K: tl.constexpr, EP: tl.constexpr, KP: tl.constexpr, F: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, ROW_BLOCKS: tl.constexpr, POSITIVITY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of the second layer of one agent (number ``A`` is ``w2``) over one part of the rows; two layers only.

    Programs: agents, parts, blocks of hidden units.
    """
    DTYPE: tl.constexpr = second_ptr.dtype.element_ty
    agent = tl.program_id(0)
    part = tl.program_id(1)
    e = tl.arange(0, EP)
    k = tl.arange(0, BK)
    own = tl.program_id(2) * BK + k
    last = agent == A
    h_ptr = p_ptr + tl.where(last, KP, 0)
    bias_ptr = w1_bias_ptr + agent * E
    if last:
        bias_ptr = w2_bias_ptr
    w_ptr = second_ptr + agent * EP * KP
    q_column = q_ptr + agent.to(tl.int64) * stride_q_agent
    acc = tl.zeros((BK, EP), tl.float32)
    acc_bias = tl.zeros((EP,), tl.float32)
    for i in range(ROW_BLOCKS):
        row = (part * ROW_BLOCKS + i).to(tl.int64) * BM + tl.arange(0, BM)
        live = row < rows
        mask = live[:, None]
        h = load_inputs(h_ptr, row, live, F, own, K, KP, 2, PRECISION, DTYPE)
        z = generate(h, h_ptr, row, live, F, w_ptr, bias_ptr, E, K, EP, KP, BM, BK, 2, PRECISION, DTYPE)
        # The gradient of a generated weight is its slope times q_a * grad_pre, or for w2 times grad * elu(pre).
        q = tl.load(q_column + row * stride_q_row, mask=live & (agent < A), other=0.0)
        grad = tl.load(grad_ptr + row * stride_grad, mask=live & last, other=0.0)
        pre_column = row[:, None] * F + (F - 2 * EP + e)[None, :]
        grad_pre = tl.load(grad_p_ptr + pre_column, mask=mask & (agent < A), other=0.0).to(tl.float32)
        pre = tl.load(p_ptr + pre_column, mask=mask & last & (e < E)[None, :], other=0.0).to(tl.float32)
        grad_z = (q[:, None] * grad_pre + grad[:, None] * elu(pre)) * positive_slope(z, beta, POSITIVITY)
        acc = dot(tl.trans(h), operand(grad_z, PRECISION, DTYPE), acc, PRECISION)
        acc_bias += tl.sum(grad_z, 0)
    out = part_ptr + part.to(tl.int64) * ((A + 1) * EP * (KP + 1))
    tl.store(out + (agent * EP + e)[None, :] * KP + own[:, None], acc)
    if tl.program_id(2) == 0:
        tl.store(out + (A + 1) * EP * KP + agent * EP + e, acc_bias)


@triton.jit(do_not_specialize=["x_parts", "y_parts"])
def add_parts_kernel(
    x_ptr, y_ptr, out_ptr, x_parts, y_parts, X: tl.constexpr, Y: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr
):
    """Sums of ``x [x_parts, X]`` and ``y [y_parts, Y]`` over their parts, side by side, in a fixed order."""
    program = tl.program_id(0)
    X_BLOCKS: tl.constexpr = (X + BLOCK - 1) // BLOCK
    ptr = x_ptr
    parts = x_parts
    size = X
    first = program
    out = out_ptr
    if program >= X_BLOCKS:
        ptr = y_ptr
        parts = y_parts
        size = Y
        first = program - X_BLOCKS
        out = out_ptr + X
    column = first * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    total = tl.zeros((BLOCK,), tl.float32)
    start = 0
    while start < parts:
        number = start + tl.arange(0, PARTS)
        mask = (number < parts)[:, None] & inside[None, :]
        values = tl.load(ptr + number.to(tl.int64)[:, None] * size + column[None, :], mask=mask, other=0.0)
        total += tl.sum(values, 0)
        start += PARTS
    tl.store(out + column, total, mask=inside)


@triton.jit
def pack_kernel(
    w1_hidden_ptr, w1_hidden_bias_ptr, w2_hidden_ptr, w2_hidden_bias_ptr, w1_ptr, w2_ptr,
    b1_ptr, b1_bias_ptr, v_hidden_ptr, v_hidden_bias_ptr, second_ptr, first_ptr, first_bias_ptr,
    A: tl.constexpr, E: tl.constexpr, H: tl.constexpr, K: tl.constexpr, S: tl.constexpr,
    EP: tl.constexpr, KP: tl.constexpr, SP: tl.constexpr,
    LAYERS: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The weights as operands of products, padded with zeros.

    ``second [(A + 1) * EP, KP]`` is agent after agent, then w2; ``first [F, SP]`` has its rows in the order of the
    columns of ``P``. A program copies 16 rows, which are always of one and the same parameter.
    """
    DTYPE: tl.constexpr = second_ptr.dtype.element_ty
    row = tl.program_id(0) * 16
    within = tl.arange(0, 16)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if row < (A + 1) * EP:
        agent = row // EP
        r = row - agent * EP + within
        source = w1_ptr + agent * E * K
        if agent == A:
            source = w2_ptr
        inside = (r < E)[:, None] & (column < K)[None, :]
        values = tl.load(source + r[:, None] * K + column[None, :], mask=inside, other=0.0)
        out = second_ptr + (row + within)[:, None] * KP + column[None, :]
        tl.store(out, operand(values, PRECISION, DTYPE), mask=(column < KP)[None, :])
    else:
        f = row - (A + 1) * EP
        source = b1_ptr
        bias = b1_bias_ptr
        r = f + within
        size = E
        if LAYERS == 2:
            r = r - 2 * KP
            if f < KP:
                source = w1_hidden_ptr
                bias = w1_hidden_bias_ptr
                r = f + within
                size = H
            elif f < 2 * KP:
                source = w2_hidden_ptr
                bias = w2_hidden_bias_ptr
                r = f - KP + within
                size = H
        if f >= (2 * KP + EP if LAYERS == 2 else EP):
            source = v_hidden_ptr
            bias = v_hidden_bias_ptr
            r = r - EP
        inside = (r < size)[:, None] & (column < S)[None, :]
        values = tl.load(source + r[:, None] * S + column[None, :], mask=inside, other=0.0)
        out = first_ptr + (f + within)[:, None] * SP + column[None, :]
        tl.store(out, operand(values, PRECISION, DTYPE), mask=(column < SP)[None, :])
        biases = tl.load(bias + r, mask=r < size, other=0.0)
        tl.store(first_bias_ptr + f + within, biases, mask=tl.program_id(1) + 0 * within == 0)


# ------------------------------------------------------------------------------------------------------------- the host


def _forward(agent_qs: Tensor, states: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """``q_tot [N]`` and, to ``save`` for backward, ``P [N, F]`` and the packed weights (otherwise empty)."""
    params, (positivity, beta, save) = MonotonicParams(*rest[:14]), rest[14:]
    with launching(states):
        return _mix(agent_qs, _dense_rows(states), params, positivity, beta, save)


def _mix(
    agent_qs: Tensor, states: Tensor, params: MonotonicParams, positivity: int, beta: float, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    rows, A = agent_qs.shape
    sizes = _sizes(A, params)
    params = MonotonicParams(*(p if p is None else p.contiguous() for p in params))  # type: ignore[arg-type]
    packed = _pack(params, states, sizes)
    second, first, first_bias = _unpack(packed, sizes)
    fused = not save and (sizes.layers == 1 or sizes.KP == sizes.BK)
    p = packed if fused else torch.addmm(first_bias, states, first[:, : sizes.S].t())  # a fused kernel does not read it
    q_tot = agent_qs.new_empty(rows)
    if rows:
        precision = dot_precision(states.dtype)
        launch = (fused_launch if fused else forward_launch)(rows, sizes, precision, states.device)
        mix_kernel[(triton.cdiv(rows, launch.BM),)](
            agent_qs, states, p, first, first_bias, second,
            params.w1_bias, params.w2_bias, params.v_weight, params.v_bias, q_tot,
            rows, agent_qs.stride(0), agent_qs.stride(1), states.stride(0), beta,
            A=A, E=sizes.E, K=sizes.K, S=sizes.S,
            EP=sizes.EP, KP=sizes.KP, SP=sizes.SP, F=sizes.columns,
            BM=launch.BM, BK=sizes.BK, BS=sizes.BK if sizes.layers == 1 else min(sizes.SP, 32),
            LAYERS=sizes.layers, POSITIVITY=positivity, PRECISION=precision, FUSED=fused,
            num_warps=launch.num_warps, num_stages=launch.num_stages,
        )  # fmt: skip
    if not save:
        p, packed = packed.new_empty(0), packed.new_empty(0)
    return q_tot, p, packed


def _forward_fake(agent_qs: Tensor, states: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    sizes = _sizes(agent_qs.shape[1], MonotonicParams(*args[:14]))
    rows, save = agent_qs.shape[0], args[-1]
    p = states.new_empty((rows, sizes.columns) if save else (0,))
    return agent_qs.new_empty(rows), p, states.new_empty(_packed_size(sizes) if save else 0)


def _backward_forward(
    grad: Tensor, agent_qs: Tensor, states: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of agents' values, of states, of all weights that see the state, and sums (see `_split_gradients`).

    The last three are empty where not wanted.
    """
    p, packed, w1_bias, w2_bias, v_weight, hidden, positivity, beta, wants_states, wants_weights = rest
    w1_bias, w2_bias, v_weight = w1_bias.contiguous(), w2_bias.contiguous(), v_weight.contiguous()
    sizes = _sizes_from(agent_qs, states, v_weight, hidden)
    with launching(states):
        states = _dense_rows(states)
        grad_qs, grad_p, parts = _rows_gradient(
            grad, agent_qs, states, p, packed, w1_bias, w2_bias, v_weight, sizes, positivity, beta
        )
        grad_states, grad_first, sums = grad_p.new_empty(0), grad.new_empty(0), grad.new_empty(0)
        if wants_states:
            # With one layer first and second are one matrix, whose rows are the columns of grad_p.
            weights = packed[: -sizes.columns][-sizes.grad_columns * sizes.SP :].view(-1, sizes.SP)
            grad_states = grad_p @ weights[:, : sizes.S]
        if wants_weights:
            grad_first = (grad_p.t() @ states).to(grad.dtype)
            weight_parts = _weight_gradient(
                grad, agent_qs, p, grad_p, packed, w1_bias, w2_bias, sizes, positivity, beta
            )
            sums = _add_parts(parts, weight_parts)
    return grad_qs, grad_states, grad_first, sums


def _rows_gradient(
    grad: Tensor,
    agent_qs: Tensor,
    states: Tensor,
    p: Tensor,
    packed: Tensor,
    w1_bias: Tensor,
    w2_bias: Tensor,
    v_weight: Tensor,
    sizes: Sizes,
    positivity: int,
    beta: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the agents' values and of ``P``, and sums of the latter over the rows of each program."""
    rows, precision = agent_qs.shape[0], dot_precision(states.dtype)
    grad_qs = agent_qs.new_empty(agent_qs.shape)
    grad_p = states.new_empty(rows, sizes.grad_columns)
    launch = backward_launch(rows, sizes, precision, states.device)
    parts = grad.new_empty(triton.cdiv(rows, launch.BM), _part_size(sizes))
    if rows:
        blocks = sizes.KP // sizes.BK if sizes.layers == 2 else 1
        backward_kernel[(parts.shape[0], blocks)](
            agent_qs, states, p, _unpack(packed, sizes)[0], w1_bias, w2_bias, v_weight, grad,
            grad_qs, grad_p, parts,
            rows, agent_qs.stride(0), agent_qs.stride(1), states.stride(0), grad.stride(0), beta,
            A=sizes.A, E=sizes.E, K=sizes.K, EP=sizes.EP, KP=sizes.KP,
            F=sizes.columns, G=sizes.grad_columns, PART=parts.shape[1], BM=launch.BM, BK=sizes.BK,
            LAYERS=sizes.layers, POSITIVITY=positivity, PRECISION=precision,
            num_warps=launch.num_warps, num_stages=launch.num_stages,
        )  # fmt: skip
    return grad_qs, grad_p, parts


def _weight_gradient(
    grad: Tensor,
    agent_qs: Tensor,
    p: Tensor,
    grad_p: Tensor,
    packed: Tensor,
    w1_bias: Tensor,
    w2_bias: Tensor,
    sizes: Sizes,
    positivity: int,
    beta: float,
) -> Tensor:
    """Gradients of the second layer's weights and biases over parts of the rows; nothing with one layer."""
    rows, precision, size = agent_qs.shape[0], dot_precision(p.dtype), _weight_part_size(sizes)
    if not size or not rows:
        return grad.new_empty(0, size)
    launch, blocks = weight_gradient_launch(sizes, precision), sizes.KP // sizes.BK
    row_blocks = _row_blocks_per_part(rows, launch.BM, (sizes.A + 1) * blocks, p.device)
    parts = grad.new_empty(triton.cdiv(rows, launch.BM * row_blocks), size)
    weight_gradient_kernel[(sizes.A + 1, parts.shape[0], blocks)](
        agent_qs, p, grad_p, grad, _unpack(packed, sizes)[0], w1_bias, w2_bias, parts,
        rows, agent_qs.stride(0), agent_qs.stride(1), grad.stride(0), beta,
        A=sizes.A, E=sizes.E, K=sizes.K, EP=sizes.EP, KP=sizes.KP, F=sizes.columns,
        BM=launch.BM, BK=sizes.BK, ROW_BLOCKS=row_blocks, POSITIVITY=positivity, PRECISION=precision,
        num_warps=launch.num_warps, num_stages=launch.num_stages,
    )  # fmt: skip
    return parts


def _add_parts(x: Tensor, y: Tensor) -> Tensor:
    """Column sums of both, side by side."""
    X, Y, block = x.shape[1], y.shape[1], 256
    sums = x.new_empty(X + Y)
    add_parts_kernel[(triton.cdiv(X, block) + triton.cdiv(Y, block),)](
        x, y, sums, x.shape[0], y.shape[0], X=X, Y=Y, PARTS=16, BLOCK=block, num_warps=4
    )
    return sums


def _backward_fake(grad: Tensor, agent_qs: Tensor, states: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *_, v_weight, hidden, _, _, wants_states, wants_weights = rest
    sizes = _sizes_from(agent_qs, states, v_weight, hidden)
    return (
        agent_qs.new_empty(agent_qs.shape),
        states.new_empty(states.shape if wants_states else (0,)),
        grad.new_empty((sizes.grad_columns, sizes.S) if wants_weights else (0,)),
        grad.new_empty(_part_size(sizes) + _weight_part_size(sizes) if wants_weights else 0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    params = MonotonicParams(*inputs[2:16])
    ctx.hidden = 0 if params.w1_hidden_weight is None else params.w1_hidden_weight.shape[0]
    ctx.positivity, ctx.beta, ctx.saved = inputs[16:]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    if ctx.saved:
        ctx.save_for_backward(*inputs[:2], *output[1:], params.w1_bias, params.w2_bias, params.v_weight)


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad
    if not ctx.saved:
        raise RuntimeError("fastmix::monotonic_triton was called with save=False and cannot be differentiated")
    if grad is None:
        return (None,) * len(needs)
    wants_weights = any(needs[2:16])
    grad_qs, grad_states, grad_first, sums = _monotonic_backward(
        grad, *ctx.saved_tensors, ctx.hidden, ctx.positivity, ctx.beta, needs[1], wants_weights
    )
    agent_qs, states, *_, v_weight = ctx.saved_tensors
    params: tuple[Tensor | None, ...] = (None,) * 14
    if wants_weights:
        params = _split_gradients(grad_first, sums, _sizes_from(agent_qs, states, v_weight, ctx.hidden))
    return (
        grad_qs if needs[0] else None,
        grad_states if needs[1] else None,
        *(p if need else None for p, need in zip(params, needs[2:16], strict=True)),
        None,
        None,
        None,
    )


def _split_gradients(grad_first: Tensor, sums: Tensor, sizes: Sizes) -> tuple[Tensor | None, ...]:
    """The gradients of the parameters, in their order, out of the padded and joined ones."""
    A, E, H, EP, KP = sizes.A, sizes.E, sizes.H, sizes.EP, sizes.KP
    at = sizes.grad_columns - 2 * EP
    b1, v_hidden = grad_first[at : at + E], grad_first[at + EP : at + EP + E]
    b1_bias, v_hidden_bias = sums[at : at + E], sums[at + EP : at + EP + E]
    v_weight, v_bias = sums[at + 2 * EP : at + 2 * EP + E].view(1, E), sums[at + 3 * EP : at + 3 * EP + 1]
    if sizes.layers == 1:
        weights, biases = grad_first[:at].view(A + 1, EP, sizes.S), sums[:at].view(A + 1, EP)
        hidden: tuple[Tensor | None, ...] = (None, None, None, None)
    else:
        size = (A + 1) * EP * KP
        rest = sums[_part_size(sizes) :]
        weights, biases = rest[:size].view(A + 1, EP, KP)[:, :, :H], rest[size:].view(A + 1, EP)
        hidden = (grad_first[:H], sums[:H], grad_first[KP : KP + H], sums[KP : KP + H])
    return (
        *hidden[:2],
        weights[:A, :E].reshape(A * E, -1),
        biases[:A, :E].reshape(A * E),
        *hidden[2:],
        weights[A, :E],
        biases[A, :E],
        b1,
        b1_bias,
        v_hidden,
        v_hidden_bias,
        v_weight,
        v_bias,
    )


def _pack(params: MonotonicParams, like: Tensor, sizes: Sizes) -> Tensor:
    """The weights for `_unpack`, in the dtype of ``like``."""
    packed = like.new_empty(_packed_size(sizes))
    second, first, first_bias = _unpack(packed, sizes)
    widest = max(sizes.SP, sizes.KP)
    block = min(256, next_power(widest))
    pack_kernel[((second.shape[0] + first.shape[0]) // 16, triton.cdiv(widest, block))](
        params.w1_hidden_weight, params.w1_hidden_bias, params.w2_hidden_weight, params.w2_hidden_bias,
        params.w1_weight, params.w2_weight, params.b1_weight, params.b1_bias,
        params.v_hidden_weight, params.v_hidden_bias, second, first, first_bias,
        A=sizes.A, E=sizes.E, H=sizes.H, K=sizes.K, S=sizes.S, EP=sizes.EP, KP=sizes.KP, SP=sizes.SP,
        LAYERS=sizes.layers, PRECISION=dot_precision(like.dtype), BLOCK=block, num_warps=4,
    )  # fmt: skip
    return packed


def _unpack(packed: Tensor, sizes: Sizes) -> tuple[Tensor, Tensor, Tensor]:
    """Second layer ``[(A + 1) * EP, KP]``, first layer ``[F, SP]`` and its bias ``[F]``."""
    second = (sizes.A + 1) * sizes.EP * sizes.KP
    first = second + sizes.columns * sizes.SP
    return packed[:second].view(-1, sizes.KP), packed[second:first].view(-1, sizes.SP), packed[first:]


def _packed_size(sizes: Sizes) -> int:
    return (sizes.A + 1) * sizes.EP * sizes.KP + sizes.columns * (sizes.SP + 1)


def _part_size(sizes: Sizes) -> int:
    """Sums over the rows of: the gradient of ``P``; v_weight (``EP``); v_bias, padded to 16."""
    return sizes.grad_columns + sizes.EP + 16


def _weight_part_size(sizes: Sizes) -> int:
    """Gradients of the second layer's weights and biases; none with one layer."""
    return (sizes.A + 1) * sizes.EP * (sizes.KP + 1) if sizes.layers == 2 else 0


def _sizes(A: int, params: MonotonicParams) -> Sizes:
    E, S = params.b1_weight.shape
    hidden = params.w1_hidden_weight
    return plan(A, E, S if hidden is None else hidden.shape[0], S, 1 if hidden is None else 2)


def _sizes_from(agent_qs: Tensor, states: Tensor, v_weight: Tensor, hidden: int) -> Sizes:
    """The same for backward; ``hidden`` is ``H``, or 0 with one layer."""
    S = states.shape[1]
    return plan(agent_qs.shape[1], v_weight.shape[1], hidden or S, S, 2 if hidden else 1)


def _dense_rows(states: Tensor) -> Tensor:
    return states if states.stride(1) == 1 else states.contiguous()


_monotonic_backward = _library.define(
    "monotonic_triton_backward",
    "(Tensor grad, Tensor agent_qs, Tensor states, Tensor p, Tensor packed, Tensor w1_bias, Tensor w2_bias,"
    " Tensor v_weight, int hidden, int positivity, float beta, bool wants_states, bool wants_weights)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _backward_forward,
    _backward_fake,
    devices=(DISPATCH_KEY,),
)
_monotonic = _library.define(
    "monotonic_triton",
    "(Tensor agent_qs, Tensor states, Tensor? w1_hidden_weight, Tensor? w1_hidden_bias, Tensor w1_weight,"
    " Tensor w1_bias, Tensor? w2_hidden_weight, Tensor? w2_hidden_bias, Tensor w2_weight, Tensor w2_bias,"
    " Tensor b1_weight, Tensor b1_bias, Tensor v_hidden_weight, Tensor v_hidden_bias, Tensor v_weight, Tensor v_bias,"
    " int positivity, float beta, bool save) -> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    setup_context=_setup_context,
    backward=_backward,
    devices=(DISPATCH_KEY,),
)
