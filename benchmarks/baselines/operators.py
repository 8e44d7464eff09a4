"""Single operators the public way, and the lists of matrix products that no implementation can do without."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .networks import CellAgent

NEG = -9999999.0


def td_lambda_recursion(
    rewards: Tensor, terminated: Tensor, mask: Tensor, target_qs: Tensor, gamma: float, td_lambda: float
) -> Tensor:
    """TD(lambda) targets ``[B, T, 1]`` of ``target_qs [B, T + 1, 1]``, one Python step per time step."""
    targets = target_qs.new_zeros(target_qs.shape)
    targets[:, -1] = target_qs[:, -1] * (1 - torch.sum(terminated, dim=1))
    for t in range(targets.shape[1] - 2, -1, -1):
        targets[:, t] = td_lambda * gamma * targets[:, t + 1] + mask[:, t] * (
            rewards[:, t] + (1 - td_lambda) * gamma * target_qs[:, t + 1] * (1 - terminated[:, t])
        )
    return targets[:, :-1]


class Selected(NamedTuple):
    """The same fields as ``fastmix.ops.select`` returns."""

    greedy_actions: Tensor
    greedy_qs: Tensor
    chosen_qs: Tensor
    target_qs: Tensor
    all_greedy: Tensor


def select_steps(agent_qs: Tensor, avail_actions: Tensor, actions: Tensor, target_qs: Tensor) -> Selected:
    """Masked argmax and what is gathered by it, in the steps of the public learners; something must be available."""
    masked = agent_qs.clone()
    masked[avail_actions == 0] = NEG
    greedy_actions = masked.max(dim=-1, keepdim=True)[1]
    return Selected(
        greedy_actions.squeeze(-1),
        torch.gather(masked, -1, greedy_actions).squeeze(-1),
        torch.gather(agent_qs, -1, actions.unsqueeze(-1)).squeeze(-1),
        torch.gather(target_qs, -1, greedy_actions).squeeze(-1),
        (actions == greedy_actions.squeeze(-1)).all(-1),
    )


def td_loss_steps(qs: Tensor, targets: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Masked squared error over the number of live entries, and the masked error."""
    td_error = qs - targets.detach()
    mask = mask.expand_as(td_error)
    masked_td_error = td_error * mask
    return (masked_td_error**2).sum() / mask.sum(), masked_td_error.detach()


def quantile_huber_steps(theta: Tensor, targets: Tensor, fractions: Tensor, mask: Tensor) -> Tensor:
    """Quantile Huber loss (kappa 1) of ``[B, T, G, N]`` against ``[B, T, G, N']`` by all pairs, over live rows."""
    targets = targets.detach().unsqueeze(3)
    error = targets - theta.unsqueeze(4)
    weight = (fractions.unsqueeze(4) - (error.detach() <= 0).to(theta.dtype)).abs()
    huber = F.smooth_l1_loss(theta.unsqueeze(4).expand_as(error), targets.expand_as(error), reduction="none")
    rows = (weight * huber).mean(dim=4).sum(dim=3)
    mask = mask.expand_as(rows)
    return (rows * mask).sum() / mask.sum()


def cell_loop(agent: Callable[..., tuple[Tensor, Tensor]], inputs: Tensor, hidden_dim: int = 64) -> Tensor:
    """``[T, N, I]`` -> ``[T, N, U]``: the agent's step over and over."""
    hidden = inputs.new_zeros(inputs.shape[1], hidden_dim)
    outputs = []
    for step in inputs:
        q, hidden = agent(step, hidden)
        outputs.append(q)
    return torch.stack(outputs)


def monotonic_products(
    rows: int,
    n_agents: int,
    state_dim: int,
    embed: int = 32,
    hypernet: int = 64,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Callable[[], None]:
    """The 11 products of `monotonic` forward and backward one after another, into kept buffers.

    The four first layers are merged into one product. States need no gradient. What lies between them is left out.
    """
    first = 2 * hypernet + 2 * embed
    wide = n_agents * embed

    def new(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype, device=device)

    states, first_weight = new(rows, state_dim), new(state_dim, first)
    h1, h2, vh = new(rows, hypernet), new(rows, hypernet), new(rows, embed)
    w1_weight, w2_weight, v_weight = new(hypernet, wide), new(hypernet, embed), new(embed, 1)
    dz, dw1, dw2, g = new(rows, first), new(rows, wide), new(rows, embed), new(rows, 1)
    # The weights of the input-gradient products are stored as nn.Linear stores them.
    w1_rows, w2_rows, v_row = w1_weight.t().contiguous(), w2_weight.t().contiguous(), v_weight.t().contiguous()
    pairs = [
        (states, first_weight),
        (h1, w1_weight),
        (h2, w2_weight),
        (vh, v_weight),
        (g.t(), vh),
        (g, v_row),
        (dw2.t(), h2),
        (dw2, w2_rows),
        (dw1.t(), h1),
        (dw1, w1_rows),
        (dz.t(), states),
    ]
    return _products(pairs)


def recurrent_products(
    rows: int,
    steps: int,
    n_inputs: int,
    n_actions: int,
    hidden: int = 64,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Callable[[], None]:
    """The products of `recurrent` forward and backward into kept buffers: over all steps at once, the carry per step.

    Inputs need no gradient; the product with the zero initial state is left out, and with it one of the backward pass.
    """

    def new(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype, device=device)

    total = steps * rows
    inputs, x, dx, dgi = new(total, n_inputs), new(total, hidden), new(total, hidden), new(total, 3 * hidden)
    states, dgh = new(steps, rows, hidden), new(steps, rows, 3 * hidden)
    dq = new(total, n_actions)
    fc1, w_ih, w_hh, fc2 = (
        new(hidden, n_inputs),
        new(3 * hidden, hidden),
        new(3 * hidden, hidden),
        new(n_actions, hidden),
    )
    flat_states = states.view(total, hidden)
    earlier, later_dgh = flat_states[: total - rows], dgh.view(total, 3 * hidden)[rows:]
    pairs = [(inputs, fc1.t()), (x, w_ih.t())]
    pairs += [(states[t], w_hh.t()) for t in range(steps - 1)]
    pairs += [(flat_states, fc2.t()), (dq, fc2), (dq.t(), flat_states)]
    pairs += [(dgh[t], w_hh) for t in range(steps - 1, 0, -1)]
    pairs += [(dgi, w_ih), (dgi.t(), x), (dx.t(), inputs)]
    if steps > 1:
        pairs.append((later_dgh.t(), earlier))
    return _products(pairs)


def _products(pairs: list[tuple[Tensor, Tensor]]) -> Callable[[], None]:
    work = [(a, b, a.new_empty(a.shape[0], b.shape[1])) for a, b in pairs]

    def run() -> None:
        for a, b, out in work:
            torch.mm(a, b, out=out)

    return run


def acting_step(agent: CellAgent, inputs: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """One step of the agent as a rollout does it, without recording gradients."""
    with torch.inference_mode():
        return agent(inputs, hidden)
