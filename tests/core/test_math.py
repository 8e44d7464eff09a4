"""csrc/cpu/math.h, compiled for each instruction set that this machine runs, against double precision and mpmath."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mpmath
import pytest
import torch
from torch import Tensor

from fastmix import _core

ROOT = Path(__file__).parents[2]
COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
FLAGS = {
    "baseline": [],
    "avx2": ["-march=x86-64-v3"],
    "avx512": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
}
RUNNABLE = {"baseline": ["baseline"], "avx2": ["baseline", "avx2"], "avx512": list(FLAGS)}[_core.isa()]
FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Any], Any], float]] = {
    # name: in double precision, in any precision, largest |x| where the value is a normal float that moves
    "exp": (torch.exp, mpmath.exp, 87.0),
    "expm1": (torch.expm1, mpmath.expm1, 87.0),
    "sigmoid": (torch.sigmoid, lambda x: 1 / (1 + mpmath.exp(-x)), 87.0),
    "tanh": (torch.tanh, mpmath.tanh, 20.0),
    "softplus": (
        lambda x: x.clamp(min=0) + torch.log1p(torch.exp(-x.abs())),
        lambda x: mpmath.log1p(mpmath.exp(x)),
        87.0,
    ),
}

NAMES = [*FUNCTIONS, "log_normal"]
"""In the order of ``math_probe.cpp``"""

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")


@pytest.fixture(scope="module", params=RUNNABLE)
def probe(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    library = tmp_path_factory.mktemp("math") / f"{request.param}.so"
    assert COMPILER is not None
    command = [
        COMPILER, "-std=c++20", "-O2", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi",
        "-fPIC", "-shared", *FLAGS[request.param], f"-DFASTMIX_ISA={request.param}", f"-I{ROOT / 'csrc'}",
        str(Path(__file__).with_name("math_probe.cpp")), "-o", str(library),
    ]  # fmt: skip
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(library))


def compute(probe: ctypes.CDLL, name: str, x: Tensor) -> Tensor:
    padded = torch.cat([x, x.new_zeros(-len(x) % 16)]).contiguous()
    y = torch.full_like(padded, torch.nan)
    call = probe.map_float if x.dtype == torch.float32 else probe.map_double
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (padded, y)]
    call(NAMES.index(name), *pointers, ctypes.c_int64(len(padded)))
    return y[: len(x)]


def ulps(value: Tensor, exact: Tensor) -> float:
    """Largest distance in units in the last place of the value's dtype."""
    unit = torch.finfo(value.dtype).eps * torch.exp2(torch.frexp(exact).exponent.to(exact.dtype) - 1)
    return float(((value.to(exact.dtype) - exact).abs() / unit).max())


@pytest.mark.parametrize("name", FUNCTIONS)
def test_float_is_within_three_units(probe: ctypes.CDLL, name: str) -> None:
    exact, _, limit = FUNCTIONS[name]
    magnitudes = torch.cat([torch.logspace(-10, 0, 200_000), torch.linspace(0, limit, 400_000)])
    x = torch.cat([magnitudes, -magnitudes])
    assert ulps(compute(probe, name, x), exact(x.double())) <= 3.0


@pytest.mark.parametrize("name", FUNCTIONS)
def test_double_is_within_three_units(probe: ctypes.CDLL, name: str) -> None:
    _, exact, limit = FUNCTIONS[name]
    uniform = torch.rand(2000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    magnitudes = torch.cat([10 ** (-8 * uniform[:500]), limit * uniform[500:]])
    x = torch.cat([magnitudes, -magnitudes])
    y = compute(probe, name, x)
    with mpmath.workprec(150):
        worst = max(
            abs(mpmath.mpf(value) - true) / mpmath.ldexp(1, mpmath.frexp(true)[1] - 53)
            for value, true in ((v, exact(mpmath.mpf(u))) for u, v in zip(x.tolist(), y.tolist(), strict=True))
        )
    assert worst <= 3.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_limits_and_nan(probe: ctypes.CDLL, name: str, dtype: torch.dtype) -> None:
    infinity = float("inf")
    x = torch.tensor([-infinity, -1e30, -800.0, -0.0, 0.0, 800.0, 1e30, infinity, torch.nan], dtype=dtype)
    y = compute(probe, name, x)
    exact = FUNCTIONS[name][0](x)
    assert y[-1].isnan()
    # sigmoid and softplus stop at the smallest normal numbers instead of 0.
    torch.testing.assert_close(y, exact, rtol=0.0, atol=1e-35, equal_nan=True)


def test_exp_passes_through_the_subnormal_numbers(probe: ctypes.CDLL) -> None:
    x = torch.linspace(-104, -87, 10_000)
    torch.testing.assert_close(compute(probe, "exp", x).double(), torch.exp(x.double()), rtol=0.0, atol=2e-45)


def test_exp_reaches_the_largest_number(probe: ctypes.CDLL) -> None:
    x = torch.tensor([88.7, 88.72, 88.73])
    y = compute(probe, "exp", x)
    assert y[:2].isfinite().all() and y[2] == torch.inf


def test_logarithm_of_normal_numbers(probe: ctypes.CDLL) -> None:
    smallest, largest = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
    around_one = torch.linspace(0.5, 2.0, 300_001)
    x = torch.cat([torch.logspace(-37.9, 38.5, 300_000), around_one, torch.tensor([smallest, largest])])
    assert ulps(compute(probe, "log_normal", x), x.double().log()) <= 3.0
    assert compute(probe, "log_normal", torch.ones(1)).item() == 0.0


def test_logarithm_of_normal_numbers_in_double_precision(probe: ctypes.CDLL) -> None:
    uniform = torch.rand(2000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = torch.cat([10 ** (600 * uniform[:1000] - 300), 0.5 + 1.5 * uniform[1000:]])
    y = compute(probe, "log_normal", x)
    with mpmath.workprec(150):
        worst = max(
            abs(mpmath.mpf(value) - mpmath.log(u)) / mpmath.ldexp(1, mpmath.frexp(mpmath.log(u))[1] - 53)
            for u, value in zip(map(mpmath.mpf, x.tolist()), y.tolist(), strict=True)
        )
    assert worst <= 3.0
