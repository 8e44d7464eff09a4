"""Tensors of `monotonic` as the compiled core takes them, on the CPU and on CUDA."""

from __future__ import annotations

import logging
from typing import Final

from torch import Tensor

from fastmix.ops.monotonic.types import POSITIVITIES, MonotonicParams

logger = logging.getLogger("fastmix")

POSITIVITY_CODES: Final = {name: index for index, name in enumerate(POSITIVITIES)}

INPUTS: Final = "Tensor agent_qs, Tensor states, " + ", ".join(
    f"Tensor{'?' if 'hidden' in name and name[0] == 'w' else ''} {name}" for name in MonotonicParams._fields
)
"""Of an op's schema: agent_qs, states and the parameters."""


Sizes = tuple[int, int, int, int, int]
"""Rows, agents, embed, hidden (0 with one layer), state features"""


def sizes_of(states: Tensor, params: tuple[Tensor | None, ...]) -> Sizes:
    """As the core takes them."""
    hidden, generated, bias = params[1], params[3], params[9]
    assert generated is not None and bias is not None
    embed, state_dim = bias.shape[0], states.shape[-1]
    agents, hidden_width = generated.shape[0] // embed, 0 if hidden is None else hidden.shape[0]
    return states.numel() // state_dim, agents, embed, hidden_width, state_dim


def dense_params(params: tuple[Tensor | None, ...]) -> tuple[list[int], tuple[Tensor | None, ...]]:
    """Addresses of dense parameters, and what owns them."""
    addresses = []
    for index, param in enumerate(params):
        if param is not None and not param.is_contiguous():
            logger.debug("monotonic copies %s of strides %s", MonotonicParams._fields[index], param.stride())
            params = (*params[:index], param.contiguous(), *params[index + 1 :])
            param = params[index]
        addresses.append(0 if param is None else param.data_ptr())
    return addresses, params
