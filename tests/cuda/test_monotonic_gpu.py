"""`monotonic` on a real device, by each backend: precision, determinism, strides, streams, graphs, compilation."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastmix import _core, backends
from fastmix.ops.monotonic import POSITIVITIES, MonotonicParams, monotonic, reference
from fastmix.testing import assert_close, poisoned_allocations
from fastmix.testing.golden import Golden
from tests.cuda.device import no_waiting
from tests.generators import non_contiguous
from tests.golden_rules import Rule, Setting, find_rule
from tests.monotonic_problem import Problem, check, cut_off, golden_files, make, mix

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

BACKENDS = ("native", "triton")

KINKS = 3e-2
"""Of gradients in lower precision: weights and hidden units near zero change sign, and with it their slope."""

SHAPES = {
    "3m": (3, 48, 15_360, {}),
    "MMM2": (10, 322, 5_000, {}),
    "MMM2-few": (10, 322, 500, {}),
    "27m_vs_30m": (27, 1170, 2_000, {}),
    "smallest": (1, 7, 333, {"E": 1, "H": 1}),
    "odd": (2, 9, 1_001, {"E": 31, "H": 33}),
    "64-agents": (64, 64, 500, {}),
    "widest-states": (2, 4096, 300, {}),
}
MORE_SHAPES = {
    "qmix_large": (10, 322, 3_000, {"E": 64, "H": 256}),
    "64-agents-odd": (64, 64, 500, {"E": 33, "H": 65}),
    "widest": (2, 4096, 300, {"E": 256, "H": 256}),
    "one-layer": (10, 322, 5_000, {"layers": 1}),
    "one-layer-odd": (2, 4095, 300, {"E": 31, "layers": 1}),
}
"""What the core's kernels leave to Triton."""

CASES = [
    *(pytest.param(backend, *shape, id=f"{backend}-{name}") for backend in BACKENDS for name, shape in SHAPES.items()),
    *(pytest.param("triton", *shape, id=f"triton-{name}") for name, shape in MORE_SHAPES.items()),
]
LAYERS = pytest.mark.parametrize(("backend", "layers"), [("native", 2), ("triton", 2), ("triton", 1)])


@pytest.fixture(autouse=True)
def _settings(request: pytest.FixtureRequest) -> Iterator[None]:
    """Skips where there is no such backend; a precision that a test sets ends with it."""
    callspec = getattr(request.node, "callspec", None)
    backend = callspec.params.get("backend") if callspec else None
    if backend == "triton" and importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    if backend == "native" and not _core.cuda:
        pytest.skip("needs a core built with CUDA")
    outer = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(outer)


def run(problem: Problem, backend: str) -> list[Tensor]:
    """Result with and without gradient, and all gradients."""
    out = mix(problem, backend)
    grads = torch.autograd.grad(out, list(problem.inputs().values()), problem.cotangent)
    with torch.no_grad():
        return [out.detach(), mix(problem, backend), *grads]


@pytest.mark.parametrize(("backend", "A", "S", "rows", "sizes"), CASES)
@pytest.mark.parametrize(("setting", "tolerance", "grads"), [("highest", 3e-6, 1e-5), ("high", 5e-4, KINKS)])
def test_float64_reference_is_met(
    backend: str, A: int, S: int, rows: int, sizes: dict[str, Any], setting: str, tolerance: float, grads: float
) -> None:
    torch.set_float32_matmul_precision(setting)
    if setting == "highest" and backend == "native":
        tolerance = max(tolerance, cut_off(S))
        grads = max(grads, 6 * tolerance)
    rounding = {"highest": 2.0**-24, "high": 2.0**-11}[setting]
    check(make(A, S, rows, **sizes).to("cuda"), tolerance, grads=grads, backend=backend, rounding=rounding)


@LAYERS
@pytest.mark.parametrize("positivity", POSITIVITIES)
def test_every_positivity(positivity: str, backend: str, layers: int) -> None:
    torch.set_float32_matmul_precision("highest")
    problem = make(5, 98, 1_000, layers=layers, positivity=positivity, beta=2.5).to("cuda")
    if backend == "native" and positivity not in ("abs", "none"):
        with pytest.raises(RuntimeError, match="only positivity 'abs' and 'none'"):
            run(problem, backend)
        return
    check(problem, 3e-6, grads=1e-5, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_absolute_value_has_slope_zero_at_zero(backend: str) -> None:
    problem = make(5, 98, 1_000).to("cuda")
    with torch.no_grad():
        problem.params.w1_weight.zero_()
        problem.params.w1_bias.zero_()
    grads = dict(zip(problem.inputs(), run(problem, backend)[2:], strict=True))
    assert not grads["w1_weight"].any() and not grads["w1_bias"].any()
    assert grads["b1_weight"].any()


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_autocast(dtype: torch.dtype, tolerance: float, layers: int) -> None:
    problem = make(10, 322, 5_000, layers=layers).to("cuda")
    with torch.autocast("cuda", dtype):
        assert backends.resolve("monotonic", problem.agent_qs, native_limit="autocast") == "triton"
        check(problem, tolerance, grads=5 * KINKS, backend="triton")


@pytest.mark.parametrize("backend", BACKENDS)
def test_rounding_is_better_than_truncation(backend: str) -> None:
    """The share of one tf32 product in the error: below 5e-4, where truncated operands give 2e-3."""
    torch.set_float32_matmul_precision("high")
    problem = make(10, 322, 5_000).to("cuda")
    exact = problem.to("cuda", torch.float64)
    with torch.no_grad():
        expected = reference.monotonic(*exact[:3], "abs", 1.0)
        assert_close(mix(problem, backend), expected, 5e-4)


@LAYERS
@pytest.mark.parametrize("setting", ["highest", "high"])
def test_every_run_gives_the_same_bits(setting: str, backend: str, layers: int) -> None:
    torch.set_float32_matmul_precision(setting)
    problem = make(10, 322, 5_000, layers=layers).to("cuda")
    first = run(problem, backend)
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(first, run(problem, backend), strict=True))


@LAYERS
def test_strides(backend: str, layers: int) -> None:
    plain = make(5, 98, 1_000, layers=layers).to("cuda")
    expected = run(plain, backend)
    spread = Problem(
        non_contiguous(plain.agent_qs.detach()).requires_grad_(),
        non_contiguous(plain.states.detach()).requires_grad_(),
        MonotonicParams(*(None if p is None else non_contiguous(p.detach()).requires_grad_() for p in plain.params)),  # type: ignore[arg-type]
        non_contiguous(plain.cotangent),
        "abs",
        1.0,
    )
    for a, b in zip(run(spread, backend), expected, strict=True):
        assert_close(a, b, 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("S", [97, 98, 100])
def test_rows_in_groups(S: int, backend: str) -> None:
    """Slices along time, of states in copies of 4, 8 and 16 bytes: the same bits as of dense rows, without a copy."""
    plain = make(5, S, 33 * 59).to("cuda")
    expected = run(plain, backend)
    q = torch.zeros(33, 60, 5, device="cuda")[:, :-1].copy_(plain.agent_qs.detach().view(33, 59, 5))
    s = torch.zeros(33, 61, S, device="cuda")[:, 1:-1].copy_(plain.states.detach().view(33, 59, S))
    sliced = plain._replace(agent_qs=q.detach().requires_grad_(), states=s.detach().requires_grad_())
    for a, b in zip(run(sliced, backend), expected, strict=True):
        assert torch.equal(a.view(b.shape), b)


@LAYERS
def test_offsets_beyond_two_to_the_31(backend: str, layers: int) -> None:
    """Rows 2^29 elements apart, so the fifth begins at element 2^31."""
    stride, rows = 2**29, 6
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GB of free device memory")
    plain = make(5, 98, rows, layers=layers).to("cuda")
    expected = run(plain, backend)
    memory = torch.empty(rows * stride, device="cuda")
    q = memory.as_strided((rows, 5), (stride, 1)).copy_(plain.agent_qs.detach())
    s = memory.as_strided((rows, 98), (stride, 1), 64).copy_(plain.states.detach())
    far = plain._replace(agent_qs=q.detach().requires_grad_(), states=s.detach().requires_grad_())
    for a, b in zip(run(far, backend), expected, strict=True):
        assert_close(a, b, 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_saved_tensor_beyond_two_to_the_31(backend: str) -> None:
    """``P`` of 12 million rows has 2^31.1 elements; the last rows are as right as the same rows alone."""
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
    out = mix(problem._replace(agent_qs=q, states=s), backend)
    grads = torch.autograd.grad(out, [q, problem.params.w1_weight, problem.params.b1_weight], cotangent)
    alone = mix(problem, backend)
    expected = torch.autograd.grad(
        alone, [problem.agent_qs, problem.params.w1_weight, problem.params.b1_weight], problem.cotangent
    )
    assert_close(out[-last:], alone, 1e-5)
    assert_close(grads[0][-last:], expected[0], 1e-5)
    for a, b in zip(grads[1:], expected[1:], strict=True):
        assert_close(a, b, 1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_other_streams(backend: str) -> None:
    problem = make(5, 98, 2_000).to("cuda")
    expected = run(problem, backend)
    stream = torch.cuda.Stream()
    late = problem.agent_qs.detach().clone()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # kernels on another stream would read the values below too early
        late.mul_(2).div_(2).requires_grad_()
        results = run(problem._replace(agent_qs=late), backend)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_waiting(backend: str) -> None:
    problem = make(5, 98, 2_000).to("cuda")
    run(problem, backend)
    with no_waiting():
        run(problem, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_graph_replay(backend: str) -> None:
    problem = make(5, 98, 2_000).to("cuda")
    run(problem, backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(problem, backend)
    with torch.no_grad():
        problem.agent_qs.copy_(torch.randn_like(problem.agent_qs))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, run(problem, backend), strict=True))


def test_another_number_of_rows_compiles_nothing() -> None:
    kernels = pytest.importorskip("fastmix.ops.monotonic.triton", exc_type=ImportError)
    names = ("mix_kernel", "backward_kernel", "weight_gradient_kernel", "add_parts_kernel", "pack_kernel")

    def compiled() -> int:
        return sum(len(getattr(kernels, name).device_caches[torch.cuda.current_device()][0]) for name in names)

    run(make(5, 98, 15_360).to("cuda"), "triton")
    before = compiled()
    for rows in (15_359, 15_000, 14_001, 13_568):
        run(make(5, 98, rows).to("cuda"), "triton")
    assert compiled() == before


@LAYERS
def test_compiles_without_a_graph_break(backend: str, layers: int) -> None:
    def loss(q: Tensor, s: Tensor, params: MonotonicParams, cotangent: Tensor) -> Tensor:
        return (monotonic(q, s, params, backend=backend).flatten() * cotangent).sum()

    fast = torch.compile(loss, fullgraph=True, dynamic=True)
    for rows in (1_000, 1_500):
        problem = make(5, 98, rows, layers=layers).to("cuda")
        inputs = list(problem.inputs().values())
        expected = torch.autograd.grad(loss(*problem[:4]), inputs)
        for a, b in zip(torch.autograd.grad(fast(*problem[:4]), inputs), expected, strict=True):
            assert_close(a, b, 1e-5)


@LAYERS
def test_no_unwritten_memory_is_used(backend: str, layers: int) -> None:
    problem = make(5, 98, 1_001, E=31, H=33, layers=layers).to("cuda")
    plain = run(problem, backend)
    with poisoned_allocations() as report:
        poisoned = run(problem, backend)
    assert report.count > 5
    assert all(torch.equal(a, b) for a, b in zip(plain, poisoned, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_device_that_is_not_current(backend: str) -> None:
    expected = run(make(5, 98, 1_000).to("cuda:0"), backend)
    results = run(make(5, 98, 1_000).to("cuda:1"), backend)
    for a, b in zip(results, expected, strict=True):
        assert a.device.index == 1
        assert_close(a, b, 1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("file", golden_files())
def test_reference_numbers(file: Golden, backend: str) -> None:
    torch.set_float32_matmul_precision("highest")
    rule = find_rule(file)
    assert isinstance(rule, Rule)
    rule.run(file, Setting(backend, torch.float32, "cuda"))


@pytest.mark.parametrize("backend", ["native"])
def test_automatic_choice(backend: str) -> None:
    problem = make(3, 9, 24, E=4, H=5).to("cuda")
    assert backends.resolve("monotonic", problem.agent_qs) == backend
    assert "monotonic_cuda" in type(monotonic(*problem[:3]).grad_fn).__name__
    assert backends.resolve("monotonic", problem.agent_qs.double()) == "reference"
