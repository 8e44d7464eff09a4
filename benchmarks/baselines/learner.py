"""One learner step of IQL, VDN and QMIX as the public trainers write it.

The agent is called once per time step on inputs concatenated for that step; the mixer is a module of separate layers;
the targets are a Python recursion; masks, gathers, clipping and the optimiser are torch's own. Where public trainers
differ from each other the cheaper way is taken: the target networks always run without recording gradients, and one-hot
actions are part of the stored batch, not made in the step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .networks import CellAgent, QMixer, VDNMixer
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
    """What distinguishes the steps that this module can do."""

    mixer: str | None
    """``None`` (independent learners), ``"vdn"`` or ``"qmix"``"""
    gamma: float = 0.99
    td_lambda: float | None = None
    """``None``: one-step targets as in PyMARL's q_learner; a number: TD(lambda) as in pymarl2's nq_learner"""
    double_q: bool = True
    loss_scale: float = 1.0
    optimizer: str = "rmsprop"
    lr: float = 5e-4
    optimizer_eps: float = 1e-5
    rmsprop_alpha: float = 0.99
    grad_norm_clip: float = 10.0
    obs_last_action: bool = True
    obs_agent_id: bool = True


class PublicLearner:
    """Agent and mixer, their target copies, the optimiser; `step` does one training step and nothing else."""

    def __init__(self, config: PublicConfig, agent: CellAgent, mixer: VDNMixer | QMixer | None) -> None:
        self.config = config
        self.agent, self.mixer = agent, mixer
        self.target_agent, self.target_mixer = copy.deepcopy(agent), copy.deepcopy(mixer)
        self.parameters = [*agent.parameters(), *(mixer.parameters() if mixer is not None else ())]
        self.optimizer = self._make_optimizer()
        # What step() calls; compile() replaces them.
        self._agent: Callable[..., tuple[Tensor, Tensor]] = self.agent
        self._target_agent: Callable[..., tuple[Tensor, Tensor]] = self.target_agent
        self._mixer: Callable[..., Tensor] | None = self.mixer
        self._target_mixer: Callable[..., Tensor] | None = self.target_mixer

    def networks(self) -> Iterator[tuple[str, nn.Module]]:
        """Name -> module, of the networks that exist."""
        for name in ("agent", "mixer", "target_agent", "target_mixer"):
            module = getattr(self, name)
            if module is not None:
                yield name, module

    def compile(self, mode: str | None = None) -> None:
        """Compile the agent's step and the mixer, online and target; loops and the optimiser stay as they are."""
        # Each module is called with one set of shapes only.
        self._agent = torch.compile(self.agent, dynamic=False, mode=mode)
        self._target_agent = torch.compile(self.target_agent, dynamic=False, mode=mode)
        if isinstance(self.mixer, QMixer) and isinstance(self.target_mixer, QMixer):
            self._mixer = torch.compile(self.mixer, dynamic=False, mode=mode)
            self._target_mixer = torch.compile(self.target_mixer, dynamic=False, mode=mode)

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
        agent_qs = self._unroll(self._agent, batch)
        chosen_qs = torch.gather(agent_qs[:, :-1], dim=3, index=batch.actions[:, :-1]).squeeze(3)
        with torch.no_grad():
            targets = self._targets(agent_qs.detach(), batch)
        if self._mixer is not None:
            chosen_qs = self._mixer(chosen_qs, batch.state[:, :-1])
        td_error = chosen_qs - targets
        mask = batch.mask.expand_as(td_error)
        masked_td_error = td_error * mask
        return self.config.loss_scale * (masked_td_error**2).sum() / mask.sum()

    def _update(self) -> Tensor:
        grad_norm = nn.utils.clip_grad_norm_(self.parameters, self.config.grad_norm_clip)
        self.optimizer.step()
        return grad_norm

    def _targets(self, agent_qs: Tensor, batch: PublicBatch) -> Tensor:
        target_qs = self._unroll(self._target_agent, batch)
        first = 0 if self.config.td_lambda is not None else 1
        unavailable = batch.avail_actions[:, first:] == 0
        target_qs = target_qs[:, first:]
        if self.config.double_q:
            online = agent_qs[:, first:].clone()
            online[unavailable] = NEG
            greedy = online.max(dim=3, keepdim=True)[1]
            bootstrap = torch.gather(target_qs, 3, greedy).squeeze(3)
        else:
            target_qs[unavailable] = NEG
            bootstrap = target_qs.max(dim=3)[0]
        if self._target_mixer is not None:
            bootstrap = self._target_mixer(bootstrap, batch.state[:, first:])
        config = self.config
        if config.td_lambda is None:
            return batch.reward + config.gamma * (1 - batch.terminated) * bootstrap
        return td_lambda_recursion(
            batch.reward, batch.terminated, batch.mask, bootstrap, config.gamma, config.td_lambda
        )

    def _unroll(self, agent: Callable[..., tuple[Tensor, Tensor]], batch: PublicBatch) -> Tensor:
        episodes, steps, n_agents = batch.obs.shape[:3]
        hidden = batch.obs.new_zeros(episodes * n_agents, self.agent.hidden_dim)
        outputs = []
        for t in range(steps):
            q, hidden = agent(self._inputs(batch, t), hidden)
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
