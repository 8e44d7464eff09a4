"""IQL: every agent learns its own value of the team's reward."""

from __future__ import annotations

from typing import Any, ClassVar

from fastmix.algorithms.q_learning import QLearning


class IQL(QLearning):
    """Independent Q-learning (Tan 1993): no mixer; the loss is the mean over agents as well."""

    defaults: ClassVar[dict[str, Any]] = {"mixer": "none"}
    preset_overrides: ClassVar[dict[str, dict[str, Any]]] = {
        "pymarl": {"epsilon_anneal_time": 20_000},
        "pymarl2": {"agent": "rnn", "lr": 5e-4, "targets": "one_step", "batch_size": 32},
    }
