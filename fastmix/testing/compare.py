"""How far two results are apart, and a comparison whose failure shows where."""

from __future__ import annotations

import torch
from torch import Tensor

ZERO = 1e-12
"""Expected tensors whose largest entry is below this are zero up to rounding (a gradient that cancels exactly)."""

_SHOWN = 8


def rms_ratio(actual: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference over the root mean square of `expected`, both computed in float64.

    Scale-free, and not blown up by single entries near zero as an elementwise relative error is. Empty tensors give 0,
    an `expected` of zeros gives 0 for zeros and inf for anything else, NaN gives NaN.
    """
    if actual.numel() == 0:
        return 0.0
    actual, expected = _float64(actual), _float64(expected)
    error = (actual - expected).square().mean().sqrt().item()
    scale = expected.square().mean().sqrt().item()
    if scale == 0.0:
        return error if error == 0.0 or error != error else float("inf")
    return error / scale


def assert_close(
    actual: Tensor,
    expected: Tensor,
    tolerance: float,
    *,
    name: str = "result",
    mask: Tensor | None = None,
    zero: float = ZERO,
) -> None:
    """Raise `AssertionError` unless `rms_ratio(actual, expected) <= tolerance`; the message lists the worst entries.

    Shapes must be equal. Integer and boolean `expected` must be met exactly. Where every entry of `expected` is below
    `zero`, no entry of `actual` may exceed `tolerance` instead. Where `expected` is infinite or NaN, `actual` must be
    the same; nowhere else may it be non-finite.

    Args:
        actual, expected: tensors of one shape.
        tolerance: largest RMS ratio accepted.
        name: how the message calls the tensor.
        mask: compare only where it is not zero; broadcast against the tensors from the left (a `[B, T, 1]` mask fits
            `[B, T, A, U]`).
        zero: see above.
    """
    if actual.shape != expected.shape:
        raise AssertionError(f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}")
    keep = torch.ones(expected.shape, dtype=torch.bool)
    if mask is not None:
        keep &= _expand_left(mask.detach().cpu() != 0, expected.shape)
    a, e = actual.detach().cpu()[keep], expected.detach().cpu()[keep]
    if a.numel() == 0:
        return
    if not e.is_floating_point():
        wrong, verdict = a != e, "must be equal"
    else:
        a, e = a.double(), e.double()
        special = ~torch.isfinite(e)
        same = torch.where(special, (a == e) | (a.isnan() & e.isnan()), torch.isfinite(a))
        if not bool(same.all()):
            wrong, verdict = ~same, "must be finite exactly where the expected value is"
        else:
            a, e = a.masked_fill(special, 0.0), e.masked_fill(special, 0.0)
            largest = e.abs().max().item()
            if largest < zero:
                error = a.abs().max().item()
                verdict = f"largest entry {error:.3e}, expected zero within {tolerance:.1e}"
            else:
                error = rms_ratio(a, e)
                verdict = f"RMS ratio {error:.3e}, tolerance {tolerance:.1e}"
            if error <= tolerance:
                return
            wrong = (a - e).abs() > 0
    if bool(wrong.any()):
        raise AssertionError(f"{name}: {verdict}\n{_worst(actual, expected, keep, wrong)}")


def _worst(actual: Tensor, expected: Tensor, keep: Tensor, wrong: Tensor) -> str:
    """The entries that differ most, as a table."""
    indices = keep.nonzero()[wrong]
    a, e = actual.detach().cpu()[keep][wrong].double(), expected.detach().cpu()[keep][wrong].double()
    gaps = (a - e).abs().nan_to_num(nan=float("inf"), posinf=float("inf"))
    order = gaps.argsort(descending=True, stable=True)[:_SHOWN].tolist()
    lines = [
        f"  {int(wrong.sum())} of {int(keep.sum())} compared entries differ; first at {indices[0].tolist()}; worst:"
    ]
    lines += [f"  {indices[i].tolist()}: {a[i].item():.17g}, expected {e[i].item():.17g}" for i in order]
    return "\n".join(lines)


def _expand_left(mask: Tensor, shape: torch.Size) -> Tensor:
    while mask.dim() < len(shape):
        mask = mask.unsqueeze(-1)
    while mask.dim() > len(shape) and mask.shape[-1] == 1:
        mask = mask.squeeze(-1)
    return mask.expand(shape)


def _float64(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().double()
