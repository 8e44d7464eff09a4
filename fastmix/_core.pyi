"""Compiled kernels of fastmix; written by ``python -m tests.core_stub``."""

from collections.abc import Sequence

class RecurrentStepperDouble:
    """One network's acting step, with weights packed once."""
    def __init__(self, arg0: int, arg1: int, arg2: int, arg3: int, arg4: int) -> None: ...
    def pack(self, arg0: Sequence[int]) -> None: ...
    def step(
        self,
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
        arg10: int,
        arg11: int,
    ) -> None: ...

class RecurrentStepperFloat:
    """One network's acting step, with weights packed once."""
    def __init__(self, arg0: int, arg1: int, arg2: int, arg3: int, arg4: int) -> None: ...
    def pack(self, arg0: Sequence[int]) -> None: ...
    def step(
        self,
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
        arg10: int,
        arg11: int,
    ) -> None: ...

class Workspace:
    """Memory of a pool that outlives calls; contents undefined."""
    def __init__(self, bytes: int) -> None: ...

compiler: str
cuda: bool

def isa() -> str:
    """Instruction set in use: 'avx512', 'avx2' or 'baseline'."""

def monotonic_backward(
    arg0: Sequence[int],
    arg1: Sequence[int],
    arg2: Sequence[int],
    arg3: int,
    arg4: int,
    arg5: int,
    arg6: int,
    arg7: int,
    arg8: Sequence[int] | None,
    arg9: Sequence[int],
    arg10: int,
    arg11: float,
    arg12: bool,
    arg13: int,
    /,
) -> None: ...
def monotonic_forward(
    arg0: Sequence[int],
    arg1: Sequence[int],
    arg2: Sequence[int],
    arg3: int,
    arg4: int,
    arg5: int,
    arg6: Sequence[int],
    arg7: int,
    arg8: float,
    arg9: bool,
    arg10: int,
    /,
) -> None: ...
def monotonic_saved(arg0: int, arg1: int, arg2: int, arg3: bool, /) -> tuple[int, int, int]:
    """Multiple to which saved rows are padded, columns of `activations`, bytes of `signs` in a row."""

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
def recurrent_backward(
    arg0: int,
    arg1: int,
    arg2: bool,
    arg3: Sequence[int],
    arg4: int,
    arg5: int,
    arg6: int,
    arg7: int,
    arg8: Sequence[int],
    arg9: int,
    arg10: int,
    arg11: Sequence[int],
    arg12: Sequence[int],
    arg13: Sequence[int],
    arg14: bool,
    arg15: int,
    /,
) -> None: ...
def recurrent_forward(
    arg0: int,
    arg1: int,
    arg2: int,
    arg3: Sequence[int],
    arg4: int,
    arg5: int,
    arg6: int,
    arg7: int,
    arg8: Sequence[int],
    arg9: Sequence[int],
    arg10: Sequence[int],
    arg11: bool,
    arg12: int,
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
def select_backward_float32(
    arg0: tuple,
    arg1: int,
    arg2: tuple,
    arg3: int,
    arg4: tuple,
    arg5: int,
    arg6: int,
    arg7: int,
    arg8: tuple,
    arg9: int,
    arg10: float,
    arg11: int,
    /,
) -> None: ...
def select_backward_float64(
    arg0: tuple,
    arg1: int,
    arg2: tuple,
    arg3: int,
    arg4: tuple,
    arg5: int,
    arg6: int,
    arg7: int,
    arg8: tuple,
    arg9: int,
    arg10: float,
    arg11: int,
    /,
) -> None: ...
def select_forward_float32(
    arg0: tuple,
    arg1: int,
    arg2: tuple,
    arg3: int,
    arg4: tuple,
    arg5: int,
    arg6: int,
    arg7: tuple,
    arg8: int,
    arg9: tuple,
    arg10: int,
    arg11: tuple,
    arg12: int,
    arg13: int,
    arg14: int,
    arg15: int,
    arg16: int,
    arg17: float,
    arg18: int,
    /,
) -> tuple: ...
def select_forward_float64(
    arg0: tuple,
    arg1: int,
    arg2: tuple,
    arg3: int,
    arg4: tuple,
    arg5: int,
    arg6: int,
    arg7: tuple,
    arg8: int,
    arg9: tuple,
    arg10: int,
    arg11: tuple,
    arg12: int,
    arg13: int,
    arg14: int,
    arg15: int,
    arg16: int,
    arg17: float,
    arg18: int,
    /,
) -> tuple: ...
def td_loss_forward_float32(
    arg0: tuple,
    arg1: int,
    arg2: tuple,
    arg3: int,
    arg4: tuple,
    arg5: int,
    arg6: tuple,
    arg7: int,
    arg8: tuple,
    arg9: int,
    arg10: tuple,
    arg11: float,
    arg12: bool,
    arg13: float,
    arg14: int,
    arg15: int,
    arg16: int,
    arg17: int,
    /,
) -> None: ...
def td_loss_forward_float64(
    arg0: tuple,
    arg1: int,
    arg2: tuple,
    arg3: int,
    arg4: tuple,
    arg5: int,
    arg6: tuple,
    arg7: int,
    arg8: tuple,
    arg9: int,
    arg10: tuple,
    arg11: float,
    arg12: bool,
    arg13: float,
    arg14: int,
    arg15: int,
    arg16: int,
    arg17: int,
    /,
) -> None: ...
def workspace_clear() -> None:
    """Give the pool's memory back to the system."""

def workspace_kept() -> int:
    """Bytes that the pool keeps for later calls."""
