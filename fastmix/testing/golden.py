"""Reference numbers: `.npz` files with the inputs, parameters, outputs and gradients of public implementations.

Two families of files exist and both are read into one `Golden`. One names its content in `meta/kind` with the
hyper-parameters as JSON in `meta/hp_json`; the other has a single JSON string `meta` with `case`, `variant` and `cfg`.
Nothing is unpickled.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

ENVIRONMENT_VARIABLE = "FASTMIX_GOLDEN"


@dataclass(frozen=True)
class Golden:
    """One file. Keys of the sections are the names behind the section's prefix; values are tensors as stored."""

    path: Path
    kind: str
    """What to rebuild: `meta/kind`, or `case`"""
    variant: str
    """Which form of it; empty where the kind has one"""
    config: dict[str, Any]
    """Sizes and hyper-parameters: `meta/hp_json`, or `cfg`"""
    inputs: dict[str, Tensor] = field(repr=False)
    params: dict[str, Tensor] = field(repr=False)
    outputs: dict[str, Tensor] = field(repr=False)
    cotangents: dict[str, Tensor] = field(repr=False)
    grads: dict[str, Tensor] = field(repr=False)
    """Gradients of the parameters"""
    input_grads: dict[str, Tensor] = field(repr=False)
    after: dict[str, Tensor] = field(repr=False)
    """Parameters after one optimiser step"""
    none_grads: frozenset[str] | None
    """Parameters whose gradient was None (stored as zeros); None where the file does not say"""
    none_input_grads: frozenset[str] | None
    """The same of inputs"""
    arrays: dict[str, Any] = field(repr=False)
    """Every array of the file under its full name, as NumPy arrays"""

    @property
    def name(self) -> str:
        """The file's name without its ending."""
        return self.path.name.removesuffix(".npz")

    def networks(self, section: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """A learner's `params`, `grads` or `after` by network: `{"agent": {"fc1.weight": ...}, "mixer": ...}`."""
        networks: dict[str, dict[str, Tensor]] = {}
        for key, tensor in section.items():
            network, _, rest = key.partition("/") if "/" in key else key.partition(".")
            networks.setdefault(network, {})[rest] = tensor
        return networks


def folder(default: str | os.PathLike[str]) -> Path:
    """The folder of golden files: the environment variable `FASTMIX_GOLDEN`, else `default`."""
    return Path(os.environ.get(ENVIRONMENT_VARIABLE) or default)


def load(path: str | os.PathLike[str]) -> Golden:
    """Read one file. Raises `ValueError` when it describes itself in neither way."""
    path = Path(path)
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    if "meta/kind" in arrays:
        kind, variant = str(arrays["meta/kind"]), ""
        config = json.loads(str(arrays["meta/hp_json"]))
        absent = list(map(str, arrays["meta/none_grad"])) if "meta/none_grad" in arrays else None
    elif "meta" in arrays:
        meta = json.loads(str(arrays["meta"]))
        kind, variant, config, absent = meta["case"], meta.get("variant") or "", meta["cfg"], None
    else:
        raise ValueError(f"{path} has neither 'meta/kind' nor 'meta': it does not say what it holds")

    def section(prefix: str) -> dict[str, Tensor]:
        names = [name for name in arrays if name.startswith(prefix) and arrays[name].dtype.kind in "fiub"]
        return {name.removeprefix(prefix): torch.from_numpy(arrays[name].copy()) for name in names}

    def without_gradient(prefix: str) -> frozenset[str] | None:
        if absent is None:
            return None
        return frozenset(name.removeprefix(prefix) for name in absent if name.startswith(prefix))

    return Golden(
        path=path,
        kind=kind,
        variant=variant,
        config=config,
        inputs=section("in/"),
        params=section("param/"),
        outputs=section("out/"),
        cotangents=section("cotangent/"),
        grads=section("grad/"),
        input_grads=section("gradin/"),
        after=section("after/"),
        none_grads=without_gradient("grad/"),
        none_input_grads=without_gradient("gradin/"),
        arrays=arrays,
    )
