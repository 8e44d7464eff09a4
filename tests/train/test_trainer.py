"""The training loop: its counts, its logs, and that a run which stops anywhere goes on as if it had not."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastmix import envs
from fastmix.algorithms import Algorithm
from fastmix.algorithms.optimiser import Optimiser
from fastmix.backends import backend
from fastmix.train import checkpoint
from fastmix.train import replay as replay_module
from fastmix.train import trainer as trainer_module
from fastmix.train.config import TrainConfig
from fastmix.train.feed import StreamedFeed
from fastmix.train.learner import Learner
from fastmix.train.logging import read_metrics
from fastmix.train.plan import Plan, make_replay
from fastmix.train.replay import Draw
from fastmix.train.storage import DeviceStorage, HostStorage
from fastmix.train.trainer import CHECKPOINT_FOLDER, Interrupted, Progress, Trainer, load_run
from tests.train.ragged import make_ragged
from tests.train.tape import TapeRecorder

SMALL = {"batch_size": 6, "buffer_size": 20, "batch_size_run": 4, "rnn_hidden_dim": 8, "epsilon_anneal_time": 200,
         "mixing_embed_dim": 4, "hypernet_embed": 8, "target_update_interval": 8}  # fmt: skip
MATRIX = TrainConfig(
    env="matrix:stochastic",
    t_max=160,
    test_interval=50,
    log_interval=40,
    checkpoint_interval=32,
    test_nepisode=4,
    overrides=SMALL,
)
RAGGED = replace(
    MATRIX, env="ragged:x", t_max=700, test_interval=150, log_interval=100, checkpoint_interval=90, bucket=4
)


@pytest.fixture(autouse=True)
def _ragged_env(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(envs.REGISTRY, "ragged", make_ragged)
    torch.set_num_threads(1)


def final_state(trainer: Trainer) -> dict[str, Any]:
    """Everything a checkpoint holds, less the clock."""
    state = trainer.state_dict()
    for name in ("wall_s", "log_offset"):
        del state["counters"][name]
    return state


def assert_identical(a: Any, b: Any, where: str = "state") -> None:
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_identical(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, np.ndarray):
        np.testing.assert_array_equal(a, b, err_msg=where)
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_identical(x, y, f"{where}[{i}]")
    else:
        assert a == b, where


class Killed(Exception):  # noqa: N818 - what happens to a run, not an error
    """Stands in for a kill: nothing after it runs."""


def killed_after(t_env: int) -> Progress:
    def on_progress(now: int) -> bool:
        if now >= t_env:
            raise Killed
        return False

    return on_progress


PREY = "prey:p-1,n_agents=3,n_stags=2,world_shape=4x4"
CONFIGS = {
    "qmix": replace(MATRIX, algo="qmix"),
    "vdn pymarl": replace(MATRIX, algo="vdn", preset="pymarl"),
    "epymarl": replace(MATRIX, algo="qmix", preset="epymarl"),
    "ragged qmix": replace(RAGGED, algo="qmix"),
    "ragged iql, two updates": replace(RAGGED, algo="iql", updates_per_round=2, stored_termination="pymarl"),
    "ragged prioritised": replace(RAGGED, algo="qmix", overrides=SMALL | {"use_per": True}),
    "prey": replace(RAGGED, algo="vdn", env=f"{PREY},episode_limit=9", replay_obs_dtype="auto"),
    "float16 replay": replace(RAGGED, algo="vdn", replay_obs_dtype="float16", epsilon_decay="exp"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_killed_run_ends_as_one_that_was_never_killed(tmp_path: Path, name: str) -> None:
    config = CONFIGS[name]
    whole = Trainer(config, tmp_path / "whole")
    whole.run()
    assert config.t_max is not None
    for kill_at in (1, config.t_max // 3, config.t_max // 2, config.t_max - 5):
        with pytest.raises(Killed):
            Trainer(config, tmp_path / "killed", on_progress=killed_after(kill_at)).run()
        # What happens to torch's own generator in between must not matter.
        torch.manual_seed(kill_at)
    for half_written in (".best.safetensors.9.tmp", f"{CHECKPOINT_FOLDER}/.checkpoint-000000000009.safetensors.9.tmp"):
        (tmp_path / "killed" / half_written).touch()
    resumed = Trainer(config, tmp_path / "killed")
    assert 0 < resumed.counters.t_env < config.t_max
    resumed.run()
    assert not list((tmp_path / "killed").glob("**/*.tmp"))
    assert whole.counters.updates > 10
    assert_identical(final_state(whole), final_state(resumed))
    a, b = (read_metrics(tmp_path / folder / "metrics.jsonl") for folder in ("whole", "killed"))
    clock = ("wall_s", "env_steps_per_s", "updates_per_s")
    assert [{k: v for k, v in r.items() if k not in clock} for r in a] == [
        {k: v for k, v in r.items() if k not in clock} for r in b
    ]


ROADS = ["resident", "streamed", "resident, recorded", "streamed, recorded"]


def take(road: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let trainers keep their episodes and step as on a GPU, for which the CPU stands in."""
    if road.startswith("resident"):
        monkeypatch.setattr(
            trainer_module,
            "make_replay",
            lambda plan, *rest: make_replay(replace(plan, replay_device=torch.device("cpu")), *rest),
        )
    elif road.startswith("streamed"):
        monkeypatch.setattr(
            trainer_module, "make_feed", lambda replay, device: StreamedFeed(replay, replay.storage, device)
        )
    if road.endswith("recorded"):
        monkeypatch.setattr(trainer_module, "Learner", partial(Learner, recorder=TapeRecorder()))


def on_all_steps(algo: Algorithm, **options: Any) -> Learner:
    """A learner that computes padding too, as on a GPU: sums over other rows would round in another way."""
    algo.skips_padding = False
    return Learner(algo, **options)


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("name", ["ragged qmix", "ragged iql, two updates", "ragged prioritised", "float16 replay"])
def test_a_killed_run_may_take_another_road(
    tmp_path: Path, name: str, road: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Episodes on the device or streamed to it, fetched ahead or not, recorded steps or not: the end is the same."""
    config = CONFIGS[name]
    monkeypatch.setattr(Optimiser, "_steps_as_factor", lambda self: self.steps.double())  # as on CUDA
    monkeypatch.setattr(trainer_module, "Learner", on_all_steps)
    with backend("reference"):  # whose every operator passes the tape
        whole = Trainer(config, tmp_path / "whole")
        whole.run()
        for kill_at, way in ((200, road), (350, "host"), (500, road)):
            with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
                take(way, patch)
                Trainer(config, tmp_path / "killed", on_progress=killed_after(kill_at)).run()
        with pytest.MonkeyPatch.context() as patch:
            take(road, patch)
            resumed = Trainer(config, tmp_path / "killed")
            assert resumed.counters.t_env > 0
            resumed.run()
            assert (resumed.learner.captures > 0) == road.endswith("recorded")
    assert_identical(final_state(whole), final_state(resumed))


def test_fetching_ahead_and_episodes_in_between_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison above covers all: batches fetched ahead and used, and batches exchanged for newer ones."""
    taken: list[bool] = []
    original = StreamedFeed._take_pending

    def noted(self: StreamedFeed, draw: Draw) -> Any:
        pending = self._pending is not None
        fetched = original(self, draw)
        if pending:
            taken.append(fetched is not None)
        return fetched

    monkeypatch.setattr(StreamedFeed, "_take_pending", noted)
    take("streamed", monkeypatch)
    Trainer(CONFIGS["ragged iql, two updates"], tmp_path).run()
    assert taken.count(True) > 20 and taken.count(False) > 5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["ragged qmix", "ragged iql, two updates", "ragged prioritised", "float16 replay"])
def test_a_run_on_a_gpu_ends_the_same_whatever_happens_to_it(tmp_path: Path, name: str) -> None:
    """With graphs and without, episodes on the device or streamed to it, left alone or killed and gone on otherwise."""
    resident = replace(CONFIGS[name], device="cuda")
    streamed = replace(resident, replay_device="cpu", graphs=False)
    whole = Trainer(resident, tmp_path / "whole")
    whole.run()
    assert isinstance(whole.replay.storage, DeviceStorage) and whole.learner.captures > 0
    other = Trainer(streamed, tmp_path / "other")
    other.run()
    assert isinstance(other.feed, StreamedFeed) and other.learner.captures == 0
    for kill_at, config in (
        (200, resident),
        (350, replace(streamed, graphs=True)),
        (500, replace(resident, graphs=False)),
    ):
        with pytest.raises(Killed):
            Trainer(config, tmp_path / "killed", on_progress=killed_after(kill_at)).run()
    resumed = Trainer(resident, tmp_path / "killed")
    assert resumed.counters.t_env > 0
    resumed.run()
    assert_identical(final_state(whole), final_state(other))
    assert_identical(final_state(whole), final_state(resumed))


def test_settings_of_the_machine_may_change(tmp_path: Path) -> None:
    Trainer(MATRIX, tmp_path).run()
    changed = replace(MATRIX, graphs=False, replay_device="cpu")
    Trainer(changed, tmp_path).run()
    assert json.loads((tmp_path / "config.json").read_text())["train"]["graphs"] is False
    assert load_run(tmp_path)[0] == changed


def test_a_device_that_fills_up_meanwhile_sends_replay_to_the_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(replay_module, "DeviceStorage", full)
    plan = replace(Plan.of(MATRIX), replay_device=torch.device("cpu"))
    said: list[str] = []
    assert isinstance(make_replay(plan, 0, said.append).storage, HostStorage)
    assert len(said) == 1 and "had no room left for the replay buffer of" in said[0]
    with pytest.raises(MemoryError, match="lower --buffer-size, or leave it to --replay-device auto"):
        make_replay(replace(plan, config=replace(MATRIX, replay_device="cuda")), 0, said.append)


def test_resuming_matters_for_every_part(tmp_path: Path) -> None:
    """The comparison above can fail: leave any part of a checkpoint out, and the run ends elsewhere."""
    config = CONFIGS["ragged qmix"]
    whole = Trainer(config, tmp_path / "whole")
    whole.run()
    with pytest.raises(Killed):
        Trainer(config, tmp_path / "killed", on_progress=killed_after(400)).run()
    saved = checkpoint.load(checkpoint.list_checkpoints(tmp_path / "killed" / CHECKPOINT_FOLDER)[-1])
    for part in ("algo", "replay", "rollout"):
        forgetful = Trainer(config, tmp_path / f"forgets-{part}")
        forgetful.load_state_dict({**saved, part: forgetful.state_dict()[part]})
        forgetful.run()
        ends = [trainer.algo.state_dict()["agent.fc1.weight"] for trainer in (whole, forgetful)]
        assert not torch.equal(*ends), part


def test_the_same_seed_gives_the_same_run_and_another_another(tmp_path: Path) -> None:
    runs = []
    for i, seed in enumerate((3, 3, 4)):
        trainer = Trainer(replace(MATRIX, seed=seed), tmp_path / str(i))
        trainer.run()
        runs.append(trainer.algo.state_dict()["agent.fc1.weight"])
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_rounds_updates_and_target_copies_are_pymarls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(replace(MATRIX, updates_per_round=2), tmp_path)
    events: list[tuple[str, int]] = []

    def noted(kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            events.append((kind, trainer.counters.episodes))
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(trainer.algo, "step", noted("step", trainer.algo.step))
    monkeypatch.setattr(trainer.algo, "update_targets", noted("copy", trainer.algo.update_targets))
    result = trainer.run()
    # 4 episodes a round; the buffer has a batch of 6 after the second round; episodes are counted before the round is.
    steps = [episodes for kind, episodes in events if kind == "step"]
    assert steps == [e for e in range(4, 160, 4) for _ in range(2)]
    assert [episodes for kind, episodes in events if kind == "copy"] == list(range(8, 160, 8))
    # The copy comes straight after the first step that is due.
    assert events[events.index(("copy", 8)) - 1] == ("step", 8) and ("step", 8) in events[events.index(("copy", 8)) :]
    assert (result["t_env"], result["episodes"], result["updates"]) == (160, 160, len(steps))


def test_what_is_logged(tmp_path: Path) -> None:
    Trainer(MATRIX, tmp_path).run()
    records = read_metrics(tmp_path / "metrics.jsonl")
    tests = [r for r in records if "test_return_mean" in r]
    trains = [r for r in records if "loss" in r]
    assert [r["t_env"] for r in tests] == [0, 52, 104, 156, 160]
    for record in tests:
        assert len(record["test_returns"]) == 4 and np.mean(record["test_returns"]) == record["test_return_mean"]
    assert [r["wall_s"] for r in tests] == sorted(r["wall_s"] for r in tests) and tests[0]["wall_s"] > 0
    assert tests[0]["replay_ratio"] == 0 < tests[1]["replay_ratio"] < tests[-1]["replay_ratio"]
    assert [r["t_env"] for r in trains] == [40, 80, 120, 160]
    for record in trains:
        assert record["env_steps_per_s"] > 0 and record["updates_per_s"] > 0
        assert record["buffer_episodes"] == 20
        assert record["replay_ratio"] == pytest.approx(record["updates"] * 6 / record["episodes"])
        assert {
            "epsilon",
            "grad_norm",
            "td_error_abs",
            "q_tot_mean",
            "target_mean",
            "return_mean",
            "wall_s",
        } <= record.keys()
    assert trains[1]["epsilon"] == pytest.approx(1 - 0.95 * 80 / 200)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["train"]["env"] == "matrix:stochastic" and config["algorithm"]["batch_size"] == 6


def test_checkpoints_are_pruned_and_the_last_step_has_one(tmp_path: Path) -> None:
    Trainer(replace(MATRIX, keep_checkpoints=3), tmp_path).run()
    names = [path.name for path in checkpoint.list_checkpoints(tmp_path / CHECKPOINT_FOLDER)]
    assert names == [f"checkpoint-{t:012d}.safetensors" for t in (96, 128, 160)]


def test_a_finished_run_goes_on_to_a_later_end(tmp_path: Path) -> None:
    whole = Trainer(MATRIX, tmp_path / "whole")
    whole.run()
    assert MATRIX.t_max is not None
    Trainer(replace(MATRIX, t_max=MATRIX.t_max // 2), tmp_path / "grown").run()
    grown = Trainer(MATRIX, tmp_path / "grown")
    assert 0 < grown.counters.t_env < MATRIX.t_max
    grown.run()
    # The first end was evaluated too, which training does not notice.
    a, b = final_state(whole), final_state(grown)
    parts = ("algo", "replay", "rollout", "torch_rng")
    assert_identical({part: a[part] for part in parts}, {part: b[part] for part in parts})


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    first = Trainer(MATRIX, tmp_path)
    first.run()
    again = Trainer(MATRIX, tmp_path)
    again.run()
    assert_identical(final_state(first), final_state(again))


def test_best_and_latest_can_be_loaded(tmp_path: Path) -> None:
    trainer = Trainer(MATRIX, tmp_path)
    result = trainer.run()
    config, algo, t_env = load_run(tmp_path)
    assert config == MATRIX and t_env == 160
    assert_identical(algo.state_dict(), trainer.algo.state_dict())
    _, best, best_at = load_run(tmp_path, "best")
    tests = {
        r["t_env"]: r["test_return_mean"] for r in read_metrics(tmp_path / "metrics.jsonl") if "test_return_mean" in r
    }
    del tests[0]  # nothing learnt yet
    assert tests[best_at] == max(tests.values()) == result["best_return"]
    assert best.state_dict().keys() == algo.state_dict().keys()
    absolute = result["absolute"]
    assert absolute["t_env"] == best_at and len(absolute["returns"]) == 10 * 4
    assert absolute["return_mean"] == pytest.approx(np.mean(absolute["returns"]))
    assert Trainer(MATRIX, tmp_path).run()["absolute"] == absolute  # also of a run that had ended
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        load_run(tmp_path / "nowhere")


def test_another_config_does_not_continue_a_run(tmp_path: Path) -> None:
    Trainer(MATRIX, tmp_path).run()
    with pytest.raises(ValueError, match="seed = 0, and it would now be 1"):
        Trainer(replace(MATRIX, seed=1), tmp_path)
    with pytest.raises(ValueError, match="overrides"):
        Trainer(replace(MATRIX, overrides=SMALL | {"lr": 0.1}), tmp_path)
    with pytest.raises(ValueError, match=r"t-max is 80; the runs in .* are of 160 steps, and can only go on"):
        Trainer(replace(MATRIX, t_max=80), tmp_path)


def test_the_constructor_writes_nothing(tmp_path: Path) -> None:
    said: list[str] = []
    Trainer(MATRIX, tmp_path / "run", announce=said.append)
    assert not (tmp_path / "run").exists()
    assert any("replay buffer: 20 episodes" in line for line in said)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, None])
def test_stopping_checkpoints(tmp_path: Path, number: signal.Signals | None) -> None:
    def on_progress(t_env: int) -> bool:
        if t_env == 56 and number is not None:
            os.kill(os.getpid(), number)
        return t_env == 56 and number is None

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match="56 of 160"):
        Trainer(MATRIX, tmp_path / "stopped", on_progress=on_progress).run()
    assert signal.getsignal(signal.SIGINT) is before
    resumed = Trainer(MATRIX, tmp_path / "stopped")
    assert resumed.counters.t_env == 56
    resumed.run()
    whole = Trainer(replace(MATRIX), tmp_path / "whole")
    whole.run()
    assert_identical(final_state(whole)["algo"], final_state(resumed)["algo"])


def test_divergence_stops_with_advice(tmp_path: Path) -> None:
    trainer = Trainer(MATRIX, tmp_path)
    for parameter in trainer.algo.networks["agent"].parameters():
        parameter.data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="the loss is nan at 40 environment steps; lower --lr"):
        trainer.run()


def test_the_loop_learns(tmp_path: Path) -> None:
    """VDN on a game without traps: additive payoffs, best joint action (2, 1)."""
    path = tmp_path / "easy.json"
    path.write_text(json.dumps({"payoff": [[0, 1, 0], [1, 2, 1], [3, 4, 3]]}))
    overrides = SMALL | {"batch_size": 32, "buffer_size": 500, "lr": 1e-2}
    config = TrainConfig(algo="vdn", env=f"matrix:@{path}", t_max=1600, overrides=overrides)
    result = Trainer(config, tmp_path / "run").run()
    assert result["test_return_mean"] == 4.0


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the size of the process from Linux's /proc")
@pytest.mark.parametrize(("env", "rounds"), [("ragged:x", 150), (f"{PREY},episode_limit=20", 250)])  # 1,000 episodes
def test_memory_stays_flat(tmp_path: Path, env: str, rounds: int) -> None:
    config = replace(RAGGED, env=env, t_max=10**6, checkpoint_interval=10**6, test_interval=10**6)
    trainer = Trainer(config, tmp_path)

    def resident_kb() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1000

    for _ in range(60):
        trainer._round()
    before = resident_kb()
    for _ in range(rounds):
        trainer._round()
    # Keeping anything per round (a graph, a batch) would show: a batch of this size is some 50 kB.
    assert resident_kb() - before < 4_000
