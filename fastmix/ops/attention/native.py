"""`attention` through the compiled core: networks and attention in one pass over blocks of rows, no key is built."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastmix.ops import _library, _memory, _networks
from fastmix.ops._rows import layout, with_dense_rows
from fastmix.ops.attention.types import AttentionOutput, AttentionParams

_run_forward, _run_backward = _library.CoreFunction("attention_forward"), _library.CoreFunction("attention_backward")

_QUERY, _HEAD, _V, _KEY = range(4)
"""The networks, in the order of their parameters"""


def attention(
    agent_qs: Tensor,
    states: Tensor,
    params: AttentionParams,
    own_size: int,
    own_grad: bool,
    alive: Tensor | None,
    softmax: bool,
    return_weights: bool,
    return_statistics: bool,
) -> AttentionOutput:
    """See `fastmix.ops.attention`; arguments are already checked: ``[.., A]``, ``[.., S]``, and bool ``[N, A]``.

    ``..`` is one dimension or two.
    """
    tensors, depths = _networks.flatten((params.query, params.head, params.v, (params.key,)))
    training = _library.wants_grad((agent_qs, states, *tensors))
    q_tot, weights, v, squares, entropies, _, _ = _attention(
        agent_qs, states, alive, depths, own_size, own_grad, softmax, return_weights, return_statistics, training,
        tensors,
    )  # fmt: skip
    return AttentionOutput(
        q_tot,
        weights if return_weights else None,
        v if return_weights and params.v else None,
        squares if return_statistics else None,
        entropies if return_statistics else None,
    )


def _forward(
    agent_qs: Tensor,
    states: Tensor,
    alive: Tensor | None,
    depths: list[int],
    own_size: int,
    own_grad: bool,
    softmax: bool,
    return_weights: bool,
    return_statistics: bool,
    training: bool,
    params: list[Tensor],
) -> tuple[Tensor, ...]:
    """All of `AttentionOutput`, those not wanted empty; and what backward needs, empty unless ``training``."""
    shapes = _shapes(agent_qs, states, depths, own_size, return_weights, return_statistics, training, params)
    results = [_memory.kept(shape, states.dtype) for shape in shapes]
    states, params = with_dense_rows("attention", states), _networks.dense(params)
    networks = _networks.split(params, depths)
    _run_forward(
        states, *_inputs(agent_qs, states, alive, own_size), _specs(networks, networks, [False] * 3), _kinds(depths),
        _addresses(networks[_KEY]), _reads_qs(networks, own_size), softmax, _addresses(results),
    )  # fmt: skip
    return tuple(results)


def _backward_forward(
    grad_q_tot: Tensor | None,
    grad_weights: Tensor | None,
    grad_v: Tensor | None,
    grad_squares: Tensor | None,
    grad_entropies: Tensor | None,
    agent_qs: Tensor,
    states: Tensor,
    alive: Tensor | None,
    hidden: Tensor,
    projected: Tensor,
    depths: list[int],
    own_size: int,
    own_grad: bool,
    softmax: bool,
    wants: list[int],
    wants_qs: bool,
    wants_states: bool,
    params: list[Tensor],
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Gradients of agent_qs, states and the parameters; those not wanted are empty."""
    grad_qs, grad_states, grads = _empty_grads(agent_qs, states, depths, wants, wants_qs, wants_states, params)
    upstream = [
        None if grad is None else grad.contiguous()
        for grad in (grad_q_tot, grad_weights, grad_v, grad_squares, grad_entropies)
    ]
    states, params = with_dense_rows("attention", states), _networks.dense(params)
    networks = _networks.split(params, depths)
    _run_backward(
        states, *_inputs(agent_qs, states, alive, own_size), _specs(networks, grads, wants), _kinds(depths),
        _addresses(networks[_KEY]), _reads_qs(networks, own_size), softmax, own_grad, _addresses(upstream),
        _addresses((hidden, projected)), _addresses((grad_qs, grad_states)), _addresses(grads[_KEY]),
    )  # fmt: skip
    return grad_qs, grad_states, [grad for network in grads for grad in network]


def _inputs(agent_qs: Tensor, states: Tensor, alive: Tensor | None, own_size: int) -> tuple[Any, ...]:
    """Rows, state features, agents and own features; where rows of utilities and states lie; address of ``alive``."""
    agents = agent_qs.shape[-1]
    sizes = (agent_qs.shape[:-1].numel(), states.shape[-1], agents, own_size)
    return sizes, layout(agent_qs), layout(states), 0 if alive is None else alive.data_ptr()


def _addresses(tensors: Any) -> list[int]:
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


def _reads_qs(networks: list[list[Tensor]], own_size: int) -> bool:
    return bool(networks[_KEY][0].shape[-1] > own_size)


def _kinds(depths: list[int]) -> tuple[int, int, int]:
    """Where query, head and v stand among those that are there, -1 for an absent one."""
    head, v = depths[_HEAD] > 0, depths[_V] > 0
    return 0, 1 if head else -1, 1 + head if v else -1


def _specs(networks: list[list[Tensor]], grads: list[list[Tensor]], wants: Any) -> list[_networks.Spec]:
    return [
        _networks.spec(network, grad if want else None)
        for network, grad, want in zip(networks[:_KEY], grads, wants, strict=False)
        if network
    ]


def _shapes(
    agent_qs: Tensor,
    states: Tensor,
    depths: list[int],
    own_size: int,
    return_weights: bool,
    return_statistics: bool,
    training: bool,
    params: list[Tensor],
) -> list[tuple[int, ...]]:
    """Of what forward returns."""
    leading, agents = agent_qs.shape[:-1], agent_qs.shape[-1]
    networks = _networks.split(params, depths)
    key, key_bias = networks[_KEY]
    heads, none = key.shape[0], (0,)
    statistics = (*leading, heads) if return_statistics else none
    results = [
        (*leading, 1),
        (*leading, agents) if return_weights else none,
        (*leading, 1) if return_weights and depths[_V] else none,
        statistics,
        statistics,
    ]
    if not training:
        return [*results, none, none]
    columns = heads * (key.shape[-1] + (key_bias.numel() > 0)) + (heads if depths[_HEAD] else 0) + bool(depths[_V])
    hidden = _networks.hidden_columns(network for network in networks[:_KEY] if network)
    return [*results, *(_networks.kept_shape(leading.numel(), kept) for kept in (hidden, columns))]


def _empty_grads(
    agent_qs: Tensor,
    states: Tensor,
    depths: list[int],
    wants: list[int],
    wants_qs: bool,
    wants_states: bool,
    params: list[Tensor],
) -> tuple[Tensor, Tensor, list[list[Tensor]]]:
    return (
        states.new_empty(agent_qs.shape if wants_qs else (0,)),
        states.new_empty(states.shape if wants_states else (0,)),
        _networks.empty_grads(_networks.split(params, depths), map(bool, wants)),
    )


def _fake(agent_qs: Tensor, states: Tensor, alive: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    depths, own_size, _, _, return_weights, return_statistics, training, params = rest
    shapes = _shapes(agent_qs, states, depths, own_size, return_weights, return_statistics, training, params)
    return tuple(states.new_empty(shape) for shape in shapes)


def _backward_fake(*args: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    (agent_qs, states), depths, (wants, wants_qs, wants_states, params) = args[5:7], args[10], args[14:]
    grad_qs, grad_states, grads = _empty_grads(agent_qs, states, depths, wants, wants_qs, wants_states, params)
    return grad_qs, grad_states, [grad for network in grads for grad in network]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    agent_qs, states, alive, depths, own_size, own_grad, softmax, _, _, training, params = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[5:])
    if not training:
        return  # nothing was kept; _backward says so
    ctx.settings = (list(depths), own_size, own_grad, softmax)
    ctx.wants = _networks.wanted(_networks.split(params, depths))
    ctx.wants_inputs = (agent_qs.requires_grad, states.requires_grad)
    ctx.save_for_backward(agent_qs, states, alive, *output[5:], *params)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    if not hasattr(ctx, "wants"):
        raise RuntimeError("fastmix::attention was called with training=False and cannot be differentiated")
    agent_qs, states, alive, hidden, projected, *params = ctx.saved_tensors
    depths, own_size = ctx.settings[:2]
    grad_q_tot, grad_weights, grad_v, grad_squares, grad_entropies = (_present(grad) for grad in grads[:5])
    mixes = grad_q_tot is not None or grad_weights is not None
    attends = mixes or grad_squares is not None or grad_entropies is not None
    values = grad_q_tot is not None or grad_v is not None
    nothing = (None,) * 10
    if not attends and not values:
        return *nothing, [None] * len(params)
    # The key's gradient comes out of that of the queries, and the other way round.
    query = attends and (ctx.wants[_QUERY] or ctx.wants[_KEY])
    wants = [query, ctx.wants[_HEAD] and mixes, ctx.wants[_V] and values, query]
    reads_qs = _reads_qs(_networks.split(params, depths), own_size)
    wants_qs = ctx.wants_inputs[0] and (grad_q_tot is not None or (reads_qs and attends))
    wants_states = ctx.wants_inputs[1]
    grad_qs, grad_states, param_grads = _attention_backward(
        grad_q_tot, grad_weights, grad_v, grad_squares, grad_entropies, agent_qs, states, alive, hidden, projected,
        *ctx.settings, [int(want) for want in wants], wants_qs, wants_states, params,
    )  # fmt: skip
    return (
        grad_qs if wants_qs else None, grad_states if wants_states else None, *nothing[2:],
        _networks.present(param_grads, params, depths, wants),
    )  # fmt: skip


def _present(grad: Tensor | None) -> Tensor | None:
    """None for the gradient of a result that was not asked for."""
    return None if grad is None or grad.dim() == 1 else grad


_attention_backward = _library.define(
    "attention_backward",
    "(Tensor? grad_q_tot, Tensor? grad_weights, Tensor? grad_v, Tensor? grad_squares, Tensor? grad_entropies,"
    " Tensor agent_qs, Tensor states, Tensor? alive, Tensor hidden, Tensor projected, int[] depths, int own_size,"
    " bool own_grad, bool softmax, int[] wants, bool wants_qs, bool wants_states, Tensor[] params)"
    " -> (Tensor, Tensor, Tensor[])",
    _backward_forward,
    _backward_fake,
)
_attention = _library.define(
    "attention",
    "(Tensor agent_qs, Tensor states, Tensor? alive, int[] depths, int own_size, bool own_grad, bool softmax,"
    " bool return_weights, bool return_statistics, bool training, Tensor[] params)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _fake,
    setup_context=_setup_context,
    backward=_backward,
)
