"""Reads past the end of a tensor on purpose: AddressSanitizer has to stop this process.

``make sanitize`` runs it first, so that its silence about everything else means something.
"""

from __future__ import annotations

from typing import Any

from tests.fuzz import core


def main() -> None:
    assert core.FILE is not None, "only for a core built with sanitizers, named by SANITIZED_CORE"
    import torch

    from fastmix import _core

    forward: Any = _core.returns_forward_float32

    steps = 1000
    short, long = torch.zeros(steps // 2), torch.zeros(steps + 1)
    rewards, terminated, mask, target_qs, behaviour_qs, targets = short, long, long, long, None, torch.empty(steps)
    addresses = [
        0 if t is None else t.data_ptr() for t in (rewards, terminated, mask, target_qs, behaviour_qs, targets)
    ]
    forward(*addresses, 1, steps, 1, 1, 0.99, 0, 0.6, 1, 1)


if __name__ == "__main__":
    main()
