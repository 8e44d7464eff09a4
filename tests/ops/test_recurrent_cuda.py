"""`recurrent` on CUDA: the kernels emulated on the host, and all of it on a real device."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor

import fastmix
from fastmix import backends
from fastmix.ops import _library
from fastmix.ops.recurrent import RecurrentOutput, RecurrentParams, Stepper, cuda, recurrent
from fastmix.testing import assert_close, rms_ratio
from tests.cuda import emulate
from tests.generators import SHAPES, non_contiguous, recurrent_params
from tests.ops.support import fullgraph

needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

PRECISE, ROUGH = 2e-6, 2e-3
"""RMS ratio to float64: products to float32's precision, and to that of tf32"""
LONG = 1e-5
"""As `PRECISE`, over many steps, with the exponentials of a device"""
FLIPS, KINKS = 2e-3, 3e-2
"""Of gradients before the ReLU: rounding decides of features near zero, few of millions or, in low precision, many"""
SETTINGS = {"highest": (LONG, FLIPS), "high": (ROUGH, KINKS)}
"""torch.set_float32_matmul_precision -> tolerances of large problems"""


class Problem(NamedTuple):
    obs: Tensor
    networks: list[RecurrentParams]
    hidden: list[Tensor | None]
    last_actions: Tensor | None
    agent_ids: bool

    def to(self, device: str, dtype: torch.dtype) -> Problem:
        def moved(t: Tensor | None) -> Any:
            if t is None or not t.is_floating_point():
                return None if t is None else t.to(device)
            return t.detach().to(device, dtype).requires_grad_(t.requires_grad)

        networks = [RecurrentParams._make(map(moved, network)) for network in self.networks]
        hidden = [moved(state) for state in self.hidden]
        return Problem(moved(self.obs), networks, hidden, moved(self.last_actions), self.agent_ids)

    def leaves(self) -> list[Tensor]:
        tensors = [self.obs, *self.hidden, *(p for network in self.networks for p in network)]
        return [t for t in tensors if t is not None and t.requires_grad]


def problem(
    B: int = 3,
    T: int = 7,
    A: int = 2,
    n_obs: int = 7,
    U: int = 5,
    D: Sequence[int] = (64,),
    *,
    actions: bool = True,
    ids: bool = True,
    norm: bool = False,
    start: bool = True,
    grad_obs: bool = False,
    frozen: Sequence[int] = (),
    seed: int = 0,
) -> Problem:
    """Networks of hidden sizes ``D`` on one input; those of the indices ``frozen`` need no gradient."""
    g = torch.Generator().manual_seed(seed)
    inputs = n_obs + (U if actions else 0) + (A if ids else 0)
    networks = [
        recurrent_params(inputs, width, U, layer_norm=norm, seed=seed + i, requires_grad=i not in frozen)
        for i, width in enumerate(D)
    ]
    hidden = [
        torch.randn(B, A, width, generator=g).requires_grad_(i not in frozen) if start else None
        for i, width in enumerate(D)
    ]
    obs = torch.randn(B, T, A, n_obs, generator=g).requires_grad_(grad_obs)
    return Problem(obs, networks, hidden, torch.randint(-1, U, (B, T, A), generator=g) if actions else None, ids)


def run(p: Problem, backend: str = "native", states: bool = False) -> list[RecurrentOutput]:
    return recurrent(
        p.obs, p.networks, p.hidden, last_actions=p.last_actions, agent_ids=p.agent_ids, return_hidden_states=states,
        backend=backend,
    )  # fmt: skip


def flat(outputs: Sequence[RecurrentOutput]) -> list[Tensor]:
    return [t for output in outputs for t in output if t is not None]


def gradients(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Of a random linear function of the outputs, the same one in every dtype; zeros where unused."""
    g = torch.Generator().manual_seed(0)
    cotangents = [torch.randn(o.shape, generator=g).to(o) for o in outputs]
    results = torch.autograd.grad(outputs, inputs, cotangents, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(i) if r is None else r for r, i in zip(results, inputs, strict=True)]


def grads(outputs: Sequence[RecurrentOutput], p: Problem) -> list[Tensor]:
    return gradients([t for t in flat(outputs) if t.requires_grad], p.leaves())


def check(p: Problem, tolerance: float, kinks: float = 0.0, states: bool = False) -> None:
    """Outputs and all gradients against the reference in float64; ``kinks`` is for those of the input layer."""
    ours = run(p, states=states)
    exact = p.to(str(p.obs.device), torch.float64)
    expected = run(exact, "reference", states)
    for i, (a, e) in enumerate(zip(flat(ours), flat(expected), strict=True)):
        assert a.dtype == torch.float32
        assert_close(a, e, tolerance, name=f"output {i}")
    before = [id(t) for t in (p.obs, *(t for network in p.networks for t in network[:2]))]
    for i, (leaf, a, e) in enumerate(zip(p.leaves(), grads(ours, p), grads(expected, exact), strict=True)):
        assert_close(a, e, max(tolerance, kinks if id(leaf) in before else 0.0), name=f"gradient {i}")


# ---- Emulated ----


def _emulate(descending: bool = False, device: int = 2) -> Iterator[None]:
    core = emulate.core("recurrent")
    core.descending(descending)
    core.device(device)
    with (
        mock.patch.object(_library, "on_cuda", lambda tensor: True),
        mock.patch.object(_library, "queue_on", lambda device, function, *args: function(*args, 0)),
        mock.patch.object(cuda, "_core", lambda: core),
        mock.patch.object(cuda, "_device_limit", lambda *args: None),
    ):
        yield


@pytest.fixture(params=[False, True], ids=["ascending", "descending"])
def either_order(request: pytest.FixtureRequest) -> Iterator[None]:
    """The native backend goes the way of CUDA tensors, to emulated kernels, a block's threads in either order."""
    yield from _emulate(request.param)


@pytest.fixture
def emulated() -> Iterator[None]:
    """The same, in one order."""
    yield from _emulate()


@pytest.fixture
def few_multiprocessors() -> Iterator[None]:
    """The same on two multiprocessors: blocks take several tiles of rows, and several turns."""
    yield from _emulate(device=0)


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "one of everything": lambda: problem(1, 1, 1, 1, 1, grad_obs=True),
    "16 rows": lambda: problem(4, 2, 4, start=False),
    "17 rows": lambda: problem(17, 12, 1, ids=False, grad_obs=True),
    "40 rows": lambda: problem(8, 7, 5, 30, 12, actions=False),
    "hidden 32": lambda: problem(5, 12, 3, 11, 6, (32,), grad_obs=True),
    "no actions, no ids": lambda: problem(2, 5, 2, 33, 17, actions=False, ids=False, start=False),
    "many inputs": lambda: problem(2, 3, 3, 301, 36, grad_obs=True),
    "many inputs, hidden 32": lambda: problem(2, 3, 3, 301, 36, (32,)),
    "64 outputs": lambda: problem(3, 4, 3, 5, 64),
    "65 outputs": lambda: problem(3, 4, 3, 5, 65),
    "layer norm": lambda: problem(3, 5, 3, norm=True, grad_obs=True),
    "several networks": lambda: problem(2, 5, 3, 9, 6, (64, 64, 64), frozen=(1,), grad_obs=True),
    "both widths, five networks": lambda: problem(2, 4, 2, 9, 6, (64, 32, 64, 64, 64, 64), frozen=(2, 4)),
    "frozen": lambda: problem(2, 5, 3, frozen=(0,)),
    "frozen but for obs": lambda: problem(2, 5, 3, frozen=(0,), grad_obs=True),
    "no steps": lambda: problem(T=0, grad_obs=True),
    "no episodes": lambda: problem(B=0, start=False, grad_obs=True),
}


@pytest.mark.usefixtures("either_order")
@pytest.mark.parametrize("states", [False, True])
@pytest.mark.parametrize("name", PROBLEMS)
def test_emulated_kernels(name: str, states: bool) -> None:
    p = PROBLEMS[name]()
    if p.leaves():
        check(p, PRECISE, states=states)
    else:
        ours, expected = run(p, states=states), run(p.to("cpu", torch.float64), "reference", states)
        assert not any(t.requires_grad for t in flat(ours))
        for a, e in zip(flat(ours), flat(expected), strict=True):
            assert_close(a, e, PRECISE)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("name", ["17 rows", "40 rows", "hidden 32", "many inputs", "64 outputs", "several networks"])
def test_emulated_kernels_in_lower_precision(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "float32_precision", lambda: "high")
    check(PROBLEMS[name](), ROUGH, KINKS)


@pytest.mark.usefixtures("few_multiprocessors")
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("D", [(64,), (32, 32)])
def test_emulated_blocks_of_several_tiles(D: tuple[int, ...], setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "float32_precision", lambda: setting)
    tolerance, kinks = (PRECISE, 0.0) if setting == "highest" else SETTINGS[setting]
    check(problem(23, 5, 5, 11, 7, D), tolerance, kinks, states=True)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("kind", ["gaps", "time first", "expanded"])
def test_emulated_kernels_take_strides(kind: str) -> None:
    p = problem(3, 5, 3, 11)
    obs = {
        "gaps": non_contiguous(p.obs),
        "time first": p.obs.transpose(0, 1).contiguous().transpose(0, 1),
        "expanded": p.obs[:, :1].expand(p.obs.shape),
    }[kind]
    assert p.last_actions is not None
    spread = [RecurrentParams._make(None if t is None else non_contiguous(t.detach()) for t in n) for n in p.networks]
    for network in spread:
        for t in network:
            if t is not None:
                t.requires_grad_()
    check(p._replace(obs=obs.detach(), networks=spread, last_actions=non_contiguous(p.last_actions)), PRECISE)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("scale", [1e-25, 1e-6, 1e6, 1e25])
def test_emulated_gradients_of_any_size(scale: float) -> None:
    """Half precision numbers reach from 6e-8 to 65,504, gradients may not notice."""
    p = problem(3, 9, 3, 11, grad_obs=True)
    q = run(p)[0].q
    cotangent = torch.randn(q.shape)
    cotangent[0, 5:] = 0  # an episode that has ended
    cotangent[1] *= 1e-4
    expected = torch.autograd.grad(q, p.leaves(), cotangent, retain_graph=True)
    ours = torch.autograd.grad(q, p.leaves(), cotangent * scale)
    for i, (a, e) in enumerate(zip(ours, expected, strict=True)):
        assert_close(a.double() / scale, e, PRECISE, name=f"gradient {i}")


@pytest.mark.usefixtures("emulated")
def test_emulated_gradients_that_grow_from_step_to_step() -> None:
    """2.5-fold, over 12 steps: reset gates open, update gates closed, states so small that nothing saturates.

    As small as they are, half precision numbers keep five digits of them, and so of the gradient of weight_hh.
    """
    p = problem(2, 12, 2, ids=False)
    network, hidden = p.networks[0], p.hidden[0]
    assert hidden is not None
    with torch.no_grad():
        hidden.mul_(1e-6)
        network.weight_ih.mul_(1e-6)
        network.weight_hh.zero_()[128:].copy_(2.5 * torch.eye(64))
        network.bias_ih.zero_()
        network.bias_hh.copy_(torch.tensor([20.0, -20.0, 0.0]).repeat_interleave(64))
    exact = p.to("cpu", torch.float64)
    q = [run(p)[0].q, run(exact, "reference")[0].q]
    ours, expected = (torch.autograd.grad(out[:, -1].sum(), x.leaves()) for out, x in zip(q, (p, exact), strict=True))
    assert expected[0].abs().max() > 2**15 * network.fc2_weight.abs().max()
    for i, (a, e) in enumerate(zip(ours, expected, strict=True)):
        assert_close(a, e, 3e-5, name=f"gradient {i}")


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("what", ["obs", "hidden"])
def test_emulated_numbers_of_any_size(what: str) -> None:
    """Of initial states: below 255."""
    p = problem(3, 4, 3, 11)
    hidden = p.hidden[0]
    assert hidden is not None
    if what == "obs":
        p = p._replace(obs=p.obs * torch.tensor([1e-9, 1.0, 1e4])[:, None, None, None])
    else:
        p = p._replace(hidden=[(hidden.detach() * (250 / hidden.detach().abs().max())).requires_grad_()])
    exact = p.to("cpu", torch.float64)
    results = []
    for x, backend in ((p, "native"), (p, "reference"), (exact, "reference")):
        out = run(x, backend)
        results.append([*flat(out), *grads(out, x)])
    # Of large sums that cancel, and of gates that are open or closed, float32 itself knows less than usual.
    for a, b, e in zip(*results, strict=True):
        assert_close(a, e, max(PRECISE, 4 * rms_ratio(b, e)))


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("norm", [False, True])
def test_emulated_nan_spoils_its_own_row_from_its_step_on(norm: bool) -> None:
    p = problem(5, 6, 3, 11, norm=norm, start=False)
    clean, obs = run(p)[0].q, p.obs.clone()
    obs[2, 3, 1, 3] = torch.nan
    q = run(p._replace(obs=obs))[0].q
    spoiled = torch.zeros(q.shape[:3], dtype=torch.bool)
    spoiled[2, 3:, 1] = True
    assert q[spoiled].isnan().all()
    assert torch.equal(q[~spoiled], clean[~spoiled])


@pytest.mark.usefixtures("few_multiprocessors")
def test_emulated_sums_over_many_rows_keep_float_precision() -> None:
    p = problem(24, 30, 3, 5, actions=False, ids=False, start=False)
    exact = p.to("cpu", torch.float64)
    ours, expected = (
        torch.autograd.grad(out[0].q.sum(), x.leaves()) for out, x in ((run(p), p), (run(exact, "reference"), exact))
    )
    for i, (a, e) in enumerate(zip(ours, expected, strict=True)):
        assert_close(a, e, PRECISE, name=f"gradient {i}")


@pytest.mark.usefixtures("emulated")
def test_emulated_same_bits_every_time() -> None:
    p = problem(9, 5, 3, 11, grad_obs=True)
    results = [[*flat(out := run(p)), *grads(out, p)] for _ in range(3)]
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], again, strict=True))


@pytest.mark.usefixtures("emulated")
def test_emulated_gradient_of_each_output_alone() -> None:
    p = problem(3, 5, 2, D=(64, 64))
    exact = p.to("cpu", torch.float64)
    outputs = run(p, states=True), run(exact, "reference", True)
    for i in range(3):
        ours, expected = (
            gradients(flat(out)[i : i + 1], x.leaves()) for out, x in zip(outputs, (p, exact), strict=True)
        )
        for a, e in zip(ours, expected, strict=True):
            assert_close(a, e, PRECISE)


@pytest.mark.usefixtures("emulated")
def test_emulated_autocast_gives_single_precision() -> None:
    p = problem(3, 5, 2, 30)
    with torch.autocast("cpu", torch.bfloat16):
        q = run(p._replace(obs=p.obs.bfloat16()))[0].q
    assert q.dtype == torch.float32
    rounded = p._replace(obs=p.obs.bfloat16().float()).to("cpu", torch.float64)
    assert_close(q, run(rounded, "reference")[0].q, ROUGH)


@pytest.mark.usefixtures("emulated")
def test_emulated_stepper() -> None:
    p = problem(5, 4, 3, 11)
    step = Stepper(p.networks[0], 11, 3)
    assert p.last_actions is not None
    hidden, expected = p.hidden[0], run(p.to("cpu", torch.float64), "reference")[0]
    for t in range(4):
        q, hidden = step(p.obs[:, t], hidden, p.last_actions[:, t])
        assert not q.requires_grad
        assert_close(q, expected.q[:, t], PRECISE)
    assert hidden is not None
    assert_close(hidden, expected.hidden, PRECISE)


@pytest.mark.usefixtures("emulated")
def test_other_hidden_sizes_are_left_to_other_backends() -> None:
    p = problem(D=(64, 48))
    with pytest.raises(RuntimeError, match=r"'native' was asked for, but .* hidden sizes of 32 and 64, got 48"):
        run(p)
    ours = recurrent(p.obs, p.networks, p.hidden, last_actions=p.last_actions, agent_ids=True)
    for a, e in zip(flat(ours), flat(run(p, "reference")), strict=True):
        assert_close(a, e, PRECISE)


def test_shared_memory_that_is_needed_is_known_beforehand() -> None:
    core = emulate.core("recurrent")
    sizes = [
        (width, n_obs, U, precise) for width in (32, 64) for n_obs in (5, 300) for U in (5, 64) for precise in (0, 1)
    ]
    core.device(2)
    assert all(core.recurrent_cuda_fits(*size) for size in sizes)
    core.device(1)  # with 99 KiB
    assert [size for size in sizes if not core.recurrent_cuda_fits(*size)] == [
        (64, 5, 64, 1), (64, 300, 5, 1), (64, 300, 64, 1),
    ]  # fmt: skip


@pytest.fixture
def on_the_cpu() -> Iterator[None]:
    """The ops of CUDA tensors are there for CPU tensors too, for what traces them."""
    library = torch.library.Library("fastmix", "IMPL")
    for n in (1, 2):
        library.impl(f"recurrent_cuda_{n}", partial(cuda._forward, n), "CPU")
        library.impl(f"recurrent_cuda_{n}_backward", partial(cuda._backward_forward, n), "CPU")
    yield
    library._destroy()


@pytest.mark.traced
@pytest.mark.usefixtures("emulated", "on_the_cpu")
def test_emulated_ops_compile_without_graph_break() -> None:
    p = problem(2, 3, 2, D=(64, 64), frozen=(1,))
    compiled, eager = fullgraph(run)(p), run(p)
    for a, e in zip(flat(compiled), flat(eager), strict=True):
        assert torch.equal(a, e)
    for a, e in zip(grads(compiled, p), grads(eager, p), strict=True):
        assert torch.equal(a, e)


@pytest.mark.traced
@pytest.mark.usefixtures("emulated", "on_the_cpu")
@pytest.mark.parametrize("saves", [True, False])
def test_emulated_ops_are_described_to_pytorch(saves: bool) -> None:
    p = problem(2, 3, 2, D=(32,), grad_obs=True)
    network = p.networks[0]
    tensors = [p.obs, p.last_actions, p.hidden[0], *network[:6], *network[8:]]
    if not saves:
        tensors = [None if t is None else t.detach() for t in tensors]
    for states in (0, 1):
        torch.library.opcheck(torch.ops.fastmix.recurrent_cuda_1.default, (*tensors, True, states, int(saves), True))


def test_nothing_is_kept_without_gradients() -> None:
    for _ in _emulate():
        p = problem(2, 3, 2, frozen=(0,))
        network = p.networks[0]
        tensors = [p.obs, p.last_actions, p.hidden[0], *network[:6], *network[8:]]
        *_, saved = cuda._forward(1, *tensors, True, 0, 0, True)
        assert saved.numel() == 0
        *_, saved = cuda._forward(1, *tensors, True, 0, 1, True)
        assert saved.numel() == 4 * (3 * 64 + 4 * 64 + 3)


# ---- On a device ----


@pytest.fixture
def precision() -> Iterator[None]:
    outer = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(outer)


def gpu_test(function: Callable[..., None]) -> Callable[..., None]:
    """On a device, at PyTorch's default precision unless the test sets another."""
    for mark in (*needs_gpu, pytest.mark.usefixtures("precision")):
        function = mark(function)
    return function


def of_shape(name: str, **options: Any) -> Problem:
    s = SHAPES[name]
    return problem(s.batch_size, s.steps + 1, s.n_agents, s.obs_dim, s.n_actions, **options).to("cuda", torch.float32)


@gpu_test
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("setting", SETTINGS)
def test_gpu_float64_reference_is_met(name: str, setting: str) -> None:
    torch.set_float32_matmul_precision(setting)
    check(of_shape(name, start=False), *SETTINGS[setting])


@gpu_test
@pytest.mark.parametrize(("episodes", "steps"), [(64, 60), (256, 60), (512, 120), (1000, 7)])
@pytest.mark.parametrize("D", [(64,), (64, 64), (32,)])
def test_gpu_many_rows(episodes: int, steps: int, D: tuple[int, ...]) -> None:
    check(problem(episodes, steps, 5, 55, 12, D).to("cuda", torch.float32), LONG, FLIPS)


@gpu_test
@pytest.mark.parametrize("name", PROBLEMS)
def test_gpu_odd_problems(name: str) -> None:
    p = PROBLEMS[name]().to("cuda", torch.float32)
    if p.leaves():
        check(p, LONG, states=True)


@gpu_test
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gpu_autocast(dtype: torch.dtype) -> None:
    p = of_shape("5m_vs_6m", start=False)
    with torch.autocast("cuda", dtype):
        check(p, ROUGH, KINKS)


@gpu_test
@pytest.mark.parametrize("setting", SETTINGS)
def test_gpu_same_bits_every_time(setting: str) -> None:
    torch.set_float32_matmul_precision(setting)
    p = of_shape("5m_vs_6m", D=(64, 64), frozen=(1,), grad_obs=True)
    first = None
    for _ in range(20):
        out = run(p)
        result = [*flat(out), *grads(out, p)]
        first = first or result
        assert all(torch.equal(a, b) for a, b in zip(first, result, strict=True))


@gpu_test
@pytest.mark.parametrize("backend", ["native", "cudnn"])
def test_gpu_nothing_waits_for_the_device(backend: str) -> None:
    p = of_shape("5m_vs_6m", D=(64, 64), frozen=(1,))
    grads(run(p, backend), p)
    cotangents = [torch.randn_like(t) for t in flat(run(p, backend)) if t.requires_grad]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad([t for t in flat(run(p, backend)) if t.requires_grad], p.leaves(), cotangents)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu_test
@pytest.mark.parametrize("backend", ["native", "cudnn"])
def test_gpu_graphs(backend: str) -> None:
    p = of_shape("5m_vs_6m", D=(64, 64), frozen=(1,))
    cotangents = [torch.randn_like(t) for t in flat(run(p, backend)) if t.requires_grad]

    def step() -> list[Tensor]:
        out = run(p, backend)
        learned = [t for t in flat(out) if t.requires_grad]
        return [*(t.detach() for t in flat(out)), *torch.autograd.grad(learned, p.leaves(), cotangents)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in range(3):
        g = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            p.obs.copy_(torch.randn(p.obs.shape, generator=g))
            for network in p.networks:
                for t in network:
                    if t is not None:
                        t.mul_(1.01)
        graph.replay()
        for a, b in zip(captured, step(), strict=True):
            assert torch.equal(a, b) if backend == "native" else torch.allclose(a, b, rtol=1e-4, atol=1e-5)


@gpu_test
def test_gpu_runs_on_the_current_stream() -> None:
    p = of_shape("MMM2", start=False)
    expected = flat(run(p))
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        late = torch.zeros_like(p.obs)
        torch.cuda._sleep(50_000_000)
        late.copy_(p.obs)
        out = flat(run(p._replace(obs=late)))
    stream.synchronize()
    for a, e in zip(out, expected, strict=True):
        assert torch.equal(a, e)


@gpu_test
@pytest.mark.traced
@pytest.mark.parametrize("backend", ["native", "cudnn"])
def test_gpu_compiles_without_graph_break(backend: str) -> None:
    p = of_shape("3m", D=(64, 64), frozen=(1,))
    compiled, eager = fullgraph(run)(p, backend), run(p, backend)
    for a, e in zip([*flat(compiled), *grads(compiled, p)], [*flat(eager), *grads(eager, p)], strict=True):
        assert_close(a, e, 0.0 if backend == "native" else 1e-5)


@gpu_test
@pytest.mark.parametrize("norm", [False, True])
def test_gpu_cudnn_agrees(norm: bool) -> None:
    p = of_shape("5m_vs_6m", norm=norm, grad_obs=True)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False), warnings.catch_warnings():
        warnings.simplefilter("error")
        ours, theirs = run(p, states=True), run(p, "cudnn", True)
        for a, e in zip([*flat(ours), *grads(ours, p)], [*flat(theirs), *grads(theirs, p)], strict=True):
            assert_close(a, e, FLIPS)


@gpu_test
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_gpu_cudnn_in_other_precisions(dtype: torch.dtype) -> None:
    p = problem(8, 9, 3, 30, 12, (40,)).to("cuda", dtype)
    out, expected = run(p, "cudnn"), run(p.to("cuda", torch.float64), "reference")
    tolerance = {torch.bfloat16: 4e-2, torch.float64: 1e-10}[dtype]
    for a, e in zip(flat(out), flat(expected), strict=True):
        assert_close(a, e, tolerance)
    assert all(g.isfinite().all() for g in grads(out, p))


@gpu_test
def test_gpu_choice() -> None:
    p = problem(2, 3, 2).to("cuda", torch.float32)
    assert backends.resolve("recurrent", p.obs) == "native"
    assert backends.available("recurrent", "cuda") == ("native", "cudnn", "reference")
    other = problem(2, 3, 2, D=(40,)).to("cuda", torch.float32)
    with pytest.raises(RuntimeError, match="hidden sizes of 32 and 64, got 40"):
        run(other)
    assert run(other, None)[0].q.shape == (2, 3, 2, 5)  # type: ignore[arg-type]
    with fastmix.backend("cudnn"):
        assert_close(run(p, None)[0].q, run(p, "native")[0].q, 1e-3)  # type: ignore[arg-type]


@gpu_test
def test_gpu_stepper_unrolls_like_the_sequence() -> None:
    p = of_shape("5m_vs_6m", start=False)
    s = SHAPES["5m_vs_6m"]
    assert p.last_actions is not None
    step, hidden, expected = Stepper(p.networks[0], s.obs_dim, s.n_agents), None, run(p)[0]
    graph, inputs = torch.cuda.CUDAGraph(), [p.obs[:, 0].clone(), p.last_actions[:, 0].clone()]
    state = torch.zeros(s.batch_size, s.n_agents, 64, device="cuda")
    step(inputs[0], state, inputs[1])
    with torch.cuda.graph(graph):
        q, after = step(inputs[0], state, inputs[1])
        state.copy_(after)
    state.zero_()
    for t in range(s.steps):
        eager, hidden = step(p.obs[:, t], hidden, p.last_actions[:, t])
        inputs[0].copy_(p.obs[:, t])
        inputs[1].copy_(p.last_actions[:, t])
        graph.replay()
        assert torch.equal(eager, q) and torch.equal(hidden, state)
        assert_close(eager, expected.q[:, t], LONG)


@gpu_test
def test_gpu_reference_takes_double_precision() -> None:
    p = problem(2, 3, 2).to("cuda", torch.float64)
    assert backends.resolve("recurrent", p.obs) in ("cudnn", "reference")
    with pytest.raises(RuntimeError, match="float32"):
        run(p)
