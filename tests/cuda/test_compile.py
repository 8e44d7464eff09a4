"""Every CUDA kernel compiled offline, without warnings, for the ends of the architectures of CMakeLists.txt and Hopper.

The build compiles for all of them where there is nvcc; here registers are read, and what does not fit into them.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.cuda.emulate import ROOT

NVCC = shutil.which("nvcc") or ""
KERNELS = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
FEW = 64
"""Bytes: a register or two that do not fit are put aside outside of loops"""


def architectures() -> list[str]:
    (listed,) = re.findall(r"foreach\(architecture IN ITEMS ([\d ]+)\)", (ROOT / "CMakeLists.txt").read_text())
    known = subprocess.run([NVCC, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    usable = [architecture for architecture in listed.split() if f"sm_{architecture}" in known]
    return sorted({usable[0], "90", usable[-1]}, key=int)


@pytest.mark.slow
@pytest.mark.skipif(not NVCC, reason="needs nvcc")
@pytest.mark.parametrize("kernels", KERNELS, ids=lambda path: path.stem)
def test_kernels_compile_and_fit_into_registers(kernels: Path, tmp_path: Path) -> None:
    command = [NVCC, "-std=c++17", f"-I{ROOT / 'csrc'}", "-DFASTMIX_ISA=cuda", "--threads", "2", "-Xptxas", "-v"]
    for architecture in architectures():
        command += ["-gencode", f"arch=compute_{architecture},code=sm_{architecture}"]
    command += ["--Werror=all-warnings", "-c", str(kernels), "-o", str(tmp_path / "kernels.o")]
    report = subprocess.run(command, capture_output=True, text=True, check=False)
    assert report.returncode == 0, report.stderr
    functions = re.findall(r"Compiling entry function '(\w+)' for '(\w+)'", report.stderr)
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill stores", report.stderr)]
    assert len(functions) > 0 and len(spills) >= len(functions)
    assert max(spills) <= FEW, sorted(zip(spills, functions, strict=False))[-3:]
