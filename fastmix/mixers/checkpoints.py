"""Loading what public trainers saved, and moving between their two names for the same mixer."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

Family = Literal["qmix", "nmix"]

# PyMARL's `QMixer` (two layers) on the left, pymarl2's fine-tuned `Mixer` on the right.
_LAYERS = (
    ("hyper_w_1.", "hyper_w1."),
    ("hyper_w_final.", "hyper_w2."),
    ("hyper_b_1.", "hyper_b1.0."),
    ("V.", "hyper_b2."),
)


def load_pymarl(module: nn.Module, source: str | os.PathLike[str] | Mapping[str, Tensor]) -> None:
    """Load a checkpoint of a public trainer (`mixer.th`, `agent.th`) into a mixer or an agent.

    `source` is a file written by `torch.save(state_dict)` or the state dict itself. Files are read with
    `weights_only=True`: nothing in them is executed. A mixer saved under the other naming family is renamed first.
    Every key must then match; `RuntimeError` names those that do not. Saving needs no helper: public trainers read
    what `torch.save(module.state_dict(), path)` writes.
    """
    if not isinstance(source, Mapping):
        source = torch.load(source, map_location="cpu", weights_only=True)
        if not isinstance(source, Mapping):
            raise ValueError(f"a checkpoint must hold a state dict, got {type(source).__name__}")
    own = set(module.state_dict())
    if set(source) != own:
        for family in ("qmix", "nmix"):
            if _family(source) not in (None, family) and (renamed := convert_state_dict(source, family)).keys() == own:
                source = renamed
    module.load_state_dict(dict(source))


def convert_state_dict(state_dict: Mapping[str, Tensor], to: Family) -> dict[str, Tensor]:
    """Rename a `QMixer` state dict to `NMixer`'s keys (`to="nmix"`) or back (`to="qmix"`). Tensors are shared.

    Raises `ValueError` when the state dict belongs to neither, or to a one-layer `QMixer`, which `NMixer` cannot be.
    """
    if to not in ("qmix", "nmix"):
        raise ValueError(f"to must be 'qmix' or 'nmix', got {to!r}")
    family = _family(state_dict)
    if family is None:
        raise ValueError(f"not the state dict of a QMixer or an NMixer: keys {sorted(state_dict)}")
    if family == to:
        return dict(state_dict)
    if "hyper_w_1.weight" in state_dict:
        raise ValueError("a QMixer with hypernet_layers=1 has no NMixer form: NMixer always has two layers")
    old, new = (0, 1) if to == "nmix" else (1, 0)
    converted = {}
    for key, tensor in state_dict.items():
        layer = next(names for names in _LAYERS if key.startswith(names[old]))
        converted[layer[new] + key.removeprefix(layer[old])] = tensor
    return converted


def _family(state_dict: Mapping[str, Tensor]) -> Family | None:
    for column, family in enumerate(("qmix", "nmix")):
        prefixes = tuple(names[column] for names in _LAYERS)
        if state_dict and all(key.startswith(prefixes) for key in state_dict):
            return "qmix" if family == "qmix" else "nmix"
    return None
