"""Find the baselines: ``fastmix.baselines`` of an installed wheel, ``benchmarks/baselines`` of a checkout."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Final

PACKAGE: Final = "fastmix.baselines"


def load(name: str) -> ModuleType:
    """The module ``name`` of the baselines: ``"learner"``, ``"networks"``, ``"operators"`` or ``"training"``.

    Raises:
        ImportError: this installation has no baselines.
    """
    if PACKAGE not in sys.modules and not _installed():
        _load_checkout()
    return importlib.import_module(f"{PACKAGE}.{name}")


def _installed() -> bool:
    return importlib.util.find_spec(PACKAGE) is not None


def _load_checkout() -> None:
    import fastmix

    folder = Path(fastmix.__file__).resolve().parents[1] / "benchmarks" / "baselines"
    init = folder / "__init__.py"
    if not init.exists():
        raise ImportError(
            f"the baselines to measure against are neither installed as {PACKAGE} nor in {folder}; "
            "run from a checkout of the repository (pip install -e .) or reinstall fastmix"
        )
    spec = importlib.util.spec_from_file_location(PACKAGE, init, submodule_search_locations=[str(folder)])
    assert spec is not None and spec.loader is not None  # the file exists and ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[PACKAGE] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[PACKAGE]
        raise
