"""Acting: one step at a time of one network, without gradients, with packed weights kept between steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from fastmix import backends
from fastmix.ops import _checks, _library
from fastmix.ops.recurrent import arguments, cuda, cudnn, native, reference
from fastmix.ops.recurrent.types import RecurrentOutput, RecurrentParams

_NO_STRIDES: tuple[int, ...] = (0, 0)
_version, _data_ptr = attrgetter("_version"), Tensor.data_ptr


class Stepper:
    """One acting step of a recurrent utility network (see `fastmix.ops.recurrent` for its equations).

    On the CPU the core's packed copy of the weights is made at the first step and again after every change of a
    parameter that PyTorch counts (optimiser steps, ``load_state_dict``, any in-place operation under ``no_grad``) or
    that moves it (``param.data = ...``). In-place operations through ``param.data`` are invisible to PyTorch's
    counters: call `refresh` after those. On CUDA nothing is packed.

    Args:
        params: the network; its tensors are held, and read again whenever they change.
        obs_size: ``O``.
        n_agents: ``A`` where the input ends with the one-hot of the agent, 0 where it does not. What ``W1`` leaves
            beside both is the one-hot of the last action.

    Raises:
        ValueError, TypeError: parameters whose shapes, dtypes or devices do not agree.
    """

    def __init__(self, params: RecurrentParams, obs_size: int, n_agents: int = 0) -> None:
        arguments.check_network("params", params)
        arguments.check_dtypes(params.fc1_weight, params, None, "params", "hidden")
        self._tensors = tuple(p for p in params if p is not None)
        if any(p.is_inference() for p in self._tensors):
            raise ValueError("params must not be inference tensors: PyTorch does not count their changes")
        self._params, self._obs_size, self._ids = params, obs_size, n_agents
        self._hidden_size, self._outputs = params.fc1_weight.shape[0], params.fc2_weight.shape[0]
        self._actions = arguments.action_width("params", params, obs_size, n_agents)
        self._sequence = _sequence_function(params, obs_size)
        self._core: Any = None
        self._seen: list[int] = []  # versions and addresses of the weights that are packed
        self._held: Sequence[Tensor] = ()
        self._key: tuple[Any, ...] = ()  # the arguments checked last, and results of their size
        self._like: tuple[Tensor, ...] = ()

    def refresh(self) -> None:
        """Read all weights again at the next step."""
        self._seen = []

    def __call__(self, obs: Tensor, hidden: Tensor | None, last_actions: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``obs [B, A, O]``, ``hidden [B, A, D]`` (None = zeros), ``last_actions [B, A]`` int64 (-1 = none) where the
        network has room for their one-hot -> ``q [B, A, U]`` and the next hidden state ``[B, A, D]``.

        Raises:
            ValueError, TypeError: an argument of wrong shape, dtype, device or range.
        """
        key = (*_signature(obs), *_signature(hidden), *_signature(last_actions))
        if key != self._key:
            self._check(obs, hidden, last_actions)
            rows = obs.shape[:2]
            self._like = (obs.new_empty((*rows, self._outputs)), obs.new_empty((*rows, self._hidden_size)))
            self._key = key
        if self._sequence is not None:
            last = None if last_actions is None else last_actions.unsqueeze(1)
            with torch.no_grad():
                out = self._sequence(obs.unsqueeze(1), self._params, hidden, last, self._ids > 0, False)
            return out.q.squeeze(1), out.hidden
        seen = [*map(_version, self._tensors), *map(_data_ptr, self._tensors)]
        if seen != self._seen:
            self._pack(seen)
        episodes, n_agents, _ = obs.shape
        episode, agent, feature = obs.stride()
        if feature != 1:
            obs = native.readable(obs)
            episode, agent, _ = obs.stride()
        start = 0
        if hidden is not None:
            hidden = hidden.contiguous()
            start = hidden.data_ptr()
        actions, action_strides = 0, _NO_STRIDES
        if last_actions is not None:
            actions, action_strides = last_actions.data_ptr(), last_actions.stride()
        q, after = map(torch.empty_like, self._like)  # costs half of what torch.empty does
        self._core.step(
            obs.data_ptr(), episode, agent, actions, *action_strides, start, q.data_ptr(), after.data_ptr(),
            episodes, n_agents, torch.get_num_threads(),
        )  # fmt: skip
        return q, after

    def _pack(self, seen: list[int]) -> None:
        from fastmix import _core

        if self._core is None:
            kind = (
                _core.RecurrentStepperDouble
                if self._params.fc1_weight.dtype == torch.float64
                else _core.RecurrentStepperFloat
            )
            self._core = kind(self._obs_size, self._actions, self._ids, self._hidden_size, self._outputs)
        weights = [None if p is None else p.detach().contiguous() for p in self._params]
        self._core.pack([0 if p is None else p.data_ptr() for p in weights])
        # Held, so that no later tensor can have one of these addresses and pass for it.
        self._held = [p.detach() for p in self._tensors]
        self._seen = seen

    def _check(self, obs: Tensor, hidden: Tensor | None, last_actions: Tensor | None) -> None:
        _checks.check_tensor("obs", obs)
        _checks.check_shape("obs", obs, (None, self._ids or None, self._obs_size), "[B, A, O]")
        _checks.check_like("obs", obs, self._params.fc1_weight, "the parameters")
        if (last_actions is None) == (self._actions > 0):
            room = f"has room for a one-hot of {self._actions} actions" if self._actions else "has no room for actions"
            raise ValueError(f"last_actions must be given exactly where the input layer has room for them: it {room}")
        last = None if last_actions is None else last_actions.unsqueeze(1)
        arguments.check_arguments(obs.unsqueeze(1), [self._params], [hidden], last, self._ids > 0)
        arguments.check_dtypes(obs, self._params, hidden, "params", "hidden")


def _sequence_function(params: RecurrentParams, obs_size: int) -> Callable[..., RecurrentOutput] | None:
    """What runs a step as a sequence of one; None where the core does, with packed weights, on the CPU.

    On CUDA nothing is packed: weights are read where they lie, by two launches a step.
    """
    on_cuda = _library.on_cuda(params.fc1_weight)
    limit = cuda.limit(params, obs_size) if on_cuda else None
    name = backends.resolve("recurrent", params.fc1_weight, native_limit=limit)
    if name == "native":
        return cuda.recurrent_one if on_cuda else None
    return cudnn.recurrent if name == "cudnn" else reference.recurrent


def _signature(tensor: Tensor | None) -> tuple[Any, ...]:
    """What a step must look at in an argument; the same as in the step before, nothing needs checking again."""
    return (None,) if tensor is None else (tensor.shape, tensor.dtype, tensor.device)
