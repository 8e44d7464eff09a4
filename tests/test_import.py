"""Environment workers fork after `import fastmix`: the import must leave nothing behind that a fork breaks."""

from __future__ import annotations

import os

import pytest
import torch

from tests.ops.support import python

IMPORTS = ("fastmix", "fastmix.ops", "fastmix._core", "fastmix.mixers", "fastmix.agents", "fastmix.algorithms")


def test_import_fastmix_alone_is_light() -> None:
    python("import sys, fastmix; assert not {'torch', 'fastmix._core', 'triton'} & sys.modules.keys()")


@pytest.mark.parametrize("module", IMPORTS)
def test_import_creates_no_context_and_no_threads(module: str) -> None:
    python(
        f"""
import os, sys, threading
import torch  # what torch itself does at import is not ours

def threads():
    return len(os.listdir("/proc/self/task")) if sys.platform == "linux" else threading.active_count()

before, had_triton = threads(), "triton" in sys.modules
import {module}
assert not torch.cuda.is_initialized()
assert had_triton or "triton" not in sys.modules
assert threads() == before, (before, threads())
""",
        OMP_NUM_THREADS="2",
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the platform has no fork")
def test_forked_workers_run_native_ops() -> None:
    """With one thread: OpenMP's pool, once started with more, hangs in a forked child, in torch's ops as in ours."""
    python(
        """
import os, signal
import torch
from fastmix.ops import returns, select

torch.set_num_threads(1)
qs = torch.arange(24.0).view(2, 3, 4)

def work():
    assert select(qs, None, backend="native").greedy_actions.tolist() == [[3, 3, 3], [3, 3, 3]]
    flags = torch.zeros(2, 3, 1)
    assert returns(flags, flags, flags + 1, torch.ones(2, 4, 1), gamma=0.5, backend="native").eq(0.5).all()

work()
child = os.fork()
if child == 0:
    signal.alarm(60)
    work()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_forked_workers_may_use_cuda() -> None:
    """CUDA cannot be used in a child forked after its initialisation; so the parent's import must not initialise it."""
    python(
        """
import os
import torch
import fastmix.ops, fastmix._core

child = os.fork()
if child == 0:
    torch.zeros(1, device="cuda")
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""
    )
