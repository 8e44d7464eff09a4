"""The emulated instructions: matrix units, their loads, asynchronous copies, half precision numbers."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch

from tests.cuda import emulate
from tests.cuda.test_emulation import call


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    kernels = Path(__file__).with_name("instructions_probe.cu")
    return ctypes.CDLL(str(emulate.compile_library(tmp_path_factory.mktemp("instructions"), kernels)))


def test_half_precision_products(probe: ctypes.CDLL) -> None:
    a, b, before = torch.randn(16, 16).half().float(), torch.randn(16, 8).half().float(), torch.randn(16, 8)
    plain, loaded = before.clone(), torch.empty(16, 8)
    assert call(probe, "half_products", a, b, plain, loaded) == ""
    expected = a.double() @ b.double() + before.double()
    assert torch.allclose(plain.double(), expected, rtol=0, atol=2e-6)
    assert torch.equal(plain, loaded)


def test_sums_are_cut_off_towards_zero(probe: ctypes.CDLL) -> None:
    a, b, d, loaded = torch.zeros(16, 16), torch.zeros(16, 8), torch.full((16, 8), -1.0), torch.empty(16, 8)
    a[:, 0], b[0] = 2.0**-12, 2.0**-12 * 1.25
    assert call(probe, "half_products", a, b, d, loaded) == ""
    assert (d == -1 + 2 * 2.0**-24).all()  # 1.25 units in the last place; one of them would be nearer


def test_tf32_products(probe: ctypes.CDLL) -> None:
    a, b, before = torch.randn(16, 8), torch.randn(8, 8), torch.randn(16, 8)
    d = before.clone()
    assert call(probe, "tf32_products", a, b, d) == ""

    def rounded(t: torch.Tensor) -> torch.Tensor:
        return ((t.view(torch.int32) + 0x1000) & -0x2000).view(torch.float32).double()

    assert torch.allclose(d.double(), rounded(a) @ rounded(b) + before.double(), rtol=0, atol=2e-6)
    nan = torch.full((16, 8), torch.nan)
    assert call(probe, "tf32_products", nan, b, d) == "" and d.isnan().all()


def test_rows_of_matrices(probe: ctypes.CDLL) -> None:
    numbers = torch.arange(256, dtype=torch.int16)
    out = torch.zeros(128, dtype=torch.int32)
    assert call(probe, "rows", numbers, out) == ""
    assert torch.equal(out.view(torch.int16), numbers)  # register j of lane i: pair i of matrix j


def test_copies_arrive_when_they_are_waited_for(probe: ctypes.CDLL) -> None:
    out = torch.zeros(7)
    assert call(probe, "copies", torch.arange(1.0, 5.0), out) == ""
    assert out[0].isnan() and out[1:5].tolist() == [1, 2, 3, 4] and out[5].isnan() and out[6] == 0


def test_half_precision_numbers(probe: ctypes.CDLL) -> None:
    special = [
        0.0,
        -0.0,
        1.0,
        65504.0,
        65519.0,
        65520.0,
        1e9,
        torch.inf,
        torch.nan,
        6e-8,
        2.9e-8,
        3e-8,
        6.1e-5,
        6.097e-5,
    ]
    numbers = torch.cat([torch.tensor(special), torch.randn(1000) * 10.0 ** torch.randint(-9, 6, (1000,))])
    out = torch.empty(len(numbers), 4)
    assert call(probe, "halves", numbers, len(numbers), out) == ""
    half = numbers.half()
    assert torch.equal(out[:, 0].nan_to_num(7.0), half.float().nan_to_num(7.0))
    assert torch.equal(out[:, 1].nan_to_num(7.0), (-half).float().nan_to_num(7.0))
    assert torch.equal(out[:, 2].nan_to_num(7.0), (half * 0.5).float().nan_to_num(7.0))
    assert (out[:, 3] == 3).all()
