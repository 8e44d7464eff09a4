"""Networks of an op as its schema takes them, and as the compiled core does: see `csrc/fastmix/network.h`.

A schema has one ``Tensor[]`` with the weights and biases of all networks in turn, an empty tensor where there is no
bias, and an ``int[]`` with the number of layers of each network, 0 for one that is absent.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache

import torch
from torch import Tensor

from fastmix.ops._layers import Layers

Spec = tuple[int, bool, bool, list[int], list[int], list[int]]
"""Groups, reads actions, reads extras, outputs of the layers, addresses of the parameters and of their gradients"""


def flatten(networks: Iterable[Layers]) -> tuple[list[Tensor], list[int]]:
    """All parameters, and how many layers each network has."""
    params: list[Tensor] = []
    depths = []
    for network in networks:
        depths.append(len(network))
        for weight, bias in network:
            params += (weight, weight.new_empty(0) if bias is None else bias)
    return params, depths


def split(params: Sequence[Tensor], depths: Iterable[int]) -> list[list[Tensor]]:
    """The parameters of each network."""
    networks, begin = [], 0
    for depth in depths:
        networks.append(list(params[begin : begin + 2 * depth]))
        begin += 2 * depth
    return networks


def groups(network: Sequence[Tensor]) -> int:
    """How many networks of one form there are."""
    return network[0].shape[0] if network[0].dim() == 3 else 1


def hidden_columns(networks: Iterable[Sequence[Tensor]]) -> int:
    """Features of all hidden layers of all networks."""
    return sum(groups(network) * weight.shape[-2] for network in networks for weight in network[:-2:2])


def kept_shape(rows: int, columns: int) -> tuple[int, int, int]:
    """Of what is kept for backward, ``columns`` numbers a row: rows lie side by side, in blocks."""
    block = _block_rows()
    return -(-rows // block), columns, block


@cache
def _block_rows() -> int:
    from fastmix import _core

    return _core.network_block_rows


def dense(params: Sequence[Tensor]) -> list[Tensor]:
    """The parameters without gaps: copies where they have some."""
    return [param if param.is_contiguous() else param.contiguous() for param in params]


def empty_grads(networks: Iterable[Sequence[Tensor]], wants: Iterable[bool]) -> list[list[Tensor]]:
    """Gradients to be written, of each network; empty tensors where they are not wanted."""
    return [
        [torch.empty(p.shape if want else (0,), dtype=p.dtype, device=p.device) for p in network]
        for network, want in zip(networks, wants, strict=True)
    ]


def wanted(networks: Iterable[Sequence[Tensor]]) -> list[bool]:
    """Whether a gradient is wanted of any parameter of each network."""
    return [any(param.requires_grad for param in network) for network in networks]


def spec(
    network: Sequence[Tensor],
    grads: Sequence[Tensor] | None = None,
    *,
    reads_actions: bool = False,
    reads_extras: bool = False,
) -> Spec:
    """A network of `dense` parameters for the core, which writes its gradients into ``grads``."""
    outputs = [weight.shape[-2] for weight in network[::2]]
    addresses = [param.data_ptr() for param in network]
    grad_addresses = [] if grads is None else [grad.data_ptr() for grad in grads]
    return groups(network), reads_actions, reads_extras, outputs, addresses, grad_addresses


def present(
    grads: Sequence[Tensor], params: Sequence[Tensor], depths: Iterable[int], wants: Iterable[bool]
) -> list[Tensor | None]:
    """Gradients as autograd takes them: None for networks whose are not wanted, and for absent biases."""
    per_param = [want for want, depth in zip(wants, depths, strict=True) for _ in range(2 * depth)]
    return [
        grad if want and param.numel() > 0 else None for want, grad, param in zip(per_param, grads, params, strict=True)
    ]
