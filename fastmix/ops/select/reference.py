"""`select` in plain PyTorch: masked argmax per agent and everything gathered by it."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmix.ops.select.types import UNAVAILABLE, Selection


def select(
    agent_qs: Tensor, avail_actions: Tensor | None, actions: Tensor | None, target_qs: Tensor | None
) -> Selection:
    """See `fastmix.ops.select`; arguments are already checked."""
    avail = None if avail_actions is None else avail_actions != 0
    masked = agent_qs if avail is None else agent_qs.masked_fill(~avail, UNAVAILABLE)
    greedy = _greedy(agent_qs.detach(), avail)
    greedy_qs = masked.gather(-1, greedy.unsqueeze(-1)).squeeze(-1)
    chosen = target = all_greedy = None
    if actions is not None:
        chosen = agent_qs.gather(-1, actions.unsqueeze(-1)).squeeze(-1)
        all_greedy = (actions == greedy).all(-1)
    if target_qs is not None:
        target_masked = target_qs.detach() if avail is None else target_qs.detach().masked_fill(~avail, UNAVAILABLE)
        target = target_masked.gather(-1, greedy.unsqueeze(-1)).squeeze(-1)
    return Selection(greedy, greedy_qs, chosen, target, all_greedy)


def _greedy(qs: Tensor, avail: Tensor | None) -> Tensor:
    """Argmax over available actions; `torch.argmax` takes the lowest index of ties, and NaN for the largest number."""
    if avail is None:
        return qs.argmax(-1)
    greedy = qs.masked_fill(~avail, -torch.inf).argmax(-1)
    # Where the best available value is -inf itself the mask does not show, and the first available action is meant.
    hidden = ~avail.gather(-1, greedy.unsqueeze(-1)).squeeze(-1)
    return torch.where(hidden, avail.to(torch.uint8).argmax(-1), greedy)
