"""What the tests of several ops need."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

_Params = TypeVar("_Params")

ROOT = Path(__file__).parents[2]
ISAS = ("avx512", "avx2", "baseline")
"""Narrowing below what the processor has changes nothing, so every machine can run all three."""

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
"""RMS ratio"""


def python(code: str, **environment: str) -> str:
    """Run `code` in a fresh interpreter in the root of the sources and return what it printed; a failure is raised."""
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def run_tests_under_isa(file: str, select: str, isa: str) -> None:
    """Run the tests of `file` whose name contains `select` with the instruction set `isa`."""
    # A sanitized core, where one is in use, is loaded by a plugin; the child takes it as well.
    plugin = ["-p", "tests.fuzz.core"] if "tests.fuzz.core" in sys.modules else []
    command = [sys.executable, "-m", "pytest", *plugin, "-q", "-p", "no:cacheprovider", "-k", select, file]
    environment = os.environ | {"FASTMIX_ISA": isa, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


def gradients(outputs: Tensor | Sequence[Tensor], inputs: Sequence[Tensor], seed: int = 0) -> list[Tensor]:
    """Gradients of a random linear function of the outputs, the same one for equal shapes; zeros where unused."""
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    g = torch.Generator().manual_seed(seed)
    weights = [torch.randn(o.shape, generator=g, dtype=torch.float64).to(o) for o in outputs]
    grads = torch.autograd.grad(outputs, list(inputs), weights, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(i) if grad is None else grad for grad, i in zip(grads, inputs, strict=True)]


def leaves(params: Any) -> list[Tensor]:
    """The tensors in nested tuples, absent ones left out."""
    return [leaf for leaf in pytree.tree_leaves(params) if leaf is not None]


def rebuild(params: _Params, tensors: Iterable[Tensor]) -> _Params:
    """``params`` with the tensors of `leaves` replaced by ``tensors``."""
    given = iter(tensors)
    rebuilt: _Params = pytree.tree_map(lambda leaf: None if leaf is None else next(given), params)
    return rebuilt


def fullgraph(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` compiled whole (no graph break), by the tracer and autograd only: no C++ compiler needed."""
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")
