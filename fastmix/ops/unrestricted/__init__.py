"""`unrestricted`: a joint value without any constraint on how it depends on utilities and actions."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

from fastmix import backends
from fastmix.ops import _checks
from fastmix.ops._layers import Layers, Linear, action_width, check_layers
from fastmix.ops.unrestricted import native, reference
from fastmix.ops.unrestricted.types import UnrestrictedParams

__all__ = ["Layers", "Linear", "UnrestrictedParams", "unrestricted"]


def unrestricted(
    features: Tensor | None,
    states: Tensor,
    params: UnrestrictedParams,
    *,
    actions: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Value of a state with whatever else it depends on, from one network over all of it.

    With the parts that are given, in this order::

        q = net([states | one-hots of actions, agent after agent | features]) + v(states)

    Fast forms never build the one-hots: they add up columns of the first layer. Rows are independent: NaN or infinity
    in one row's inputs reaches no other row of the result.

    Args:
        features: ``[..., F]``: the utilities of the taken actions in WQMIX's and ResQ's networks, the encoded agents in
            QTRAN's; None for none.
        states: ``[..., S]``, with the leading dimensions of ``features``.
        params: the networks' weights, see `UnrestrictedParams`.
        actions: ``[..., A]`` int64, the joint action; -1 gives a one-hot of zeros. The width ``U`` of a one-hot is what
            the first layer leaves for each agent beside state and features. None for none.
        backend: ``None`` for the automatic choice, or a name of `fastmix.backends.NAMES`.

    Returns:
        ``[..., K]``, differentiable once in ``features``, ``states`` and every parameter. Under autocast half-precision
        arguments are promoted to float32 and so is the result.

    Raises:
        ValueError, TypeError: an argument of wrong shape, dtype, device or range.

    Source: Rashid et al. (2020), WQMIX (the unrestricted Q*); Son et al. (2019), QTRAN (the joint networks).
    """
    _check_types(features, states, params)
    if _checks.autocast_enabled(states):
        features, states, params = _checks.upcast_nested((features, states, params))
        with torch.autocast(states.device.type, enabled=False):
            return unrestricted(features, states, params, actions=actions, backend=backend)
    n_actions = _check_shapes(features, states, params, actions)

    leading = states.shape[:-1]
    chosen = backends.resolve("unrestricted", states, backend)
    if chosen != "native" or len(leading) not in (1, 2):
        features, states, actions = _rows(features), _rows(states), _rows(actions)
    run = reference.unrestricted
    if chosen == "native":
        run = native.unrestricted
    elif chosen == "triton":
        from fastmix.ops.unrestricted import triton  # here, as it imports Triton

        run = triton.unrestricted
    joint = run(features, states, actions, params, n_actions)
    return joint if states.shape[:-1] == leading else joint.reshape(*leading, joint.shape[-1])


@overload
def _rows(tensor: Tensor) -> Tensor: ...
@overload
def _rows(tensor: Tensor | None) -> Tensor | None: ...
def _rows(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.reshape(tensor.shape[:-1].numel(), tensor.shape[-1])


def _check_types(features: Tensor | None, states: Tensor, params: UnrestrictedParams) -> None:
    if not isinstance(params, UnrestrictedParams):
        raise TypeError(f"params must be an UnrestrictedParams, got {type(params).__name__}")
    _checks.check_tensor("states", states)
    _checks.check_floating("states", states)
    if features is not None:
        _checks.check_tensor("features", features)
        _checks.check_floating("features", features)


def _check_shapes(features: Tensor | None, states: Tensor, params: UnrestrictedParams, actions: Tensor | None) -> int:
    """Raise where sizes do not agree; the number of actions of each agent otherwise (0 without ``actions``)."""
    if features is not None:
        if features.dim() < 1 or features.shape[-1] < 1:
            raise ValueError(f"features must have shape [..., F], F at least 1, got {tuple(features.shape)}")
        _checks.check_states(states, features, "features")
    elif states.dim() < 1 or states.shape[-1] < 1:
        raise ValueError(f"states must have shape [..., S], S at least 1, got {tuple(states.shape)}")
    width = states.shape[-1] + (0 if features is None else features.shape[-1])
    n_actions = 0
    if actions is not None:
        _checks.check_actions(actions, (*states.shape[:-1], None), states)
        n_actions = action_width("params.net", params.net, width, actions.shape[-1])
        _checks.check_action_range(actions, n_actions)
        width += actions.shape[-1] * n_actions
    check_layers("params.net", params.net, states, width, None)
    if params.v != ():
        check_layers("params.v", params.v, states, states.shape[-1], 1)
    return n_actions
