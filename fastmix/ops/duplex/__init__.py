"""`duplex`: QPLEX's duplex dueling network, its importance weights alone, and POWQMIX's recogniser."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmix import backends
from fastmix.ops import _checks
from fastmix.ops._layers import Layers, Linear, action_width, check_layers
from fastmix.ops.duplex import native, recogniser_native, reference
from fastmix.ops.duplex.types import (
    PARTS,
    DuplexOutput,
    DuplexParams,
    ImportanceParams,
    RecogniserParams,
    Recognition,
)

__all__ = [
    "PARTS",
    "DuplexOutput",
    "DuplexParams",
    "ImportanceParams",
    "Layers",
    "Linear",
    "Recognition",
    "RecogniserParams",
    "duplex",
    "importance",
    "recognise",
]


def duplex(
    agent_qs: Tensor,
    max_qs: Tensor | None,
    states: Tensor,
    actions: Tensor | None,
    params: DuplexParams,
    *,
    minus_one: bool = True,
    part: str = "both",
    backend: str | None = None,
) -> DuplexOutput:
    r"""QPLEX's joint value of the agents' utilities, from values and advantages that are both factored.

    With ``w = |scale(s)| + 1e-10`` and ``b = shift(s)``, or 1 and 0 where the params have none, and ``lambda`` the
    weights of `importance`::

        v_tot   = sum_a (w_a q_a + b_a)
        adv_tot = sum_a (lambda_a - 1) stop_gradient(w_a (q_a - max_q_a))
        q_tot   = v_tot + adv_tot

    So gradients reach ``agent_qs``, ``scale`` and ``shift`` through ``v_tot`` only, the importance network through
    ``adv_tot`` only, and ``max_qs`` not at all. Rows are independent: NaN or infinity in one row's inputs reaches no
    other row of the result.

    Args:
        agent_qs: ``[..., A]``, utilities of the joint action.
        max_qs: ``[..., A]``, each agent's largest utility; None with ``part="v"``.
        states: ``[..., S]``, with the leading dimensions of ``agent_qs``.
        actions: ``[..., A]`` int64, the joint action; -1 gives a one-hot of zeros. None with ``part="v"``.
        params: the networks' weights, see `DuplexParams`.
        minus_one: False leaves out the ``- 1``.
        part: ``"both"``, or ``"v"`` or ``"adv"`` to compute only that part; parameters of the other get no gradient.
        backend: ``None`` for the automatic choice, or a name of `fastmix.backends.NAMES`.

    Returns:
        A `DuplexOutput`, differentiable once in ``agent_qs``, ``states`` and every parameter. Under autocast
        half-precision arguments are promoted to float32 and so is the result.

    Raises:
        ValueError, TypeError: an argument of wrong shape, dtype, device, range or value.

    Source: Wang et al. (2021), QPLEX, section 3.2.
    """
    _checks.check_choice("part", part, PARTS)
    if not isinstance(params, DuplexParams):
        raise TypeError(f"params must be a DuplexParams, got {type(params).__name__}")
    _check_qs(agent_qs, max_qs, states, needed=part != "v")
    if _checks.autocast_enabled(agent_qs):
        agent_qs, max_qs, states, params = _checks.upcast_nested((agent_qs, max_qs, states, params))
        with torch.autocast(agent_qs.device.type, enabled=False):
            return duplex(agent_qs, max_qs, states, actions, params, minus_one=minus_one, part=part, backend=backend)
    _check_shapes(agent_qs, max_qs, states)
    A, S = agent_qs.shape[-1], states.shape[-1]
    if (params.scale == ()) != (params.shift == ()):
        raise ValueError("params must have both of scale and shift, or neither")
    if params.scale != ():
        check_layers("params.scale", params.scale, states, S, A)
        check_layers("params.shift", params.shift, states, S, A)
    if part != "v":
        _check_importance("params.importance", params.importance, states, actions, agent_qs.shape)

    chosen = backends.resolve("duplex", agent_qs, backend)
    run = native.duplex if chosen == "native" else reference.duplex
    if chosen == "triton":
        from fastmix.ops.duplex import triton  # here, as it imports Triton

        run = triton.duplex
    leading = agent_qs.shape[:-1]
    if chosen != "native" or len(leading) not in (1, 2):
        agent_qs, states = _rows(agent_qs), _rows(states)
        max_qs, actions = None if max_qs is None else _rows(max_qs), None if actions is None else _rows(actions)
    flat = run(agent_qs, max_qs, states, actions, params, minus_one, part)
    return DuplexOutput._make(None if value is None else value.reshape(*leading, 1) for value in flat)


def importance(states: Tensor, actions: Tensor, params: ImportanceParams, *, backend: str | None = None) -> Tensor:
    r"""QPLEX's importance weights of the agents' advantages, all above 0::

        lambda_a = sum_k (|key_k(s)| + 1e-10) sigmoid(agents_k(s))_a sigmoid(action_k([s | one-hots of actions]))_a

    Args:
        states: ``[..., S]``.
        actions: ``[..., A]`` int64, the joint action; -1 gives a one-hot of zeros.
        params: the networks' weights, see `ImportanceParams`.
        backend: ``None`` for the automatic choice, or a name of `fastmix.backends.NAMES`.

    Returns:
        ``[..., A]``, differentiable once in ``states`` and every parameter; float32 under autocast.

    Raises:
        ValueError, TypeError: an argument of wrong shape, dtype, device or range.

    Source: Wang et al. (2021), QPLEX, section 3.2.
    """
    _checks.check_tensor("states", states)
    _checks.check_floating("states", states)
    if _checks.autocast_enabled(states):
        states, params = _checks.upcast_nested((states, params))
        with torch.autocast(states.device.type, enabled=False):
            return importance(states, actions, params, backend=backend)
    if states.dim() < 1 or states.shape[-1] < 1:
        raise ValueError(f"states must have shape [..., S], S at least 1, got {tuple(states.shape)}")
    _check_importance("params", params, states, actions, (*states.shape[:-1], None))
    shape = actions.shape
    chosen = backends.resolve("importance", states, backend)
    run = native.importance if chosen == "native" else reference.importance
    if chosen == "triton":
        from fastmix.ops.duplex import triton  # here, as it imports Triton

        run = triton.importance
    if chosen != "native" or len(shape) not in (2, 3):
        states, actions = _rows(states), _rows(actions)
    return run(states, actions, params).reshape(shape)


def recognise(
    agent_qs: Tensor,
    max_qs: Tensor,
    states: Tensor,
    actions: Tensor,
    params: RecogniserParams,
    *,
    backend: str | None = None,
) -> Recognition:
    r"""POWQMIX's estimate of the joint value, by which potentially optimal joint actions are recognised.

    With ``x = [s | one-hots of actions, agent after agent]``::

        w1 = |W_1(x)| as [A, E]    w2 = |W_2(x)| as [E]    lambda_a = w1[a] . w2
        q_r = sum_a lambda_a stop_gradient(q_a - max_q_a) + v(s)

    An action is potentially optimal where ``q_r >= v - C``. No gradient reaches ``agent_qs`` and ``max_qs``. Fast forms
    never build the one-hots. Rows are independent: NaN or infinity in one row's inputs reaches no other row.

    Args:
        agent_qs: ``[..., A]``, utilities of the joint action.
        max_qs: ``[..., A]``, each agent's largest utility.
        states: ``[..., S]``, with the leading dimensions of ``agent_qs``.
        actions: ``[..., A]`` int64, the joint action; -1 gives a one-hot of zeros.
        params: the networks' weights, see `RecogniserParams`.
        backend: ``None`` for the automatic choice, or a name of `fastmix.backends.NAMES`.

    Returns:
        A `Recognition`, differentiable once in ``states`` and every parameter; float32 under autocast.

    Raises:
        ValueError, TypeError: an argument of wrong shape, dtype, device or range.

    Source: POWQMIX, equations 5 and 11; how ``W_1`` and ``W_2`` make ``lambda`` is not said there and chosen here.
    """
    if not isinstance(params, RecogniserParams):
        raise TypeError(f"params must be a RecogniserParams, got {type(params).__name__}")
    _check_qs(agent_qs, max_qs, states, needed=True)
    if _checks.autocast_enabled(agent_qs):
        agent_qs, max_qs, states, params = _checks.upcast_nested((agent_qs, max_qs, states, params))
        with torch.autocast(agent_qs.device.type, enabled=False):
            return recognise(agent_qs, max_qs, states, actions, params, backend=backend)
    _check_shapes(agent_qs, max_qs, states)
    A, S = agent_qs.shape[-1], states.shape[-1]
    _checks.check_actions(actions, agent_qs.shape, states)
    n_actions = action_width("params.w1", params.w1, S, A)
    _checks.check_action_range(actions, n_actions)
    check_layers("params.w2", params.w2, states, S + A * n_actions, None)
    check_layers("params.w1", params.w1, states, S + A * n_actions, A * params.w2[-1].weight.shape[0])
    check_layers("params.v", params.v, states, S, 1)

    leading = agent_qs.shape[:-1]
    chosen = backends.resolve("recognise", agent_qs, backend)
    if chosen != "native" or len(leading) not in (1, 2):
        agent_qs, max_qs, states, actions = _rows(agent_qs), _rows(max_qs), _rows(states), _rows(actions)
    run = reference.recognise
    if chosen == "native":
        run = recogniser_native.recognise
    elif chosen == "triton":
        from fastmix.ops.duplex import recogniser_triton  # here, as it imports Triton

        run = recogniser_triton.recognise
    out = run(agent_qs, max_qs, states, actions, params)
    return out if states.shape[:-1] == leading else Recognition._make(value.reshape(*leading, 1) for value in out)


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(tensor.shape[:-1].numel(), tensor.shape[-1])


def _check_qs(agent_qs: Tensor, max_qs: Tensor | None, states: Tensor, needed: bool) -> None:
    _checks.check_tensor("agent_qs", agent_qs)
    _checks.check_tensor("states", states)
    _checks.check_floating("agent_qs", agent_qs)
    if needed or max_qs is not None:
        _checks.check_tensor("max_qs", max_qs)


def _check_shapes(agent_qs: Tensor, max_qs: Tensor | None, states: Tensor) -> None:
    _checks.check_agent_qs(agent_qs)
    _checks.check_states(states, agent_qs, "agent_qs")
    if max_qs is not None:
        _checks.check_shape("max_qs", max_qs, agent_qs.shape, "[..., A]")
        _checks.check_like("max_qs", max_qs, agent_qs, "agent_qs")


def _check_importance(
    name: str,
    params: ImportanceParams,
    states: Tensor,
    actions: Tensor | None,
    shape: tuple[int | None, ...],
) -> None:
    """Raise unless an importance network and the joint actions ``[..., A]`` fit ``states``."""
    if not isinstance(params, ImportanceParams):
        raise TypeError(f"{name} must be an ImportanceParams, got {type(params).__name__}")
    _checks.check_tensor("actions", actions)
    assert actions is not None
    _checks.check_actions(actions, shape, states)
    S, A = states.shape[-1], actions.shape[-1]
    n_actions = action_width(f"{name}.action", params.action, S, A)
    _checks.check_action_range(actions, n_actions)
    kernels = params.action[0].weight.shape[0]
    check_layers(f"{name}.key", params.key, states, S, 1, groups=kernels)
    check_layers(f"{name}.agents", params.agents, states, S, A, groups=kernels)
    check_layers(f"{name}.action", params.action, states, S + A * n_actions, A, groups=kernels)
