"""`recurrent` through the compiled core on CUDA: several networks of one hidden size in the same few launches.

Forward: the input layer of all steps, then one walk over them. Backward: one walk back, the weights' gradients, a sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastmix import backends
from fastmix.ops import _library
from fastmix.ops._precision import float32_precision
from fastmix.ops.recurrent.native import readable
from fastmix.ops.recurrent.reference import NORM_EPS
from fastmix.ops.recurrent.types import RecurrentOutput, RecurrentParams

HIDDEN_SIZES = (32, 64)
"""Whose recurrent weights the registers of a block hold."""

MOST_OUTPUTS = 64
"""Of an output layer that is computed along the way; a wider one is a product behind it, like one with layer norm."""

MOST_NETWORKS = 4
"""In one launch."""

_FIELDS = (
    "fc1_weight", "fc1_bias", "weight_ih", "weight_hh", "bias_ih", "bias_hh", "fc2_weight", "fc2_bias",
)  # fmt: skip
_INPUTS = 1 + len(_FIELDS)  # of a network: its hidden state and these
_OUTPUTS = 4  # q, hidden, hidden_states, saved


def limit(network: RecurrentParams, n_obs: int) -> str | None:
    """Why the kernels cannot take a network, on observations of ``n_obs`` features, or None when they can."""
    width, outputs, dtype = network.fc1_weight.shape[0], network.fc2_weight.shape[0], network.fc1_weight.dtype
    if dtype != torch.float32:
        return f"its CUDA kernels take float32, got {dtype}"
    if width not in HIDDEN_SIZES:
        return f"its CUDA kernels take hidden sizes of {' and '.join(map(str, HIDDEN_SIZES))}, got {width}"
    return _limit_on(network.fc1_weight.device.index, width, n_obs, min(outputs, MOST_OUTPUTS))


def _limit_on(index: int, width: int, n_obs: int, outputs: int) -> str | None:
    return _device_limit(index, width, n_obs, outputs)


_limit_on._dynamo_marked_constant = True  # type: ignore[attr-defined]  # see fastmix.backends


@cache
def _device_limit(index: int, width: int, n_obs: int, outputs: int) -> str | None:
    if backends.core_problem() or backends.cuda_problem():
        return None  # a better reason will be given
    if torch.cuda.get_device_capability(index) < (8, 0):
        return "its CUDA kernels need a GPU of compute capability 8.0 or newer"
    with torch.cuda.device(index):
        fits = all(_core().recurrent_cuda_fits(width, n_obs, outputs, precise) for precise in (False, True))
    return None if fits else "its CUDA kernels need blocks with more shared memory than this GPU has"


def recurrent(
    obs: Tensor,
    networks: Sequence[RecurrentParams],
    hidden: Sequence[Tensor | None],
    last_actions: Tensor | None,
    agent_ids: bool,
    return_hidden_states: bool,
    *,
    half: bool = False,
) -> list[RecurrentOutput]:
    """See `fastmix.ops.recurrent`; arguments are already checked, and every network has passed `limit`.

    ``half``: products to the precision that autocast asks for, though results are float32.
    """
    precise = not half and float32_precision() == "highest"
    order = sorted(range(len(networks)), key=lambda i: networks[i].fc1_weight.shape[0])
    results: dict[int, RecurrentOutput] = {}
    for _, group in groupby(order, key=lambda i: networks[i].fc1_weight.shape[0]):
        indices = list(group)
        for start in range(0, len(indices), MOST_NETWORKS):
            chosen = indices[start : start + MOST_NETWORKS]
            outputs = _launch(
                obs, [networks[i] for i in chosen], [hidden[i] for i in chosen], last_actions, agent_ids,
                return_hidden_states, precise,
            )  # fmt: skip
            results.update(zip(chosen, outputs, strict=True))
    return [results[i] for i in range(len(networks))]


def recurrent_one(obs: Tensor, network: RecurrentParams, hidden: Tensor | None, *settings: Any) -> RecurrentOutput:
    """`recurrent` for one network, called as the other backends are."""
    return recurrent(obs, [network], [hidden], *settings)[0]


def _launch(
    obs: Tensor,
    networks: Sequence[RecurrentParams],
    hidden: Sequence[Tensor | None],
    last_actions: Tensor | None,
    agent_ids: bool,
    return_hidden_states: bool,
    precise: bool,
) -> list[RecurrentOutput]:
    own_outputs = [_has_own_outputs(network) for network in networks]
    tensors: list[Tensor | None] = []
    saves = []
    for network, state, own in zip(networks, hidden, own_outputs, strict=True):
        outputs = (None, None) if own else (network.fc2_weight, network.fc2_bias)
        tensors += [state, *network[:6], *outputs]
        saves.append(_library.wants_grad((obs, *tensors[-_INPUTS:])))
    states = [return_hidden_states or own for own in own_outputs]
    flat = _ops[len(networks)](obs, last_actions, *tensors, agent_ids, _mask(states), _mask(saves), precise)
    results = []
    for i, (network, own) in enumerate(zip(networks, own_outputs, strict=True)):
        q, last, all_states, _ = flat[_OUTPUTS * i : _OUTPUTS * (i + 1)]
        if own:
            features = all_states
            if network.norm_weight is not None:
                features = F.layer_norm(features, features.shape[-1:], network.norm_weight, network.norm_bias, NORM_EPS)
            q = F.linear(features, network.fc2_weight, network.fc2_bias)
        results.append(RecurrentOutput(q, last, all_states if return_hidden_states else None))
    return results


def _has_own_outputs(network: RecurrentParams) -> bool:
    """Whether the output layer is left to PyTorch."""
    return network.norm_weight is not None or network.fc2_weight.shape[0] > MOST_OUTPUTS


def _mask(flags: Sequence[bool]) -> int:
    return sum(1 << i for i, flag in enumerate(flags) if flag)


def _core() -> Any:
    from fastmix import _core

    return _core


class _Call:
    """The arguments of one call, taken apart; the same for both passes."""

    def __init__(self, n: int, args: Sequence[Any]) -> None:
        self.obs, self.last_actions = args[:2]
        self.networks = [args[2 + _INPUTS * i : 2 + _INPUTS * (i + 1)] for i in range(n)]
        self.agent_ids, self.states, self.saves, self.precise = args[2 + _INPUTS * n : 6 + _INPUTS * n]
        self.episodes, self.steps, self.agents, self.n_obs = self.obs.shape
        self.width = self.networks[0][1].shape[0]

    @property
    def empty(self) -> bool:
        """Whether there is nothing to launch a kernel for."""
        return self.episodes * self.steps * self.agents == 0

    def sizes(self) -> tuple[int, ...]:
        ids = self.agents if self.agent_ids else 0
        return (self.episodes, self.steps, self.agents, self.n_obs, ids, self.width)

    def actions(self, i: int) -> int:
        """Width of the one-hot of the last action."""
        if self.last_actions is None:
            return 0
        inputs: int = self.networks[i][1].shape[1]
        return inputs - self.n_obs - (self.agents if self.agent_ids else 0)

    def outputs(self, i: int) -> int:
        weight = self.networks[i][7]
        return 0 if weight is None else weight.shape[0]

    def saved_size(self, save: bool) -> int:
        """Floats that a network's forward pass needs and, with ``save``, leaves for the backward pass.

        States before each step and behind the last, and outputs of the input layer, as one or two half precision
        numbers each; a scale for each of the latter's rows.
        """
        planes = 2 if self.precise else 1
        rows = self.episodes * self.agents
        return rows * ((self.steps + (self.steps + 1 if save else 0)) * planes * self.width // 2 + self.steps)

    def strides(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return self.obs.stride()[:3], (0, 0, 0) if self.last_actions is None else self.last_actions.stride()


def _forward(n: int, *args: Any) -> tuple[Tensor, ...]:
    call = _Call(n, args)
    results = _forward_fake(n, *args)
    if call.empty:
        for i, network in enumerate(call.networks):
            last = results[_OUTPUTS * i + 1]
            if network[0] is None:
                last.zero_()
            else:
                last.copy_(network[0])
        return results
    call.obs = readable(call.obs)
    rows, held = [], []
    for i, network in enumerate(call.networks):
        hidden, *weights = (None if t is None else t.contiguous() for t in network)
        q, last, states, saved = results[_OUTPUTS * i : _OUTPUTS * (i + 1)]
        save = call.saves >> i & 1
        if not save:
            saved = call.obs.new_empty(call.saved_size(save=False))
        held.append((hidden, weights, saved))
        rows.append(
            (call.actions(i), call.outputs(i), *map(_address, (hidden, q, last, states, saved)), save,
             *map(_address, weights))
        )  # fmt: skip
    _library.queue_on(
        call.obs.device, _core().recurrent_cuda_forward, call.obs.data_ptr(), _address(call.last_actions), rows,
        call.sizes(), *call.strides(), call.precise,
    )  # fmt: skip
    return results


def _forward_fake(n: int, *args: Any) -> tuple[Tensor, ...]:
    call = _Call(n, args)
    results = []
    for i in range(n):
        lead = (call.episodes, call.steps, call.agents)
        outputs = call.outputs(i)
        results += [
            call.obs.new_empty((*lead, outputs) if outputs else (0,)),
            call.obs.new_empty((call.episodes, call.agents, call.width)),
            call.obs.new_empty((*lead, call.width) if call.states >> i & 1 else (0,)),
            call.obs.new_empty((call.saved_size(save=True) if call.saves >> i & 1 else 0,)),
        ]
    return tuple(results)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.agent_ids, _, ctx.saves, ctx.precise = inputs
    ctx.n = len(output) // _OUTPUTS
    constant = [i for i in range(len(output)) if i % _OUTPUTS == 3 or not ctx.saves >> i // _OUTPUTS & 1]
    ctx.mark_non_differentiable(*(output[i] for i in constant))
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output[3::_OUTPUTS])


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    tensors, saved = ctx.saved_tensors[: 2 + _INPUTS * ctx.n], ctx.saved_tensors[2 + _INPUTS * ctx.n :]
    obs, last_actions = tensors[:2]
    needed = ctx.needs_input_grad
    result: list[Tensor | None] = [None] * len(needed)
    chosen: list[int] = []
    arguments: list[Tensor | None] = []
    for i in range(ctx.n):
        q, last, states, _ = grads[_OUTPUTS * i : _OUTPUTS * (i + 1)]
        if ctx.saves >> i & 1 and not (q is None and last is None and states is None):
            chosen.append(i)
            first = 2 + _INPUTS * i
            arguments += [*tensors[first : first + _INPUTS], saved[i], q, last, states]
    if not chosen:
        return tuple(result)
    wants_hidden = [needed[2 + _INPUTS * i] for i in chosen]
    grad_obs, *flat = _backward_ops[len(chosen)](
        obs, last_actions, *arguments, ctx.agent_ids, ctx.precise, needed[0], _mask(wants_hidden)
    )
    result[0] = grad_obs if needed[0] else None
    for j, i in enumerate(chosen):
        for k in range(_INPUTS):
            at = 2 + _INPUTS * i + k
            has_gradient = wants_hidden[j] if k == 0 else tensors[at] is not None
            result[at] = flat[_INPUTS * j + k] if has_gradient else None
    return tuple(result)


_BACKWARD_INPUTS = _INPUTS + 4  # of a network: as forward, then what was saved and the gradients of its outputs


def _backward_call(n: int, args: Sequence[Any]) -> tuple[_Call, list[Any], bool, int]:
    """The forward call of these arguments, what the networks have besides, and which gradients are wanted."""
    per_network = [args[2 + _BACKWARD_INPUTS * i : 2 + _BACKWARD_INPUTS * (i + 1)] for i in range(n)]
    agent_ids, precise, wants_obs, wants_hidden = args[2 + _BACKWARD_INPUTS * n :]
    inputs = [t for network in per_network for t in network[:_INPUTS]]
    call = _Call(n, (*args[:2], *inputs, agent_ids, 0, 0, precise))
    return call, [network[_INPUTS:] for network in per_network], wants_obs, wants_hidden


def _backward_forward(n: int, *args: Any) -> tuple[Tensor, ...]:
    """Gradients of obs, and of each network's hidden state (both empty where not wanted) and parameters."""
    call, besides, wants_obs, wants_hidden = _backward_call(n, args)
    results = _backward_fake(n, *args)
    if call.empty:
        for result in results:
            result.zero_()
        for i, (_, _, grad_last, _) in enumerate(besides):
            if wants_hidden >> i & 1 and grad_last is not None:
                results[1 + _INPUTS * i].copy_(grad_last)
        return results
    obs = call.obs = readable(call.obs)
    rows, held = [], []
    grad_x = obs.new_empty((n if wants_obs else 0, call.steps, call.episodes, call.agents, call.width))
    for i, (network, (saved, grad_q, grad_last, grad_states)) in enumerate(zip(call.networks, besides, strict=True)):
        weights = [None if t is None else t.contiguous() for t in network[1:]]
        grad_last, grad_states = (None if t is None else t.contiguous() for t in (grad_last, grad_states))
        grad_hidden, *grads = results[1 + _INPUTS * i : 1 + _INPUTS * (i + 1)]
        if grad_q is None or call.outputs(i) == 0:  # the output layer was not used, or is not ours
            grad_q = None
            for grad in grads[-2:]:
                grad.zero_()
        held.append((weights, grad_last, grad_states))
        rows.append(
            (call.actions(i), call.outputs(i), _address(saved), _address(grad_q),
             *((0, 0, 0, 0) if grad_q is None else grad_q.stride()), _address(grad_last), _address(grad_states),
             *map(_address, (*weights, *grads, grad_hidden)), grad_x[i].data_ptr() if wants_obs else 0)
        )  # fmt: skip
    core = _core()
    arguments = (obs.data_ptr(), _address(call.last_actions), rows, call.sizes(), *call.strides(), call.precise)
    size = _library.queue_on(obs.device, core.recurrent_cuda_workspace, *arguments)
    workspace = torch.empty(size, dtype=torch.uint8, device=obs.device)
    _library.queue_on(obs.device, core.recurrent_cuda_backward, *arguments, workspace.data_ptr())
    if wants_obs:
        grad_obs = sum(grad_x[i] @ network[1][:, : call.n_obs] for i, network in enumerate(call.networks))
        results[0].copy_(grad_obs.transpose(0, 1))
    return results


def _backward_fake(n: int, *args: Any) -> tuple[Tensor, ...]:
    call, _, wants_obs, wants_hidden = _backward_call(n, args)
    results = [call.obs.new_empty(call.obs.shape if wants_obs else (0,))]
    for i, (_, *weights) in enumerate(call.networks):
        shape = (call.episodes, call.agents, call.width)
        results.append(call.obs.new_empty(shape if wants_hidden >> i & 1 else (0,)))
        results += [
            call.obs.new_empty(0) if w is None else torch.empty_like(w, memory_format=torch.contiguous_format)
            for w in weights
        ]
    return tuple(results)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _define(n: int) -> tuple[_library.NativeOp, _library.NativeOp]:
    """The op of ``n`` networks and its gradient. Autograd does not look into lists, so each number is an op."""
    inputs, besides = [], []
    for i in range(n):
        network = ["Tensor? hidden", *(f"Tensor{'?' if f.startswith('fc2') else ''} {f}" for f in _FIELDS)]
        gradients = ["Tensor saved", "Tensor? grad_q", "Tensor? grad_hidden", "Tensor? grad_hidden_states"]
        inputs += [f"{field}_{i}" for field in network]
        besides += [f"{field}_{i}" for field in (*network, *gradients)]
    head = "Tensor obs, Tensor? last_actions, "
    backward = _library.define(
        f"recurrent_cuda_{n}_backward",
        f"({head}{', '.join(besides)}, bool agent_ids, bool precise, bool wants_obs, int wants_hidden)"
        f" -> ({', '.join(['Tensor'] * (1 + _INPUTS * n))})",
        partial(_backward_forward, n),
        partial(_backward_fake, n),
        devices=("CUDA",),
    )
    forward = _library.define(
        f"recurrent_cuda_{n}",
        f"({head}{', '.join(inputs)}, bool agent_ids, int states, int saves, bool precise)"
        f" -> ({', '.join(['Tensor'] * (_OUTPUTS * n))})",
        partial(_forward, n),
        partial(_forward_fake, n),
        setup_context=_setup_context,
        backward=_backward,
        devices=("CUDA",),
    )
    return forward, backward


_ops, _backward_ops = {}, {}
for _n in range(1, MOST_NETWORKS + 1):
    _ops[_n], _backward_ops[_n] = _define(_n)
