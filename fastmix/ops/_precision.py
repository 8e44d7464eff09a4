"""How exactly products of float32 matrices are to be computed, as the user told PyTorch."""

from __future__ import annotations

import torch


def float32_precision() -> str:
    """One of "highest", "high" and "medium": see `torch.set_float32_matmul_precision`."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # set through torch.backends.cuda.matmul.fp32_precision, which the older call cannot read
        return "high" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "highest"


# A constant in compiled code, as the choice of a backend is (see fastmix.backends).
float32_precision._dynamo_marked_constant = True  # type: ignore[attr-defined]
