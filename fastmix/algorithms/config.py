"""Hyper-parameters of the algorithms, and the two sets of them that the field uses."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Final

from fastmix.ops._checks import check_choice, check_range
from fastmix.ops.monotonic import POSITIVITIES
from fastmix.ops.returns import KINDS


def option(default: Any, help: str) -> Any:
    """A configuration field with its help text."""
    return dataclasses.field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class AlgorithmConfig:
    """Everything that decides what is learnt from given episodes, and how episodes are gathered for it."""

    agent: str = option("rnn", "utility network: rnn, n_rnn (the same with pymarl2's options) or ff")
    rnn_hidden_dim: int = option(64, "width of the utility network")
    use_rnn: bool = option(True, "False replaces the GRU of 'rnn' by a feed-forward layer (EPyMARL)")
    use_layer_norm: bool = option(False, "layer norm on the hidden state before the output layer (n_rnn)")
    use_orthogonal: bool = option(False, "orthogonal initialisation as in pymarl2")
    gain: float = option(0.01, "gain of the orthogonal initialisation of the output layer")
    obs_last_action: bool = option(True, "agents see their own last action")
    obs_agent_id: bool = option(True, "agents see their own index")

    mixer: str = option("qmix", "mixing network: none, vdn, qmix, qmix_noabs or nmix (pymarl2's names)")
    mixing_embed_dim: int = option(32, "width of the mixing network")
    hypernet_layers: int = option(2, "layers of the hypernetworks, 1 or 2")
    hypernet_embed: int = option(64, "hidden width of two-layer hypernetworks")
    qmix_pos_func: str = option("abs", "what makes generated weights positive: abs, softplus, quadratic, none")
    qmix_pos_func_beta: float = option(1.0, "sharpness of softplus")

    gamma: float = option(0.99, "discount")
    double_q: bool = option(True, "greedy actions of targets come from the online agents")
    targets: str = option("one_step", "learning targets: one_step, n_step, td_lambda, q_lambda")
    td_lambda: float = option(0.6, "trace decay of td_lambda and q_lambda")
    n_step: int = option(1, "window of n_step")
    loss_scale: float = option(1.0, "factor of the squared error (pymarl2: 0.5)")
    td_weight: float = option(1.0, "weight of every transition (5 for the fine-tuned variants named *_5)")
    weighting: str = option("none", "weights of transitions without a central critic: none, cw, ow")
    w: float = option(0.5, "weight of the transitions that `weighting` makes less of")
    standardise_rewards: bool = option(False, "standardise rewards by their running mean and deviation")

    optimizer: str = option("rmsprop", "rmsprop or adam")
    lr: float = option(5e-4, "learning rate")
    optim_alpha: float = option(0.99, "decay of RMSprop's running square")
    optim_eps: float = option(1e-5, "epsilon of the optimiser, outside the square root")
    weight_decay: float = option(0.0, "L2 penalty added to gradients")
    grad_norm_clip: float = option(10.0, "largest norm of all gradients together")
    target_update_interval: int = option(200, "episodes between copies of the online networks into the targets")

    batch_size: int = option(32, "episodes in a training batch")
    buffer_size: int = option(5000, "episodes that replay holds")
    batch_size_run: int = option(1, "environment copies; one training step per this many finished episodes")
    epsilon_start: float = option(1.0, "exploration at the start")
    epsilon_finish: float = option(0.05, "exploration at the end")
    epsilon_anneal_time: int = option(50_000, "environment steps from start to finish")
    use_per: bool = option(False, "proportional prioritised replay")
    per_alpha: float = option(0.6, "exponent of priorities")
    per_beta: float = option(0.4, "exponent of importance weights at the start; 1 at the end")

    def __post_init__(self) -> None:
        """Raise ValueError naming the first field that cannot be."""
        check_choice("agent", self.agent, ("rnn", "n_rnn", "ff"))
        check_choice("mixer", self.mixer, ("none", "vdn", "qmix", "qmix_noabs", "nmix"))
        check_choice("hypernet_layers", self.hypernet_layers, (1, 2))
        check_choice("qmix_pos_func", self.qmix_pos_func, POSITIVITIES)
        check_choice("targets", self.targets, KINDS)
        check_choice("weighting", self.weighting, ("none", "cw", "ow"))
        check_choice("optimizer", self.optimizer, ("rmsprop", "adam"))
        for name in ("gamma", "td_lambda", "epsilon_start", "epsilon_finish", "optim_alpha"):
            check_range(name, getattr(self, name), 0.0, 1.0)
        for name in (
            "rnn_hidden_dim", "mixing_embed_dim", "hypernet_embed", "n_step", "target_update_interval",
            "batch_size", "buffer_size", "batch_size_run", "epsilon_anneal_time",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("lr", "optim_eps", "grad_norm_clip", "loss_scale"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.weighting != "none" and self.mixer == "none":
            raise ValueError(f"weighting {self.weighting!r} needs a mixer, got mixer 'none'")
        if self.buffer_size < self.batch_size:
            raise ValueError(f"buffer_size must be at least batch_size ({self.batch_size}), got {self.buffer_size}")


# What each family of public trainers sets, over the defaults above (which are PyMARL's).
_PYMARL: Final[dict[str, Any]] = {}
_PYMARL2: Final[dict[str, Any]] = {
    "agent": "n_rnn",
    "optimizer": "adam",
    "optim_eps": 1e-8,
    "lr": 1e-3,
    "targets": "td_lambda",
    "loss_scale": 0.5,
    "batch_size": 128,
    "batch_size_run": 8,
    "epsilon_anneal_time": 100_000,
}
_EPYMARL: Final[dict[str, Any]] = {
    "optimizer": "adam",
    "optim_eps": 1e-8,
    "use_rnn": False,
    "obs_last_action": False,
    "standardise_rewards": True,
}
PRESETS: Final[dict[str, dict[str, Any]]] = {"pymarl": _PYMARL, "pymarl2": _PYMARL2, "epymarl": _EPYMARL}
"""Preset name -> settings that all algorithms share; what differs between algorithms stands in their own files."""
