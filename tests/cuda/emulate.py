"""The CUDA kernels of `csrc/cuda`, compiled for the host: what tests use in place of a GPU (see ``emulation.h``).

`core` makes one op a module of its own, from its kernels and its bindings, with the functions of a ``fastmix._core``
that was built with CUDA. Called with addresses of CPU tensors they run the kernels, whatever the stream.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest

from fastmix.backends import NATIVE_DTYPES
from fastmix.ops import _library

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

# kernel<template arguments><<<grid, block, shared, stream>>>(arguments);
_LAUNCH = re.compile(r"([A-Za-z_][\w:]*(?:<[^;{}()]*?>)?)\s*<<<(.*?)>>>\s*\((.*?)\);", re.DOTALL)
_DYNAMIC = re.compile(r"extern\s+__shared__\s+(?:(?:__align__|alignas)\(\w+\)\s+)?([\w:]+(?: \w+)*)\s+(\w+)\[\];")
_STATIC = re.compile(
    r"__shared__\s+((?:(?:__align__|alignas)\(\w+\)\s+)?)([\w:]+(?:<[^;]*?>)?(?: \w+)*?)\s+(\w+)((?:\[[^\]]+\])*);"
)


def rewrite(source: str) -> str:
    """CUDA C++ as the C++ that ``emulation.h`` completes.

    Raises:
        ValueError: a launch or a ``__shared__`` declaration of a form that is not understood (one name each).
    """
    source = _LAUNCH.sub(r"::emulation::launch(::emulation::config(\2), [&] { \1(\3); });", source)
    source = re.sub(r"\bassert\(", "emulated_assert(", source)
    source = _DYNAMIC.sub(r"\1* const \2 = reinterpret_cast<\1*>(::emulation::dynamic_shared());", source)
    source = _STATIC.sub(_shared, source)
    code = re.sub(r"//[^\n]*", "", source)
    for left in ("<<<", "__shared__"):
        if left in code:
            raise ValueError(f"the emulation cannot read this {left}: {code[code.index(left) :].splitlines()[0]}")
    return source


def _shared(match: re.Match[str]) -> str:
    align, kind, name, extents = match.groups()
    declared = f"struct {name}_shared {{ {align}{kind} value{extents}; }}; static char {name}_key;"
    return f"{declared} auto& {name} = ::emulation::static_shared<{name}_shared>(&{name}_key).value;"


def compile_library(folder: Path, *kernels: Path, sources: Sequence[Path] = (), flags: Sequence[str] = ()) -> Path:
    """A shared library of ``.cu`` files and further C++ ``sources``; skips the test where there is no compiler."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler to emulate the CUDA kernels with")
    (folder / "cuda").mkdir()
    for file in {*kernels, *(ROOT / "csrc" / "cuda").iterdir()}:  # kernels share headers
        (folder / "cuda" / file.name).write_text(f'#line 1 "{file}"\n' + rewrite(file.read_text()))
    units = [folder / f"{file.stem}_emulated.cpp" for file in kernels]
    for unit, file in zip(units, kernels, strict=True):
        unit.write_text(f'#include "{HERE / "emulation.h"}"\n#include "cuda/{file.name}"\n')
    library = folder / "emulated.so"
    # -U_FORTIFY_SOURCE: with it the C library refuses to jump between stacks.
    command = [compiler, "-std=c++20", "-O1", "-shared", "-fPIC", "-U_FORTIFY_SOURCE", "-ffp-contract=fast"]
    command += [f"-I{folder}", f"-I{ROOT / 'csrc'}", "-DFASTMIX_ISA=cuda", "-Wl,-z,lazy", *flags]
    subprocess.run([*command, *map(str, [*units, *sources]), "-o", str(library)], check=True)
    return library


@cache
def core(op: str) -> ModuleType:
    """The bindings of ``op`` as in a core with CUDA, on emulated kernels. Of its CPU functions only names are there.

    ``descending(True)`` makes the threads of a block run in the opposite order, ``device(1)`` is a GPU with less shared
    memory and more multiprocessors, ``device(2)`` one with as many as an H100.
    """
    pybind11 = pytest.importorskip("pybind11", reason="the emulated kernels are called through the bindings")
    folder = Path(tempfile.mkdtemp(prefix=f"fastmix-{op}-"))
    name = f"emulated_{op}"
    module = folder / "module.cpp"
    module.write_text(
        f"""#include "{ROOT}/bindings/{op}.cpp"
extern "C" void emulation_descending(bool on);
extern "C" void emulation_device(int index);
PYBIND11_MODULE({name}, m) {{
  fastmix::bindings::register_{op}(m);
  m.def("descending", &emulation_descending);
  m.def("device", &emulation_device);
}}
"""
    )
    includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    flags = [*includes, "-DFASTMIX_CUDA", "-fvisibility=hidden"]
    kernels = sorted((ROOT / "csrc" / "cuda").glob(f"{op}*.cu"))
    sources = [module, ROOT / "csrc" / "cpu" / "workspace.cpp"]
    library = compile_library(folder, *kernels, sources=sources, flags=flags)
    spec = importlib.util.spec_from_file_location(name, library)
    assert spec is not None and spec.loader is not None
    with _lazy_binding():  # the CPU kernels that the bindings name are not there, and never called
        loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    shutil.rmtree(folder)
    return loaded


@contextmanager
def in_place_of_a_gpu(op: str, *, descending: bool = False, module: str = "") -> Iterator[None]:
    """Inside the block the op's native backend goes the way of CUDA tensors, to emulated kernels."""
    emulated = core(op)
    emulated.descending(descending)
    native = importlib.import_module(module or f"fastmix.ops.{op}.native")
    functions = [value for value in vars(native).values() if isinstance(value, _library.CoreFunction)]
    assert functions
    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(_library, "on_cuda", lambda tensor: True))
        patches.enter_context(
            mock.patch.object(_library, "queue_on", lambda device, function, *args: function(*args, 0))
        )
        for function in functions:
            kernels = {
                dtype: getattr(emulated, f"{function.name}_cuda_{str(dtype).removeprefix('torch.')}")
                for dtype in NATIVE_DTYPES
            }
            patches.enter_context(mock.patch.object(function, "on_cuda", kernels))
        yield


@contextmanager
def _lazy_binding() -> Iterator[None]:
    outer = sys.getdlopenflags()
    sys.setdlopenflags(os.RTLD_LAZY | os.RTLD_LOCAL)
    try:
        yield
    finally:
        sys.setdlopenflags(outer)
