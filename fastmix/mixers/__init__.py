"""Mixing networks: they turn the agents' utilities into one joint value. `REGISTRY[kind]` is the class of a kind."""

from typing import Final

from fastmix.mixers.base import Mixer
from fastmix.mixers.checkpoints import convert_state_dict, load_pymarl
from fastmix.mixers.qmix import MonotonicMixer, NMixer, QMixer, QMixerNoAbs
from fastmix.mixers.vdn import VDNMixer

REGISTRY: Final[dict[str, type[Mixer]]] = {
    "vdn": VDNMixer,
    "qmix": QMixer,
    "qmix_noabs": QMixerNoAbs,
    "nmix": NMixer,
}

__all__ = [
    "REGISTRY",
    "Mixer",
    "MonotonicMixer",
    "NMixer",
    "QMixer",
    "QMixerNoAbs",
    "VDNMixer",
    "convert_state_dict",
    "load_pymarl",
]
