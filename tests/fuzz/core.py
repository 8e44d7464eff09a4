"""Use a compiled core from another folder than the installed one: the one built with sanitizers.

Importing this module (``pytest -p tests.fuzz.core``) loads ``_core*.so`` of the folder named by ``SANITIZED_CORE`` as
``fastmix._core``; it has to come before the first op runs, and does nothing where the variable is not set.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path


def load(folder: Path) -> str:
    """Load the core of ``folder`` and return the path of its file."""
    (file,) = folder.glob("_core*.so")
    import torch  # noqa: F401  its OpenMP runtime has to be the first one in the process

    spec = importlib.util.spec_from_file_location("fastmix._core", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fastmix._core"] = module
    spec.loader.exec_module(module)
    return str(file)


FILE = load(Path(os.environ["SANITIZED_CORE"])) if os.environ.get("SANITIZED_CORE") else None


def pytest_report_header() -> str | None:
    return f"compiled core: {FILE}" if FILE else None
