"""``fastmix profile``, from words to numbers."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fastmix.algorithms import Scheme, make
from fastmix.cli import main
from fastmix.experiments.bench import steps
from fastmix.experiments.profile import public_step
from fastmix.testing import CountDispatches, Profile
from fastmix.testing.shapes import SHAPES

QUICK = ["--rounds", "2", "--threads", "1"]
SMALL = ["--shape", "3m", "--batch-size", "2"]

MODULE = """
import torch

weights = torch.ones(3, 3, requires_grad=True)
calls = []

def step():
    calls.append("step")
    (torch.ones(2, 3) @ weights).sum().backward()

def make_step():
    calls.append("made")
    return step

class Nested:
    step = staticmethod(step)

def takes(x): ...

def fails():
    raise ValueError("a bug of the user")
"""


@pytest.fixture(autouse=True)
def _in_a_folder_with_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "users_module.py").write_text(MODULE)
    (tmp_path / "users_broken.py").write_text("import no_such_package")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in ("users_module", "users_broken"):
        sys.modules.pop(name, None)


def profiled(*words: str) -> tuple[dict[str, Any], dict[str, Profile]]:
    """Everything that the command writes, and the profiles in it."""
    assert main(["profile", *words, *QUICK, "--json", "out.json"]) == 0
    content = json.loads(Path("out.json").read_text())
    return content, {name: Profile.from_json(values) for name, values in content["profiles"].items()}


def test_a_learner_step_part_by_part(capsys: pytest.CaptureFixture[str]) -> None:
    content, profiles = profiled("--algo", "qmix", *SMALL, "--trace", "trace.json")
    assert (content["algo"], content["preset"], content["shape"]) == ("qmix", "pymarl2", "3m")
    assert (content["episodes"], content["steps"]) == (2, 60)
    assert content["environment"]["threads"] == 1
    step = profiles["ours"]
    assert [(p.name, p.backward) for p in step.parts] == [
        *((name, False) for name in ("unrolls", "select", "mixer", "targets", "loss")),
        *((name, True) for name in ("loss", "mixer", "select", "unrolls")),
        *((name, False) for name in ("optimiser", "other")),
    ]
    assert step.total.share == pytest.approx(1, abs=1e-9)
    assert step.host.n == 2
    assert {p.name for p in profiles["acting"].parts} == {"acting", "other"}
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert len(lines) <= 25
    assert lines[0] == "qmix (pymarl2), 3m: one step on 2 episodes of 60 transitions"
    for part in ("unrolls", "select", "mixer", "targets", "loss", "optimiser", "other", "total", "acting"):
        assert any(line.startswith(part) for line in lines), part
    assert "measurements are in out.json" in text and "the trace is in trace.json" in text
    assert json.loads(Path("trace.json").read_text())["traceEvents"]


# What the public way dispatches at 60 transitions on the CPU with torch 2.13: operators, views.
PUBLIC = {"pymarl": (5_538, 2_915), "pymarl2": (6_083, 3_279)}


@pytest.mark.parametrize("preset", PUBLIC)
def test_a_qmix_step_needs_a_fraction_of_the_public_dispatches(preset: str) -> None:
    sizes = SHAPES["3m"]
    scheme = Scheme(sizes.n_agents, sizes.n_actions, sizes.obs_dim, sizes.state_dim, 60)
    algo, batch = make("qmix", scheme, preset=preset), steps.random_batch(scheme, 2)
    public = public_step(algo, batch)
    counts = []
    for step in (lambda: algo.step(batch), public):
        step()
        with CountDispatches() as count:
            step()
        counts.append((count.operators.total(), count.views.total()))
    (ours, our_views), found = counts
    assert ours + our_views <= 150
    assert found == pytest.approx(PUBLIC[preset], rel=0.03)
    if torch.__version__.startswith("2.13."):
        assert found == PUBLIC[preset]


def test_the_public_way_stands_beside_it(capsys: pytest.CaptureFixture[str]) -> None:
    _, profiles = profiled(*SMALL, "--steps", "4", "--against", "public")
    ours, public = profiles["ours"], profiles["public"]
    assert public.total.dispatches > 10 * ours.total.dispatches
    names = {(p.name, p.backward) for p in ours.parts}
    assert {(p.name, p.backward) for p in public.parts} == names - {("select", False), ("select", True)}
    other = next(p for p in public.parts if p.name == "other")
    assert other.dispatches < 0.02 * public.total.dispatches  # everything has its part
    lines = capsys.readouterr().out.splitlines()
    assert lines[4].split()[:2] == ["ours", "public"]
    assert any(line.startswith("public: host ") for line in lines)


def test_json_alone_goes_to_the_screen(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", "--shape", "matrix", "--algo", "iql", "--preset", "epymarl", *QUICK, "--json", "-"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["algo"] == "iql" and content["steps"] == 1
    assert "mixer backward" not in content["profiles"]["ours"]


@pytest.mark.parametrize("name", ["users_module:step", "users_module:make_step", "users_module:Nested.step"])
def test_a_users_function(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    content, profiles = profiled("--function", name)
    assert content["function"] == name and list(profiles) == ["function"]
    counts = profiles["function"].operators
    assert counts["aten.mm"] == 2 and counts["aten.ones"] == 1
    text = capsys.readouterr().out
    assert text.startswith(f"{name}\n") and "other backward" in text
    assert sys.modules["users_module"].calls.count("made") == (name == "users_module:make_step")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--function", "users_module"], "it must be MODULE:NAME"),
        (["--function", "no_such_module:step"], "there is no module 'no_such_module' here or installed"),
        (["--function", "users_module:nothing"], "'nothing' is not in users_module"),
        (["--function", "users_module:calls"], "users_module:calls is of type list"),
        (["--function", "users_module:takes"], "users_module:takes takes (x)"),
        (["--function", "users_module:step", "--algo", "qmix"], "--algo cannot be given with --function"),
        (["--function", "users_module:step", "--batch-size", "3"], "--batch-size cannot be given with --function"),
        (["--algo", "qmixx"], "algorithm must be one of"),
        (["--graphs"], "--graphs needs --device cuda, got cpu"),
        (["--batch-size", "0"], "--batch-size is 0; it must be at least 1"),
        (["--preset", "epymarl", "--against", "public"], "no baseline is written for"),
    ],
)
def test_wrong_words_are_one_sentence(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", *words]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.startswith("fastmix profile: ") and captured.err.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_gpu_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", "--device", "cuda"]) == 2
    assert "this torch finds no usable GPU" in capsys.readouterr().err


def test_bugs_of_a_users_function_keep_their_traceback() -> None:
    with pytest.raises(RuntimeError, match="users_module:fails failed") as raised:
        main(["profile", "--function", "users_module:fails"])
    assert isinstance(raised.value.__cause__, ValueError)


def test_what_a_users_module_lacks_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", "--function", "users_broken:step"]) == 1
    assert "No module named 'no_such_package'" in capsys.readouterr().err


def test_threads_are_put_back() -> None:
    torch.set_num_threads(2)
    profiled("--shape", "matrix")
    assert torch.get_num_threads() == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_replay_stands_beside_the_step_on_cuda(capsys: pytest.CaptureFixture[str]) -> None:
    content, profiles = profiled(*SMALL, "--device", "cuda", "--graphs", "--against", "public")
    assert content["environment"]["gpu"]["name"]
    assert [p.name for p in profiles["replay"].parts] == ["graph replay"]
    assert profiles["replay"].total.kernels and profiles["replay"].total.synchronisations == 0
    public = profiles["public"].total
    assert public.kernels and public.kernels > 10 * (profiles["ours"].total.kernels or 0)
    assert "what a replay runs has no names" in capsys.readouterr().out
