"""`unrestricted` through the compiled core: both networks in one pass over blocks of rows, one-hots never built."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastmix.ops import _library, _memory, _networks
from fastmix.ops._rows import NO_ROWS, layout, with_dense_rows
from fastmix.ops.unrestricted.types import UnrestrictedParams

_run_forward = _library.CoreFunction("unrestricted_forward")
_run_backward = _library.CoreFunction("unrestricted_backward")


def unrestricted(
    features: Tensor | None, states: Tensor, actions: Tensor | None, params: UnrestrictedParams, n_actions: int
) -> Tensor:
    """See `fastmix.ops.unrestricted`; arguments are already checked: ``[.., F]``, ``[.., S]`` and ``[.., A]``.

    ``..`` is one dimension or two.
    """
    tensors, depths = _networks.flatten((params.net, params.v))
    training = _library.wants_grad((features, states, *tensors))
    joint: Tensor = _unrestricted(features, states, actions, depths, n_actions, training, tensors)[0]
    return joint


def _forward(
    features: Tensor | None,
    states: Tensor,
    actions: Tensor | None,
    depths: list[int],
    n_actions: int,
    training: bool,
    params: list[Tensor],
) -> tuple[Tensor, Tensor]:
    """The joint value, and the hidden features that backward needs, empty unless ``training``."""
    joint, hidden = (_memory.kept(shape, states.dtype) for shape in _shapes(states, depths, training, params))
    states, params = with_dense_rows("unrestricted", states), _networks.dense(params)
    networks = _networks.split(params, depths)
    _run_forward(
        states, *_inputs(features, states, actions, n_actions),
        _specs(features, actions, networks, networks, [False] * 2), joint.data_ptr(), hidden.data_ptr(),
    )  # fmt: skip
    return joint, hidden


def _backward_forward(
    grad: Tensor,
    features: Tensor | None,
    states: Tensor,
    actions: Tensor | None,
    hidden: Tensor,
    depths: list[int],
    n_actions: int,
    wants: list[int],
    wants_features: bool,
    wants_states: bool,
    params: list[Tensor],
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Gradients of features, states and the parameters; those not wanted are empty."""
    grad_features, grad_states, grads = _empty_grads(
        features, states, depths, wants, wants_features, wants_states, params
    )
    grad = grad.contiguous()
    states, params = with_dense_rows("unrestricted", states), _networks.dense(params)
    _run_backward(
        states, *_inputs(features, states, actions, n_actions),
        _specs(features, actions, _networks.split(params, depths), grads, wants),
        grad.data_ptr(), hidden.data_ptr(), grad_features.data_ptr(), grad_states.data_ptr(),
    )  # fmt: skip
    return grad_features, grad_states, [grad for network in grads for grad in network]


def _inputs(features: Tensor | None, states: Tensor, actions: Tensor | None, n_actions: int) -> tuple[Any, ...]:
    """Sizes, and where the rows of states, actions and features lie."""
    sizes = (
        states.shape[:-1].numel(), states.shape[-1], 0 if actions is None else actions.shape[-1], n_actions,
        0 if features is None else features.shape[-1],
    )  # fmt: skip
    return sizes, *(NO_ROWS if tensor is None else layout(tensor) for tensor in (states, actions, features))


def _specs(
    features: Tensor | None,
    actions: Tensor | None,
    networks: list[list[Tensor]],
    grads: list[list[Tensor]],
    wants: Any,
) -> list[_networks.Spec]:
    (net, v), (grad, v_grad), (want, want_v) = networks, grads, wants
    specs = [
        _networks.spec(
            net, grad if want else None, reads_actions=actions is not None, reads_extras=features is not None
        )
    ]
    return [*specs, _networks.spec(v, v_grad if want_v else None)] if v else specs


def _shapes(
    states: Tensor, depths: list[int], training: bool, params: list[Tensor]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of what forward returns."""
    leading = states.shape[:-1]
    joint = (*leading, params[2 * depths[0] - 2].shape[0])
    if not training:
        return joint, (0,)
    networks = [network for network in _networks.split(params, depths) if network]
    return joint, _networks.kept_shape(leading.numel(), _networks.hidden_columns(networks))


def _empty_grads(
    features: Tensor | None,
    states: Tensor,
    depths: list[int],
    wants: list[int],
    wants_features: bool,
    wants_states: bool,
    params: list[Tensor],
) -> tuple[Tensor, Tensor, list[list[Tensor]]]:
    return (
        states.new_empty(features.shape if features is not None and wants_features else (0,)),
        states.new_empty(states.shape if wants_states else (0,)),
        _networks.empty_grads(_networks.split(params, depths), map(bool, wants)),
    )


def _fake(features: Tensor | None, states: Tensor, actions: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    depths, _, training, params = rest
    joint, hidden = _shapes(states, depths, training, params)
    return states.new_empty(joint), states.new_empty(hidden)


def _backward_fake(*args: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    _, features, states, _, _, depths, _, wants, wants_features, wants_states, params = args
    grad_features, grad_states, grads = _empty_grads(
        features, states, depths, wants, wants_features, wants_states, params
    )
    return grad_features, grad_states, [grad for network in grads for grad in network]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    features, states, actions, depths, n_actions, training, params = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    if not training:
        return  # nothing was kept; _backward says so
    ctx.depths, ctx.n_actions = list(depths), n_actions
    ctx.wants = _networks.wanted(_networks.split(params, depths))
    ctx.wants_inputs = (features is not None and features.requires_grad, states.requires_grad)
    ctx.save_for_backward(features, states, actions, output[1], *params)


def _backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Any, ...]:
    if not hasattr(ctx, "wants"):
        raise RuntimeError("fastmix::unrestricted was called with training=False and cannot be differentiated")
    features, states, actions, hidden, *params = ctx.saved_tensors
    if grad is None:
        return (*(None,) * 6, [None] * len(params))
    wants_features, wants_states = ctx.wants_inputs
    grad_features, grad_states, grads = _unrestricted_backward(
        grad, features, states, actions, hidden, ctx.depths, ctx.n_actions, [int(want) for want in ctx.wants],
        wants_features, wants_states, params,
    )  # fmt: skip
    return (
        grad_features if wants_features else None, grad_states if wants_states else None, *(None,) * 4,
        _networks.present(grads, params, ctx.depths, ctx.wants),
    )  # fmt: skip


_unrestricted_backward = _library.define(
    "unrestricted_backward",
    "(Tensor grad, Tensor? features, Tensor states, Tensor? actions, Tensor hidden, int[] depths, int n_actions,"
    " int[] wants, bool wants_features, bool wants_states, Tensor[] params) -> (Tensor, Tensor, Tensor[])",
    _backward_forward,
    _backward_fake,
)
_unrestricted = _library.define(
    "unrestricted",
    "(Tensor? features, Tensor states, Tensor? actions, int[] depths, int n_actions, bool training, Tensor[] params)"
    " -> (Tensor, Tensor)",
    _forward,
    _fake,
    setup_context=_setup_context,
    backward=_backward,
)
