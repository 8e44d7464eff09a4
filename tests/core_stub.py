"""The typed stub of the compiled core, ``fastmix/_core.pyi``: ``python -m tests.core_stub`` writes it from the module.

A test compares the two. The functions of CUDA kernels (named ``*_cuda``) exist only in builds with nvcc; any other
build keeps what the stub already says of them.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

STUB = Path(__file__).parent.parent / "fastmix" / "_core.pyi"

_TYPES = {
    "typing.SupportsInt | typing.SupportsIndex": "int",
    "typing.SupportsFloat | typing.SupportsIndex": "float",
    "collections.abc.Sequence": "Sequence",
}


def declarations() -> dict[str, str]:
    """Name -> declaration of everything public in the compiled module, from the signatures that pybind11 puts first."""
    from fastmix import _core

    found = {}
    for name in sorted(vars(_core)):
        value = getattr(_core, name)
        if name.startswith("__"):
            continue
        if not callable(value):
            found[name] = f"{name}: {type(value).__name__}"
            continue
        signature, *about = value.__doc__.strip().splitlines()
        if signature.startswith("Overloaded"):
            raise ValueError(f"_core.{name} has overloads; give each its own name")
        for long, short in _TYPES.items():
            signature = signature.replace(long, short)
        # pybind11 numbers the arguments that have no name: they are positional only.
        if "(arg0" in signature:
            signature = re.sub(r"\) -> ", ", /) -> ", signature)
        text = " ".join(line.strip() for line in about if line.strip())
        body = f'\n    """{text}"""' if text else " ..."
        found[name] = f"def {signature}:{body}"
    return found


def read() -> dict[str, str]:
    """The same from the stub as it is."""
    if not STUB.exists():
        return {}
    blocks = re.split(r"\n(?=def |\w+: )", STUB.read_text(encoding="utf-8"))[1:]
    return {re.match(r"(?:def )?(\w+)", block)[1]: block.strip() for block in blocks}  # type: ignore[index]


def render() -> str:
    """The stub as it should be, but for line breaks."""
    from fastmix import _core

    wanted = declarations()
    if not _core.cuda:
        wanted |= {name: text for name, text in read().items() if name.endswith("_cuda")}
    head = '"""Compiled kernels of fastmix; written by ``python -m tests.core_stub``."""\n\n'
    imports = "from collections.abc import Sequence\n\n" if any("Sequence" in text for text in wanted.values()) else ""
    return head + imports + "\n".join(wanted[name] for name in sorted(wanted)) + "\n"


if __name__ == "__main__":
    STUB.write_text(render(), encoding="utf-8")
    subprocess.run([sys.executable, "-m", "ruff", "format", "--quiet", str(STUB)], check=True)
