"""The table of all speeds that fastmix sets out to reach, with the least ratio asked of each."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

from fastmix.experiments.bench import cases, joint, report, steps
from fastmix.experiments.bench.report import Effort, Planned

SHAPES = ("3m", "5m_vs_6m", "MMM2", "27m_vs_30m")
ROWS = 15_360
MEMORY_GOALS = {"monotonic": 3.0, "quantile": 10.0}
"""eager's peak memory over ours"""


def run(effort: Effort, threads: int, compiled: bool = True) -> list[dict[str, Any]]:
    """All entries in float32; ``compiled`` includes ``torch.compile`` (half of the time goes into compiling)."""
    results = report.run([*_monotonic(compiled), *_joint(compiled)], effort)
    results.append(memory("monotonic", threads, shape="MMM2", rows=ROWS))
    results.append(memory("quantile", threads, episodes=128, steps=120, n=32))
    return results + report.run([*_recurrent(), *_small_ops(), *_steps(compiled)], effort)


def memory(op: str, threads: int, **sizes: Any) -> dict[str, Any]:
    """Peak memory of training with ``op`` against eager; `cases.memory` says how it is measured, and what sizes are."""
    case = getattr(cases, op)(**sizes, compiled=())
    compared = report.parity(*case.measured_errors())
    passed = compared["passed"]
    print(
        f"{op} memory {' '.join(f'{key}={value}' for key, value in sizes.items())}",
        end=" ",
        file=sys.stderr,
        flush=True,
    )
    measured = cases.memory(op, threads, **sizes) if passed else {}
    ours, eager = (measured.get(name, {}).get("peak_bytes") for name in ("ours", "eager"))
    ratios = {"eager": round(eager / ours, 3)} if ours and eager else {}
    print(ratios, file=sys.stderr, flush=True)
    return {
        "op": op,
        "phase": "peak memory",
        "shape": case.shape,
        "sizes": case.sizes,
        "precision": case.setting.name,
        "note": "growth of the resident set during forward and backward, in a process of its own",
        "parity": compared,
        "contestants": {},
        "memory": measured,
        "ratios": ratios,
        **report.judge(ratios, {"eager": MEMORY_GOALS[op]}),
    }


def _monotonic(compiled: bool) -> list[Planned]:
    large = {"eager": 2.7, "compile": 1.5, "products": 1.0}
    small = {"eager": 1.6, "compile": 1.35, "products": 1 / 1.25}
    plan = [
        Planned(partial(cases.monotonic, shape, rows, compiled=("compile",) if compiled else ()), goals)
        for rows, goals in ((ROWS, large), (1_920, small))
        for shape in SHAPES
    ]
    plan += [
        Planned(partial(cases.monotonic, shape, rows, train=False, compiled=()), {"eager": 1.0})
        for rows in (1, 64)
        for shape in SHAPES
    ]
    return plan


def _joint(compiled: bool) -> list[Planned]:
    least = {"eager": 1.5, "compile": 1.0}
    goals = {
        joint.duplex: {"eager": 3.0, "compile": 1.5, "products": 1 / 1.4},
        joint.attention: least,
        joint.unrestricted: least,
        joint.recognise: {},
    }
    return [
        Planned(partial(case, shape, ROWS, compiled=("compile",) if compiled else ()), goal)
        for case, goal in goals.items()
        for shape in SHAPES
    ]


def _recurrent() -> list[Planned]:
    plan = [Planned(partial(cases.recurrent, shape), {"gru": 2.4, "products": 1.0}) for shape in cases.RECURRENT_SIZES]
    goals = {3: {"eager": 5.0}, 512: {"eager": 1.5}}
    plan += [
        Planned(partial(cases.acting, shape, rows), goals.get(rows, {}))
        for shape in ("3m", "MMM2", "27m_vs_30m")
        for rows in (3, 8, 27, 64, 128, 512)
    ]
    return plan


def _small_ops() -> list[Planned]:
    return [
        *(Planned(partial(cases.returns, *sizes), {"eager": 20.0}) for sizes in ((32, 120), (128, 400))),
        Planned(partial(cases.select, 128, 120, 10, 18), {"eager": 4.0}),
        Planned(partial(cases.select, 128, 120, 10, 18, train=True)),
        *(Planned(partial(cases.td_loss, *sizes)) for sizes in ((32, 120), (128, 400))),
        *(Planned(partial(cases.quantile, 128, 120, n), {"eager": least}) for n, least in ((8, 5.0), (32, 20.0))),
    ]


def _steps(compiled: bool) -> list[Planned]:
    against = ("eager", "compile") if compiled else ("eager",)
    plan = [
        Planned(partial(steps.step, "qmix", shape, against=against), {"eager": 2.3 if shape == "MMM2" else 3.0})
        for shape in ("3m", "5m_vs_6m", "prey", "MMM2", "matrix")
    ]
    plan += [
        Planned(partial(steps.step, algo, shape, against=("eager",), preset="paper"), {"eager": 3.0})
        for algo in ("dmix", "resz")
        for shape in ("3m", "5m_vs_6m", "MMM2")
    ]
    return plan + [
        Planned(partial(steps.step, algo, shape, against=("eager",)), {"eager": goal})
        for algo, goal in (("qplex", 3.0), ("cw_qmix", 3.0), ("powqmix", 3.0), ("resq", 4.0))
        for shape in ("3m", "5m_vs_6m", "prey", "MMM2")
    ]
