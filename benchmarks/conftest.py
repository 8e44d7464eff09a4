"""Warnings are errors here as in tests/, but for those that torch.compile sets off inside torch."""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).parent
WARNINGS_OF_TORCH = ("`torch.jit:DeprecationWarning", "The .grad attribute of a Tensor:UserWarning")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(HERE):
            for warning in WARNINGS_OF_TORCH:
                item.add_marker(pytest.mark.filterwarnings(f"ignore:{warning}"))
