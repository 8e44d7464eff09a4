"""Every CUDA C++ kernel once or twice at odd sizes, for compute-sanitizer: ``python -m benchmarks.sanitize``.

Results are compared with the reference, so that a run that did nothing cannot pass for a clean one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastmix import backends, ops
from fastmix.algorithms.optimiser import Optimiser
from fastmix.experiments.bench import baselines, cases, parity
from fastmix.ops.monotonic import MonotonicParams
from fastmix.ops.recurrent import RecurrentParams
from fastmix.testing import assert_close

TOLERANCE = 1e-4


def compare(name: str, call: Callable[[str], Sequence[Tensor]]) -> None:
    """``call(backend)`` on the native backend and on the reference."""
    for ours, expected in zip(call("native"), call("reference"), strict=True):
        assert_close(ours, expected, TOLERANCE, name=name)
    print(f"{name}: ok", flush=True)


def returns(setting: cases.Setting) -> None:
    episodes, steps, columns = 5, 37, 3
    mask, terminated = cases.ragged_mask(episodes, steps, setting)
    rewards, qs = setting.new(episodes, steps, 1, requires_grad=True), setting.new(episodes, steps + 1, columns)
    behaviour, cotangent = setting.new(episodes, steps + 1, columns), setting.new(episodes, steps, columns)
    qs.requires_grad_()
    for kind in ("td_lambda", "q_lambda", "one_step", "n_step"):

        def run(backend: str, kind: str = kind) -> Sequence[Tensor]:
            targets = ops.returns(
                rewards, terminated, mask, qs, gamma=0.9, kind=kind, td_lambda=0.6, n_step=3, backend=backend,
                behaviour_qs=behaviour if kind == "q_lambda" else None,
            )  # fmt: skip
            live = cotangent * mask  # targets of padded steps have no meaning in every form
            return [targets * mask, *torch.autograd.grad(targets, [rewards, qs], live)]

        compare(f"returns {kind} {setting.name}", run)


def select(setting: cases.Setting) -> None:
    for agents, actions in ((1, 1), (3, 7), (27, 36)):
        shape = (3, 5, agents)
        qs, target_qs = setting.new(*shape, actions, requires_grad=True), setting.new(*shape, actions)
        taken = torch.randint(actions, shape, device=setting.device)
        avail = (torch.rand(*shape, actions, device=setting.device) < 0.5).scatter_(-1, taken.unsqueeze(-1), True)
        cotangent = setting.new(*shape)

        def run(
            backend: str, qs: Tensor = qs, target_qs: Tensor = target_qs, taken: Tensor = taken,
            avail: Tensor = avail, cotangent: Tensor = cotangent,
        ) -> Sequence[Tensor]:  # fmt: skip
            selected = ops.select(qs, avail, actions=taken, target_qs=target_qs, backend=backend)
            assert selected.chosen_qs is not None  # actions are given
            loss = selected.chosen_qs + 0.5 * selected.greedy_qs
            results = [x.detach() for x in selected if x is not None]
            return [*results, *torch.autograd.grad(loss, qs, cotangent)]

        compare(f"select {agents}x{actions} {setting.name}", run)


def td_loss(setting: cases.Setting) -> None:
    for entries in (1, 1_037):
        mask, _ = cases.ragged_mask(1, entries, setting)
        qs, targets = setting.new(1, entries, 1, requires_grad=True), setting.new(1, entries, 1)
        weights, residual = setting.new(1, entries, 1).abs(), setting.new(1, entries, 1, requires_grad=True)

        def run(
            backend: str, qs: Tensor = qs, targets: Tensor = targets, mask: Tensor = mask, weights: Tensor = weights,
            residual: Tensor = residual,
        ) -> Sequence[Tensor]:  # fmt: skip
            out = ops.td_loss(qs, targets, mask, weights=weights, residual=residual, backend=backend)
            return [out.loss.detach(), out.td_error, *torch.autograd.grad(out.loss, [qs, residual])]

        compare(f"td_loss {entries} {setting.name}", run)


def quantile(setting: cases.Setting) -> None:
    for rows, n, n_targets in ((1, 1, 1), (1_037, 33, 7)):
        mask, _ = cases.ragged_mask(1, rows, setting)
        theta, targets = setting.new(1, rows, 1, n, requires_grad=True), setting.new(1, rows, 1, n_targets)
        agents, key = setting.new(rows, 3, n, requires_grad=True), torch.tensor([1, 2], device=setting.device)

        def run(
            backend: str, theta: Tensor = theta, targets: Tensor = targets, mask: Tensor = mask,
            agents: Tensor = agents, key: Tensor = key, n: int = n, rows: int = rows,
        ) -> Sequence[Tensor]:  # fmt: skip
            drawn = ops.fractions((1, rows, 1, n), key, dtype=setting.dtype, backend=backend)
            out = ops.quantile_loss(theta, targets, drawn, mask, backend=backend)
            means, shape = ops.mean_shape(agents, backend=backend)
            grads = torch.autograd.grad(out.loss + means.sum() + shape.square().sum(), [theta, agents])
            return [drawn, out.loss.detach(), out.row_losses, means.detach(), shape.detach(), *grads]

        compare(f"quantile {rows}x{n}x{n_targets} {setting.name}", run)


def recurrent(setting: cases.Setting) -> None:
    networks = baselines.load("networks")
    for episodes, agents, steps, inputs, hidden in ((1, 1, 1, 3, 64), (5, 3, 7, 13, 64), (11, 3, 4, 17, 32)):
        cell = networks.CellAgent(inputs + 4 + agents, 4, hidden).to(setting.device, setting.dtype)
        params = cases.utility_params(cell)
        obs = setting.new(episodes, steps, agents, inputs)
        taken = torch.randint(-1, 4, (episodes, steps, agents), device=setting.device)
        start = setting.new(episodes, agents, hidden, requires_grad=True)
        cotangent = setting.new(episodes, steps, agents, 4)
        leaves = [start, *(p for p in params if p is not None)]

        def run(
            backend: str, obs: Tensor = obs, params: RecurrentParams = params, start: Tensor = start,
            taken: Tensor = taken, leaves: list[Tensor] = leaves, cotangent: Tensor = cotangent,
        ) -> Sequence[Tensor]:  # fmt: skip
            out = ops.recurrent(obs, [params], [start], last_actions=taken, agent_ids=True, backend=backend)[0]
            grads = torch.autograd.grad(out.q, leaves, cotangent)
            return [out.q.detach(), out.hidden.detach(), *grads]

        compare(f"recurrent {episodes * agents}x{steps}x{hidden} {setting.name}", run)


def monotonic(setting: cases.Setting) -> None:
    networks = baselines.load("networks")
    sizes = ((1, 3, 5, 32, 64), (5, 98, 70, 32, 64), (2, 33, 133, 31, 33), (10, 322, 200, 32, 64))
    for agents, state_dim, rows, embed, hypernet in sizes:
        mixer = networks.QMixer(agents, state_dim, embed, 2, hypernet).to(setting.device, setting.dtype)
        params = cases.mixing_params(mixer)
        agent_qs, states = setting.new(rows, agents, requires_grad=True), setting.new(rows, state_dim)
        cotangent = setting.new(rows, 1) * ~parity.near_mixing_kink(states, params)
        leaves = [agent_qs, *(p for p in params if p is not None)]
        for positivity in ("abs", "none"):

            def run(
                backend: str, agent_qs: Tensor = agent_qs, states: Tensor = states, params: MonotonicParams = params,
                leaves: list[Tensor] = leaves, cotangent: Tensor = cotangent, positivity: str = positivity,
            ) -> Sequence[Tensor]:  # fmt: skip
                q_tot = ops.monotonic(agent_qs, states, params, positivity=positivity, backend=backend)
                with torch.no_grad():
                    alone = ops.monotonic(agent_qs, states, params, positivity=positivity, backend=backend)
                return [q_tot.detach(), alone, *torch.autograd.grad(q_tot, leaves, cotangent)]

            compare(f"monotonic {rows}x{agents}x{state_dim} {positivity} {setting.name}", run)


def optimise(setting: cases.Setting) -> None:
    start = [setting.new(size) for size in (1, 37, 5_000)]
    grads = [[torch.randn_like(p) for p in start] for _ in range(3)]
    for kind in ("rmsprop", "adam"):

        def run(backend: str, kind: str = kind) -> Sequence[Tensor]:
            parameters = [p.clone() for p in start]
            with backends.backend(backend):
                optimiser = Optimiser(parameters, kind=kind, lr=1e-2, alpha=0.9, eps=1e-5, weight_decay=0.0, clip=1.0)
            norms = []
            for step in grads:
                for parameter, grad in zip(parameters, step, strict=True):
                    parameter.grad = grad
                norms.append(optimiser.step())
            return [*norms, *parameters]

        compare(f"optimise {kind} {setting.name}", run)


CHECKS: dict[str, Callable[[cases.Setting], None]] = {
    "returns": returns,
    "select": select,
    "td_loss": td_loss,
    "quantile": quantile,
    "recurrent": recurrent,
    "monotonic": monotonic,
    "optimise": optimise,
}


def main() -> int:
    if not torch.cuda.is_available():
        print("needs a CUDA device", file=sys.stderr)
        return 2
    torch.set_float32_matmul_precision("highest")
    torch.manual_seed(0)
    status = 0
    for op, check in CHECKS.items():
        if "native" not in backends.available(op, "cuda"):
            print(f"{op}: no CUDA kernel", flush=True)
            continue
        try:
            check(cases.Setting("cuda"))
        except (AssertionError, RuntimeError) as error:  # the others are worth checking
            print(f"{op}: FAILED: {error}", flush=True)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
