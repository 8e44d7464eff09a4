"""Every Triton kernel compiled for three architectures: matrix instructions, and no more spills than recorded.

`offline.py` compiles all configurations and rewrites the record; here those of the largest usual batch.
"""

from __future__ import annotations

import json
import os

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("this process interprets its kernels", allow_module_level=True)

from tests.triton import offline  # noqa: E402


@pytest.mark.slow
@pytest.mark.parametrize("precision", offline.PRECISIONS)
@pytest.mark.parametrize("architecture", offline.ARCHITECTURES)
def test_kernels_compile(architecture: int, precision: str) -> None:
    allowed = offline.recorded_spills()
    compiled = offline.compile_case(offline.MAIN, precision, architecture)
    assert set(compiled) == {
        "pack_kernel",
        "mix_kernel_fused",
        "mix_kernel",
        "backward_kernel",
        "weight_gradient_kernel",
        "add_parts_kernel",
    }
    for name, entry in compiled.items():
        assert not entry.problems(), entry
        assert entry.spills <= allowed[offline.key(offline.MAIN, precision, architecture, name)], entry


BETWEEN_PRODUCTS = [
    (offline.DUPLEX, {"gather_kernel", "scatter_kernel", "combine_kernel", "spread_kernel"}),
    (offline.JOINT, {"attend_kernel", "attend_backward_kernel", "weigh_kernel", "weigh_backward_kernel"}),
]


@pytest.mark.slow
@pytest.mark.parametrize("precision", offline.PRECISIONS)
@pytest.mark.parametrize("architecture", offline.ARCHITECTURES)
@pytest.mark.parametrize(("case", "kernels"), BETWEEN_PRODUCTS)
def test_kernels_between_products_compile(
    case: offline.Case, kernels: set[str], architecture: int, precision: str
) -> None:
    compiled = offline.compile_case(case, precision, architecture)
    assert set(compiled) == kernels
    for entry in compiled.values():
        assert not entry.problems() and entry.spills == 0, entry


def test_record_is_complete() -> None:
    """Each recorded version of Triton has every case, and but for a few bytes before Hopper only the largest spills."""
    tables = json.loads(offline.FILE.read_text())
    assert tables
    kernels = {"duplex": "scatter_kernel", "joint": "attend_backward_kernel"}
    wanted = {
        offline.key(case, precision, architecture, kernels.get(case.op, "mix_kernel"))
        for case in offline.CASES
        for precision in offline.PRECISIONS
        for architecture in offline.ARCHITECTURES
    }
    for version, table in tables.items():
        assert wanted <= set(table), version
        for key, entry in table.items():
            few = 16 if key.startswith("sm_80") else 0
            assert "64 agents" in key or entry["spills"] <= few, (version, key, entry)


def test_an_empty_body_is_noticed() -> None:
    """Triton 3.6 compiles some kernels for sm_100 to nothing but a trap."""
    trap = offline.Compiled("mix_kernel", 8, 2, 128, 4, 0, 0, 0, "")
    assert len(trap.problems()) == 2
    assert not trap._replace(registers=100, mma=8, tensor="8 HGMMA").problems()
    assert trap._replace(registers=100, mma=8, tensor="8 HGMMA", shared=240_000).problems()
