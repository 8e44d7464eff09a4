"""`select` through the compiled core: one pass over the rows, and one that writes the gradient."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from fastmix.ops import _library
from fastmix.ops.select.types import UNAVAILABLE, Selection

logger = logging.getLogger("fastmix")

_run_forward, _run_backward = _library.CoreFunction("select_forward"), _library.CoreFunction("select_backward")
_NO_FAULT = torch.iinfo(torch.int64).max

# Availability is read as it is stored; values are AvailType of csrc/fastmix/select.h.
_AVAIL_TYPES = {
    torch.bool: 1,
    torch.uint8: 1,
    torch.int8: 1,
    torch.int32: 2,
    torch.int64: 3,
    torch.float32: 4,
    torch.float64: 5,
}


def select(
    agent_qs: Tensor,
    avail_actions: Tensor | None,
    actions: Tensor | None,
    target_qs: Tensor | None,
    mask: Tensor | None,
) -> Selection:
    """See `fastmix.ops.select`; arguments are already checked, ``mask`` is the rows that need an available action."""
    greedy_qs, chosen, target, greedy, all_greedy = _select(agent_qs, avail_actions, actions, target_qs, mask)
    return Selection(
        greedy,
        greedy_qs,
        None if actions is None else chosen,
        None if target_qs is None else target,
        None if actions is None else all_greedy,
    )


def _forward(
    agent_qs: Tensor,
    avail_actions: Tensor | None,
    actions: Tensor | None,
    target_qs: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Values before indices; empty tensors for what absent arguments leave out, since an op returns tensors only."""
    shape, dtype, device = agent_qs.shape, agent_qs.dtype, agent_qs.device
    rows = shape[:-2]
    greedy_qs = torch.empty(shape[:-1], dtype=dtype, device=device)
    greedy = torch.empty_like(greedy_qs, dtype=torch.int64)
    chosen = torch.empty_like(greedy_qs) if actions is not None else torch.empty(0, dtype=dtype, device=device)
    target = torch.empty_like(greedy_qs) if target_qs is not None else torch.empty(0, dtype=dtype, device=device)
    all_greedy = torch.empty(rows if actions is not None else 0, dtype=torch.bool, device=device)

    many = len(rows) > 2
    qs = _readable(agent_qs, many, "agent_qs")
    avail = None if avail_actions is None else _readable(_typed(avail_actions), many, "avail_actions")
    taken = None if actions is None else actions.flatten(0, -2) if many else actions
    targets = None if target_qs is None else _readable(target_qs, many, "target_qs")
    live = None if mask is None else mask.flatten() if many else mask
    args = (
        qs.shape, *_rows(qs), *_rows(avail), 0 if avail is None else _AVAIL_TYPES[avail.dtype],
        *_rows(taken), *_rows(targets), *_rows(live),
        greedy.data_ptr(), greedy_qs.data_ptr(), chosen.data_ptr(), target.data_ptr(), all_greedy.data_ptr(),
        UNAVAILABLE,
    )  # fmt: skip
    if not _library.on_cuda(qs):
        empty_row, wrong_row = _run_forward(qs, *args)
    elif live is None:
        _run_forward(qs, *args, 0)
        return greedy_qs, chosen, target, greedy, all_greedy
    else:
        faults = torch.full((2,), _NO_FAULT, dtype=torch.int64, device=device)
        _run_forward(qs, *args, faults.data_ptr())
        empty_row, wrong_row = (-1 if row == _NO_FAULT else row for row in faults.tolist())  # waits for the device
    if wrong_row >= 0:
        raise_out_of_range(wrong_row, rows, shape[-1])
    if empty_row >= 0:
        raise_nothing_available(empty_row, rows)
    return greedy_qs, chosen, target, greedy, all_greedy


def raise_out_of_range(row: int, rows: torch.Size, n_actions: int) -> None:
    """The error for an action that does not exist, in the flattened ``row`` of the leading dimensions ``rows``."""
    raise ValueError(f"actions must lie in [0, {n_actions}), row {_index(row, rows)} holds one that does not")


def raise_nothing_available(row: int, rows: torch.Size) -> None:
    """The error for a live row in which an agent has no available action."""
    raise ValueError(
        f"avail_actions must offer every agent an action where mask is not 0, row {_index(row, rows)} offers one none"
    )


def _index(row: int, rows: torch.Size) -> tuple[int, ...]:
    index: list[int] = []
    for size in reversed(rows):
        index.append(row % size)
        row //= size
    return tuple(reversed(index))


def _typed(avail_actions: Tensor) -> Tensor:
    return avail_actions if avail_actions.dtype in _AVAIL_TYPES else avail_actions != 0


def _readable(tensor: Tensor, flatten: bool, name: str) -> Tensor:
    """The tensor with at most two leading dimensions and its last one dense; a copy only where strides ask for it."""
    if flatten:
        tensor = tensor.flatten(0, -3)
    if tensor.stride(-1) != 1 and tensor.shape[-1] != 1:
        logger.debug("select: %s with strides %s is copied", name, tensor.stride())
        tensor = tensor.contiguous()
    return tensor


def _rows(tensor: Tensor | None) -> tuple[int, tuple[int, ...]]:
    return (0, ()) if tensor is None else (tensor.data_ptr(), tensor.stride())


def _fake(
    agent_qs: Tensor,
    avail_actions: Tensor | None,
    actions: Tensor | None,
    target_qs: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    shape = agent_qs.shape[:-1]
    return (
        agent_qs.new_empty(shape),
        agent_qs.new_empty(0 if actions is None else shape),
        agent_qs.new_empty(0 if target_qs is None else shape),
        agent_qs.new_empty(shape, dtype=torch.int64),
        agent_qs.new_empty(0 if actions is None else shape[:-1], dtype=torch.bool),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    agent_qs, _, actions, _, _ = inputs
    greedy_qs, _, target, greedy, all_greedy = output
    ctx.n_actions = agent_qs.shape[-1]
    ctx.has_actions = actions is not None
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(greedy, target, all_greedy)
    ctx.save_for_backward(greedy, greedy_qs, actions)


def _backward(ctx: Any, grad_greedy_qs: Tensor | None, grad_chosen: Tensor | None, *_: Any) -> Any:
    greedy, greedy_qs, actions = ctx.saved_tensors
    if not ctx.has_actions:
        grad_chosen = None
    grad = None
    if grad_greedy_qs is not None or grad_chosen is not None:
        grad = _select_backward(grad_greedy_qs, grad_chosen, greedy, greedy_qs, actions, ctx.n_actions)
    return grad, None, None, None, None


def _backward_forward(
    grad_greedy_qs: Tensor | None,
    grad_chosen_qs: Tensor | None,
    greedy_actions: Tensor,
    greedy_qs: Tensor,
    actions: Tensor | None,
    n_actions: int,
) -> Tensor:
    shape = greedy_actions.shape
    grad = torch.empty(*shape, n_actions, dtype=greedy_qs.dtype, device=greedy_qs.device)
    sizes: tuple[int, ...] = grad.shape
    grads = [grad_greedy_qs, grad_chosen_qs, actions]
    if len(sizes) > 4:
        grads = [None if t is None else t.flatten(0, -2) for t in grads]
        sizes = (greedy_actions.numel() // max(shape[-1], 1), shape[-1], n_actions)
    _run_backward(
        grad,
        sizes, *_rows(grads[0]), *_rows(grads[1]),
        greedy_actions.contiguous().data_ptr(), greedy_qs.contiguous().data_ptr(), *_rows(grads[2]),
        grad.data_ptr(), UNAVAILABLE,
    )  # fmt: skip
    return grad


def _backward_fake(
    grad_greedy_qs: Tensor | None,
    grad_chosen_qs: Tensor | None,
    greedy_actions: Tensor,
    greedy_qs: Tensor,
    actions: Tensor | None,
    n_actions: int,
) -> Tensor:
    return greedy_qs.new_empty(*greedy_qs.shape, n_actions)


_select_backward = _library.define(
    "select_backward",
    "(Tensor? grad_greedy_qs, Tensor? grad_chosen_qs, Tensor greedy_actions, Tensor greedy_qs, Tensor? actions,"
    " SymInt n_actions) -> Tensor",
    _backward_forward,
    _backward_fake,
    devices=("CPU", "CUDA"),
)
_select = _library.define(
    "select",
    "(Tensor agent_qs, Tensor? avail_actions, Tensor? actions, Tensor? target_qs, Tensor? mask)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _fake,
    setup_context=_setup_context,
    backward=_backward,
    devices=("CPU", "CUDA"),
)
