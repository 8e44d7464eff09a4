"""Triton decides at its import between compiler and interpreter, so a process tests one of them."""

from __future__ import annotations

import importlib.util
import os

collect_ignore = []
if importlib.util.find_spec("triton") is None:
    collect_ignore += ["offline.py", "test_offline.py"]
if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore.append("interpreter")  # test_interpreter.py runs that folder in a process of its own
