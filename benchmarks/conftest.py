"""Benchmarks run with ``--benchmark-only``; warnings are errors, but for those torch.compile sets off in torch."""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).parent
WARNINGS_OF_TORCH = ("`torch.jit:DeprecationWarning", "The .grad attribute of a Tensor:UserWarning")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    ours = [item for item in items if item.path.is_relative_to(HERE)]
    if not config.getoption("benchmark_only", default=False):
        config.hook.pytest_deselected(items=ours)
        items[:] = [item for item in items if item not in ours]
        return
    for item in ours:
        for warning in WARNINGS_OF_TORCH:
            item.add_marker(pytest.mark.filterwarnings(f"ignore:{warning}"))
