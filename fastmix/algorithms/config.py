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

    agent: str = option(
        "rnn", "utility network: rnn, n_rnn (the same with pymarl2's options) or ff; of distributions: iqn_rnn"
    )
    rnn_hidden_dim: int = option(64, "width of the utility network")
    use_rnn: bool = option(True, "False replaces the GRU of 'rnn' by a feed-forward layer (EPyMARL)")
    use_layer_norm: bool = option(False, "layer norm on the hidden state before the output layer (n_rnn)")
    use_orthogonal: bool = option(False, "orthogonal initialisation as in pymarl2")
    gain: float = option(0.01, "gain of the orthogonal initialisation of the output layer")
    obs_last_action: bool = option(True, "agents see their own last action")
    obs_agent_id: bool = option(True, "agents see their own index")

    mixer: str = option("qmix", "mixing network: none or a kind of fastmix.mixers, of those that the algorithm takes")
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
    weighting: str = option(
        "none",
        "which transitions keep the weight w_high, the others get w: none (all), cw (greedy joint action, or a target "
        "above its value), ow (underestimated), igm (greedy joint action), pow (recognised as potentially optimal)",
    )
    w_high: float = option(1.0, "weight of the transitions that `weighting` favours; of all without one")
    w: float = option(0.5, "weight of the other transitions")
    standardise_rewards: bool = option(False, "standardise rewards by their running mean and deviation")
    compat: str = option(
        "paper", "where a paper and its released code disagree: paper, or released (see the algorithm's page)"
    )

    # Qatten, and QPLEX with its attention
    unit_dim: int = option(0, "features at the front of the state that are each agent's own (0: as many as there are)")
    n_head: int = option(4, "heads of attention")
    weighted_head: bool = option(True, "state-dependent weights: of attention's heads, of QPLEX's utilities")
    n_query_embedding_layer1: int = option(64, "hidden width of queries (pymarl2's Qatten)")
    n_query_embedding_layer2: int = option(32, "width of queries and keys (pymarl2's Qatten)")
    n_head_embedding_layer1: int = option(64, "hidden width of the heads' weights (pymarl2's Qatten)")
    n_constrant_value: int = option(32, "hidden width of the state's value (pymarl2's Qatten and spelling)")
    attend_reg_coef: float = option(0.001, "coefficient of the mean squared logit in the loss (PyMARL's Qatten)")
    nonlinear: bool = option(False, "keys also see the utilities (PyMARL's Qatten)")
    state_bias: bool = option(True, "add a state's value (PyMARL's Qatten)")
    mask_dead: bool = option(False, "do not attend to agents whose action is 0 (PyMARL's Qatten)")

    # QPLEX
    num_kernel: int = option(4, "kernels of QPLEX's importance weights")
    adv_hypernet_layers: int = option(2, "layers of QPLEX's importance networks: 1, 2 or 3")
    adv_hypernet_embed: int = option(64, "hidden width of QPLEX's importance networks")
    is_minus_one: bool = option(True, "QPLEX weighs advantages by their importance less one")

    # QTRAN
    qtran_arch: str = option("qtran_paper", "input of QTRAN's joint value: qtran_paper (hidden states) or coma_critic")
    network_size: str = option("small", "two (small) or three (big) hidden layers in QTRAN's joint networks")
    opt_loss: float = option(1.0, "coefficient of QTRAN's loss at the greedy joint action")
    nopt_min_loss: float = option(0.1, "coefficient of QTRAN's loss at the joint action taken")

    # distributions: DIQL, DDN, DMIX, ResZ
    n_quantiles: int = option(8, "quantiles of a return in the loss")
    n_target_quantiles: int = option(8, "samples of a return in a target")
    n_approx_quantiles: int = option(32, "quantiles whose mean an agent acts by")
    quantile_embed_dim: int = option(64, "cosine features of a fraction")
    acting_fractions: str = option(
        "random", "fractions that agents act by: random (drawn at every step), midpoints (fixed, nothing is drawn)"
    )
    kappa: float = option(1.0, "error from which the quantile loss is no longer quadratic")

    # central critic: CW/OW-QMIX, POWQMIX, ResQ, ResZ
    central_mixer: str = option(
        "central_ff", "mixer of the central critic: central_ff, central_atten, qmix_noabs, vdn; ResZ: resz_central_ff"
    )
    central_mixing_embed_dim: int = option(256, "width of unrestricted mixers")
    central_action_embed: int = option(1, "values that the central agent has for each action")
    central_loss: float = option(1.0, "coefficient of the central critic's loss")

    # POWQMIX's recogniser
    recogniser_weights: str = option(
        "two_layer", "network of the advantages' weights: two_layer, or QPLEX's: importance"
    )
    recogniser_embed_dim: int = option(32, "width of the recogniser")
    recogniser_hypernet_embed: int = option(64, "hidden width of the recogniser's hypernetworks")
    recogniser_loss: float = option(1.0, "coefficient of the recogniser's loss")
    recogniser_target: bool = option(False, "recognise by a target copy of the recogniser")
    tolerance: float = option(0.05, "how far below the greedy joint value (in rewards) counts as potentially optimal")

    # ResQ, ResZ
    residual_mixer: str = option(
        "central_ff",
        "mixer of the residual: central_ff, vdn, qmix, qatten_pymarl2; ResZ: resz_central_atten, resz_central_ff, "
        "dmix, ddn",
    )
    residual_negative_abs: bool = option(True, "keep the residual below 0 by -|.|; False: by a loss (ResQ-MSE)")
    noopt_loss: float = option(1.0, "coefficient of the loss of residuals above 0 that are kept there by it")
    condition: str = option(
        "max_action",
        "where the residual is masked: max_action (greedy joint action), max_larger (or a target above its value), "
        "hysteretic (overestimated), none",
    )

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
        for name, choices in _CHOICES.items():
            check_choice(name, getattr(self, name), choices)
        for name in ("gamma", "td_lambda", "epsilon_start", "epsilon_finish", "optim_alpha"):
            check_range(name, getattr(self, name), 0.0, 1.0)
        for name in (
            "rnn_hidden_dim", "mixing_embed_dim", "hypernet_embed", "n_step", "target_update_interval",
            "batch_size", "buffer_size", "batch_size_run", "epsilon_anneal_time", "n_head", "num_kernel",
            "n_query_embedding_layer1", "n_query_embedding_layer2", "n_head_embedding_layer1", "n_constrant_value",
            "adv_hypernet_embed", "central_mixing_embed_dim", "central_action_embed", "recogniser_embed_dim",
            "recogniser_hypernet_embed", "n_quantiles", "n_target_quantiles", "n_approx_quantiles",
            "quantile_embed_dim",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in (
            "unit_dim", "w", "w_high", "attend_reg_coef", "opt_loss", "nopt_min_loss", "noopt_loss", "tolerance",
            "kappa",
        ):  # fmt: skip
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("lr", "optim_eps", "grad_norm_clip", "loss_scale", "central_loss", "recogniser_loss"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.weighting != "none" and self.mixer == "none":
            raise ValueError(f"weighting {self.weighting!r} needs a mixer, got mixer 'none'")
        if self.buffer_size < self.batch_size:
            raise ValueError(f"buffer_size must be at least batch_size ({self.batch_size}), got {self.buffer_size}")


_CHOICES: Final[dict[str, tuple[Any, ...]]] = {
    "agent": ("rnn", "n_rnn", "ff", "iqn_rnn"),
    "mixer": (
        "none", "vdn", "qmix", "qmix_noabs", "nmix", "qatten_pymarl2", "qatten_pymarl", "qtran_base", "qplex_dmaq",
        "qplex_dmaq_qatten", "ddn", "dmix", "datten",
    ),
    "hypernet_layers": (1, 2),
    "qmix_pos_func": POSITIVITIES,
    "targets": KINDS,
    "weighting": ("none", "cw", "ow", "igm", "pow"),
    "compat": ("paper", "released"),
    "optimizer": ("rmsprop", "adam"),
    "adv_hypernet_layers": (1, 2, 3),
    "qtran_arch": ("qtran_paper", "coma_critic"),
    "network_size": ("small", "big"),
    "central_mixer": ("central_ff", "central_atten", "qmix_noabs", "vdn", "resz_central_ff"),
    "acting_fractions": ("random", "midpoints"),
    "recogniser_weights": ("two_layer", "importance"),
    "residual_mixer": (
        "central_ff", "vdn", "qmix", "qatten_pymarl2", "resz_central_atten", "resz_central_ff", "dmix", "ddn",
    ),
    "condition": ("max_action", "max_larger", "hysteretic", "none"),
}  # fmt: skip

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
PRESETS: Final[dict[str, dict[str, Any]]] = {
    "pymarl": _PYMARL, "pymarl2": _PYMARL2, "epymarl": _EPYMARL, "paper": _PYMARL,
}  # fmt: skip
"""Preset name -> settings that all algorithms share; what differs between algorithms stands in their own files.

``paper`` is what an algorithm's own paper trained with: PyMARL's settings, except where its file says otherwise.
"""
