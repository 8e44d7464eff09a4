from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fastmix.train import checkpoint


def state() -> dict[str, object]:
    shared = torch.arange(6.0)
    return {
        "algo": {"w": torch.randn(3, 4), "scalar": torch.tensor(7), "shared_a": shared, "shared_b": shared[2:]},
        "strided": torch.randn(4, 3).t(),
        "flags": torch.tensor([True, False]),
        "half": torch.randn(2).half(),
        "array": np.arange(5, dtype=np.int64),
        "empty": np.zeros((0, 3)),
        "list": [1, 2.5, None, "x", [True, torch.ones(2)]],
        "rng": np.random.default_rng(0).bit_generator.state,  # integers of 128 bits
        "nothing": {},
    }


def assert_same(a: object, b: object) -> None:
    if isinstance(a, torch.Tensor):
        assert isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    elif isinstance(a, np.ndarray):
        assert isinstance(b, np.ndarray) and a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    elif isinstance(a, dict):
        assert isinstance(b, dict) and a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list):
        assert isinstance(b, list) and len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert type(a) is type(b) and a == b


def test_everything_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "checkpoint.safetensors"
    saved = state()
    checkpoint.save(path, saved)
    assert_same(saved, checkpoint.load(path))
    assert list(path.parent.iterdir()) == [path]


def test_one_entry_can_be_read_alone(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    saved = state()
    checkpoint.save(path, saved)
    assert_same({"algo": saved["algo"]}, checkpoint.load(path, only="algo"))


@pytest.mark.parametrize("at", ["before the bytes are on disk", "before the rename"])
def test_a_failing_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    path = tmp_path / "c.safetensors"
    checkpoint.save(path, {"x": torch.ones(2)})

    def fail(*args: object) -> None:
        raise OSError("disk full")

    if at == "before the rename":
        monkeypatch.setattr(Path, "replace", fail)
    else:
        monkeypatch.setattr(checkpoint, "_fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save(path, {"x": torch.zeros(2)})
    monkeypatch.undo()
    assert checkpoint.load(path)["x"].tolist() == [1.0, 1.0]
    assert list(tmp_path.iterdir()) == [path]


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    torch.save({"x": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        checkpoint.load(path)


def test_foreign_truncated_and_missing_files(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "c.safetensors"
    save_file({"x": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="not a checkpoint of this version"):
        checkpoint.load(path)
    checkpoint.save(path, state())
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="cannot be read"):
        checkpoint.load(path)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint .*other"):
        checkpoint.load(tmp_path / "other")


@pytest.mark.parametrize(
    ("bad", "message"), [({"a": {"b": {1, 2}}}, "entry a.b is a set"), ({"a": {1: 2}}, "entry a has the key 1")]
)
def test_what_cannot_be_saved_is_named(tmp_path: Path, bad: dict[str, object], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        checkpoint.save(tmp_path / "c.safetensors", bad)
    assert list(tmp_path.iterdir()) == []


def test_pruning_keeps_the_newest(tmp_path: Path) -> None:
    for t_env in (5, 100, 20, 3000):
        checkpoint.save(checkpoint.checkpoint_path(tmp_path, t_env), {"t": t_env})
    assert [checkpoint.load(p)["t"] for p in checkpoint.list_checkpoints(tmp_path)] == [5, 20, 100, 3000]
    checkpoint.prune(tmp_path, keep=2)
    assert [checkpoint.load(p)["t"] for p in checkpoint.list_checkpoints(tmp_path)] == [100, 3000]
    assert checkpoint.list_checkpoints(tmp_path / "none") == []


def test_what_killed_writers_left_is_swept_up(tmp_path: Path) -> None:
    for name in (".checkpoint-000000000007.safetensors.123.tmp", ".best.safetensors.9.tmp", ".config.json.9.tmp"):
        (tmp_path / name).write_bytes(b"half a file")
    kept = [tmp_path / name for name in ("best.safetensors", "notes.tmp", ".hidden")]
    for path in kept:
        path.write_text("mine")
    checkpoint.sweep_up(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted(kept)
    checkpoint.sweep_up(tmp_path / "none")
