"""Mixing networks: they turn the agents' utilities into one joint value. `REGISTRY[kind]` is the class of a kind."""

from typing import Final

from fastmix.mixers.base import ActionMixer, Attended, JointValue, Mixer, QuantileMixer, StateMixer, joint_actions
from fastmix.mixers.central import QMixerCentralAtten, QMixerCentralFF
from fastmix.mixers.checkpoints import convert_state_dict, load_pymarl
from fastmix.mixers.dfac import DDNMixer, DMixer
from fastmix.mixers.powqmix import ImportanceRecogniser, Recogniser
from fastmix.mixers.qatten import QattenMixer, QattenPymarlMixer
from fastmix.mixers.qmix import MonotonicMixer, NMixer, QMixer, QMixerNoAbs
from fastmix.mixers.qplex import DMAQer, DMAQQattenMixer, DMAQSIWeight
from fastmix.mixers.qtran import QTranAlt, QTranBase
from fastmix.mixers.resz import DattenMixer, ResZCentralAtten, ResZCentralFF
from fastmix.mixers.vdn import VDNMixer

REGISTRY: Final[dict[str, type[Mixer]]] = {
    "vdn": VDNMixer,
    "qmix": QMixer,
    "qmix_noabs": QMixerNoAbs,
    "nmix": NMixer,
    "qatten_pymarl2": QattenMixer,
    "qatten_pymarl": QattenPymarlMixer,
    "qtran_base": QTranBase,
    "qtran_alt": QTranAlt,
    "qplex_dmaq": DMAQer,
    "qplex_dmaq_qatten": DMAQQattenMixer,
    "qplex_lambda": DMAQSIWeight,
    "central_ff": QMixerCentralFF,
    "central_atten": QMixerCentralAtten,
    "powqmix_recogniser": Recogniser,
    "ddn": DDNMixer,
    "dmix": DMixer,
    "datten": DattenMixer,
    "resz_central_atten": ResZCentralAtten,
    "resz_central_ff": ResZCentralFF,
}

__all__ = [
    "REGISTRY",
    "ActionMixer",
    "Attended",
    "DMAQQattenMixer",
    "DMAQSIWeight",
    "DDNMixer",
    "DMAQer",
    "DMixer",
    "DattenMixer",
    "ImportanceRecogniser",
    "JointValue",
    "Mixer",
    "MonotonicMixer",
    "NMixer",
    "QMixer",
    "QMixerCentralAtten",
    "QMixerCentralFF",
    "QMixerNoAbs",
    "QTranAlt",
    "QTranBase",
    "QattenMixer",
    "QattenPymarlMixer",
    "QuantileMixer",
    "Recogniser",
    "ResZCentralAtten",
    "ResZCentralFF",
    "StateMixer",
    "VDNMixer",
    "convert_state_dict",
    "joint_actions",
    "load_pymarl",
]
