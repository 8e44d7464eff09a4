"""`recurrent`: input layer, GRU over the whole sequence, output layer, for several networks over one input."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmix import backends
from fastmix.ops import _checks, _library
from fastmix.ops.recurrent import arguments, cuda, cudnn, native, reference
from fastmix.ops.recurrent.stepper import Stepper
from fastmix.ops.recurrent.types import RecurrentOutput, RecurrentParams

__all__ = ["RecurrentOutput", "RecurrentParams", "Stepper", "recurrent"]


def recurrent(
    obs: Tensor,
    networks: Sequence[RecurrentParams],
    hidden: Sequence[Tensor | None] | None = None,
    *,
    last_actions: Tensor | None = None,
    agent_ids: bool = False,
    return_hidden_states: bool = False,
    lengths: Tensor | None = None,
    backend: str | None = None,
) -> list[RecurrentOutput]:
    r"""Unroll recurrent utility networks over whole sequences.

    With ``s_t = [obs_t | one-hot last action | one-hot agent id]`` (the last two as asked for), per episode and agent:

    * ``x_t = relu(W1 s_t + b1)``
    * ``r_t = sigmoid(W_ir x_t + b_ir + W_hr h_{t-1} + b_hr)``, ``z_t`` alike
    * ``n_t = tanh(W_in x_t + b_in + r_t * (W_hn h_{t-1} + b_hn))``
    * ``h_t = (1 - z_t) * n_t + z_t * h_{t-1}``
    * ``q_t = W2 h_t + b2``, or of ``LayerNorm(h_t)`` (eps 1e-5) where the network has one; ``h_t`` is carried on.

    Args:
        obs: ``[B, T, A, O]``, strides of any kind; a copy is made only where the last axis is not contiguous.
        networks: one or more networks over the same input; hidden and output sizes may differ.
        hidden: for each network its state before the first step, ``[B, A, D]``, or None for zeros.
        last_actions: ``[B, T, A]`` int64, the action before each step; -1 gives a one-hot of zeros (on CUDA, where a
            check would wait for the device, any action that does not exist). The width of the one-hot is what ``W1``
            leaves beside observation and agent id: as many as there are actions.
        agent_ids: whether the input ends with the one-hot of the agent, ``A`` wide.
        return_hidden_states: also return the state after every step.
        lengths: ``[B]`` int64, how many steps of each episode are wanted, or None for all. Values and states of later
            steps are then finite and otherwise anything, gradients must not arrive there, and ``hidden`` of an episode
            is the state after its last wanted step or a later one. The native CPU backend leaves out what it can.
        backend: ``None`` for the automatic choice, or a name of `fastmix.backends.NAMES`.

    Returns:
        A `RecurrentOutput` for each network, differentiable in every parameter, ``hidden`` and ``obs``. Where nothing
        of a network wants a gradient, nothing is kept for one.

    Raises:
        ValueError, TypeError: an argument of wrong shape, dtype, device or range.

    Source: Rashid et al. (2018), section 6.2 (the network); Cho et al. (2014) (the GRU, in PyTorch's form).
    """
    start = [None] * len(networks) if hidden is None else list(hidden)
    arguments.check_arguments(obs, networks, start, last_actions, agent_ids)
    arguments.check_lengths(obs, lengths)
    settings = (last_actions, agent_ids, return_hidden_states)
    if _checks.autocast_enabled(obs):
        with torch.autocast(obs.device.type, enabled=False):
            networks = [RecurrentParams._make(map(_checks.upcast, network)) for network in networks]
            start = [_checks.upcast(state) for state in start]
            upcast = obs.float() if obs.dtype in (torch.float16, torch.bfloat16) else obs
            return _dispatch(upcast, networks, start, settings, lengths, backend, half=True)
    return _dispatch(obs, networks, start, settings, lengths, backend, half=False)


def _dispatch(
    obs: Tensor,
    networks: Sequence[RecurrentParams],
    hidden: Sequence[Tensor | None],
    settings: tuple[Tensor | None, bool, bool],
    lengths: Tensor | None,
    backend: str | None,
    half: bool,
) -> list[RecurrentOutput]:
    for index, (network, state) in enumerate(zip(networks, hidden, strict=True)):
        arguments.check_dtypes(obs, network, state, f"networks[{index}]", f"hidden[{index}]")
    on_cuda = _library.on_cuda(obs)
    names = [
        backends.resolve(
            "recurrent", obs, backend, native_limit=cuda.limit(network, obs.shape[-1]) if on_cuda else None
        )
        for network in networks
    ]
    results: dict[int, RecurrentOutput] = {}
    if on_cuda:
        together = [i for i, name in enumerate(names) if name == "native"]
        outputs = cuda.recurrent(
            obs, [networks[i] for i in together], [hidden[i] for i in together], *settings, half=half
        )
        results.update(zip(together, outputs, strict=True))
    for i, name in enumerate(names):
        if i in results:
            continue
        if name == "native":
            results[i] = native.recurrent(obs, networks[i], hidden[i], *settings, lengths)
        else:
            results[i] = _WHOLE[name](obs, networks[i], hidden[i], *settings)
    return [results[i] for i in range(len(networks))]


_WHOLE = {"cudnn": cudnn.recurrent, "reference": reference.recurrent}
