"""The emulation itself: barriers, shuffles, shared memory, and the mistakes that it must notice."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.cuda import emulate


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return ctypes.CDLL(
        str(emulate.compile_library(tmp_path_factory.mktemp("probe"), Path(__file__).with_name("probe.cu")))
    )


@pytest.fixture(params=[False, True], ids=["ascending", "descending"])
def probe(library: ctypes.CDLL, request: pytest.FixtureRequest) -> ctypes.CDLL:
    library.emulation_descending(ctypes.c_bool(request.param))
    return library


def call(library: ctypes.CDLL, name: str, *args: Tensor | int | bool) -> str:
    function = getattr(library, name)
    function.restype = ctypes.c_char_p
    text: bytes = function(*(ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else a for a in args))
    return text.decode()


@pytest.mark.parametrize("blocks", [1, 2, 7])
@pytest.mark.parametrize("n", [0, 1, 127, 5000])
def test_sum_over_threads_and_blocks(probe: ctypes.CDLL, n: int, blocks: int) -> None:
    numbers, parts = torch.randint(0, 1000, (n,)).double(), torch.full((blocks,), torch.nan, dtype=torch.float64)
    done, out = torch.zeros(1, dtype=torch.int32), torch.full((1,), torch.nan, dtype=torch.float64)
    assert call(probe, "sum", numbers, n, blocks, parts, done, out) == ""
    assert out.item() == numbers.sum().item() and done.item() == blocks


@pytest.mark.parametrize("width", [1, 8, 32])
def test_shuffles(probe: ctypes.CDLL, width: int) -> None:
    out = torch.zeros(64, 5, dtype=torch.int32)
    assert call(probe, "shuffle", width, out) == ""
    lanes = torch.arange(64) % 32
    first = lanes // width * width
    down, up, butterfly = lanes + 3, lanes - 2, lanes ^ 5
    assert torch.equal(out[:, 0].long(), torch.where(down < first + width, down, lanes))
    assert torch.equal(out[:, 1].long(), torch.where(up >= first, up, lanes))
    assert torch.equal(out[:, 2].long(), torch.where(butterfly < first + width, butterfly, lanes))
    assert torch.equal(out[:, 3].long(), first + 1 % width)
    assert (out[:, 4].long() & 0xFFFFFFFF == sum(1 << lane for lane in range(0, 32, 3))).all()


def test_parts_of_a_warp_meet_by_themselves(probe: ctypes.CDLL) -> None:
    out = torch.zeros(32, dtype=torch.int32)
    assert call(probe, "halves", out) == ""
    lower, upper = torch.arange(16).view(8, 2), torch.arange(16, 32).view(2, 8)
    assert torch.equal(out[:16].long(), lower.sum(1, keepdim=True).expand(8, 2).flatten())
    assert torch.equal(out[16:].long(), upper.sum(1, keepdim=True).expand(2, 8).flatten())


def test_a_missing_barrier_shows(probe: ctypes.CDLL) -> None:
    numbers = torch.arange(256.0)
    out = torch.zeros(256)
    assert call(probe, "reverse", numbers, out, False) == ""
    assert torch.equal(out, numbers.flip(0))
    assert call(probe, "reverse", numbers, out, True) == ""
    assert not torch.equal(out, numbers.flip(0)) and out.isnan().any()


def test_mistakes_are_reported(probe: ctypes.CDLL) -> None:
    assert call(probe, "trapped").startswith("trap (thread 40 of block 0)")
    assert call(probe, "nothing") == "invalid configuration argument"
    assert call(probe, "outside").startswith("a lane is not in the mask it passes (thread ")
    assert "of block 0 waits for ever at a barrier of " in call(probe, "stuck")
    assert call(probe, "shuffle", 32, torch.zeros(64, 5, dtype=torch.int32)) == ""  # and the next launch is clean


def test_threads_that_have_ended_are_not_waited_for(probe: ctypes.CDLL) -> None:
    out = torch.full((64,), -1, dtype=torch.int32)
    assert call(probe, "early", out) == ""
    assert out.tolist() == [5, -1] * 32


@pytest.mark.parametrize("line", ["k<<<1, 2>>>(a)", "__shared__ int a, b;"])
def test_what_cannot_be_read_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match="the emulation cannot read this"):
        emulate.rewrite(line)
