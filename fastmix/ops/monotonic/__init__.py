"""`monotonic`: QMIX's mixing network with its hypernetworks."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmix import backends
from fastmix.ops import _checks
from fastmix.ops.monotonic import cuda, native, reference
from fastmix.ops.monotonic.types import POSITIVITIES, MonotonicParams

__all__ = ["POSITIVITIES", "MonotonicParams", "monotonic"]


def monotonic(
    agent_qs: Tensor,
    states: Tensor,
    params: MonotonicParams,
    *,
    positivity: str = "abs",
    beta: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    r"""Joint value of the agents' values under a state-conditioned monotonic mixing network.

    With ``pos`` the positivity, and ``h_1 = relu(F_1 s)``, ``h_2 = relu(F_2 s)``, or ``s`` itself with one-layer
    hypernets::

        w1 = pos(W_1 h_1) as [A, E]    b1 = B s    w2 = pos(W_2 h_2) as [E]    v = V_2 relu(V_1 s)
        q_tot = elu(sum_a q_a w1[a] + b1) . w2 + v

    Rows are independent: NaN or infinity in one row's inputs reaches no other row of the result. Non-finite parameters
    are not looked for; they give what arithmetic gives.

    Args:
        agent_qs: ``[..., A]``.
        states: ``[..., S]``, with the leading dimensions of ``agent_qs``. Rows with gaps between them, as in
            ``states[:, :-1]``, cost nothing; columns with gaps, or gaps in more than two leading dimensions, cost a
            copy.
        params: the hypernetworks' weights, see `MonotonicParams`.
        positivity: what makes the generated weights non-negative, one of `POSITIVITIES`: ``"abs"`` (its derivative at 0
            is 0), ``"softplus"`` with sharpness ``beta``, ``"quadratic"`` (half the square), or ``"none"``.
        beta: sharpness of ``"softplus"``, above 0; ignored otherwise.
        backend: ``None`` for the automatic choice, or a name of `fastmix.backends.NAMES`.

    Returns:
        ``[..., 1]``, differentiable once in ``agent_qs``, ``states`` and every parameter. Under autocast half-precision
        arguments are promoted to float32 and so is the result; on backend ``"triton"`` products have autocast's dtype.

    Raises:
        ValueError, TypeError: an argument of wrong shape, dtype, device or value.

    Source: Rashid et al. (2018, 2020), QMIX, section 4 and figure 2; Hu et al. (2021) for the other positivities.
    """
    agent_qs, states, params = checked(agent_qs, states, params, positivity, beta)
    limit = cuda.limit(agent_qs, states, params, positivity) if agent_qs.is_cuda else None
    chosen = backends.resolve("monotonic", agent_qs, backend, native_limit=limit)
    if chosen == "reference" and _checks.autocast_enabled(agent_qs):  # Triton multiplies in autocast's dtype
        with torch.autocast(agent_qs.device.type, enabled=False):
            return _run(chosen, agent_qs, states, params, positivity, beta)
    return _run(chosen, agent_qs, states, params, positivity, beta)


def checked(
    agent_qs: Tensor, states: Tensor, params: MonotonicParams, positivity: str, beta: float
) -> tuple[Tensor, Tensor, MonotonicParams]:
    """The tensors among `monotonic`'s arguments as autocast has them, after all checks."""
    if positivity not in POSITIVITIES:
        _checks.check_choice("positivity", positivity, POSITIVITIES)
    if positivity == "softplus" and not 0 < beta < float("inf"):
        raise ValueError(f"beta must be positive and finite, got {beta!r}")
    _check_types(agent_qs, states, params)
    if _checks.autocast_enabled(agent_qs):
        agent_qs, states = _checks.upcast(agent_qs), _checks.upcast(states)
        params = MonotonicParams(*(_checks.upcast(p) for p in params))  # type: ignore[arg-type]
    _check_shapes(agent_qs, states, params)
    return agent_qs, states, params


def _run(
    chosen: str, agent_qs: Tensor, states: Tensor, params: MonotonicParams, positivity: str, beta: float
) -> Tensor:
    leading = agent_qs.shape[:-1]
    if chosen != "native" or len(leading) not in (1, 2):
        rows = leading.numel()
        agent_qs, states = agent_qs.reshape(rows, agent_qs.shape[-1]), states.reshape(rows, states.shape[-1])
    if chosen == "triton":
        from fastmix.ops.monotonic import triton  # here, as it imports Triton

        q_tot = triton.monotonic(agent_qs, states, params, positivity, beta)
    elif chosen == "reference":
        q_tot = reference.monotonic(agent_qs, states, params, positivity, beta)
    elif agent_qs.is_cuda:
        q_tot = cuda.monotonic(agent_qs, states, params, positivity)
    else:
        q_tot = native.monotonic(agent_qs, states, params, positivity, beta)
    return q_tot if q_tot.dim() == len(leading) + 1 else q_tot.reshape(*leading, 1)


_HIDDEN = ("w1_hidden_weight", "w1_hidden_bias", "w2_hidden_weight", "w2_hidden_bias")


def _check_types(agent_qs: Tensor, states: Tensor, params: MonotonicParams) -> None:
    if not isinstance(params, MonotonicParams):
        raise TypeError(f"params must be a MonotonicParams, got {type(params).__name__}")
    _checks.check_tensor("agent_qs", agent_qs)
    _checks.check_tensor("states", states)
    tensors: tuple[object, ...] = params
    for name, tensor in zip(MonotonicParams._fields, tensors, strict=True):
        if not isinstance(tensor, Tensor) and not (tensor is None and name in _HIDDEN):
            _checks.check_tensor(f"params.{name}", tensor)
    absent = [name for name in _HIDDEN if getattr(params, name) is None]
    if absent and len(absent) < len(_HIDDEN):
        raise ValueError(
            f"params must have all hidden layers or none, but {', '.join(absent)} are None and others are not"
        )
    _checks.check_floating("agent_qs", agent_qs)


def _check_shapes(agent_qs: Tensor, states: Tensor, params: MonotonicParams) -> None:
    _checks.check_agent_qs(agent_qs)
    _checks.check_states(states, agent_qs, "agent_qs")
    A, S, E = agent_qs.shape[-1], states.shape[-1], params.b1_bias.numel()
    H = S if params.w1_hidden_weight is None else params.w1_hidden_weight.shape[0]
    shapes = (
        (H, S), (H,), (A * E, H), (A * E,), (H, S), (H,), (E, H), (E,), (E, S), (E,), (E, S), (E,), (1, E), (1,),
    )  # fmt: skip
    dtype, device = agent_qs.dtype, agent_qs.device
    for name, tensor, shape in zip(MonotonicParams._fields, params, shapes, strict=True):
        if tensor is not None and (tensor.shape != shape or tensor.dtype != dtype or tensor.device != device):
            sizes = f"A = {A}, E = {E}, S = {S}" + ("" if params.w1_hidden_weight is None else f", H = {H}")
            _checks.check_shape(f"params.{name}", tensor, shape, f"(with {sizes})")
            _checks.check_like(f"params.{name}", tensor, agent_qs, "agent_qs")
    if E < 1 or H < 1:
        raise ValueError(f"params must have an embed and a hypernet width of at least 1, got {E} and {H}")
