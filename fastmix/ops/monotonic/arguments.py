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


def sizes_of(agent_qs: Tensor, states: Tensor, params: tuple[Tensor | None, ...]) -> Sizes:
    """As the core takes them."""
    hidden, embed = params[1], params[9]
    assert embed is not None
    agents = agent_qs.shape[-1]
    return (
        agent_qs.numel() // agents, agents, embed.shape[0], 0 if hidden is None else hidden.shape[0], states.shape[-1],
    )  # fmt: skip


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
