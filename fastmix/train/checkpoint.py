"""Checkpoints: one safetensors file with everything in it, written so that a kill at any moment leaves a whole one.

A state is a nested dictionary (or list) whose leaves are tensors, numpy arrays or JSON values. Tensors and arrays go
into the file as they are; the rest, and the nesting, go into its header as JSON. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FORMAT = "fastmix-checkpoint-1"
_NAME = re.compile(r"checkpoint-(\d{12})\.safetensors")
_TENSOR, _ARRAY = "__tensor__", "__array__"


def save(path: Path, state: dict[str, Any]) -> None:
    """Write ``state`` to ``path`` atomically: temporary file, fsync, rename, fsync of the folder.

    Raises ``TypeError`` naming the entry when a leaf is neither a tensor, an array nor a JSON value.
    """
    tensors: dict[str, Tensor] = {}
    skeleton = _pack(state, "", tensors)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(tensors, temporary, metadata={"format": FORMAT, "state": json.dumps(skeleton)})
        _fsync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    _fsync(path.parent)


def load(path: Path, *, only: str | None = None) -> dict[str, Any]:
    """What ``save`` wrote, tensors on the CPU; arrays come back as arrays. ``only`` reads a single top-level entry.

    Raises ``ValueError`` when the file is not a fastmix checkpoint or is damaged, ``FileNotFoundError`` when missing.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(f"{path} is not a checkpoint of this version (format {metadata.get('format')!r})")
            skeleton = json.loads(metadata["state"])
            if only is not None:
                skeleton = {only: skeleton[only]}
            state: dict[str, Any] = _unpack(skeleton, file)
            return state
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read as a checkpoint: {error}") from error


def checkpoint_path(folder: Path, t_env: int) -> Path:
    """Where the checkpoint taken after ``t_env`` environment steps lives; names sort by age."""
    return folder / f"checkpoint-{t_env:012d}.safetensors"


def list_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))


def prune(folder: Path, keep: int) -> None:
    """Delete all but the newest ``keep`` checkpoints."""
    for path in list_checkpoints(folder)[:-keep]:
        path.unlink()


def sweep_up(folder: Path) -> None:
    """Delete the half-written files that killed writers left in ``folder``; for the one process that writes there."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a small text file atomically, with the same guarantee as :func:`save`."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    _fsync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """``value`` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def _pack(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"checkpoint entry {name or '(top)'} has the key {key!r}; keys must be strings")
        return {key: _pack(entry, f"{name}.{key}" if name else key, tensors) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_pack(entry, f"{name}.{i}", tensors) for i, entry in enumerate(value)]
    if isinstance(value, Tensor):
        tensor = value.detach().cpu().contiguous()
        # safetensors refuses tensors that share memory; everything else is written without a copy.
        if any(tensor.untyped_storage().data_ptr() == other.untyped_storage().data_ptr() for other in tensors.values()):
            tensor = tensor.clone()
        tensors[name] = tensor
        return {_TENSOR: name}
    if isinstance(value, np.ndarray):
        tensors[name] = torch.from_numpy(np.array(value, order="C"))
        return {_ARRAY: name}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(
        f"checkpoint entry {name} is a {type(value).__name__}; it must be a tensor, an array or a JSON value"
    )


def _unpack(value: Any, file: Any) -> Any:
    if isinstance(value, dict):
        if value.keys() == {_TENSOR}:
            return file.get_tensor(value[_TENSOR])
        if value.keys() == {_ARRAY}:
            return file.get_tensor(value[_ARRAY]).numpy()
        return {key: _unpack(entry, file) for key, entry in value.items()}
    if isinstance(value, list):
        return [_unpack(entry, file) for entry in value]
    return value


def _fsync(path: Path) -> None:
    """Force a file's content, or a folder's entries, to the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open folders, and its rename is already durable
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
