"""Both families of reference files are read into one form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastmix.testing import golden

ARRAYS: dict[str, Any] = {
    "in/x": np.zeros((2, 3), np.float32),
    "out/loss/total": np.float64(2.5),
    "grad/agent.fc1.weight": np.ones(3),
    "cotangent/q": np.ones(1),
    "gradin/x": np.ones((2, 3)),
}


def test_family_with_kind(tmp_path: Path) -> None:
    path = tmp_path / "a.b.npz"
    meta: dict[str, Any] = {
        "meta/kind": "learner",
        "meta/hp_json": json.dumps({"A": 3}),
        "meta/none_grad": np.array(["grad/agent.fc1.weight", "gradin/x"]),
        "param/target_agent.rnn.weight_ih": np.ones(2),
    }
    np.savez(path, **ARRAYS, **meta)
    file = golden.load(path)
    assert (file.name, file.kind, file.variant, file.config) == ("a.b", "learner", "", {"A": 3})
    assert (file.none_grads, file.none_input_grads) == (frozenset({"agent.fc1.weight"}), frozenset({"x"}))
    assert file.inputs["x"].dtype == torch.float32
    assert file.outputs["loss/total"].item() == 2.5
    assert list(file.networks(file.params)) == ["target_agent"]
    assert list(file.networks(file.params)["target_agent"]) == ["rnn.weight_ih"]


def test_family_with_one_json_string(tmp_path: Path) -> None:
    meta = json.dumps({"case": "resq.learner", "variant": "mse", "cfg": {"A": 3}})
    more: dict[str, Any] = {"meta": np.array(meta), "param/agent/fc1.weight": np.ones(2)}
    np.savez(tmp_path / "a.npz", **ARRAYS, **more)
    file = golden.load(tmp_path / "a.npz")
    assert (file.kind, file.variant, file.config, file.none_grads) == ("resq.learner", "mse", {"A": 3}, None)
    assert list(file.networks(file.params)["agent"]) == ["fc1.weight"]


def test_a_file_without_description_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **ARRAYS)
    with pytest.raises(ValueError, match="does not say what it holds"):
        golden.load(tmp_path / "a.npz")


def test_pickles_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.array([object()], dtype=object))
    with pytest.raises(ValueError, match="allow_pickle"):
        golden.load(tmp_path / "a.npz")


def test_folder_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(golden.ENVIRONMENT_VARIABLE, raising=False)
    assert golden.folder("here") == Path("here")
    monkeypatch.setenv(golden.ENVIRONMENT_VARIABLE, "there")
    assert golden.folder("here") == Path("there")
