"""Poisoned allocations: exactly fastmix's own uninitialised tensors are filled, and only inside the block."""

from __future__ import annotations

import types

import pytest
import torch

from fastmix.testing import poison_, poisoned_allocations

SOURCE = """
import torch

def allocate(like):
    return [
        torch.empty(3),
        torch.empty(2, 2, dtype=torch.float64),
        torch.empty_like(like),
        torch.empty_strided((2, 3), (1, 2)),
        torch.empty_permuted((2, 3), (1, 0)),
        like.new_empty(4),
        like.new_empty_strided((2,), (1,)),
    ]
"""


def module(name: str) -> types.ModuleType:
    created = types.ModuleType(name)
    exec(SOURCE, created.__dict__)
    return created


def test_only_the_package_is_poisoned() -> None:
    like = torch.zeros(2)
    with poisoned_allocations() as report:
        inside = module("fastmix.ops.somewhere").allocate(like)
        assert report.count == len(inside)
        assert all(bool(t.isnan().all()) for t in inside)
        for stranger in ("fastmixer", "torch.nn.somewhere"):
            module(stranger).allocate(like)
        torch.empty(3)
        assert report.count == len(inside)
    module("fastmix.ops.somewhere").allocate(like)
    assert report.count == len(inside)


def test_functions_are_put_back() -> None:
    before = torch.empty, torch.empty_like, torch.Tensor.new_empty
    with pytest.raises(KeyError), poisoned_allocations():
        assert torch.empty is not before[0]
        raise KeyError
    assert (torch.empty, torch.empty_like, torch.Tensor.new_empty) == before


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16, torch.complex64])
def test_floating_poison_is_nan(dtype: torch.dtype) -> None:
    assert poison_(torch.zeros(3, dtype=dtype)).isnan().all()


def test_other_poison() -> None:
    assert (poison_(torch.zeros(3, dtype=torch.int32)) == 2**31 - 1).all()
    assert (poison_(torch.zeros(3, dtype=torch.uint8)) == 255).all()
    assert poison_(torch.zeros(3, dtype=torch.bool)).all()
