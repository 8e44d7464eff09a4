"""The typed stub of the compiled core, ``fastmix/_core.pyi``: ``python -m tests.core_stub`` writes it from the module.

A test compares the two. The functions of CUDA kernels (``_cuda`` is in their names) exist only in builds with nvcc;
any other build keeps what the stub already says of them.
"""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from pathlib import Path

STUB = Path(__file__).parent.parent / "fastmix" / "_core.pyi"

_TYPES = {
    "typing.SupportsInt | typing.SupportsIndex": "int",
    "typing.SupportsFloat | typing.SupportsIndex": "float",
    "collections.abc.Sequence": "Sequence",
}


def declarations() -> dict[str, str]:
    """Name -> declaration of everything public in the compiled module."""
    from fastmix import _core

    return {name: _declaration(name, value) for name, value in vars(_core).items() if not name.startswith("__")}


def read() -> dict[str, str]:
    """The same from the stub as it is."""
    if not STUB.exists():
        return {}
    blocks = re.split(r"\n(?=def |class |\w+: )", STUB.read_text(encoding="utf-8"))[1:]
    return {re.match(r"(?:def |class )?(\w+)", block)[1]: block.strip() for block in blocks}  # type: ignore[index]


def render() -> str:
    """The stub as it should be, but for line breaks."""
    from fastmix import _core

    wanted = declarations()
    if not _core.cuda:
        wanted |= {name: text for name, text in read().items() if "_cuda" in name}
    head = '"""Compiled kernels of fastmix; written by ``python -m tests.core_stub``."""\n\n'
    imports = "from collections.abc import Sequence\n\n" if any("Sequence" in text for text in wanted.values()) else ""
    return head + imports + "\n".join(wanted[name] for name in sorted(wanted)) + "\n"


def _declaration(name: str, value: object) -> str:
    if isinstance(value, type):
        methods = [_declaration(key, method) for key, method in vars(value).items() if _is_api(key)]
        body = [f'"""{_one_line(value.__doc__)}"""', *methods]
        return f"class {name}:\n" + textwrap.indent("\n".join(body), "    ")
    if not callable(value):
        return f"{name}: {type(value).__name__}"
    # pybind11 puts the signature into the first line of the docstring.
    signature, *about = (value.__doc__ or "").strip().splitlines()
    if signature.startswith("Overloaded"):
        raise ValueError(f"_core.{name} has overloads; give each its own name")
    for long, short in _TYPES.items():
        signature = signature.replace(long, short)
    signature = re.sub(r'typing\.Annotated\[([\w.]+\[\w+\]), "FixedSize\(\d+\)"\]', r"\1", signature)
    signature = re.sub(r"\(self: [\w.]+", "(self", signature)
    # It numbers the arguments that have no name: they are positional only.
    if "(arg0" in signature:
        signature = re.sub(r"\) -> ", ", /) -> ", signature)
    text = _one_line("\n".join(about))
    return f'def {signature}:\n    """{text}"""' if text else f"def {signature}: ..."


def _is_api(method: str) -> bool:
    return method == "__init__" or not method.startswith("_")


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())


if __name__ == "__main__":
    STUB.write_text(render(), encoding="utf-8")
    subprocess.run([sys.executable, "-m", "ruff", "format", "--quiet", str(STUB)], check=True)
