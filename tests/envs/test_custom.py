"""Environments of a user's own, by name; the one in the documentation is trained on."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from fastmix import envs
from fastmix.cli import main
from fastmix.envs import BatchedEnv

PAGE = Path(__file__).parents[2] / "docs" / "environments.md"


@pytest.fixture
def my_games(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (code,) = re.findall(r"```python\n(# my_games\.py\n.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "my_games.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_games", raising=False)
    return tmp_path


def test_the_documented_environment_keeps_its_word(my_games: Path) -> None:
    env, rng = envs.make("python:my_games.make_meet,3", 5, 0), np.random.default_rng(0)
    assert isinstance(env, BatchedEnv) and env.info.n_agents == 3
    again = envs.make("python:my_games.make_meet,3", 5, 1)
    again.load_state_dict(env.state_dict())
    for _ in range(50):
        assert env.avail.any(-1).all()
        actions = rng.integers(0, 3, (5, 3))
        for one in (env, again):
            one.step(actions)
            one.reset(np.flatnonzero(one.terminated | one.truncated))
        np.testing.assert_array_equal(env.obs, again.obs)


def test_it_is_trained_on(my_games: Path) -> None:
    words = ["train", "--algo", "vdn", "--env", "python:my_games.make_meet", "--t-max", "600", "--batch-size", "8"]
    assert main([*words, "--seeds", "2", "--workers", "2", "--rnn-hidden-dim", "8", "--out", "run"]) == 0
    result = json.loads((my_games / "run" / "seed-1" / "result.json").read_text())
    assert result["updates"] > 0 and 0 <= result["test_win_rate"] <= 1
    assert len(result["absolute"]["won"]) == 320


def test_wrong_names_are_explained(my_games: Path) -> None:
    (my_games / "broken.py").write_text("import no_such_package\n\ndef make(spec, n_envs, seed): ...\n")
    (my_games / "half.py").write_text("def make(spec, n_envs, seed):\n    return []\n\nvalue = 3\n")
    for name, message in (
        ("make_meet", "must be python:module.function"),
        ("nowhere.make", r"there is no module nowhere; is its folder on the path"),
        ("half.other", "half has no function other"),
        ("half.value", "half has no function value"),
        ("half.make", "half.make made a list, which lacks info, n_envs, obs, .*step"),
    ):
        with pytest.raises(ValueError, match=message):
            envs.make(f"python:{name}", 1, 0)
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        envs.make("python:broken.make", 1, 0)
