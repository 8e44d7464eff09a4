"""Fused, stateless operators, one folder each: a public function, its plain PyTorch reference, and its fast forms."""

from fastmix.ops.attention import attention
from fastmix.ops.duplex import duplex, importance, recognise
from fastmix.ops.monotonic import monotonic
from fastmix.ops.quantile import fractions, mean_shape, midpoints, quantile_loss, quantile_mix
from fastmix.ops.recurrent import recurrent
from fastmix.ops.returns import returns
from fastmix.ops.select import select
from fastmix.ops.td_loss import td_loss
from fastmix.ops.unrestricted import unrestricted

__all__ = [
    "attention",
    "duplex",
    "fractions",
    "importance",
    "mean_shape",
    "midpoints",
    "monotonic",
    "quantile_loss",
    "quantile_mix",
    "recognise",
    "recurrent",
    "returns",
    "select",
    "td_loss",
    "unrestricted",
]
