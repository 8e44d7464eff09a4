"""Compile every Triton kernel without a GPU, on the road a launch takes, and tell what the code needs.

    python -m tests.triton.offline            # all cases into tests/triton/compiled.json, a part for each Triton
    python -m tests.triton.offline --check    # compares with the file instead
    python -m tests.triton.offline --table    # prints the file as Markdown, compiles nothing

The host code of an op runs on CPU tensors while launches are turned into compilations for a chosen architecture: block
sizes, specialisation on strides and alignment, and options are those of a real call. Registers and spills are read from
ptxas, matrix instructions from its input and from the machine code.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas

from fastmix.ops import _joint_triton as joint
from fastmix.ops.attention import triton as attention
from fastmix.ops.duplex import recogniser_triton as recogniser
from fastmix.ops.duplex import triton as duplex
from fastmix.ops.monotonic import POSITIVITIES
from fastmix.ops.monotonic import triton as monotonic
from tests.generators import Shape, monotonic_params

FILE = Path(__file__).parent / "compiled.json"
ARCHITECTURES = (80, 90, 100)
PRECISIONS = {
    "tf32": ("high", torch.float32),
    "tf32x3": ("highest", torch.float32),
    "bfloat16": ("high", torch.bfloat16),
}
MODULES = (monotonic, joint, duplex, attention, recogniser)
NO_PRODUCTS = (
    "pack_kernel", "add_parts_kernel", "gather_kernel", "combine_kernel", "spread_kernel", "attend_kernel",
    "attend_backward_kernel", "weigh_kernel", "weigh_backward_kernel",
)  # fmt: skip
"""Kernels that have no matrix product"""


class Case(NamedTuple):
    """One network and number of rows."""

    name: str
    shape: Shape
    rows: int
    embed: int = 32
    hypernet_embed: int = 64
    layers: int = 2
    positivity: str = "abs"
    op: str = "monotonic"
    kernels: int = 4

    def __str__(self) -> str:
        return f"{self.name}, {self.rows} rows"


MMM2 = Shape(10, 18, 322, 176)
MAIN = Case("MMM2", MMM2, 61_440)
DUPLEX = Case("MMM2 duplex", MMM2, 61_440, op="duplex")
JOINT = Case("MMM2 joint", MMM2, 61_440, op="joint")
CASES = (
    MAIN,
    DUPLEX,
    Case("64 agents duplex, 10 kernels", Shape(64, 36, 4096, 5), 4_096, op="duplex", kernels=10),
    JOINT,
    Case("64 agents joint", Shape(64, 36, 4096, 5), 4_096, op="joint"),
    Case("MMM2", MMM2, 3_072),
    Case("MMM2", MMM2, 320),
    Case("MMM2 softplus", MMM2, 15_360, positivity="softplus"),
    Case("MMM2 one layer", MMM2, 15_360, layers=1),
    Case("MMM2 embed 64, hypernet 256", MMM2, 15_360, embed=64, hypernet_embed=256),
    Case("64 agents, embed 256, hypernet 256", Shape(64, 5, 4096, 5), 4_096, embed=256, hypernet_embed=256),
)
"""Every configuration of the heuristics, and the largest sizes"""


class Compiled(NamedTuple):
    """What one kernel needs; ``mma`` counts matrix instructions in the PTX, ``tensor`` in the machine code."""

    kernel: str
    warps: int
    stages: int
    block: int
    registers: int
    spills: int
    """Bytes of spill stores"""
    shared: int
    """Bytes of shared memory"""
    mma: int
    tensor: str

    def problems(self) -> list[str]:
        """Why the kernel is wrong whatever was recorded before."""
        found = []
        if self.registers < 8:
            found.append(f"{self.registers} registers: an empty body, as of a kernel that only traps")
        if self.kernel not in NO_PRODUCTS and not (self.mma and self.tensor):
            found.append("no matrix instructions")
        if self.shared > 227 * 1024:
            found.append(f"{self.shared} bytes of shared memory, more than an H100 has")
        return found


def compile_case(case: Case, precision: str, architecture: int) -> dict[str, Compiled]:
    """Every kernel that a training call and a call without gradient launch."""
    setting, dtype = PRECISIONS[precision]
    outer = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(setting)
    try:
        with (
            torch.no_grad(),
            launches_compile(architecture) as kernels,
            mock.patch.object(monotonic, "has_wide_products", lambda device: architecture >= 90),
        ):
            {"duplex": _call_duplex, "joint": _call_joint}.get(case.op, _call)(case, dtype)
    finally:
        torch.set_float32_matmul_precision(outer)
    return {name: _inspect(name, kernel, arguments, architecture) for name, (kernel, arguments) in kernels.items()}


@contextmanager
def launches_compile(architecture: int) -> Iterator[dict[str, Any]]:
    """Inside, launching a kernel compiles it instead, into the yielded name -> (compiled kernel, arguments)."""
    kernels: dict[str, Any] = {}
    run = triton.JITFunction.run

    def compile_only(self: Any, *args: Any, **kwargs: Any) -> Any:
        kernel = run(self, *args, **{**kwargs, "warmup": True})
        name = self.__name__ + ("_fused" if kwargs.get("FUSED") else "")
        kernels.setdefault(name, (kernel, kwargs))
        return kernel

    driver = triton.runtime.driver
    driver.set_active(_NoDevice(architecture))
    functions = [value for module in MODULES for value in vars(module).values()]
    caches = [kernel.device_caches for kernel in functions if isinstance(kernel, triton.JITFunction)]
    for cache in caches:
        cache.clear()  # they are by device number, and the architecture of number 0 changes
    try:
        with mock.patch.object(triton.JITFunction, "run", compile_only):
            yield kernels
    finally:
        driver._active = None
        for cache in caches:
            cache.clear()


class _NoDevice:
    """What Triton asks a driver before it compiles."""

    def __init__(self, architecture: int) -> None:
        self.target = GPUTarget("cuda", architecture, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def _call(case: Case, dtype: torch.dtype) -> None:
    p = monotonic_params(case.shape, case.embed, case.hypernet_embed, case.layers, requires_grad=False)
    agent_qs = torch.zeros(case.rows, case.shape.n_agents)
    states = torch.empty(case.rows, case.shape.state_dim, dtype=dtype)  # never touched, so it takes no memory
    positivity = POSITIVITIES.index(case.positivity)
    monotonic._forward(agent_qs, states, *p, positivity, 1.0, False)
    with (
        mock.patch.object(torch, "addmm", _shape_of_product),
        mock.patch.object(Tensor, "__matmul__", _shape_of_product),
    ):
        q_tot, saved, packed = monotonic._forward(agent_qs, states, *p, positivity, 1.0, True)
        hidden = 0 if p.w1_hidden_weight is None else p.w1_hidden_weight.shape[0]
        monotonic._backward_forward(
            torch.zeros_like(q_tot), agent_qs, states, saved, packed, p.w1_bias, p.w2_bias, p.v_weight,
            hidden, positivity, 1.0, True, True,
        )  # fmt: skip


def _call_duplex(case: Case, dtype: torch.dtype) -> None:
    """What `duplex` launches between its library products."""
    N, A, U, K, C = case.rows, case.shape.n_agents, case.shape.n_actions, case.kernels, case.kernels * 64
    actions = torch.empty(N, A, dtype=torch.int64)
    features, by_state = torch.empty(N, C, dtype=dtype), torch.empty(N, A, dtype=dtype)
    key, by_agent = torch.empty(K, N, 1, dtype=dtype), torch.empty(K, N, A, dtype=dtype)
    joint._gather_forward(features, actions, torch.empty(A * U, C, dtype=dtype))
    with mock.patch.object(Tensor, "sum", lambda parts, dim: parts[0]):
        joint._scatter_forward(features, actions, A * U)
    given = (by_state, by_state, by_state)
    v, adv = duplex._combine_forward(*given, by_state, key, by_agent, by_agent, True, True)
    duplex._spread_forward(v, adv, *given, key, by_agent, by_agent)


def _call_joint(case: Case, dtype: torch.dtype) -> None:
    """What `attention` and `recognise` launch between their library products, with all that is optional."""
    A, S, N, heads = case.shape.n_agents, case.shape.state_dim, case.rows, 4

    def new(*shape: int) -> Tensor:  # never touched, so it takes no memory
        return torch.empty(*shape, dtype=dtype)

    by_agent, alive, own = new(N, A), torch.empty(N, A, dtype=torch.bool), S // A
    inputs = (by_agent, new(N, S), new(heads, N, own + 2), new(N, heads), alive, own, True, True)
    results = attention._forward(*inputs, True, True, 0.5)
    backward: Any = attention._backward_forward
    backward(*results, *inputs, True, 0.5)
    generated = (by_agent, by_agent, new(N, A * case.embed), new(N, case.embed))
    recogniser._backward_forward(recogniser._forward(*generated), *generated)


def _shape_of_product(*factors: Tensor) -> Tensor:
    a, b = factors[-2:]
    return a.new_empty(a.shape[0], b.shape[1])


def _inspect(name: str, kernel: Any, arguments: dict[str, Any], architecture: int) -> Compiled:
    ptx = kernel.asm["ptx"]
    target = re.search(r"\.target\s+(\w+)", ptx)
    assert target is not None
    ptxas = get_ptxas(architecture) if get_ptxas.__code__.co_argcount else get_ptxas()
    report = subprocess.run(
        [ptxas.path, "-v", f"-arch={target.group(1)}", "-o", "/dev/null", "-"],
        input=ptx, capture_output=True, text=True, check=True,
    ).stderr  # fmt: skip
    return Compiled(
        name,
        kernel.metadata.num_warps,
        kernel.metadata.num_stages,
        arguments.get("BM", 0),
        int(_number(r"Used (\d+) registers", report)),
        int(_number(r"(\d+) bytes spill stores", report)),
        kernel.metadata.shared,
        len(re.findall(r"wgmma\.mma_async|mma\.sync|tcgen05\.mma", ptx)),
        _tensor_instructions(kernel),
    )


def _tensor_instructions(kernel: Any) -> str:
    """Kinds of matrix instructions in the machine code: HMMA (mma.sync), HGMMA (wgmma), UTC*MMA (tcgen05)."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-sass", cubin.name]
        sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    kinds = re.findall(r"\b(HMMA|HGMMA|UTC\w*MMA)\b", sass)
    return "+".join(f"{kinds.count(kind)} {kind}" for kind in sorted(set(kinds)))


def _number(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    assert found is not None, text
    return found.group(1)


def _one_line_a_kernel(tables: dict[str, Any]) -> str:
    blocks = []
    for version, entries in sorted(tables.items()):
        lines = [f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in sorted(entries.items())]
        blocks.append(f" {json.dumps(version)}: {{\n" + ",\n".join(lines) + "\n }")
    return "{\n" + ",\n".join(blocks) + "\n}\n"


def key(case: Case, precision: str, architecture: int, kernel: str) -> str:
    """Of one kernel in the file."""
    return f"sm_{architecture} | {case} | {precision} | {kernel}"


def recorded_spills() -> dict[str, int]:
    """Bytes per key, the largest of the recorded versions of Triton where this one is not recorded."""
    tables = json.loads(FILE.read_text())
    allowed: dict[str, int] = {}
    for table in [tables[triton.__version__]] if triton.__version__ in tables else tables.values():
        for name, entry in table.items():
            allowed[name] = max(allowed.get(name, 0), entry["spills"])
    return allowed


def markdown() -> str:
    """The file with one row a case and kernel, and in each cell rows and warps of a tile, registers / spills."""
    lines = []
    for version, table in json.loads(FILE.read_text()).items():
        rows: dict[str, dict[str, str]] = {}
        for name, entry in table.items():
            architecture, case, precision, kernel = name.split(" | ")
            if kernel not in NO_PRODUCTS:
                cell = f"{entry['block']}x{entry['warps']}w {entry['registers']}/{entry['spills']} {entry['tensor']}"
                rows.setdefault(f"{case} | {kernel.removesuffix('_kernel')}", {})[f"{architecture} {precision}"] = cell
        columns = sorted({column for row in rows.values() for column in row})
        lines += [f"Triton {version}", "", "| case | kernel | " + " | ".join(columns) + " |"]
        lines.append("|---" * (2 + len(columns)) + "|")
        lines += [f"| {row} | " + " | ".join(cells.get(c, "") for c in columns) + " |" for row, cells in rows.items()]
    return "\n".join(lines)


def main() -> int:
    """Compile everything; write or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the file instead of rewriting it")
    parser.add_argument("--table", action="store_true", help="print the file and stop")
    parser.add_argument("--arch", type=int, nargs="*", default=ARCHITECTURES)
    parser.add_argument("--precision", nargs="*", default=list(PRECISIONS))
    parser.add_argument("--case", default="", help="only cases whose name contains this")
    arguments = parser.parse_args()
    if arguments.table:
        print(markdown())
        return 0
    table: dict[str, Any] = {}
    problems = []
    allowed = recorded_spills() if arguments.check else {}
    for architecture in arguments.arch:
        for case in (case for case in CASES if arguments.case in str(case)):
            for precision in arguments.precision:
                for name, compiled in compile_case(case, precision, architecture).items():
                    where = key(case, precision, architecture, name)
                    table[where] = {k: v for k, v in compiled._asdict().items() if k != "kernel"}
                    found = compiled.problems()
                    if arguments.check and compiled.spills > allowed.get(where, 0):
                        found.append(f"{compiled.spills} bytes of spills, {allowed.get(where, 0)} recorded")
                    problems += [f"{where}: {problem}" for problem in found]
                    c = compiled
                    print(
                        f"{where:95} BM {c.block:3} {c.warps}w {c.stages}s  {c.registers:3}/{c.spills:<4} "
                        f"{c.shared / 1024:5.0f} KB  {c.tensor} {' '.join(found)}", flush=True,
                    )  # fmt: skip
    if not arguments.check and not problems:
        tables = json.loads(FILE.read_text()) if FILE.exists() else {}
        tables.setdefault(triton.__version__, {}).update(table)
        lines = [
            f"{json.dumps(version)}: {{\n"
            + ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in entries.items())
            + "\n}"
            for version, entries in sorted(tables.items())
        ]
        FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print("\n".join(problems))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
