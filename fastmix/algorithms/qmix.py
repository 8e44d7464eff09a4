"""QMIX, with PyMARL's or pymarl2's (fine-tuned) hyper-parameters."""

from __future__ import annotations

from typing import Any, ClassVar

from fastmix.algorithms.q_learning import QLearning


class QMIX(QLearning):
    """QMIX (Rashid et al. 2018); the preset ``pymarl2`` is fine-tuned QMIX (Hu et al. 2021)."""

    preset_overrides: ClassVar[dict[str, dict[str, Any]]] = {"pymarl2": {"mixer": "nmix"}}
