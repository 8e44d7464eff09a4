"""When backend ``triton`` can be had, and the sentences where not; no Triton is needed to say so."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from fastmix import backends


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    clear()
    yield
    monkeypatch.undo()
    clear()


def clear() -> None:
    backends.triton_problem.cache_clear()
    backends.matrix_problem.cache_clear()


def installed(monkeypatch: pytest.MonkeyPatch, is_installed: bool, interpreted: bool = False) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if is_installed else None)
    monkeypatch.setenv("TRITON_INTERPRET", "1" if interpreted else "0")


def test_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, False)
    assert "pip install 'fastmix[triton]'" in str(backends.triton_problem("cuda"))
    clear()
    installed(monkeypatch, True)
    assert "TRITON_INTERPRET=1" in str(backends.triton_problem("cpu"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, expected in (((7, 5), "8.0 or newer"), ((8, 0), "None"), ((9, 0), "None")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda capability=capability: capability)
        clear()
        assert expected in str(backends.triton_problem("cuda")) == str(backends.matrix_problem())
    clear()
    installed(monkeypatch, True, interpreted=True)
    assert backends.triton_problem("cpu") is None
    assert "runs on the CPU" in str(backends.triton_problem("cuda"))


def test_never_automatic_on_the_cpu() -> None:
    assert backends.available("monotonic")[0] != "triton"


def test_importing_fastmix_imports_no_triton() -> None:
    code = "import sys, fastmix, fastmix.ops, fastmix.mixers; sys.exit('triton' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
