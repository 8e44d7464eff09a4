"""Registration of native ops with PyTorch, with a short road for eager mode.

Every native op is a `torch.library` op (fake implementation and autograd registered), so that ``torch.compile``,
dispatch modes and ``opcheck`` see it whole. That road costs about 100 microseconds a call with gradients, almost all
of it Python bookkeeping. In plain eager mode the same three functions therefore run through one
`torch.autograd.Function` (12 us), or with no wrapper at all where no gradient is wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_library = torch.library.Library("fastmix", "DEF")

Outputs = Tensor | tuple[Tensor, ...]


class NativeOp:
    """One native op: call it like its ``forward``."""

    def __init__(
        self, name: str, forward: Callable[..., Outputs], function: type[torch.autograd.Function] | None
    ) -> None:
        self.name = name
        self._forward = forward
        self._function = function
        self._packet = getattr(torch.ops.fastmix, name).default

    def __call__(self, *args: Any) -> Any:
        if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0 or _is_wrapped(args):
            return self._packet(*args)
        if self._function is not None and wants_grad(args):
            return self._function.apply(*args)
        return self._forward(*args)


def define(
    name: str,
    schema: str,
    forward: Callable[..., Outputs],
    fake: Callable[..., Outputs],
    *,
    setup_context: Callable[[Any, tuple[Any, ...], Any], None] | None = None,
    backward: Callable[..., Any] | None = None,
    device: str = "CPU",
) -> NativeOp:
    """Register ``fastmix::name`` and return its callable.

    Args:
        name: the op's name inside ``torch.ops.fastmix``.
        schema: its signature without the name, as in ``"(Tensor q, float gamma) -> Tensor"``. Tensors only outside
            lists, since
            autograd does not look into lists.
        forward: computes the op on ``device``.
        fake: the same on tensors without data.
        setup_context, backward: as for `torch.library.register_autograd`; None for an op without a gradient.
    """
    _library.define(f"{name}{schema}")
    _library.impl(name, forward, device)
    torch.library.register_fake(f"fastmix::{name}", fake, lib=_library)
    function = None
    if backward is not None and setup_context is not None:
        torch.library.register_autograd(f"fastmix::{name}", backward, setup_context=setup_context, lib=_library)
        methods = {
            "forward": staticmethod(forward),
            "setup_context": staticmethod(setup_context),
            "backward": staticmethod(torch.autograd.function.once_differentiable(backward)),
        }
        function = type(f"{name}_function", (torch.autograd.Function,), methods)
    return NativeOp(name, forward, function)


def wants_grad(tensors: Sequence[Any]) -> bool:
    """Whether autograd must record an op on ``tensors`` (entries that are not tensors are ignored)."""
    return torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in tensors)


def _is_wrapped(args: Sequence[Any]) -> bool:
    """A tensor subclass (fake, functional, traced) among the leading arguments needs the dispatcher."""
    return any(isinstance(t, Tensor) and type(t) not in (Tensor, torch.nn.Parameter) for t in args[:2])
