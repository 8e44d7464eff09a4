"""What tests on a real GPU share."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import pytest
import torch

from fastmix import _core

Result = TypeVar("Result")


def needs_gpu(test: Callable[..., None]) -> Callable[..., None]:
    """The marker and the skip of a test that runs the core's CUDA kernels."""
    usable = torch.cuda.is_available() and _core.cuda
    skip = pytest.mark.skipif(not usable, reason="needs a CUDA device and a core built with CUDA")
    marked: Callable[..., None] = pytest.mark.gpu(skip(test))
    return marked


@contextmanager
def no_waiting() -> Iterator[None]:
    """Whatever makes the host wait for the device raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def captured(function: Callable[[], Result]) -> tuple[torch.cuda.CUDAGraph, Result]:
    """A CUDA graph of ``function()``, and what a replay fills. What runs on another stream is not in it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function()  # kernels are loaded by their first launch
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), warnings.catch_warnings():
        # Leaves keep the stream they first got a gradient on, which is the other one here; graphs take in both.
        warnings.filterwarnings("ignore", "The AccumulateGrad node's stream does not match")
        result = function()
    return graph, result


def late(values: torch.Tensor) -> torch.Tensor:
    """A copy on the GPU that the current stream fills only after a while: kernels on another stream come too early."""
    copy = torch.zeros_like(values)
    torch.cuda.synchronize()
    torch.cuda._sleep(100_000_000)
    return copy.copy_(values)
