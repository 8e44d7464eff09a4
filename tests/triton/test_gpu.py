"""The Triton kernels on a real device: precision, determinism, strides, streams, graphs, compilation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastmix import backends
from fastmix.ops.monotonic import POSITIVITIES, MonotonicParams, reference
from fastmix.testing import assert_close, poisoned_allocations
from fastmix.testing.golden import Golden
from tests.cuda.device import no_waiting
from tests.generators import non_contiguous
from tests.golden_rules import Rule, Setting, find_rule
from tests.triton.problem import Problem, check, golden_files, make

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

KINKS = 3e-2
"""Of gradients in lower precision: weights and hidden units near zero change sign, and with it their slope."""

SHAPES = [
    pytest.param(3, 48, 15_360, {}, id="3m"),
    pytest.param(10, 322, 5_000, {}, id="MMM2"),
    pytest.param(10, 322, 500, {}, id="MMM2-few"),
    pytest.param(27, 1170, 2_000, {}, id="27m_vs_30m"),
    pytest.param(10, 322, 3_000, {"E": 64, "H": 256}, id="qmix_large"),
    pytest.param(1, 7, 333, {"E": 1, "H": 1}, id="smallest"),
    pytest.param(2, 9, 1_001, {"E": 31, "H": 33}, id="odd"),
    pytest.param(64, 64, 500, {"E": 33, "H": 65}, id="64-agents"),
    pytest.param(2, 4096, 300, {"E": 256, "H": 256}, id="widest"),
    pytest.param(10, 322, 5_000, {"layers": 1}, id="one-layer"),
    pytest.param(2, 4095, 300, {"E": 31, "layers": 1}, id="one-layer-odd"),
]


@pytest.fixture(autouse=True)
def _precision() -> Iterator[None]:
    outer = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(outer)


def run(problem: Problem) -> list[Tensor]:
    """Result with and without gradient, and all gradients."""
    from fastmix.ops.monotonic import triton as kernels

    settings = (problem.positivity, problem.beta)
    out = kernels.monotonic(*problem[:3], *settings)
    grads = torch.autograd.grad(out, list(problem.inputs().values()), problem.cotangent)
    with torch.no_grad():
        return [out.detach(), kernels.monotonic(*problem[:3], *settings), *grads]


@pytest.mark.parametrize(("A", "S", "rows", "sizes"), SHAPES)
@pytest.mark.parametrize(("setting", "tolerance", "grads"), [("highest", 3e-6, 1e-5), ("high", 5e-4, KINKS)])
def test_float64_reference_is_met(
    A: int, S: int, rows: int, sizes: dict[str, Any], setting: str, tolerance: float, grads: float
) -> None:
    torch.set_float32_matmul_precision(setting)
    check(make(A, S, rows, **sizes).to("cuda"), tolerance, grads=grads)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("positivity", POSITIVITIES)
def test_every_positivity(positivity: str, layers: int) -> None:
    torch.set_float32_matmul_precision("highest")
    check(make(5, 98, 1_000, layers=layers, positivity=positivity, beta=2.5).to("cuda"), 3e-6, grads=1e-5)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_autocast(dtype: torch.dtype, tolerance: float, layers: int) -> None:
    problem = make(10, 322, 5_000, layers=layers).to("cuda")
    with torch.autocast("cuda", dtype):
        check(problem, tolerance, grads=5 * KINKS)


def test_rounding_is_better_than_truncation() -> None:
    """The share of one tf32 product in the error: below 5e-4, where truncated operands give 2e-3."""
    from fastmix.ops.monotonic import triton as kernels

    torch.set_float32_matmul_precision("high")
    problem = make(10, 322, 5_000).to("cuda")
    exact = problem.to("cuda", torch.float64)
    with torch.no_grad():
        expected = reference.monotonic(*exact[:3], "abs", 1.0)
        assert_close(kernels.monotonic(*problem[:3], "abs", 1.0), expected, 5e-4)


@pytest.mark.parametrize(("A", "S", "rows", "sizes"), [SHAPES[1], SHAPES[9]])
def test_every_run_gives_the_same_bits(A: int, S: int, rows: int, sizes: dict[str, Any]) -> None:
    problem = make(A, S, rows, **sizes).to("cuda")
    first = run(problem)
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(first, run(problem), strict=True))


@pytest.mark.parametrize("layers", [1, 2])
def test_strides(layers: int) -> None:
    plain = make(5, 98, 1_000, layers=layers).to("cuda")
    expected = run(plain)
    spread = Problem(
        non_contiguous(plain.agent_qs.detach()).requires_grad_(),
        non_contiguous(plain.states.detach()).requires_grad_(),
        MonotonicParams(*(None if p is None else non_contiguous(p.detach()).requires_grad_() for p in plain.params)),  # type: ignore[arg-type]
        non_contiguous(plain.cotangent),
        "abs",
        1.0,
    )
    for a, b in zip(run(spread), expected, strict=True):
        assert_close(a, b, 1e-5)


@pytest.mark.parametrize("layers", [1, 2])
def test_offsets_beyond_two_to_the_31(layers: int) -> None:
    """Rows 2^29 elements apart, so the fifth begins at element 2^31."""
    stride, rows = 2**29, 6
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GB of free device memory")
    plain = make(5, 98, rows, layers=layers).to("cuda")
    expected = run(plain)
    memory = torch.empty(rows * stride, device="cuda")
    q = memory.as_strided((rows, 5), (stride, 1)).copy_(plain.agent_qs.detach())
    s = memory.as_strided((rows, 98), (stride, 1), 64).copy_(plain.states.detach())
    far = plain._replace(agent_qs=q.detach().requires_grad_(), states=s.detach().requires_grad_())
    for a, b in zip(run(far), expected, strict=True):
        assert_close(a, b, 1e-5)


def test_saved_tensor_beyond_two_to_the_31() -> None:
    """``P`` of 12 million rows has 2^31.1 elements; the last rows are as right as the same rows alone."""
    from fastmix.ops.monotonic import triton as kernels

    if torch.cuda.mem_get_info()[0] < 60 * 2**30:
        pytest.skip("needs 60 GB of free device memory")
    rows, last = 12_000_000, 1_000
    problem = make(2, 8, last).to("cuda")
    q = torch.zeros(rows, 2, device="cuda")
    s = torch.zeros(rows, 8, device="cuda")
    q[-last:], s[-last:] = problem.agent_qs.detach(), problem.states.detach()
    cotangent = torch.zeros(rows, device="cuda")
    cotangent[-last:] = problem.cotangent
    q.requires_grad_()
    out = kernels.monotonic(q, s, problem.params, "abs", 1.0)
    grads = torch.autograd.grad(out, [q, problem.params.w1_weight, problem.params.b1_weight], cotangent)
    alone = kernels.monotonic(*problem[:3], "abs", 1.0)
    expected = torch.autograd.grad(
        alone, [problem.agent_qs, problem.params.w1_weight, problem.params.b1_weight], problem.cotangent
    )
    assert_close(out[-last:], alone, 1e-5)
    assert_close(grads[0][-last:], expected[0], 1e-5)
    for a, b in zip(grads[1:], expected[1:], strict=True):
        assert_close(a, b, 1e-4)


def test_other_streams() -> None:
    problem = make(5, 98, 2_000).to("cuda")
    expected = run(problem)
    stream = torch.cuda.Stream()
    late = problem.agent_qs.detach().clone()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # kernels on another stream would read the values below too early
        late.mul_(2).div_(2).requires_grad_()
        results = run(problem._replace(agent_qs=late))
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def test_no_waiting() -> None:
    problem = make(5, 98, 2_000).to("cuda")
    run(problem)
    with no_waiting():
        run(problem)


def test_graph_replay() -> None:
    problem = make(5, 98, 2_000).to("cuda")
    run(problem)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(problem)
    with torch.no_grad():
        problem.agent_qs.copy_(torch.randn_like(problem.agent_qs))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, run(problem), strict=True))


def test_another_number_of_rows_compiles_nothing() -> None:
    from fastmix.ops.monotonic import triton as kernels

    names = ("mix_kernel", "backward_kernel", "weight_gradient_kernel", "add_parts_kernel", "pack_kernel")

    def compiled() -> int:
        return sum(len(getattr(kernels, name).device_caches[torch.cuda.current_device()][0]) for name in names)

    run(make(5, 98, 15_360).to("cuda"))
    before = compiled()
    for rows in (15_359, 15_000, 14_001, 13_568):
        run(make(5, 98, rows).to("cuda"))
    assert compiled() == before


@pytest.mark.parametrize("layers", [1, 2])
def test_compiles_without_a_graph_break(layers: int) -> None:
    def loss(q: Tensor, s: Tensor, params: MonotonicParams, cotangent: Tensor) -> Tensor:
        from fastmix.ops.monotonic import triton as kernels

        return (kernels.monotonic(q, s, params, "abs", 1.0) * cotangent).sum()

    fast = torch.compile(loss, fullgraph=True, dynamic=True)
    for rows in (1_000, 1_500):
        problem = make(5, 98, rows, layers=layers).to("cuda")
        inputs = list(problem.inputs().values())
        expected = torch.autograd.grad(loss(*problem[:4]), inputs)
        for a, b in zip(torch.autograd.grad(fast(*problem[:4]), inputs), expected, strict=True):
            assert_close(a, b, 1e-5)


@pytest.mark.parametrize("layers", [1, 2])
def test_no_unwritten_memory_is_used(layers: int) -> None:
    problem = make(5, 98, 1_001, E=31, H=33, layers=layers).to("cuda")
    plain = run(problem)
    with poisoned_allocations() as report:
        poisoned = run(problem)
    assert report.count > 5
    assert all(torch.equal(a, b) for a, b in zip(plain, poisoned, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_device_that_is_not_current() -> None:
    expected = run(make(5, 98, 1_000).to("cuda:0"))
    results = run(make(5, 98, 1_000).to("cuda:1"))
    for a, b in zip(results, expected, strict=True):
        assert a.device.index == 1
        assert_close(a, b, 1e-6)


@pytest.mark.parametrize("file", golden_files())
def test_reference_numbers(file: Golden) -> None:
    torch.set_float32_matmul_precision("highest")
    rule = find_rule(file)
    assert isinstance(rule, Rule)
    rule.run(file, Setting("triton", torch.float32, "cuda"))


def test_automatic_choice() -> None:
    problem = make(3, 9, 24, E=4, H=5).to("cuda")
    assert backends.resolve("monotonic", problem.agent_qs) == "triton"
    assert backends.resolve("monotonic", problem.agent_qs.double()) == "reference"
