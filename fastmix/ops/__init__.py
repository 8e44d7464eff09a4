"""Fused, stateless operators, one folder each: a public function, its plain PyTorch reference, and its fast forms."""

from fastmix.ops.monotonic import monotonic
from fastmix.ops.recurrent import recurrent
from fastmix.ops.returns import returns
from fastmix.ops.select import select
from fastmix.ops.td_loss import td_loss

__all__ = ["monotonic", "recurrent", "returns", "select", "td_loss"]
