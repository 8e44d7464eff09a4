"""Compiled kernels of fastmix; written by ``python -m tests.core_stub``."""

from collections.abc import Sequence

compiler: str
cuda: bool

def isa() -> str:
    """Instruction set in use: 'avx512', 'avx2' or 'baseline'."""

openmp: bool

def optimise(
    arg0: Sequence[int],
    arg1: Sequence[int],
    arg2: Sequence[int],
    arg3: Sequence[int],
    arg4: Sequence[int],
    arg5: int,
    arg6: bool,
    arg7: int,
    arg8: float,
    arg9: float,
    arg10: float,
    arg11: float,
    arg12: float,
    arg13: float,
    arg14: bool,
    arg15: int,
    /,
) -> None: ...
def returns_backward(
    arg0: int,
    arg1: int,
    arg2: int,
    arg3: int,
    arg4: int,
    arg5: int,
    arg6: int,
    arg7: int,
    arg8: int,
    arg9: int,
    arg10: float,
    arg11: int,
    arg12: float,
    arg13: int,
    arg14: bool,
    arg15: int,
    /,
) -> None: ...
def returns_forward(
    arg0: int,
    arg1: int,
    arg2: int,
    arg3: int,
    arg4: int,
    arg5: int,
    arg6: int,
    arg7: int,
    arg8: int,
    arg9: int,
    arg10: float,
    arg11: int,
    arg12: float,
    arg13: int,
    arg14: bool,
    arg15: int,
    /,
) -> None: ...
