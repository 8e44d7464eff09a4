"""Keep the two trees apart: ``pytest`` runs tests/, ``pytest --benchmark-only`` runs benchmarks/."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parent


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    if config.args_source is pytest.Config.ArgsSource.ARGS:
        return None  # paths given on the command line are taken as they are
    unwanted = "tests" if config.getoption("benchmark_only") else "benchmarks"
    return True if collection_path == ROOT / unwanted else None
