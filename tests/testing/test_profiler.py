"""The profiler: counts and attributions of functions whose operators are known, and the reading of traces."""

from __future__ import annotations

import gzip
import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastmix import _core, _parts
from fastmix.algorithms import Algorithm, EpisodeBatch, Scheme, make
from fastmix.testing import CountDispatches, Part, Profile, part, profile
from fastmix.testing.profiler import profile_together, table, trace
from fastmix.testing.profiler.trace import OTHER, Event, Label, Parts, Timeline, cuda_work, timeline
from fastmix.train.learner import Delivery, Learner
from tests.generators import SHAPES, episodes

QUICK: dict[str, Any] = {"rounds": 2, "warmup": 1}


def needs_gpu(test: Callable[..., None]) -> Callable[..., None]:
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")(test))


def rows(result: Profile) -> dict[tuple[str, bool], Part]:
    return {(p.name, p.backward): p for p in result.parts}


def problem(device: str = "cpu") -> tuple[Algorithm, EpisodeBatch]:
    shape = SHAPES["3m"]
    scheme = Scheme(shape.n_agents, shape.n_actions, shape.obs_dim, shape.state_dim, 60)
    return make("qmix", scheme, device=device), EpisodeBatch(*episodes(shape, 4, 60)).to(device)


# ------------------------------------------------------------------------------------------------------------- counting


def test_operators_are_counted_forward_and_backward() -> None:
    w, x = torch.ones(3, 3, requires_grad=True), torch.ones(2, 3)
    with CountDispatches() as count:
        y = (x @ w).relu()
        ((y * y).sum() + w.sum()).backward()
    assert count.operators == {
        "aten.mm": 2,  # forward, and the gradient of w
        "aten.relu": 1,
        "aten.mul.Tensor": 3,  # forward, and the gradients of both factors
        "aten.sum": 2,
        "aten.add.Tensor": 3,  # forward, gradients of both factors, gradients of both uses of w
        "aten.ones_like": 1,
        "aten.threshold_backward": 1,
    }
    assert count.views["aten.expand"] == 2 and count.views["aten.t"] == 1
    assert count.total == count.operators.total() + count.views.total()


def test_composite_operators_count_as_their_parts_and_scalars_as_reads() -> None:
    layer, x = torch.nn.Linear(3, 4), torch.ones(2, 3)
    with CountDispatches() as count, torch.no_grad():
        layer(x).sum().item()
    assert count.operators == {"aten.addmm": 1, "aten.sum": 1, "aten._local_scalar_dense": 1}
    assert count.views == {"aten.t": 1}


class Deep(torch.autograd.Function):
    """Calls autograd inside autograd; beyond a depth of 60 PyTorch goes on in another thread."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, depth: int) -> Tensor:
        ctx.depth = depth
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        if ctx.depth == 0:
            threads.add(threading.get_ident())
            return grad * 2, None
        with torch.enable_grad():
            x = ctx.saved_tensors[0].detach().requires_grad_()
            y = Deep.apply(x, ctx.depth - 1)
        y.backward(grad)
        return x.grad, None


threads: set[int] = set()


def test_the_count_follows_autograd_into_other_threads() -> None:
    threads.clear()
    x = torch.ones(2, requires_grad=True)

    def step() -> None:
        x.grad = None
        with part("deep"):
            y = Deep.apply(x, 70).sum()
        y.backward()

    with CountDispatches() as count:
        step()
    assert threads and threading.get_ident() not in threads
    assert count.operators == {"aten.clone": 71, "aten.sum": 1, "aten.ones_like": 1, "aten.mul.Tensor": 1}
    found = rows(profile(step, **QUICK))
    assert found["deep", False].dispatches == 2  # the first clone, and the sum
    assert found["deep", True].dispatches >= 1 and sum(p.dispatches for p in found.values()) == 74


def test_compiled_code_is_counted_as_it_was_written() -> None:
    @torch.compile(fullgraph=True, backend="eager")
    def f(x: Tensor) -> Tensor:
        with part("compiled"):
            return (x * 2 + 1).sum()

    x = torch.ones(5)
    f(x)
    with CountDispatches() as count:
        f(x)
    assert count.operators == {"aten.mul.Tensor": 1, "aten.add.Tensor": 1, "aten.sum": 1}
    result = profile(lambda: f(x), **QUICK)
    assert {p.name: p.dispatches for p in result.parts} == {"compiled": 3, "other": 0}
    assert {p.name: p.share for p in result.parts} == {"compiled": 0, "other": 1}


# ---------------------------------------------------------------------------------------------------------------- parts


def step_with_parts() -> Callable[[], None]:
    a, b, x = (torch.randn(8, 8, requires_grad=i < 2) for i in range(3))

    def step() -> None:
        for weight in (a, b):
            weight.grad = None
        with part("first"):
            y = x @ a
            with part("inner"):
                y = y.relu()
            y = y.neg()
        with part("second"):
            z = (y @ b).sum()
        z.neg().backward()
        with part("update"), torch.no_grad():
            for weight in (a, b):
                if weight.grad is not None:
                    weight.sub_(weight.grad)

    return step


def test_parts_have_their_own_dispatches_forward_and_backward() -> None:
    result = profile(step_with_parts(), **QUICK)
    found = {key: p.dispatches for key, p in rows(result).items()}
    assert found == {
        ("first", False): 2,
        ("first", True): 2,  # only a needs a gradient: one product
        ("inner", False): 1,
        ("inner", True): 1,
        ("second", False): 2,
        ("second", True): 2,  # both factors need one; the gradient of the sum is a view
        ("update", False): 2,
        ("other", False): 2,  # with the ones that backward begins with
        ("other", True): 1,
    }
    assert [key for key in found if key[0] != "other"] == [
        *(("first", False), ("inner", False), ("second", False)),
        *(("second", True), ("first", True), ("inner", True)),
        ("update", False),
    ]
    assert result.parts[-1].name == "other"


def test_parts_sum_to_the_whole() -> None:
    step = step_with_parts()
    result = profile(step, **QUICK)
    with CountDispatches() as count:
        step()
    total = result.total
    assert total.share == pytest.approx(1, abs=1e-9)
    assert total.host_s == pytest.approx(result.host.median, rel=1e-9)
    assert (total.dispatches, total.views) == (count.operators.total(), count.views.total())
    assert result.operators == count.operators + count.views
    assert all(p.share > 0 for p in result.parts if p.name != "other")


def test_host_time_goes_to_the_part_that_takes_it() -> None:
    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            time.sleep(0.01)
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            time.sleep(0.03)
            return grad

    x = torch.ones(2, requires_grad=True)

    def step() -> None:
        with part("slow"):
            y = Slow.apply(x)
        with part("quick"):
            y = y.sum()
        y.backward()
        time.sleep(0.06)

    found = rows(profile(step, **QUICK))
    # Sleeping takes at least as long as it is told to; nothing else here takes a tenth of it.
    assert found["slow", False].share == pytest.approx(0.1, abs=0.05)
    assert found["slow", True].share == pytest.approx(0.3, abs=0.05)
    assert found["other", False].share == pytest.approx(0.6, abs=0.1)
    assert found["quick", False].share < 0.05


def test_the_calls_of_the_core_are_the_kernels_of_the_cpu() -> None:
    algo, batch = problem()
    before = [(name, getattr(_core, name)) for name in dir(_core)], _core.RecurrentStepperFloat.step
    result = profile(lambda: algo.step(batch), **QUICK)
    found = {key: p.kernels for key, p in rows(result).items() if p.kernels}
    assert found == {
        ("unrolls", False): 2,  # online and target network
        ("unrolls", True): 1,
        ("select", False): 1,
        ("select", True): 1,
        ("mixer", False): 2,
        ("mixer", True): 1,
        ("targets", False): 1,
        ("loss", False): 1,  # its backward pass scales what the forward pass computed
        ("optimiser", False): 1,
    }
    total = result.total
    assert total.kernel_s is not None and 0 < total.kernel_s < result.host.median
    assert total.synchronisations is None and result.copies is None and result.runtime == {}
    assert {name.removesuffix("_float32"): count for name, (count, _) in result.by_kernel.items()} == {
        **{f"recurrent_{way}": count for way, count in (("forward", 2), ("backward", 1))},
        **{f"monotonic_{way}": count for way, count in (("forward", 2), ("backward", 1))},
        **dict.fromkeys(("select_forward", "select_backward", "returns_forward", "td_loss_forward", "optimise"), 1),
    }
    times = [seconds for _, seconds in result.by_kernel.values()]
    assert times == sorted(times, reverse=True) and sum(times) == pytest.approx(total.kernel_s)
    assert "most time in: " in str(result)
    assert before == ([(name, getattr(_core, name)) for name in dir(_core)], _core.RecurrentStepperFloat.step)


def test_functions_of_the_core_that_were_looked_up_before_are_seen_too() -> None:
    kept: dict[str, Any] = {"returns": _core.returns_forward_float32}
    x = torch.ones(4)

    def step() -> None:
        for which in ("returns", "looked up now"):
            run = kept.setdefault(which, _core.returns_forward_float32)
            run(*[x.data_ptr()] * 4, 0, x.data_ptr(), 0, 1, 1, 1, 0.9, 0, 0.5, 1, 1)  # of no episode
        del kept["looked up now"]

    assert profile(step, **QUICK).total.kernels == 2
    assert kept == {"returns": _core.returns_forward_float32}


def test_acting_is_a_call_of_the_core() -> None:
    algo, batch = problem()
    hidden = algo.initial_hidden(4)
    obs, last, avail = batch.obs[:, 0], batch.last_actions[:, 0], batch.avail_actions[:, 0]
    result = profile(lambda: algo.act(obs, last, avail, hidden, epsilon=0.0), **QUICK)
    assert result.total.kernels == 2  # one step of the network, and select


def test_parts_of_other_threads_are_counted_as_other() -> None:
    x = torch.ones(2)

    def in_part() -> None:
        with part("elsewhere"):
            torch.add(x, x)

    def step() -> None:
        worker = threading.Thread(target=in_part)
        worker.start()
        worker.join()
        with part("here"):
            torch.add(x, x)

    assert {p.name for p in profile(step, **QUICK).parts} == {"here", "other"}


def test_nobody_listens_before_or_after() -> None:
    nothing = part("a")
    assert part("b") is nothing

    def fails() -> None:
        with part("a"):
            raise ArithmeticError("as planned")

    calls = iter([lambda: None, fails])
    with pytest.raises(ArithmeticError, match="as planned"):
        profile(lambda: next(calls)(), **QUICK)
    heard: list[str] = []

    def listener(name: str) -> Any:
        heard.append(name)
        return nothing

    with pytest.raises(ArithmeticError), _parts.listening(listener):
        fails()
    assert heard == ["a"] and part("a") is nothing


def test_a_part_costs_little_where_nobody_listens() -> None:
    def seconds() -> float:
        start = time.perf_counter()
        for _ in range(1000):
            with part("a"):
                pass
        return time.perf_counter() - start

    assert min(seconds() for _ in range(20)) < 1000 * 1e-6


# --------------------------------------------------------------------------------------------------------------- traces

A, B, C = Label("a"), Label("b"), Label("c", backward=True)


def test_the_innermost_interval_counts() -> None:
    line = Timeline([(0, 100, A), (10, 40, B), (20, 30, C), (40, 50, C), (60, 60, B), (90, 120, B)])
    times = {-1: OTHER, 0: A, 9: A, 10: B, 19: B, 20: C, 30: B, 40: C, 50: A, 60: A, 90: B, 119: B, 120: OTHER}
    assert {time: line.label(time) for time in times} == times
    spans: Counter[Label] = Counter()
    for label, duration in line.spans(-5, 130):
        spans[label] += duration
    assert spans == {OTHER: 15, A: 50, B: 50, C: 20}
    assert list(line.spans(25, 27)) == [(C, 2)] and list(line.spans(200, 203)) == [(OTHER, 3)]


def test_an_interval_may_begin_or_end_with_the_one_it_lies_in() -> None:
    line = Timeline([(0, 5, B), (0, 10, A), (8, 10, C)])
    assert list(line.spans(0, 10)) == [(B, 5), (A, 3), (C, 2)]
    assert list(Timeline([]).spans(0, 4)) == [(OTHER, 4)]


def test_nodes_belong_to_the_part_that_made_them() -> None:
    parts = Parts()
    for number, name in ((10, "other"), (12, "a"), (15, "b"), (15, "a"), (17, "other")):
        parts.change(number, name)
    assert [parts.made(n) for n in (3, 10, 12, 14, 15, 16, 17, 99)] == ["other"] * 2 + ["a"] * 4 + ["other"] * 2

    def node(name: str, start: int, number: int | None) -> Event:
        return Event(trace.NODE + name, "cpu_op", start, 5, {} if number is None else {"Sequence number": number})

    events = [
        Event("fastmix.part: a", "cpu_op", 0, 10, {}),
        node("torch::autograd::AccumulateGrad", 20, None),  # of a graph made before
        node("MulBackward0", 30, 17),
        node("MmBackward0", 40, 13),
        node("torch::autograd::AccumulateGrad", 46, None),
    ]
    line = timeline(events, parts, "fastmix.part: ")
    labels = [line.label(t) for t in (5, 21, 31, 41, 47, 60)]
    a, other = Label("a", backward=True), Label("other", backward=True)
    assert labels == [A, other, other, a, a, OTHER]


CUDA_TRACE: dict[str, Any] = {
    "traceEvents": [
        {"ph": "M", "name": "process_name", "pid": 0, "tid": 0, "args": {}},
        {"ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernel", "pid": 9, "tid": 9, "ts": 5, "dur": 1,
         "args": {"correlation": 1}},
        {"ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernel_v7000", "pid": 9, "tid": 9, "ts": 12, "dur": 1,
         "args": {"correlation": 2}},
        {"ph": "X", "cat": "cuda_driver", "name": "cuLaunchKernelEx", "pid": 9, "tid": 8, "ts": 22, "dur": 1,
         "args": {"correlation": 3}},
        {"ph": "X", "cat": "cuda_runtime", "name": "cudaMemcpyAsync", "pid": 9, "tid": 9, "ts": 31, "dur": 1,
         "args": {"correlation": 4}},
        {"ph": "X", "cat": "cuda_runtime", "name": "cudaStreamSynchronize", "pid": 9, "tid": 9, "ts": 33, "dur": 60,
         "args": {"correlation": 5}},
        {"ph": "X", "cat": "cuda_runtime", "name": "cudaDeviceSynchronize", "pid": 9, "tid": 9, "ts": 101, "dur": 9,
         "args": {"correlation": 6}},
        {"ph": "X", "cat": "kernel", "name": "before", "pid": 0, "tid": 7, "ts": 11, "dur": 3,
         "args": {"correlation": 1}},
        {"ph": "X", "cat": "kernel", "name": "first", "pid": 0, "tid": 7, "ts": 40, "dur": 3.5,
         "args": {"correlation": 2}},
        {"ph": "X", "cat": "kernel", "name": "of a graph", "pid": 0, "tid": 7, "ts": 50, "dur": 2,
         "args": {"correlation": 3}},
        {"ph": "X", "cat": "kernel", "name": "of a graph", "pid": 0, "tid": 7, "ts": 60, "dur": 2,
         "args": {"correlation": 3}},
        {"ph": "X", "cat": "gpu_memcpy", "name": "Memcpy DtoH", "pid": 0, "tid": 7, "ts": 120, "dur": 1,
         "args": {"correlation": 4}},
        {"ph": "s", "cat": "ac2g", "name": "ac2g", "id": 1, "pid": 9, "tid": 9, "ts": 12},
    ]
}  # fmt: skip


def test_kernels_belong_to_the_part_that_launched_them(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    path.write_text(json.dumps(CUDA_TRACE))
    work = cuda_work(trace.load(path), 10_000, 100_000, Timeline([(11_000, 20_000, A), (20_000, 30_000, C)]))
    assert work.kernels == [("first", A, 3500), ("of a graph", C, 2000), ("of a graph", C, 2000)]
    assert work.waits == {OTHER: 1} and work.copies == 1
    assert work.calls == {
        "cudaLaunchKernel": 1,
        "cuLaunchKernelEx": 1,
        "cudaMemcpyAsync": 1,
        "cudaStreamSynchronize": 1,
    }


@pytest.mark.parametrize(
    ("name", "waits"),
    [
        ("cudaStreamSynchronize", True),
        ("cudaDeviceSynchronize", True),
        ("cudaEventSynchronize", True),
        ("cuCtxSynchronize", True),
        ("cudaMemcpy", True),
        ("cudaMemcpy2D", True),
        ("cudaStreamSynchronize_ptsz_v7000", True),
        ("cuMemcpyDtoH_v2", True),
        ("cudaMemcpyAsync", False),
        ("cudaMemcpyAsync_v3020", False),
        ("cuMemcpyDtoHAsync_v2", False),
        ("cudaStreamWaitEvent", False),
        ("cudaLaunchKernel", False),
        ("cudaGraphLaunch", False),
    ],
)
def test_what_waits(name: str, waits: bool) -> None:
    event = Event(name, "cuda_runtime", 1, 1, {"correlation": 1})
    assert bool(cuda_work([event], 0, 10, Timeline([])).waits) == waits


@pytest.mark.parametrize("name", ["deep/trace.json", "trace.json.gz"])
def test_the_trace_is_kept_for_perfetto(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    profile(step_with_parts(), trace=path, **QUICK)
    content = path.read_bytes()
    events = json.loads(gzip.decompress(content) if name.endswith(".gz") else content)["traceEvents"]
    names = {event["name"] for event in events}
    assert {"fastmix.step", "fastmix.part: inner", "aten::mm"} <= names


# -------------------------------------------------------------------------------------------------------------- results


def test_a_profile_survives_json() -> None:
    result = profile(step_with_parts(), **QUICK)
    assert Profile.from_json(json.loads(json.dumps(result.to_json()))) == result


def test_a_profile_prints_its_parts_and_their_sum() -> None:
    result = profile(step_with_parts(), **QUICK)
    lines = str(result).splitlines()
    assert lines[0].split() == ["part", "dispatches", "views", "host", "ms", "host", "%", "core", "calls", "core", "ms"]
    assert len({len(line) for line in lines[: len(result.parts) + 3]}) == 1  # aligned
    assert [line.split("  ")[0] for line in lines[1:9]] == [
        "first", "inner", "second", "other backward", "second backward", "first backward", "inner backward", "update",
    ]  # fmt: skip
    total = next(line for line in lines if line.startswith("total"))
    assert total.split()[1] == "15" and total.split()[4] == "100.0"
    assert "most called: " in lines[-1] and "aten.mm 5" in lines[-1]  # no kernel of the core to name


def test_profiles_stand_side_by_side() -> None:
    x = torch.ones(2)

    def one() -> None:
        with part("both"):
            torch.add(x, x)

    def other() -> None:
        with part("both"):
            torch.add(x, x)
            torch.add(x, x)
        with part("more"):
            torch.mul(x, x)

    profiles = profile_together({"one": one, "other": other}, **QUICK)
    lines = table(profiles).splitlines()
    assert lines[1].split()[:2] == ["one", "other"]
    assert lines[2].split()[:3] == ["both", "1", "2"]
    assert lines[3].split()[:2] == ["more", "1"]  # one has no such part
    assert lines[-1].split()[:3] == ["total", "1", "3"]


def test_tables_of_nothing_or_of_two_devices_are_refused() -> None:
    with pytest.raises(ValueError, match="profiles must be of one device, got none"):
        table({})


@pytest.mark.parametrize(
    ("functions", "options", "message"),
    [
        ({}, {}, "functions must not be empty"),
        ({"f": int}, {"rounds": 0}, "rounds and warmup must be at least 1, got 0 and 3"),
        ({"f": int}, {"device": "tpu"}, "device must be 'cpu', 'cuda' or None, got 'tpu'"),
    ],
)
def test_what_cannot_be_profiled_is_named(functions: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        profile_together(functions, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_gpu_is_named() -> None:
    with pytest.raises(ValueError, match="device is 'cuda', and this torch finds no usable GPU"):
        profile(int, device="cuda")


def test_functions_that_profile_are_refused() -> None:
    def step() -> None:
        with torch.profiler.profile():
            torch.ones(2)

    with pytest.raises(RuntimeError, match=r"the function uses torch\.profiler itself"):
        profile(step, **QUICK)
    assert profile(lambda: torch.ones(2), **QUICK).total.dispatches == 1


def test_memory_counts_what_the_core_keeps_between_calls() -> None:
    algo, _ = problem()
    batch = EpisodeBatch(*episodes(SHAPES["3m"], 32, 60))
    result = profile(lambda: algo.step(batch), **QUICK)
    if result.peak_bytes is not None:
        rows, steps, width = 32 * 3, 61, 64
        assert result.peak_bytes > rows * width * 6 * steps * 4  # states, inputs and gates of the unroll


def test_memory_is_what_the_call_needs() -> None:
    def step() -> None:
        torch.ones(16 * 2**20).sum()

    result = profile(step, **QUICK)
    if result.peak_bytes is not None:  # the system tells
        assert 60 * 2**20 < result.peak_bytes < 80 * 2**20


# ------------------------------------------------------------------------------------------------------------------ GPU


@needs_gpu
def test_a_step_on_cuda_has_kernels_everywhere_and_waits_nowhere() -> None:
    algo, batch = problem("cuda")
    result = profile(lambda: algo.step(batch), **QUICK)
    found, total = rows(result), result.total
    assert result.device == "cuda"
    for name, backward in (
        ("unrolls", False),
        ("unrolls", True),
        ("mixer", False),
        ("mixer", True),
        ("targets", False),
    ):
        kernels, seconds = found[name, backward].kernels, found[name, backward].kernel_s
        assert kernels and seconds, (name, backward)
    assert total.kernels is not None and sum(p.kernels or 0 for p in result.parts) == total.kernels
    assert total.synchronisations == 0, result.runtime
    assert result.synchronisation_warnings == 0
    assert result.held_bytes and result.peak_bytes
    assert total.share == pytest.approx(1, abs=1e-9)
    with CountDispatches() as count:
        algo.step(batch)
    assert (total.dispatches, total.views) == (count.operators.total(), count.views.total())


@needs_gpu
def test_backward_on_cuda_is_counted_in_its_parts() -> None:
    a, x = torch.randn(8, 8, device="cuda", requires_grad=True), torch.randn(8, 8, device="cuda")

    def step() -> None:
        a.grad = None
        with part("product"):
            y = x @ a
        with part("sum"):
            z = y.sum()
        z.backward()

    found = rows(profile(step, **QUICK))
    assert found["product", False].dispatches == found["product", True].dispatches == 1
    assert found["product", False].kernels and found["product", True].kernels and found["sum", False].kernels


@needs_gpu
def test_synchronisations_are_seen_by_both_witnesses() -> None:
    x = torch.ones(4, device="cuda")

    def step() -> float:
        with part("read"):
            return x.sum().item()

    result = profile(step, **QUICK)
    assert rows(result)["read", False].synchronisations == 1
    assert result.synchronisation_warnings == 1 and result.copies


@needs_gpu
def test_a_replayed_step_shows_the_kernels_of_its_graph() -> None:
    algo, batch = problem("cuda")
    other, _ = problem("cuda")
    learner, ready = Learner(other, graphs=True), Delivery("batch", lambda: batch)
    profiles = profile_together({"eager": lambda: algo.step(batch), "graph": lambda: learner.step(ready)}, **QUICK)
    eager, graph = profiles["eager"].total, profiles["graph"].total
    assert profiles["graph"].runtime["cudaGraphLaunch"] == 1
    assert graph.dispatches < 10 and graph.kernels is not None and eager.kernels is not None
    assert eager.kernels / 2 < graph.kernels <= eager.kernels
    assert graph.synchronisations == 0
