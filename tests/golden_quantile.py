"""DFAC's agent and loss (golden kinds ``dfac.iqn_agent`` and ``dfac.quantile_huber``)."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from fastmix.agents import IQNRNNAgent
from fastmix.ops import quantile_loss
from fastmix.testing.golden import Golden
from tests.golden_rules import Setting, compare, leaf_inputs, load


def check_agent(golden: Golden, setting: Setting) -> None:
    """One step: all quantiles, then those of each action alone, and their means."""
    config = golden.config
    args = SimpleNamespace(
        n_actions=config["U"], rnn_hidden_dim=golden.params["fc1.weight"].shape[0], quantile_embed_dim=config["QE"],
        n_quantiles=config["N"], n_target_quantiles=config["Np"], n_approx_quantiles=config["K"], name=config["alg"],
    )  # fmt: skip
    agent = IQNRNNAgent.from_args(golden.inputs["inputs"].shape[-1], args)
    load(agent, golden.params, setting)
    by_action = [torch.full((1, 1, config["A"]), action, device=setting.device) for action in range(config["U"])]
    for whole in (True, False):
        agent.zero_grad()
        inputs = leaf_inputs(golden, setting)
        x, h, tau = (inputs[name].unflatten(0, (config["B"], -1)) for name in ("inputs", "hidden", "tau"))
        assert tau.shape[1] == (config["A"] if agent.per_agent_fractions else 1)
        assert tau.shape[2] == agent.counts[config["forward_type"]]
        states, after = agent.trunk(x.unsqueeze(1), h)
        drawn = tau.unsqueeze(1) if agent.per_agent_fractions else tau
        if whole:
            q = agent.quantiles(states, drawn)
        else:
            shape = states.shape[:-1]
            q = torch.stack([agent.quantiles(states, drawn, a.expand(shape)) for a in by_action], -2)
        expected = golden.outputs["q"]
        setting.close(agent.means(states, drawn).reshape(-1, config["U"]), expected.mean(-1), "mean")
        compare(golden, setting, {"q": q.reshape(expected.shape), "h": after.flatten(0, 1)}, agent, inputs)


def check_loss(golden: Golden, setting: Setting) -> None:
    """The loss and its gradient."""
    inputs = leaf_inputs(golden, setting)
    theta = inputs["theta"]
    loss = quantile_loss(theta, inputs["target"], inputs["tau"], inputs["mask"]).loss
    setting.close(loss, golden.outputs["loss"], "out/loss")
    (grad,) = torch.autograd.grad(loss, theta)
    setting.close(grad, golden.input_grads["theta"], "gradin/theta")
