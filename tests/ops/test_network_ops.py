"""What native ops of small networks have in common: instruction sets, threads, blocks of rows, parts wanted."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastmix.ops import attention, recognise, unrestricted
from fastmix.testing import assert_close
from tests import duplex_problem
from tests.ops import test_attention, test_unrestricted
from tests.ops.support import ISAS, TOLERANCE, fullgraph, gradients, leaves, run_tests_under_isa

MAKE: dict[str, Callable[..., Any]] = {
    **{
        f"attention {form}": lambda *a, form=form, **k: test_attention.Problem(*a, **test_attention.FORMS[form], **k)
        for form in test_attention.FORMS
    },
    **{
        f"unrestricted {form}": lambda *a, form=form, **k: test_unrestricted.Problem(
            *a, **test_unrestricted.FORMS[form], **k
        )
        for form in test_unrestricted.FORMS
    },
    "recognise": lambda *a, **k: duplex_problem.Problem("recognise", *a, **k),
}
every_op = pytest.mark.parametrize("op", MAKE)
ONE_EACH = ("attention pymarl_all", "unrestricted everything", "recognise")


def outputs(problem: Any, inputs: Sequence[Tensor] | None = None, backend: str = "native") -> list[Tensor]:
    return leaves((problem.run(backend, inputs),))


def assert_parity(problem: Any) -> None:
    tolerance = TOLERANCE[problem.states.dtype]
    got, want = outputs(problem), leaves((problem.expected(),))
    for i, pair in enumerate(zip(got, want, strict=True)):
        assert_close(*pair, tolerance, name=f"output {i}")
    pairs = zip(gradients(got, problem.inputs), gradients(want, problem.inputs), strict=True)
    for i, pair in enumerate(pairs):
        assert_close(*pair, 10 * tolerance, name=f"gradient of input {i}", zero=100 * tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [1, 15, 16, 17, 63, 64, 65, 200])
@every_op
def test_parity_over_blocks(op: str, rows: int, dtype: torch.dtype) -> None:
    assert_parity(MAKE[op](rows, dtype=dtype))


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa: str) -> None:
    run_tests_under_isa(__file__, "parity_over", isa)


@pytest.mark.parametrize("threads", [1, 2, 3])
@every_op
def test_same_result_in_every_run(op: str, threads: int) -> None:
    torch.set_num_threads(threads)
    problem = MAKE[op](1_000, state=60, dtype=torch.float32)
    assert_parity(problem)

    def everything() -> list[Tensor]:
        results = outputs(problem)
        return [*(result.detach() for result in results), *gradients(results, problem.inputs)]

    first = everything()
    for _ in range(3):
        for ours, wanted in zip(everything(), first, strict=True):
            assert torch.equal(ours, wanted)


@every_op
def test_every_output_alone(op: str) -> None:
    """Gradients of one output: those it does not depend on get none, as in the reference."""
    problem = MAKE[op](31)
    results = {backend: outputs(problem, backend=backend) for backend in ("native", "reference")}
    for i in range(len(results["native"])):
        upstream = torch.randn_like(results["native"][i])
        ours, wanted = (
            torch.autograd.grad(results[backend][i], problem.inputs, upstream, retain_graph=True, allow_unused=True)
            for backend in ("native", "reference")
        )
        for k, (grad, want) in enumerate(zip(ours, wanted, strict=True)):
            assert grad is None or want is not None, f"output {i} does not depend on input {k}"
            if want is not None and want.any():
                assert grad is not None
                assert_close(grad, want, 1e-10, name=f"output {i}, gradient of input {k}", zero=1e-9)


@every_op
def test_every_subset_of_gradients(op: str) -> None:
    problem = MAKE[op](31)
    upstream = [torch.randn_like(result) for result in outputs(problem)]
    count = len(problem.inputs)
    for subset in [[0], [1], [2], [0, 1], [count - 1], [3], list(range(2, count))]:
        inputs = [t.detach().requires_grad_(i in subset) for i, t in enumerate(problem.inputs)]
        for backend in ("native", "reference"):
            for result, grad in zip(outputs(problem, inputs, backend), upstream, strict=True):
                if result.requires_grad:
                    result.backward(grad, retain_graph=True)
            grads = [inputs[i].grad for i in subset]
            if backend == "native":
                ours = [None if grad is None else grad.clone() for grad in grads]
                for i in subset:
                    inputs[i].grad = None
        for i, got, want in zip(subset, ours, grads, strict=True):
            if want is None or not want.any():
                assert got is None or not got.any()
            else:
                assert got is not None
                assert_close(got, want, 1e-10, name=f"gradient of input {i} of {subset}", zero=1e-9)


@pytest.mark.parametrize("op", ONE_EACH)
def test_second_derivatives_raise(op: str) -> None:
    problem = MAKE[op](3)
    (result, *_) = outputs(problem)
    upstream = torch.ones_like(result).requires_grad_()
    (grad,) = torch.autograd.grad(result, problem.inputs[-1], upstream, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("op", ONE_EACH)
def test_rows_with_gaps_are_not_copied(op: str, caplog: pytest.LogCaptureFixture) -> None:
    problem = MAKE[op](6, 9)
    width = problem.states.shape[-1]
    with caplog.at_level(logging.DEBUG, "fastmix"):
        problem.states = torch.randn(6, 10, width, dtype=torch.float64)[:, :-1].requires_grad_()
        assert_parity(problem)
        problem.states = torch.randn(9, 6, width, dtype=torch.float64).transpose(0, 1).requires_grad_()
        assert_parity(problem)
        assert "copied" not in caplog.text
        problem.states = torch.randn(6, 9, width, 2, dtype=torch.float64)[..., 0].requires_grad_()
        assert_parity(problem)
        assert "copies states of shape (6, 9" in caplog.text


@pytest.mark.parametrize("op", ONE_EACH)
def test_offsets_beyond_32_bits(op: str, tmp_path: Path) -> None:
    # A sparse file: 2^31 numbers apart, but only the pages in use exist.
    far = 2**31
    memory = torch.from_file(str(tmp_path / "sparse"), shared=True, size=far + 4_096, dtype=torch.float32)
    problem = MAKE[op](2, 7, dtype=torch.float32)
    values = problem.states.detach()
    view = memory.as_strided(values.shape, (far, values.shape[-1], 1), 1_024)
    problem.states = view.copy_(values).requires_grad_()
    assert_parity(problem)


@pytest.mark.traced
@pytest.mark.parametrize("training", [True, False])
@every_op
def test_opcheck(op: str, training: bool) -> None:
    """Forward, and with it backward, as the dispatcher sees them."""
    problem = MAKE[op](3, 4, grad=training)
    calls: list[tuple[Any, tuple[Any, ...]]] = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "fastmix":
                calls.append((func, args))
            return func(*args, **(kwargs or {}))

    with Recorder():
        results = outputs(problem)
        if training:
            gradients(results, problem.inputs)
    names = [str(func).split(".")[1] for func, _ in calls]
    name = op.split()[0]
    assert names == ([name, f"{name}_backward"] if training else [name])
    for func, args in calls:
        detached = [
            [t.detach() for t in a] if isinstance(a, list) and a and isinstance(a[0], Tensor) else a for a in args
        ]
        plain = tuple(a.detach() if isinstance(a, Tensor) else a for a in detached)
        checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
        torch.library.opcheck(func, plain, test_utils=checks)


@pytest.mark.traced
@pytest.mark.parametrize("op", ONE_EACH)
def test_compiles_for_any_number_of_rows(op: str) -> None:
    problem = MAKE[op](5)
    torch.compiler.reset()
    name, params, options = op.split()[0], problem.params, getattr(problem, "options", {})

    def call(agent_qs: Tensor, states: Tensor, actions: Tensor) -> Tensor:
        if name == "attention":
            own = {key: value for key, value in options.items() if key != "alive"}
            return attention(agent_qs, states, params, backend="native", **own).q_tot
        if name == "recognise":
            return recognise(agent_qs, agent_qs * 0, states, actions, params, backend="native").q_r
        return unrestricted(agent_qs, states, params, actions=actions, backend="native")

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (5, 13, 200):
        agent_qs = torch.randn(rows, 3 if name == "recognise" else 5, dtype=torch.float64)
        states = torch.randn(rows, problem.states.shape[-1], dtype=torch.float64, requires_grad=True)
        actions = torch.randint(4, (rows, 3))
        results = [run(agent_qs, states, actions) for run in (compiled, call)]
        assert torch.equal(*results)
        assert torch.equal(*(torch.autograd.grad(r.sum(), states)[0] for r in results))


@pytest.mark.traced
@pytest.mark.parametrize("op", ONE_EACH)
def test_compiles_whole_with_gradients_of_all(op: str) -> None:
    problem = MAKE[op](3, 4)
    results = [run() for run in (lambda: outputs(problem), fullgraph(lambda: outputs(problem)))]
    for got, want in zip(*(gradients(result, problem.inputs) for result in results), strict=True):
        assert_close(got, want, 1e-12, zero=1e-9)
