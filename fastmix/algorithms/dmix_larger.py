"""DMIX-larger: DMIX with as many parameters as ResZ's mixers have."""

from __future__ import annotations

from typing import Any, ClassVar

from fastmix.algorithms.dmix import DMIX


class DMIXLarger(DMIX):
    """ResQ appendix: a mixing network of 350K parameters on MMM2; its width there is our reading of that count."""

    defaults: ClassVar[dict[str, Any]] = {**DMIX.defaults, "mixing_embed_dim": 227}
