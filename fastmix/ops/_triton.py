"""What Triton kernels share: device functions, the precision of products, and facts about the device.

Imports Triton, so only the ``triton.py`` of an op may import it, and those are imported when their backend is chosen.
"""

# Kernels are written in Triton's language, which has no type annotations.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmix.ops._precision import float32_precision

INTERPRETED: Final = os.environ.get("TRITON_INTERPRET", "0") == "1"
"""Whether kernels run in Triton's interpreter, on CPU tensors; fixed when this module is imported, as in Triton."""

DISPATCH_KEY: Final = "CPU" if INTERPRETED else "CUDA"
"""Where ops made of Triton kernels are registered."""

PRECISIONS: Final = ("tf32x3", "tf32", "none")
"""Of products: three tf32 products that together keep float32's digits, one tf32 product, half-precision operands."""

_EMULATED = tl.constexpr(INTERPRETED)


def dot_precision(dtype: torch.dtype) -> str:
    """The entry of `PRECISIONS` for operands of ``dtype``, following `torch.set_float32_matmul_precision`.

    "highest" maps to ``tf32x3`` (error about 1e-7, on the matrix unit; plain float32 would run without it), "high" and
    "medium" to ``tf32``, as in PyTorch's own products.
    """
    if dtype != torch.float32:
        return "none"
    return "tf32x3" if float32_precision() == "highest" else "tf32"


@cache
def multiprocessors(device: torch.device) -> int:
    """How many there are to fill; kernels compiled or interpreted without a device are planned for an H100."""
    if device.type != "cuda":
        return 132
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@cache
def has_wide_products(device: torch.device) -> bool:
    """Whether four warps multiply together out of shared memory (Hopper and newer), which spares registers."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (9, 0)


@contextmanager
def launching(tensor: Tensor) -> Iterator[None]:
    """Kernels inside are launched on the device of ``tensor``, and library products keep the dtype of their factors."""
    device = tensor.device.type
    on_device = torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
    without_autocast = torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
    with on_device, without_autocast:
        yield


def next_power(size: int, least: int = 16) -> int:
    """The smallest power of two that is at least ``size`` and ``least`` (16: the smallest side of a matrix product)."""
    return max(least, 1 << (size - 1).bit_length())


@triton.jit
def operand(x, PRECISION: tl.constexpr, DTYPE: tl.constexpr):
    """``x`` as an operand of `dot`: in ``DTYPE``, and for tf32 rounded to nearest.

    The matrix unit would cut off the low 13 bits instead, an error of 2.3e-3 in the mixed value against 2e-4.
    """
    x = x.to(DTYPE)
    if PRECISION == "tf32":
        rounded = (x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
        # The sum would turn the canonical NaN of NVIDIA's instructions, 0x7fffffff, into -0.
        x = tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)
    return x


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """``acc + a @ b`` in float32; the operands come from `operand`."""
    if _EMULATED:  # the interpreter multiplies the bit patterns of bfloat16
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    if PRECISION == "tf32x3":
        acc = tl.dot(a, b, acc, input_precision="tf32x3")
    else:
        acc = tl.dot(a, b, acc, input_precision="tf32")
    return acc


@triton.jit
def relu(x):
    """NaN stays NaN."""
    return tl.where(x <= 0, 0.0, x)


@triton.jit
def elu(x):
    """``x`` above zero, ``exp(x) - 1`` below, to full precision around zero; NaN stays NaN."""
    return tl.where(x > 0, x, _expm1_negative(x))


@triton.jit
def elu_slope(x):
    """Derivative of `elu`."""
    return tl.where(x > 0, 1.0, tl.exp(tl.where(x > 0, 0.0, x)))


@triton.jit
def softplus(x, beta):
    """``log(1 + exp(beta x)) / beta``; the identity where ``beta x > 20``, as in PyTorch."""
    u = beta * x
    return tl.where(u > 20.0, x, (tl.maximum(u, 0.0) + _log1p_unit(tl.exp(-tl.abs(u)))) / beta)


@triton.jit
def softplus_slope(x, beta):
    """Derivative of `softplus`."""
    u = beta * x
    small = tl.exp(-tl.abs(u))
    return tl.where(u > 20.0, 1.0, tl.where(u > 0, 1.0, small) / (1.0 + small))


@triton.jit
def _expm1_negative(x):
    # exp(x) - 1 cancels near zero; there the Taylor polynomial, whose first missing term is below 2e-8 of the value.
    near = 1.0 + x * (1 / 7) * (1.0 + x * (1 / 8))
    near = 1.0 + x * (1 / 5) * (1.0 + x * (1 / 6) * near)
    near = x * (1.0 + x * (1 / 2) * (1.0 + x * (1 / 3) * (1.0 + x * (1 / 4) * near)))
    return tl.where(x < -0.5, tl.exp(tl.where(x > 0, 0.0, x)) - 1.0, near)


@triton.jit
def _log1p_unit(u):
    # log(1 + u) for 0 <= u <= 1 as 2 atanh(u / (2 + u)): no cancellation, and the terms fall by at least 9 each.
    s = u / (2.0 + u)
    t = s * s
    series = 1 / 9 + t * (1 / 11 + t * (1 / 13 + t * (1 / 15)))
    return 2.0 * s * (1.0 + t * (1 / 3 + t * (1 / 5 + t * (1 / 7 + t * series))))
