"""Registration of native ops with PyTorch, with a short road for eager mode.

Every native op is a `torch.library` op (fake implementation and autograd registered), so that ``torch.compile``,
dispatch modes and ``opcheck`` see it whole. That road costs about 100 microseconds a call with gradients, almost all
of it Python bookkeeping. In plain eager mode the same three functions therefore run through one
`torch.autograd.Function` whose forward takes the context (a separate ``setup_context`` makes ``apply`` bind the
signature with `inspect` at every call), or with no wrapper at all where no gradient is wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_library = torch.library.Library("fastmix", "DEF")

Outputs = Tensor | tuple[Tensor | list[Tensor], ...]
_Function = type[torch.autograd.Function]


class NativeOp:
    """One native op: call it like its ``forward``."""

    def __init__(
        self,
        name: str,
        forward: Callable[..., Outputs],
        functions: tuple[_Function | None, _Function | None],
        listed: bool,
    ) -> None:
        self.name = name
        self._forward = forward
        self._function, self._transformable = functions
        self._listed = listed
        self._packet = getattr(torch.ops.fastmix, name).default

    def __call__(self, *args: Any) -> Any:
        flat = (*args[:-1], *args[-1]) if self._listed else args
        if torch.compiler.is_compiling() or _needs_dispatcher(flat):
            return self._packet(*args)
        if torch._C._are_functorch_transforms_active():
            return self._packet(*args) if self._transformable is None else self._transformable.apply(*flat)
        if self._function is not None and wants_grad(flat):
            return self._function.apply(*flat)
        return self._forward(*args)


def define(
    name: str,
    schema: str,
    forward: Callable[..., Outputs],
    fake: Callable[..., Outputs],
    *,
    setup_context: Callable[[Any, tuple[Any, ...], Any], None] | None = None,
    backward: Callable[..., Any] | None = None,
    devices: Sequence[str] = ("CPU",),
) -> NativeOp:
    """Register ``fastmix::name`` and return its callable.

    Args:
        name: the op's name inside ``torch.ops.fastmix``.
        schema: its signature without the name, as in ``"(Tensor q, float gamma) -> Tensor"``. Its last argument may be
            a ``Tensor[]``; other tensors stand outside lists, since autograd does not look into lists.
        forward: computes the op on each of ``devices`` (dispatch keys).
        fake: the same on tensors without data.
        setup_context, backward: as for `torch.library.register_autograd`; None for an op without a gradient.
    """
    _library.define(f"{name}{schema}")
    for device in devices:
        _library.impl(name, forward, device)
    torch.library.register_fake(f"fastmix::{name}", fake, lib=_library)
    arguments = getattr(torch.ops.fastmix, name).default._schema.arguments
    listed = str(arguments[-1].type) == "List[Tensor]"
    functions: tuple[_Function | None, _Function | None] = (None, None)
    if backward is not None and setup_context is not None:
        torch.library.register_autograd(f"fastmix::{name}", backward, setup_context=setup_context, lib=_library)
        functions = _functions(name, forward, setup_context, backward, len(arguments) - 1 if listed else None)
    return NativeOp(name, forward, functions, listed)


def _functions(
    name: str,
    forward: Callable[..., Outputs],
    setup_context: Callable[[Any, tuple[Any, ...], Any], None],
    backward: Callable[..., Any],
    single: int | None,
) -> tuple[_Function, _Function]:
    """The op for plain eager mode, and in the slower form that `torch.func` transforms ask for.

    A list of tensors behind the ``single`` first arguments is spread out here, as autograd sees only what stands
    outside of lists.
    """

    def gathered(args: tuple[Any, ...]) -> tuple[Any, ...]:
        return args if single is None else (*args[:single], list(args[single:]))

    def spread(grads: tuple[Any, ...]) -> tuple[Any, ...]:
        return grads if single is None else (*grads[:single], *grads[single])

    def differentiate(ctx: Any, *grads: Any) -> Any:
        return spread(backward(ctx, *grads))

    once = torch.autograd.function.once_differentiable(differentiate)

    def quick_forward(ctx: Any, *args: Any) -> Outputs:
        args = gathered(args)
        outputs = forward(*args)
        setup_context(ctx, args, outputs)
        return outputs

    def quick_backward(ctx: Any, *grads: Any) -> Any:
        # Gradients are on only under create_graph=True, which `once` answers with an error as soon as it is used.
        return once(ctx, *grads) if torch.is_grad_enabled() else differentiate(ctx, *grads)

    quick = {"forward": staticmethod(quick_forward), "backward": staticmethod(quick_backward)}
    transformable = {
        "forward": staticmethod(lambda *args: forward(*gathered(args))),
        "setup_context": staticmethod(lambda ctx, inputs, output: setup_context(ctx, gathered(inputs), output)),
        "backward": staticmethod(once),
    }
    return (
        type(f"{name}_function", (torch.autograd.Function,), quick),
        type(f"{name}_transformable", (torch.autograd.Function,), transformable),
    )


class CoreFunction:
    """A function of the compiled core, which exists once per dtype and for the CPU and CUDA each.

    Call it with a tensor whose dtype and device decide, and with the arguments but for the last one, which is the
    number of torch's threads on the CPU and the current stream on CUDA.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.on_cpu, self.on_cuda = _ByDtype(name), _ByDtype(f"{name}_cuda")

    def __call__(self, like: Tensor, *args: Any) -> Any:
        if on_cuda(like):
            return queue_on(like.device, self.on_cuda[like.dtype], *args)
        return self.on_cpu[like.dtype](*args, torch.get_num_threads())


class _ByDtype(dict[torch.dtype, Callable[..., Any]]):
    """``<name>_<dtype>`` of the core, looked up on first use: nothing of fastmix imports the core when imported."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name

    def __missing__(self, dtype: torch.dtype) -> Callable[..., Any]:
        from fastmix import _core

        function: Callable[..., Any] = getattr(_core, f"{self._name}_{str(dtype).removeprefix('torch.')}")
        self[dtype] = function
        return function


def on_cuda(tensor: Tensor) -> bool:
    """Whether the core's CUDA kernels take ``tensor``; tests without a GPU say yes and put emulated kernels there."""
    return tensor.is_cuda


def queue_on(device: torch.device, function: Callable[..., Any], *args: Any) -> Any:
    """Call a CUDA ``function`` of the core on ``device``, with torch's current stream there as its last argument.

    The stream is passed as an integer. By way of `torch.cuda` this would cost more host time than the launch itself.
    """
    if device.index == torch._C._cuda_getDevice():
        return function(*args, torch._C._cuda_getCurrentRawStream(device.index))
    with torch.cuda.device(device):
        return function(*args, torch._C._cuda_getCurrentRawStream(device.index))


def wants_grad(tensors: Sequence[Any]) -> bool:
    """Whether autograd must record an op on ``tensors`` (entries that are not tensors are ignored)."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                return True
    return False


def _needs_dispatcher(args: Sequence[Any]) -> bool:
    """Dispatch modes and tensor subclasses (fake, functional, traced) must see the op itself."""
    if torch._C._len_torch_dispatch_stack() > 0:
        return True
    for tensor in args:
        if isinstance(tensor, Tensor) and type(tensor) is not Tensor and type(tensor) is not torch.nn.Parameter:
            return True
    return False
