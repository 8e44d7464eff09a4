"""Learning algorithms, one short file each.

`make(name, scheme, preset=...)` builds one; `REGISTRY[name]` is its class.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Final

import torch

from fastmix.algorithms.base import Algorithm
from fastmix.algorithms.batch import EpisodeBatch, Scheme
from fastmix.algorithms.config import PRESETS, AlgorithmConfig
from fastmix.algorithms.cw_qmix import CWQMIX
from fastmix.algorithms.cw_qmix_5 import CWQMIX5
from fastmix.algorithms.ddn import DDN
from fastmix.algorithms.diql import DIQL
from fastmix.algorithms.dmix import DMIX
from fastmix.algorithms.dmix_larger import DMIXLarger
from fastmix.algorithms.iql import IQL
from fastmix.algorithms.ow_qmix import OWQMIX
from fastmix.algorithms.ow_qmix_5 import OWQMIX5
from fastmix.algorithms.powqmix import POWQMIX
from fastmix.algorithms.powqmix_opt import POWQMIXOpt
from fastmix.algorithms.qatten import Qatten
from fastmix.algorithms.qmix import QMIX
from fastmix.algorithms.qmix_5 import QMIX5
from fastmix.algorithms.qplex import QPLEX
from fastmix.algorithms.qtran import QTRAN
from fastmix.algorithms.resq import ResQ
from fastmix.algorithms.resq_mse import ResQMSE
from fastmix.algorithms.resq_vdn import ResQVDN
from fastmix.algorithms.resq_vdn_mse import ResQVDNMSE
from fastmix.algorithms.resz import ResZ
from fastmix.algorithms.vdn import VDN
from fastmix.ops._checks import check_choice

__all__ = ["PRESETS", "REGISTRY", "Algorithm", "AlgorithmConfig", "EpisodeBatch", "Scheme", "configure", "make"]

REGISTRY: Final[dict[str, type[Algorithm]]] = {
    "iql": IQL,
    "vdn": VDN,
    "qmix": QMIX,
    "qmix_5": QMIX5,
    "qatten": Qatten,
    "qtran": QTRAN,
    "qplex": QPLEX,
    "cw_qmix": CWQMIX,
    "ow_qmix": OWQMIX,
    "cw_qmix_5": CWQMIX5,
    "ow_qmix_5": OWQMIX5,
    "resq": ResQ,
    "resq_mse": ResQMSE,
    "resq_vdn": ResQVDN,
    "resq_vdn_mse": ResQVDNMSE,
    "powqmix": POWQMIX,
    "powqmix_opt": POWQMIXOpt,
    "diql": DIQL,
    "ddn": DDN,
    "dmix": DMIX,
    "dmix_larger": DMIXLarger,
    "resz": ResZ,
}


def configure(name: str, preset: str = "pymarl2", **overrides: Any) -> AlgorithmConfig:
    """Hyper-parameters of an algorithm.

    Args:
        name: a key of `REGISTRY`.
        preset: a key of `PRESETS`: whose hyper-parameters to start from.
        overrides: fields of `AlgorithmConfig` to set on top.

    Raises:
        ValueError: an unknown name, preset or field, or a value that cannot be, or not with this algorithm.
    """
    check_choice("algorithm", name, tuple(REGISTRY))
    check_choice("preset", preset, tuple(PRESETS))
    known = {field.name for field in dataclasses.fields(AlgorithmConfig)}
    unknown = sorted(overrides.keys() - known)
    if unknown:
        raise ValueError(f"unknown hyper-parameter {unknown[0]!r}; there are: {', '.join(sorted(known))}")
    algorithm = REGISTRY[name]
    settings = PRESETS[preset] | algorithm.defaults | algorithm.preset_overrides.get(preset, {}) | overrides
    config = AlgorithmConfig(**settings)
    algorithm.check(config)
    return config


def make(
    name: str,
    scheme: Scheme,
    *,
    preset: str = "pymarl2",
    device: torch.device | str = "cpu",
    seed: int = 0,
    **overrides: Any,
) -> Algorithm:
    """An algorithm ready to train; see `configure` for ``preset`` and ``overrides``, `Algorithm` for the rest."""
    config = configure(name, preset, **overrides)
    return REGISTRY[name](scheme, config, device=device, seed=seed)
