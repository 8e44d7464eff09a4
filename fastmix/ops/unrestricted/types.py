"""Parameters of an unrestricted joint value."""

from __future__ import annotations

from typing import NamedTuple

from fastmix.ops._layers import Layers


class UnrestrictedParams(NamedTuple):
    """Two networks; see `fastmix.ops._layers` for the layers' types. ``K`` outputs, ``S`` state features."""

    net: Layers
    """``S`` features, one-hots of the joint action, then other features, as far as given, to ``K``."""
    v: Layers = ()
    """``S`` to 1 feature, added to every output: the state's own value; ``()`` for none."""
