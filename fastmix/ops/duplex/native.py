"""`duplex` and `importance` through the compiled core: all their small networks in one pass over blocks of rows."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastmix.ops import _library, _memory, _networks
from fastmix.ops._rows import NO_ROWS, layout, with_dense_rows
from fastmix.ops.duplex.types import DuplexOutput, DuplexParams, ImportanceParams

_run_forward, _run_backward = _library.CoreFunction("duplex_forward"), _library.CoreFunction("duplex_backward")

_SCALE, _SHIFT, _KEY, _AGENTS, _ACTION = range(5)
"""The networks, in the order of their parameters."""


def duplex(
    agent_qs: Tensor,
    max_qs: Tensor | None,
    states: Tensor,
    actions: Tensor | None,
    params: DuplexParams,
    minus_one: bool,
    part: str,
) -> DuplexOutput:
    """See `fastmix.ops.duplex`; arguments are already checked: ``[.., A]`` and ``[.., S]`` give ``[.., 1]``.

    ``..`` is one dimension or two.
    """
    if part == "v":
        max_qs = actions = None
    networks = (
        params.scale,
        () if part == "adv" else params.shift,  # which cancels in the advantages
        *(((), (), ()) if part == "v" else params.importance),
    )
    q_tot, v_tot, adv_tot = _call(agent_qs, max_qs, states, actions, networks, minus_one, part != "adv")
    if part == "both":
        return DuplexOutput(q_tot, v_tot, adv_tot)
    return DuplexOutput(q_tot, q_tot if part == "v" else None, q_tot if part == "adv" else None)


def importance(states: Tensor, actions: Tensor, params: ImportanceParams) -> Tensor:
    """See `fastmix.ops.duplex.importance`; arguments are already checked: ``[.., S]`` and ``[.., A]`` give ``[.., A]``.

    ``..`` is one dimension or two.
    """
    return _call(None, None, states, actions, ((), (), *params), False, False)[0]


def _call(
    agent_qs: Tensor | None,
    max_qs: Tensor | None,
    states: Tensor,
    actions: Tensor | None,
    networks: tuple[Any, ...],
    minus_one: bool,
    wants_v: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    tensors, depths = _networks.flatten(networks)
    training = _library.wants_grad((agent_qs, states, *tensors))
    q_tot, v_tot, adv_tot, _, _ = _duplex(
        agent_qs, None if max_qs is None else max_qs.detach(), states, actions,
        depths, minus_one, wants_v, training, tensors,
    )  # fmt: skip
    return q_tot, v_tot, adv_tot


def _forward(
    agent_qs: Tensor | None,
    max_qs: Tensor | None,
    states: Tensor,
    actions: Tensor | None,
    depths: list[int],
    minus_one: bool,
    wants_v: bool,
    training: bool,
    params: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``q_tot`` and its two parts, and what backward needs: hidden features and outputs, empty unless ``training``.

    The parts are empty unless there are two. Without ``agent_qs``, ``q_tot`` is the importance weights.
    """
    shapes = _shapes(agent_qs, states, actions, depths, wants_v, training, params)
    results = [_memory.kept(shape, states.dtype) for shape in shapes]
    states, params = with_dense_rows("duplex", states), _networks.dense(params)
    networks = _networks.split(params, depths)
    sizes = _sizes(agent_qs, states, actions, networks)
    q_tot, v_tot, adv_tot, hidden, outputs = (result.data_ptr() for result in results)
    joint = (0, 0, 0, q_tot) if agent_qs is None else (q_tot, v_tot, adv_tot, 0)
    _run_forward(
        states, sizes, *_rows(agent_qs, max_qs, states, actions), _specs(networks, networks, [False] * 5),
        _kinds(depths), minus_one, wants_v, (*joint, hidden, outputs),
    )  # fmt: skip
    return tuple(results)  # type: ignore[return-value]


def _backward_forward(
    grad_v: Tensor | None,
    grad_adv: Tensor | None,
    grad_weights: Tensor | None,
    agent_qs: Tensor | None,
    max_qs: Tensor | None,
    states: Tensor,
    actions: Tensor | None,
    hidden: Tensor,
    outputs: Tensor,
    depths: list[int],
    wants: list[int],
    wants_qs: bool,
    wants_states: bool,
    params: list[Tensor],
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Gradients of agent_qs, states and the parameters; those not wanted are empty."""
    grad_qs, grad_states, grads = _empty_grads(agent_qs, states, depths, wants, wants_qs, wants_states, params)
    grad_v, grad_adv, grad_weights = (None if g is None else g.contiguous() for g in (grad_v, grad_adv, grad_weights))
    states, params = with_dense_rows("duplex", states), _networks.dense(params)
    networks = _networks.split(params, depths)
    _run_backward(
        states, _sizes(agent_qs, states, actions, networks), *_rows(agent_qs, max_qs, states, actions),
        _specs(networks, grads, wants), _kinds(depths),
        tuple(0 if grad is None else grad.data_ptr() for grad in (grad_v, grad_adv, grad_weights)),
        (hidden.data_ptr(), outputs.data_ptr()), (grad_qs.data_ptr(), grad_states.data_ptr()),
    )  # fmt: skip
    return grad_qs, grad_states, [grad for network in grads for grad in network]


def _rows(
    agent_qs: Tensor | None, max_qs: Tensor | None, states: Tensor, actions: Tensor | None
) -> tuple[Any, Any, Any, Any]:
    return (
        NO_ROWS if agent_qs is None else layout(agent_qs), NO_ROWS if max_qs is None else layout(max_qs),
        layout(states), NO_ROWS if actions is None else layout(actions),
    )  # fmt: skip


def _sizes(
    agent_qs: Tensor | None, states: Tensor, actions: Tensor | None, networks: list[list[Tensor]]
) -> tuple[int, int, int, int]:
    """Rows, state features, agents, actions (0: none)."""
    state_dim = states.shape[-1]
    agents = _agents(agent_qs, actions)
    n_actions = 0 if actions is None else (networks[_ACTION][0].shape[-1] - state_dim) // agents
    return states.shape[:-1].numel(), state_dim, agents, n_actions


def _agents(agent_qs: Tensor | None, actions: Tensor | None) -> int:
    like = actions if agent_qs is None else agent_qs
    assert like is not None
    return like.shape[-1]


def _kinds(depths: list[int]) -> list[int]:
    """Where each network stands among those that are there, -1 for an absent one."""
    kinds, present = [], 0
    for depth in depths:
        kinds.append(present if depth > 0 else -1)
        present += depth > 0
    return kinds


def _specs(networks: list[list[Tensor]], grads: list[list[Tensor]], wants: Any) -> list[_networks.Spec]:
    return [
        _networks.spec(network, grad if want else None, reads_actions=kind == _ACTION)
        for kind, (network, grad, want) in enumerate(zip(networks, grads, wants, strict=True))
        if network
    ]


def _shapes(
    agent_qs: Tensor | None,
    states: Tensor,
    actions: Tensor | None,
    depths: list[int],
    wants_v: bool,
    training: bool,
    params: list[Tensor],
) -> list[tuple[int, ...]]:
    """Of what forward returns."""
    leading, agents = states.shape[:-1], _agents(agent_qs, actions)
    networks = [network for network in _networks.split(params, depths) if network]
    both = wants_v and depths[_KEY] > 0
    one, part = (agents if agent_qs is None else 1,), (*leading, 1) if both else (0,)
    if not training:
        return [(*leading, *one), part, part, (0,), (0,)]
    kernels = _networks.groups(_networks.split(params, depths)[_KEY]) if depths[_KEY] > 0 else 0
    columns = (agents if depths[_SCALE] > 0 else 0) + kernels * (1 + 2 * agents)
    hidden = _networks.hidden_columns(networks)
    return [(*leading, *one), part, part, *(_networks.kept_shape(leading.numel(), kept) for kept in (hidden, columns))]


def _empty_grads(
    agent_qs: Tensor | None,
    states: Tensor,
    depths: list[int],
    wants: list[int],
    wants_qs: bool,
    wants_states: bool,
    params: list[Tensor],
) -> tuple[Tensor, Tensor, list[list[Tensor]]]:
    like = states if agent_qs is None else agent_qs
    return (
        states.new_empty(like.shape if wants_qs else (0,)),
        states.new_empty(states.shape if wants_states else (0,)),
        _networks.empty_grads(_networks.split(params, depths), map(bool, wants)),
    )


def _fake(agent_qs: Tensor | None, max_qs: Tensor | None, states: Tensor, actions: Tensor | None, *rest: Any) -> Any:
    depths, _, wants_v, training, params = rest
    shapes = _shapes(agent_qs, states, actions, depths, wants_v, training, params)
    return tuple(states.new_empty(shape) for shape in shapes)


def _backward_fake(*args: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    _, _, _, agent_qs, _, states, _, _, _, depths, wants, wants_qs, wants_states, params = args
    grad_qs, grad_states, grads = _empty_grads(agent_qs, states, depths, wants, wants_qs, wants_states, params)
    return grad_qs, grad_states, [grad for network in grads for grad in network]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    agent_qs, max_qs, states, actions, depths, _, wants_v, training, params = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[3], output[4])
    ctx.depths = list(depths)
    if not training:
        return  # nothing was kept; _backward says so
    ctx.wants_v = wants_v
    ctx.wants = _networks.wanted(_networks.split(params, depths))
    ctx.wants_inputs = (agent_qs is not None and agent_qs.requires_grad, states.requires_grad)
    ctx.save_for_backward(agent_qs, max_qs, states, actions, *output[3:], *params)


def _backward(
    ctx: Any, grad_q: Tensor | None, grad_v: Tensor | None, grad_adv: Tensor | None, *_: None
) -> tuple[Any, ...]:
    if not hasattr(ctx, "wants"):
        raise RuntimeError("fastmix::duplex was called with training=False and cannot be differentiated")
    agent_qs, max_qs, states, actions, hidden, outputs, *params = ctx.saved_tensors
    depths, grad_weights = ctx.depths, None
    reaches_adv = depths[_KEY] > 0
    if agent_qs is None:
        grad_v, grad_adv, grad_weights = None, None, grad_q
    else:
        grad_v = _add(grad_q, grad_v) if ctx.wants_v else None
        grad_adv = _add(grad_q, grad_adv) if reaches_adv else None
    if grad_v is None and grad_adv is None and grad_weights is None:
        return (*(None,) * 8, [None] * len(params))
    reached = [grad_v is not None] * 2 + [grad_adv is not None or grad_weights is not None] * 3
    wants = [want and reach for want, reach in zip(ctx.wants, reached, strict=True)]
    wants_qs = ctx.wants_inputs[0] and grad_v is not None
    wants_states = ctx.wants_inputs[1] and any(
        reach and depth > 0 for reach, depth in zip(reached, depths, strict=True)
    )
    grad_qs, grad_states, grads = _duplex_backward(
        grad_v, grad_adv, grad_weights, agent_qs, max_qs, states, actions, hidden, outputs, depths,
        [int(want) for want in wants], wants_qs, wants_states, params,
    )  # fmt: skip
    return (
        grad_qs if wants_qs else None, None, grad_states if wants_states else None, *(None,) * 5,
        _networks.present(grads, params, depths, wants),
    )  # fmt: skip


def _add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


_duplex_backward = _library.define(
    "duplex_backward",
    "(Tensor? grad_v, Tensor? grad_adv, Tensor? grad_weights, Tensor? agent_qs, Tensor? max_qs, Tensor states,"
    " Tensor? actions, Tensor hidden, Tensor outputs, int[] depths, int[] wants, bool wants_qs, bool wants_states,"
    " Tensor[] params) -> (Tensor, Tensor, Tensor[])",
    _backward_forward,
    _backward_fake,
)
_duplex = _library.define(
    "duplex",
    "(Tensor? agent_qs, Tensor? max_qs, Tensor states, Tensor? actions, int[] depths, bool minus_one, bool wants_v,"
    " bool training, Tensor[] params) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _fake,
    setup_context=_setup_context,
    backward=_backward,
)
