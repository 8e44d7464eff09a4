"""Settings, the arguments made from them, and what is said about wrong ones."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import pytest
import torch

from fastmix.algorithms import AlgorithmConfig
from fastmix.algorithms.config import option
from fastmix.train import replay
from fastmix.train.arguments import add_dataclass_arguments, given
from fastmix.train.config import ReplayDevice, TrainConfig
from fastmix.train.plan import Plan


@dataclass(frozen=True)
class Example:
    steps: int = option(10, "how many; 100% of them")
    rate: float = option(0.5, "how fast")
    name: str = option("x", "which")
    fast: bool = option(False, "whether")
    kind: Literal["a", "b"] = option("a", "what")
    limit: int | None = option(None, "at most")
    hidden: int = 3  # no help, no argument


def parse(*words: str) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    add_dataclass_arguments(parser, Example)
    return given(parser.parse_args(words), Example)


def test_only_what_was_given_is_given() -> None:
    assert parse() == {}
    assert parse("--steps", "3", "--no-fast", "--limit", "4") == {"steps": 3, "fast": False, "limit": 4}
    assert parse("--fast", "--kind", "b", "--rate", "1e-3", "--name", "y") == {
        "fast": True, "kind": "b", "rate": 1e-3, "name": "y",
    }  # fmt: skip


@pytest.mark.parametrize(("text", "value"), [("20_000", 20_000), ("2e6", 2_000_000), ("-1", -1)])
def test_whole_numbers_may_be_written_short(text: str, value: int) -> None:
    assert parse(f"--steps={text}") == {"steps": value}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "1.5"], "argument --steps: invalid integer value: '1.5'"),
        (["--steps", "x"], "argument --steps: invalid integer value: 'x'"),
        (["--kind", "c"], "invalid choice: 'c'"),
        (["--hidden", "1"], "unrecognized arguments: --hidden"),
    ],
)
def test_wrong_words_are_named(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(*words)
    assert message in capsys.readouterr().err


def test_help_shows_fields_and_defaults() -> None:
    parser = argparse.ArgumentParser()
    add_dataclass_arguments(parser, Example)
    text = " ".join(parser.format_help().split())
    assert "--steps N how many; 100% of them (default: 10)" in text
    assert "--limit N at most" in text and "--hidden" not in text


def test_every_setting_has_help_and_becomes_an_argument() -> None:
    parser = argparse.ArgumentParser()
    add_dataclass_arguments(parser, TrainConfig)
    add_dataclass_arguments(parser, AlgorithmConfig)  # no name may occur in both
    for cls in (TrainConfig, AlgorithmConfig):
        for field in dataclasses.fields(cls):
            assert field.name == "overrides" or field.metadata["help"], field.name


def test_unknown_types_are_refused() -> None:
    @dataclass
    class Odd:
        x: int | str = option(1, "both")

    # The hints of a class inside a function cannot be looked up by name, so they are given as objects.
    Odd.__annotations__ = {"x": int | str}
    with pytest.raises(TypeError, match=r"Odd\.x"):
        add_dataclass_arguments(argparse.ArgumentParser(), Odd)


def test_configs_survive_json() -> None:
    config = TrainConfig(algo="vdn", t_max=10, overrides={"lr": 0.1, "batch_size": 4})
    assert TrainConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    with pytest.raises(ValueError, match="'colour'"):
        TrainConfig.from_json({"colour": "red"})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"t_max": 0}, "t_max is 0; it must be at least 1"),
        ({"threads": 0}, "threads is 0"),
        ({"test_interval": 0}, "test_interval is 0"),
        ({"keep_checkpoints": 0}, "keep_checkpoints is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**32}, "between 0 and"),
        ({"epsilon_decay": "step"}, "epsilon_decay is 'step'; it must be one of 'linear', 'exp'"),
        ({"stored_termination": "x"}, "one of 'true', 'pymarl'"),
        ({"replay_obs_dtype": "int4"}, "one of 'auto', 'float32'"),
    ],
)
def test_wrong_settings_are_refused_at_once(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"algo": "qmax"}, ValueError, "qmax"),
        ({"preset": "mine"}, ValueError, "mine"),
        ({"env": "matrix:none"}, ValueError, "matrix:resq1"),
        ({"env": "matrix:@/no/file.json"}, FileNotFoundError, "no file"),
        ({"device": "gpu"}, ValueError, "device is 'gpu'"),
        ({"overrides": {"lr": -1.0}}, ValueError, "lr"),
        ({"overrides": {"learning_rate": 1.0}}, ValueError, "learning_rate"),
        ({"overrides": {"epsilon_start": 0.1, "epsilon_finish": 0.5}}, ValueError, "epsilon_finish is 0.5"),
        ({"overrides": {"buffer_size": 10**13}}, MemoryError, "lower --buffer-size"),
    ],
)
def test_a_plan_checks_what_depends_on_algorithm_and_environment(
    settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Plan.of(TrainConfig(**settings))


def test_a_plan_knows_presets_and_says_the_replay_ratio() -> None:
    plan = Plan.of(TrainConfig(algo="qmix", preset="pymarl2", overrides={"lr": 0.25}))
    assert (plan.settings.lr, plan.settings.batch_size, plan.t_max) == (0.25, 128, 20_000)
    assert any("replay ratio 16" in sentence for sentence in plan.sentences())
    plan = Plan.of(TrainConfig(algo="qmix", preset="pymarl", t_max=77, updates_per_round=2))
    assert plan.t_max == 77
    assert any("replay ratio 64" in sentence for sentence in plan.sentences())


def test_parallel_runs_need_memory_together(monkeypatch: pytest.MonkeyPatch) -> None:
    config = TrainConfig()
    enough_for_one = int(1.5 * Plan.of(config).replay_bytes)
    monkeypatch.setattr(replay, "available_memory", lambda: enough_for_one)
    Plan.of(config)
    with pytest.raises(MemoryError, match="10000 episodes"):
        Plan.of(config, n_parallel=2)


@pytest.fixture
def gpu_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Pretends that there is a GPU with so many free bytes."""

    def pretend(free: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(replay, "free_device_memory", lambda device: free)

    return pretend


@pytest.mark.parametrize("choice", ["auto", "cuda"])
def test_replay_goes_to_the_device_where_it_has_room(choice: ReplayDevice, gpu_of: Callable[[int], None]) -> None:
    config = TrainConfig(device="cuda:0", replay_device=choice)
    gpu_of(10**9)
    plan = Plan.of(config)
    assert plan.replay_device == torch.device("cuda:0")
    memory, graphs, *_ = plan.sentences()
    assert memory.startswith("replay buffer: 5000 episodes of up to 1 steps take ")
    assert memory.endswith(" of 1 GB available on cuda:0 (allocated at once)")
    assert graphs == "training step: captured as a CUDA graph for every batch length (multiples of 16 steps)"


def test_replay_stays_with_the_host_where_the_device_has_no_room(gpu_of: Callable[[int], None]) -> None:
    config = TrainConfig(device="cuda", graphs=False)
    gpu_of(int(1.2 * Plan.of(TrainConfig()).replay_bytes))  # enough, but it may not take all of it
    plan = Plan.of(config)
    assert plan.replay_device is None
    memory, reason, graphs, *_ = plan.sentences()
    assert memory.endswith("(touched as it fills)")
    assert "does not fit on cuda" in reason and "75%; it stays in host memory" in reason
    assert graphs == "training step: without CUDA graphs (--no-graphs)"
    with pytest.raises(MemoryError, match=r"does not fit on cuda: .* leave it to --replay-device auto"):
        Plan.of(dataclasses.replace(config, replay_device="cuda"))


def test_replay_stays_with_the_host_where_it_is_told_to(gpu_of: Callable[[int], None]) -> None:
    gpu_of(10**12)
    plan = Plan.of(TrainConfig(device="cuda", replay_device="cpu"))
    assert plan.replay_device is None and plan.host_reason is None
    assert Plan.of(TrainConfig()).replay_device is None
    with pytest.raises(ValueError, match="replay_device is 'cuda'; with device 'cpu' it must be 'auto' or 'cpu'"):
        Plan.of(TrainConfig(replay_device="cuda"))


def test_parallel_runs_need_the_device_together(gpu_of: Callable[[int], None]) -> None:
    config = TrainConfig(device="cuda")
    gpu_of(2 * Plan.of(TrainConfig()).replay_bytes)
    assert Plan.of(config).replay_device is not None
    assert Plan.of(config, n_parallel=2).replay_device is None
