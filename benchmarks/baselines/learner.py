"""One learner step of IQL, VDN, QMIX and QPLEX as the public trainers write it.

The agent is called once per time step on inputs concatenated for that step; the mixer is a module of separate layers;
the targets are a Python recursion; masks, gathers, clipping and the optimiser are torch's own. Where public trainers
differ from each other the cheaper way is taken: the target networks always run without recording gradients, and one-hot
actions are part of the stored batch, not made in the step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .operators import td_lambda_recursion

NEG = -9999999.0


@dataclass
class PublicBatch:
    """Episodes as a public replay buffer hands them out: ``T + 1`` stored steps, ``T`` transitions."""

    obs: Tensor
    """``[B, T + 1, A, O]``"""
    state: Tensor
    """``[B, T + 1, S]``"""
    actions: Tensor
    """``[B, T + 1, A, 1]`` int64"""
    actions_onehot: Tensor
    """``[B, T + 1, A, U]``"""
    last_actions_onehot: Tensor
    """``[B, T + 1, A, U]``: one-hot action of the step before, zeros at the first"""
    avail_actions: Tensor
    """``[B, T + 1, A, U]`` int32"""
    reward: Tensor
    """``[B, T, 1]``"""
    terminated: Tensor
    """``[B, T, 1]``"""
    mask: Tensor
    """``[B, T, 1]``"""


@dataclass(frozen=True)
class PublicConfig:
    """Settings of the steps that these modules can do; which networks there are, a learner is told apart from them."""

    gamma: float = 0.99
    td_lambda: float | None = None
    """``None``: one-step targets as in PyMARL's learners; a number: TD(lambda) as in pymarl2's"""
    double_q: bool = True
    loss_scale: float = 1.0
    weighting: str = "none"
    """of `central.WeightedLearner`: ``"cw"``, ``"ow"``, ``"igm"`` or ``"pow"``"""
    w_high: float = 1.0
    w: float = 0.5
    central_loss: float = 1.0
    recogniser_loss: float = 1.0
    tolerance: float = 0.05
    """of POWQMIX's recogniser"""
    residual_negative_abs: bool = True
    """ResQ's residual is ``-|.|``; without, a loss keeps it below 0"""
    noopt_loss: float = 1.0
    optimizer: str = "rmsprop"
    lr: float = 5e-4
    optimizer_eps: float = 1e-5
    rmsprop_alpha: float = 0.99
    grad_norm_clip: float = 10.0
    obs_last_action: bool = True
    obs_agent_id: bool = True


class PublicLearner:
    """Networks by name, a target copy of each, the optimiser; `step` does one training step and nothing else.

    Here ``agent`` and, but for independent learners, ``mixer``.
    """

    def __init__(self, config: PublicConfig, networks: dict[str, nn.Module]) -> None:
        self.config = config
        self.networks = networks | {f"target_{name}": copy.deepcopy(network) for name, network in networks.items()}
        self.parameters = [p for network in networks.values() for p in network.parameters()]
        self.optimizer = self._make_optimizer()
        self.calls: dict[str, Callable[..., Any]] = dict(self.networks)
        """What `step` calls; `compile` replaces them."""

    def compile(self, mode: str | None = None) -> None:
        """Compile the agents' step and the mixers, online and target; loops and the optimiser stay as they are."""
        for name, network in self.networks.items():
            if any(True for _ in network.parameters()):
                # Each module is called with one set of shapes only.
                self.calls[name] = torch.compile(network, dynamic=False, mode=mode)

    def compile_loss(self) -> None:
        """Compile the loss as one graph over the whole unrolled sequence.

        It takes minutes to build, once per episode length: no trainer does this, but it shows what could be had.
        """
        self.loss = torch.compile(self.loss, fullgraph=True, dynamic=False)  # type: ignore[method-assign]

    def step(self, batch: PublicBatch) -> dict[str, Tensor]:
        """One training step; returns the loss and the gradient norm before clipping."""
        loss = self.loss(batch)
        self.optimizer.zero_grad()
        loss.backward()
        return {"loss": loss.detach(), "grad_norm": self._update()}

    def loss(self, batch: PublicBatch) -> Tensor:
        """Mean over live transitions of the squared temporal-difference error, times ``loss_scale``."""
        agent_qs = self._unroll("agent", batch)
        chosen_qs = gather_actions(agent_qs[:, :-1], batch.actions[:, :-1])
        with torch.no_grad():
            targets = self._targets(agent_qs.detach(), batch)
        td_error = self._mix(chosen_qs, agent_qs.detach(), batch) - targets
        return self.config.loss_scale * masked_mean(td_error**2, batch.mask)

    def _update(self) -> Tensor:
        grad_norm = nn.utils.clip_grad_norm_(self.parameters, self.config.grad_norm_clip)
        self.optimizer.step()
        return grad_norm

    def _mix(self, chosen_qs: Tensor, agent_qs: Tensor, batch: PublicBatch) -> Tensor:
        """``[B, T, 1]`` of values ``[B, T, A]`` of the actions taken; themselves for independent learners."""
        if "mixer" not in self.calls:
            return chosen_qs
        q_tot: Tensor = self.calls["mixer"](chosen_qs, batch.state[:, :-1])
        return q_tot

    def _targets(self, agent_qs: Tensor, batch: PublicBatch) -> Tensor:
        target_qs = self._unroll("target_agent", batch)
        first = 0 if self.config.td_lambda is not None else 1
        unavailable = batch.avail_actions[:, first:] == 0
        target_qs = target_qs[:, first:]
        if self.config.double_q:
            online = agent_qs[:, first:].clone()
            online[unavailable] = NEG
            greedy = online.max(dim=3, keepdim=True)[1]
            bootstrap = gather_actions(target_qs, greedy)
        else:
            target_qs[unavailable] = NEG
            bootstrap = target_qs.max(dim=3)[0]
        if "target_mixer" in self.calls:
            bootstrap = self.calls["target_mixer"](bootstrap, batch.state[:, first:])
        return self._returns(bootstrap, batch)

    def _returns(self, bootstrap: Tensor, batch: PublicBatch) -> Tensor:
        """Targets ``[B, T, K]`` of values that begin with the step after the first (one-step) or with the first."""
        config = self.config
        if config.td_lambda is None:
            return batch.reward + config.gamma * (1 - batch.terminated) * bootstrap
        return td_lambda_recursion(
            batch.reward, batch.terminated, batch.mask, bootstrap, config.gamma, config.td_lambda
        )

    def _unroll(self, name: str, batch: PublicBatch) -> Tensor:
        """``[B, T + 1, A, U]`` of the agent ``name``, one call a step."""
        agent: Any = self.networks[name]
        episodes, steps, n_agents = batch.obs.shape[:3]
        hidden = batch.obs.new_zeros(episodes * n_agents, agent.hidden_dim)
        outputs = []
        for t in range(steps):
            q, hidden = self.calls[name](self._inputs(batch, t), hidden)
            outputs.append(q.view(episodes, n_agents, -1))
        return torch.stack(outputs, dim=1)

    def _inputs(self, batch: PublicBatch, t: int) -> Tensor:
        episodes, _, n_agents = batch.obs.shape[:3]
        inputs = [batch.obs[:, t]]
        if self.config.obs_last_action:
            inputs.append(batch.last_actions_onehot[:, t])
        if self.config.obs_agent_id:
            identity = torch.eye(n_agents, dtype=batch.obs.dtype, device=batch.obs.device)
            inputs.append(identity.unsqueeze(0).expand(episodes, -1, -1))
        return torch.cat([x.reshape(episodes * n_agents, -1) for x in inputs], dim=1)

    def _make_optimizer(self) -> torch.optim.Optimizer:
        config = self.config
        if config.optimizer == "adam":
            return torch.optim.Adam(self.parameters, lr=config.lr, eps=config.optimizer_eps)
        if config.optimizer == "rmsprop":
            return torch.optim.RMSprop(
                self.parameters, lr=config.lr, alpha=config.rmsprop_alpha, eps=config.optimizer_eps
            )
        raise ValueError(f"optimizer must be 'adam' or 'rmsprop', got {config.optimizer!r}")


class DuplexLearner(PublicLearner):
    """QPLEX: the mixer, and its target, is called once for the values and once for the advantages."""

    def _mix(self, chosen_qs: Tensor, agent_qs: Tensor, batch: PublicBatch) -> Tensor:
        online = agent_qs.clone()
        online[batch.avail_actions == 0] = NEG
        max_qs = online[:, :-1].max(dim=3)[0]
        return self._both("mixer", chosen_qs, batch.state[:, :-1], batch.actions_onehot[:, :-1], max_qs)

    def _targets(self, agent_qs: Tensor, batch: PublicBatch) -> Tensor:
        target_qs = self._unroll("target_agent", batch)
        first = 0 if self.config.td_lambda is not None else 1
        unavailable = batch.avail_actions[:, first:] == 0
        target_qs, online = target_qs[:, first:], agent_qs[:, first:].clone()
        target_qs[unavailable] = NEG
        online[unavailable] = NEG
        greedy = online.max(dim=3, keepdim=True)[1]
        one_hot = torch.zeros_like(online).scatter_(3, greedy, 1)
        arguments = batch.state[:, first:], one_hot, target_qs.max(dim=3)[0]
        return self._returns(self._both("target_mixer", gather_actions(target_qs, greedy), *arguments), batch)

    def _both(self, name: str, qs: Tensor, states: Tensor, one_hot: Tensor, max_qs: Tensor) -> Tensor:
        mixer = self.calls[name]
        values: Tensor = mixer(qs, states, is_v=True)
        advantages: Tensor = mixer(qs, states, actions=one_hot, max_q_i=max_qs, is_v=False)
        return values + advantages


def gather_actions(qs: Tensor, actions: Tensor) -> Tensor:
    """``[B, T, A, U]`` at ``[B, T, A, 1]``: ``[B, T, A]``."""
    return torch.gather(qs, dim=3, index=actions).squeeze(3)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of ``values [B, T, K]`` over live transitions."""
    mask = mask.expand_as(values)
    return (values * mask).sum() / mask.sum()
