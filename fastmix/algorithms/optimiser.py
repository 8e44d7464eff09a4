"""One clip and one optimiser step for all parameters of an algorithm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastmix import backends
from fastmix.ops import _library

_run = _library.CoreFunction("optimise")
_PARTS = 1024
"""Partial sums of the norm on CUDA, as many as blocks share the pass, apart from one for each parameter"""


class Optimiser:
    """RMSprop or Adam with one joint clip of the gradient norm, as one pass over all parameters.

    The same arithmetic as ``clip_grad_norm_`` followed by `torch.optim.RMSprop` or `torch.optim.Adam`; a parameter
    whose gradient is None is left alone, its state too. The pass is native where it can be: a dozen small tensors cost
    one call, not six apiece. On CUDA nothing of it is kept by the host, so that a CUDA graph can hold it: the count of
    steps and the norm stay on the device.

    Args:
        parameters: what is optimised, all of one dtype and device.
        kind: ``"rmsprop"`` (``alpha`` is its decay) or ``"adam"`` (betas 0.9 and 0.999).
        lr, alpha, eps, weight_decay: as in `torch.optim`.
        clip: largest norm of all gradients together; gradients themselves are not changed.

    Raises:
        ValueError: parameters of several dtypes or devices.
    """

    BETAS = (0.9, 0.999)

    def __init__(
        self,
        parameters: Sequence[Tensor],
        *,
        kind: str,
        lr: float,
        alpha: float,
        eps: float,
        weight_decay: float,
        clip: float,
    ) -> None:
        self.parameters = list(parameters)
        kinds = sorted({f"{p.dtype} on {p.device}" for p in self.parameters})
        if len(kinds) > 1:
            raise ValueError(f"parameters must share one dtype and device, got {', '.join(kinds)}")
        self.kind, self.lr, self.alpha, self.eps = kind, lr, alpha, eps
        self.weight_decay, self.clip = weight_decay, clip
        self.squares = [torch.zeros_like(p, memory_format=torch.contiguous_format) for p in self.parameters]
        self.means = [torch.zeros_like(s) for s in self.squares] if kind == "adam" else []
        device = self.parameters[0].device if self.parameters else None
        self.steps = torch.zeros((), dtype=torch.int64, device=device)
        self._native = bool(self.parameters) and backends.resolve("optimise", self.parameters[0]) == "native"

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for p in self.parameters:
            p.grad = None

    @torch.no_grad()
    def step(self) -> Tensor:
        """Clip, update every parameter that has a gradient, and return the norm before clipping (0-dim).

        Raises:
            ValueError: a parameter is no longer what it was when the optimiser was made (native pass only).
        """
        if self._native:
            self._check_native()
            return self._step_native()
        self.steps += 1
        return self._step_reference()

    def state_dict(self) -> dict[str, Tensor]:
        """Running moments and the step count."""
        state = {f"square.{i}": s for i, s in enumerate(self.squares)}
        state |= {f"mean.{i}": m for i, m in enumerate(self.means)}
        return state | {"steps": self.steps}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over what `state_dict` gave.

        Raises:
            ValueError: the state belongs to other parameters or another kind of optimiser.
        """
        mine = self.state_dict()
        if mine.keys() != state.keys() or any(mine[k].shape != state[k].shape for k in mine):
            raise ValueError(f"optimiser state must be {len(mine)} tensors that fit the parameters, got {len(state)}")
        for name, tensor in mine.items():
            tensor.copy_(state[name])

    def _step_native(self) -> Tensor:
        first = self.parameters[0]
        norm = torch.empty((), dtype=first.dtype, device=first.device)
        with_grad = [i for i, p in enumerate(self.parameters) if p.grad is not None]
        parameters = [self.parameters[i] for i in with_grad]
        # Gradients of transposed or expanded results may come with strides; the pass runs over dense memory.
        grads = [p.grad.contiguous() for p in parameters if p.grad is not None]
        args = (
            [p.data_ptr() for p in parameters],
            [g.data_ptr() for g in grads],
            [self.means[i].data_ptr() for i in with_grad] if self.means else [],
            [self.squares[i].data_ptr() for i in with_grad],
            [p.numel() for p in parameters],
            norm.data_ptr(),
            self.kind == "adam", self.steps.data_ptr(), self.lr,
            *(self.BETAS if self.kind == "adam" else (0.0, self.alpha)), self.eps, self.weight_decay, self.clip,
        )  # fmt: skip
        if _library.on_cuda(first):
            parts = torch.empty(_PARTS + len(parameters), dtype=torch.float64, device=first.device)
            _run(first, *args, parts.data_ptr(), parts.numel())
        else:
            _run(first, *args)
        torch.autograd.graph.increment_version(parameters)  # the core wrote behind autograd's back; caches watch this
        return norm

    def _check_native(self) -> None:
        """The core goes by addresses: a parameter that was exchanged or cast behind our back must not reach it."""
        for i, (p, s) in enumerate(zip(self.parameters, self.squares, strict=True)):
            if p.dtype != s.dtype or p.device != s.device or p.shape != s.shape or not p.is_contiguous():
                raise ValueError(
                    f"parameter {i} must still be a contiguous {s.dtype} tensor of shape {tuple(s.shape)} on"
                    f" {s.device}, as when the optimiser was made, got {p.dtype}, {tuple(p.shape)} with strides"
                    f" {p.stride()} on {p.device}"
                )

    def _step_reference(self) -> Tensor:
        with_grad = [i for i, p in enumerate(self.parameters) if p.grad is not None]
        if not with_grad:
            return torch.zeros((), device=self.steps.device)
        parameters = [self.parameters[i] for i in with_grad]
        squares = [self.squares[i] for i in with_grad]
        grads = [p.grad for p in parameters if p.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
        grads = list(torch._foreach_mul(grads, (self.clip / (norm + 1e-6)).clamp(max=1.0)))
        if self.weight_decay:
            torch._foreach_add_(grads, parameters, alpha=self.weight_decay)
        decay = self.BETAS[1] if self.kind == "adam" else self.alpha
        torch._foreach_mul_(squares, decay)
        torch._foreach_addcmul_(squares, grads, grads, 1 - decay)
        denominators = list(torch._foreach_sqrt(squares))
        size, updates = self.lr, grads
        if self.kind == "adam":
            updates = [self.means[i] for i in with_grad]
            torch._foreach_lerp_(updates, grads, 1 - self.BETAS[0])
            steps = self._steps_as_factor()
            size, root = size / (1 - self.BETAS[0] ** steps), (1 - self.BETAS[1] ** steps) ** 0.5
            if isinstance(size, Tensor):
                updates, size = list(torch._foreach_mul(updates, size.to(norm.dtype))), 1.0
                root = root.to(norm.dtype)
            torch._foreach_div_(denominators, root)
        torch._foreach_add_(denominators, self.eps)
        torch._foreach_addcdiv_(parameters, updates, denominators, -size)
        return norm

    def _steps_as_factor(self) -> Any:
        """The count of steps; on CUDA as a tensor, which a CUDA graph reads afresh at every replay."""
        return self.steps.double() if self.steps.is_cuda else int(self.steps)
