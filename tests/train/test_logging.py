from __future__ import annotations

import builtins
import io
import json
from pathlib import Path
from typing import Any

import pytest

from fastmix.train import logging as run_logging
from fastmix.train.logging import RunLogger, progress_bar, read_metrics


def test_records_are_json_lines_and_nan_is_null(tmp_path: Path) -> None:
    logger = RunLogger(tmp_path)
    logger.write(5, {"loss": 1.5, "name": "x"})
    logger.write(9, {"loss": float("nan"), "norm": float("inf")})
    # Readable while the run goes on.
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        {"t_env": 5, "loss": 1.5, "name": "x"},
        {"t_env": 9, "loss": None, "norm": None},
    ]
    logger.close()


def test_what_was_logged_after_the_checkpoint_is_cut_off(tmp_path: Path) -> None:
    logger = RunLogger(tmp_path)
    logger.write(1, {"a": 1})
    offset = logger.offset
    assert offset == (tmp_path / "metrics.jsonl").stat().st_size
    logger.write(2, {"a": 2})
    logger.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"t_env": 3, "half a rec')
    resumed = RunLogger(tmp_path, offset=offset)
    resumed.write(2, {"a": 20})
    resumed.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"t_env": 1, "a": 1}, {"t_env": 2, "a": 20}]


def test_tensorboard_gets_the_numbers(tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is an optional extra"
    )
    logger = RunLogger(tmp_path, tensorboard=True)
    logger.write(10, {"loss": 0.5, "name": "x"})
    logger.write(20, {"loss": 0.25})
    logger.close()
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(10, 0.5), (20, 0.25)]
    assert "name" not in events.Tags()["scalars"]


def test_missing_tensorboard_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_logging.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'fastmix\[train\]'"):
        RunLogger(tmp_path, tensorboard=True)
    assert not (tmp_path / "tensorboard").exists()


def test_tensorboard_is_not_imported_unless_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def watch(name: str, *args: Any, **kwargs: Any) -> Any:
        assert "tensorboard" not in name
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", watch)
    logger = RunLogger(tmp_path)
    logger.write(1, {"a": 1})
    logger.close()


@pytest.mark.parametrize(("terminal", "enabled"), [(True, True), (True, False), (False, True)])
def test_progress_is_for_terminals(monkeypatch: pytest.MonkeyPatch, terminal: bool, enabled: bool) -> None:
    class Stream(io.StringIO):
        def isatty(self) -> bool:
            return terminal

    stream = Stream()
    monkeypatch.setattr("sys.stderr", stream)
    with progress_bar(100, "train", enabled=enabled) as bar:
        bar.update(50)
    assert ("train" in stream.getvalue()) == (terminal and enabled)


def test_json_is_strict(tmp_path: Path) -> None:
    logger = RunLogger(tmp_path)
    logger.write(1, {"x": float("-inf")})
    logger.close()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)
