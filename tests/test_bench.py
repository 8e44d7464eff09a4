"""The benchmarks: the harness, the baselines' numbers, and what ``fastmix bench`` prints."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastmix.algorithms import REGISTRY, Scheme, make
from fastmix.cli import main
from fastmix.experiments.bench import baselines, cases, joint, report, steps, table
from fastmix.experiments.bench.parity import Error, Results, compared
from fastmix.testing import assert_close, bench
from fastmix.testing.bench import Timing, interleaved, speedup, summarise
from fastmix.testing.golden import Golden, folder, load
from tests.generators import SHAPES
from tests.golden_rules import Setting, by_name, make_batch, make_learner, make_resq

QUICK = report.Effort(rounds=2, warmup=1, min_time=0.0, max_time=1.0)
EXACT = 1e-9
PRESETS = ("pymarl", "pymarl2")
PUBLIC_LEARNERS = ("q_learner", "nq_learner", "dmaq_qatten_learner", "max_q_learner")


# -------------------------------------------------------------------------------------------------------------- harness


def test_every_round_runs_every_contestant_and_begins_with_another() -> None:
    calls: list[str] = []
    timings = interleaved({name: lambda name=name: calls.append(name) for name in "abc"}, rounds=4, warmup=2)  # type: ignore[misc]
    assert "".join(calls) == "aabbcc" + "abc" + "bca" + "cab" + "abc"
    assert list(timings) == ["a", "b", "c"]
    assert all(timing.n == len(timing.samples) == 4 for timing in timings.values())


class Clock:
    """A clock that only moves when told, in place of the machine's."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(bench.time, "perf_counter", lambda: self.now)

    def takes(self, *seconds: float) -> Callable[[], None]:
        """A contestant whose calls take ``seconds`` one after another, the last of them for ever."""
        durations = itertools.chain(seconds, itertools.repeat(seconds[-1]))

        def call() -> None:
            self.now += next(durations)

        return call


def test_warm_up_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    timing = interleaved({"once slow": Clock(monkeypatch).takes(50.0, 1.0)}, rounds=3, warmup=1)["once slow"]
    assert timing.samples == (1.0, 1.0, 1.0)


def test_short_calls_are_repeated_and_the_sample_is_per_call(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    timings = interleaved({"short": clock.takes(0.25), "long": clock.takes(8.0)}, rounds=2, warmup=1, min_time=2.0)
    assert timings["short"].samples == (0.25, 0.25)
    assert timings["long"].samples == (8.0, 8.0)
    assert clock.now == 0.25 + 8.0 + 2 * (8 * 0.25 + 8.0)


def test_rounds_end_with_the_time_but_not_before_five(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    assert interleaved({"slow": clock.takes(10.0)}, rounds=1000, max_time=1.0)["slow"].n == 5
    assert interleaved({"quick": clock.takes(1.0)}, rounds=1000, max_time=9.5)["quick"].n == 10


@pytest.mark.parametrize(("contestants", "rounds", "warmup"), [({}, 1, 1), ({"a": int}, 0, 1), ({"a": int}, 1, 0)])
def test_nothing_to_measure_is_an_error(contestants: dict[str, Any], rounds: int, warmup: int) -> None:
    with pytest.raises(ValueError, match="must"):
        interleaved(contestants, rounds=rounds, warmup=warmup)


def test_summary_and_ratios() -> None:
    ours, other = summarise([1.0, 2.0, 3.0, 4.0, 5.0, 100.0]), summarise([2.0, 6.0, 6.0, 8.0, 5.0, 300.0])
    assert (ours.median, ours.p20, ours.p80, ours.n) == (3.5, 2.0, 5.0, 6)
    # The ratios within the rounds are 2, 3, 2, 2, 1, 3; the ratio of the medians would be 6 / 3.5.
    assert speedup(other, ours) == 2.0
    assert ours.as_milliseconds() == {"median_ms": 3500.0, "p20_ms": 2000.0, "p80_ms": 5000.0, "n": 6}
    with pytest.raises(ValueError, match="same call"):
        speedup(other, Timing(1.0, 1.0, 1.0, 1))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells a process its peak memory")
def test_peak_memory_sees_what_was_freed_again() -> None:
    size = 64 * 2**20
    held: list[Tensor] = []
    peak = bench.peak_memory(lambda: torch.ones(size // 4).sum())
    kept = bench.peak_memory(lambda: held.append(torch.ones(size // 4)))
    nothing = bench.peak_memory(lambda: None)
    assert peak is not None and kept is not None and nothing is not None
    assert 0.95 * size < peak < 1.2 * size
    assert 0.95 * size < kept < 1.2 * size
    assert nothing < 0.05 * size


def test_saved_bytes_counts_storages_once_and_no_inputs() -> None:
    weight, x = torch.randn(100, 50, requires_grad=True), torch.randn(20, 100)
    # exp and its square keep one result of 20 x 50; the product keeps its inputs only.
    assert bench.saved_bytes(lambda: (x @ weight).exp() ** 2, [weight, x]) == 20 * 50 * 4


# ------------------------------------------------------------------------------------------------------------ baselines


def learner_files() -> list[Any]:
    """Training steps of public learners that the baselines are written for."""
    params = []
    for path in sorted(folder(Path(__file__).parent / "golden").glob("*__step__*.npz")):
        golden = load(path)
        config = golden.config
        elsewhere = {"q_lambda", "use_per", "standardise_rewards", "n_step"} & config.keys()
        elsewhere |= {name for name in ("central_action_embed",) if config.get(name, 1) > 1}
        elsewhere |= {"double_q"} if config["mixer"] == "dmaq" and not config.get("double_q", True) else set()
        mixed = config["mixer"] in ("vdn", "qmix", "dmaq")
        if mixed and config["learner"] in PUBLIC_LEARNERS and not elsewhere:
            params.append(pytest.param(golden, id=golden.name))
    for path in sorted(folder(Path(__file__).parent / "golden").glob("resq.learner.*signed*.npz")):
        params.append(pytest.param(load(path), id=path.stem))
    return params


@pytest.mark.parametrize("golden", learner_files())
def test_baseline_is_the_public_step(golden: Golden) -> None:
    setting = Setting("reference", torch.float64, "cpu")
    build = make_resq if "learner" in golden.name else make_learner
    ours, batch = build(golden, setting), make_batch(golden, setting)
    with steps.default_dtype(torch.float64):
        learner = steps.public_learner(ours, ours.scheme)
    out = learner.step(steps.public_batch(batch, ours.scheme.n_actions))
    outputs = golden.outputs
    loss_name = next((name for name in ("loss/loss_td", "loss/loss", "loss") if name in outputs), None)
    if loss_name is not None:
        assert_close(out["loss"], outputs[loss_name].double(), EXACT, name="loss")
    if "grad_norm" in outputs:
        assert_close(out["grad_norm"], outputs["grad_norm"].double(), EXACT, name="grad_norm")
    keys = {id(p): f"{net}.{key}" for net, module in ours.networks.items() for key, p in module.named_parameters()}
    after = {keys[id(mine)]: theirs for mine, theirs in steps.parameter_pairs(ours, learner)}
    for key, expected in by_name(golden, golden.after).items():
        assert_close(after[key], expected.double(), EXACT, name=f"after/{key}")


def test_golden_files_of_training_steps_exist() -> None:
    assert len(learner_files()) >= 4


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("algo", steps.WITH_BASELINE)
@pytest.mark.parametrize("shape", ["matrix", "3m"])
def test_our_step_is_the_baselines(algo: str, shape: str, preset: str) -> None:
    sizes = SHAPES[shape]
    scheme = Scheme(sizes.n_agents, sizes.n_actions, sizes.obs_dim, sizes.state_dim, min(sizes.steps, 7))
    assert steps.step_error(algo, scheme, preset) < EXACT


@pytest.mark.parametrize("algo", sorted(REGISTRY.keys() - set(steps.WITH_BASELINE)))
def test_what_has_no_baseline_is_refused(algo: str) -> None:
    scheme = Scheme(n_agents=3, n_actions=4, obs_dim=5, state_dim=6, episode_limit=9)
    with pytest.raises(ValueError, match="no baseline is written for"):
        steps.step_error(algo, scheme, "pymarl")


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("algo", steps.WITH_BASELINE)
def test_our_gradients_are_the_baselines(algo: str, preset: str) -> None:
    scheme = Scheme(n_agents=3, n_actions=4, obs_dim=5, state_dim=6, episode_limit=9)
    with steps.default_dtype(torch.float64):
        ours = make(algo, scheme, preset=preset, seed=1)
        steps.perturb_targets(ours)
        learner = steps.public_learner(ours, scheme)
        steps.share_fractions(ours, learner)
        batch = steps.random_batch(scheme, 5)
        losses = ours.losses(batch)["loss"], learner.loss(steps.public_batch(batch, scheme.n_actions))
    assert_close(losses[0].detach(), losses[1].detach(), EXACT, name="loss")
    for loss in losses:
        loss.backward()
    compared = 0
    for mine, theirs in steps.parameter_pairs(ours, learner):
        assert (mine.grad is None) == (theirs.grad is None)
        if mine.grad is not None and theirs.grad is not None:
            assert_close(mine.grad, theirs.grad, EXACT, name=f"gradient of shape {tuple(mine.shape)}")
            compared += 1
    assert compared == len(learner.parameters)


@pytest.mark.parametrize(
    ("algo", "settings", "named"),
    [
        ("qmix", {"targets": "n_step"}, "targets"),
        ("qmix", {"qmix_pos_func": "softplus"}, "qmix_pos_func"),
        ("qmix", {"agent": "ff"}, "agent"),
        ("qmix", {"weighting": "cw"}, "weighting"),
        ("qplex", {"mixer": "qplex_dmaq_qatten"}, "DMAQQattenMixer"),
        ("cw_qmix", {"central_action_embed": 2}, "central_action_embed"),
        ("cw_qmix", {"double_q": False}, "double_q"),
        ("resq", {"condition": "hysteretic"}, "condition"),
        ("resq", {"compat": "released"}, "compat"),
        ("powqmix", {"recogniser_weights": "importance"}, "ImportanceRecogniser"),
    ],
)
def test_a_step_without_baseline_is_named(algo: str, settings: dict[str, Any], named: str) -> None:
    scheme = Scheme(n_agents=2, n_actions=3, obs_dim=4, state_dim=6, episode_limit=2)
    with pytest.raises(ValueError, match=named):
        steps.public_learner(make(algo, scheme, **settings), scheme)


SMALL_CASES = [
    pytest.param(lambda: cases.monotonic("3m", 33, compiled=()), id="monotonic training"),
    pytest.param(lambda: cases.monotonic("27m_vs_30m", 3, train=False, compiled=()), id="monotonic forward"),
    pytest.param(lambda: joint.attention("3m", 33, compiled=()), id="attention training"),
    pytest.param(lambda: joint.unrestricted("3m", 33, train=False, compiled=()), id="unrestricted forward"),
    pytest.param(lambda: joint.recognise("3m", 33, compiled=()), id="recognise training"),
    pytest.param(lambda: joint.duplex("3m", 33, compiled=()), id="duplex training"),
    pytest.param(lambda: joint.duplex("27m_vs_30m", 3, train=False, compiled=()), id="duplex forward"),
    pytest.param(lambda: cases.recurrent("matrix"), id="recurrent training"),
    pytest.param(lambda: cases.recurrent("3m", train=False), id="recurrent forward"),
    pytest.param(lambda: cases.acting("MMM2", 3), id="acting"),
    pytest.param(lambda: cases.returns(4, 9), id="returns"),
    pytest.param(lambda: cases.select(4, 5, 3, 6), id="select"),
    pytest.param(lambda: cases.select(4, 5, 3, 6, train=True), id="select training"),
    pytest.param(lambda: cases.td_loss(4, 9), id="td_loss"),
    pytest.param(lambda: cases.quantile(4, 9, 5), id="quantile"),
    pytest.param(lambda: joint.quantile_mix("3m", 33, 5, compiled=()), id="quantile_mix"),
]


@pytest.mark.parametrize("build", SMALL_CASES)
def test_contestants_of_a_case_compute_the_same(build: Any) -> None:
    case = build()
    errors, allowed = case.measured_errors()
    assert all(error.within(allowed) for error in errors.values())
    assert all(error.values > 0 for name, error in errors.items() if case.op != "select")
    results = {name: flat(call()) for name, call in case.contestants.items() if name != "products"}
    assert len(results) > 1
    for name, values in results.items():
        for index, (value, ours) in enumerate(zip(values, results["ours"], strict=True)):
            if case.op == "recurrent" and case.phase == "forward" and name != "ours":
                value = value.view(ours.shape[1], -1, *ours.shape[2:]).transpose(0, 1)  # time first
            # Zero is what a softmax's argument gets that is the same for all agents.
            assert_close(value.reshape(ours.shape), ours, 1e-5, name=f"{name}, result {index}", zero=1e-7)


def flat(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def test_products_of_monotonic_are_the_listed_ones() -> None:
    rows, A, S = 5, 3, 48
    with FlopCounterMode(display=False) as counter:
        baselines.load("operators").monotonic_products(rows, A, S)()
    assert counter.get_total_flops() == rows * 2 * (2 * 192 * S + 3 * 64 * 32 * (A + 1) + 96)


def test_products_of_small_networks_are_the_listed_ones() -> None:
    with FlopCounterMode(display=False) as counter:
        baselines.load("operators").network_products(5, [(7, 11)], [(11, 3), (3, 2)])()
    assert counter.get_total_flops() == 5 * 2 * (2 * 7 * 11 + 3 * (11 * 3 + 3 * 2))


def test_products_of_duplex_are_the_listed_ones() -> None:
    rows, A, U, S, K = 5, 3, 9, 48, 4
    with FlopCounterMode(display=False) as counter:
        baselines.load("operators").duplex_products(rows, A, U, S)()
    first = (2 + 3 * K) * 64 * S + K * 64 * A * U
    assert counter.get_total_flops() == rows * 2 * (2 * first + 3 * 64 * (2 * A + K * (1 + 2 * A)))


@pytest.mark.parametrize("T", [1, 2, 5])
def test_products_of_recurrent_are_the_listed_ones(T: int) -> None:
    rows, n_inputs, n_actions, D = 4, 7, 3, 64
    with FlopCounterMode(display=False) as counter:
        baselines.load("operators").recurrent_products(rows, T, n_inputs, n_actions)()
    every_step = 2 * D * n_inputs + 3 * D * (3 * D) + 3 * D * n_actions
    recurrent = 3 * D * (3 * D)
    assert counter.get_total_flops() == 2 * rows * (T * every_step + (T - 1) * recurrent)


def test_memory_of_training_is_measured_in_processes_of_their_own() -> None:
    rows, A, E = 512, SHAPES["3m"].n_agents, 32
    result = table.memory("monotonic", threads=1, shape="3m", rows=rows)
    memory = result["memory"]
    assert list(memory) == ["ours", "eager"]
    assert memory["eager"]["saved_bytes"] > 2 * rows * A * E * 4  # generated weights, before and after abs
    assert result["parity"]["passed"]
    content = report.report([result], "float32")
    assert "### monotonic, peak memory" in report.markdown(content)
    assert "kept for backward" in report.text(content)


# -------------------------------------------------------------------------------------------------------------- reports


def test_what_differs_from_the_reference_is_not_timed() -> None:
    calls: list[None] = []
    for error in (Error(1e-3), Error(math.nan), Error(0.0, math.inf)):
        contestants = {"ours": lambda: calls.append(None)}
        case = cases.Case("op", "forward", "3m", {}, contestants, {"ours": lambda e=error: e}, Error(1e-5, 1e-5))  # type: ignore[misc]
        result = report.measure(case, QUICK, {"eager": 2.0})
        assert not calls and not result["contestants"] and not result["ratios"]
        assert result["met"] is False and not report.all_agree([result])
        content = report.report([result], "float32")
        assert "not timed" in report.text(content)
        assert "differs from the reference" in report.markdown(content)


def test_ours_may_err_by_twice_what_the_public_way_errs_by() -> None:
    floor = Error(1e-3, 1e-2)
    assert Error(4e-4, 3e-3).allowed(floor) == floor
    assert Error(4e-3, 3e-2).allowed(floor) == Error(8e-3, 6e-2)
    assert Error(math.nan, math.inf).allowed(floor) == floor
    assert Error(1e-3, 1e-2).within(floor) and not Error(1e-3, 2e-2).within(floor)
    assert (
        not Error(2e-3).within(floor) and not Error(math.nan).within(floor) and not Error(0.0, math.nan).within(floor)
    )


def test_errors_are_the_largest_and_the_reference_runs_once() -> None:
    runs: list[None] = []

    def exact() -> Results:
        runs.append(None)
        return [torch.tensor([3.0, 4.0]), torch.ones(2)], [torch.ones(4), torch.zeros(3)]

    def off(value: float, gradient: float) -> Results:
        return [torch.tensor([3.0, 4.0]) * (1 + value)], [torch.ones(4) * (1 - gradient), torch.zeros(3)]

    errors = compared({"ours": lambda: off(0.25, 0.5), "eager": lambda: off(0.0, math.nan)}, exact)
    assert errors["ours"]() == (0.25, 0.5)
    assert errors["eager"]().values == 0.0 and math.isnan(errors["eager"]().gradients)
    assert len(runs) == 1


def test_goals_are_judged() -> None:
    assert report.judge({"eager": 2.0, "products": 0.9}, {"eager": 2.0, "products": 1.0})["met"] is False
    assert report.judge({"eager": 2.0, "products": 1.0}, {"eager": 2.0, "products": 1.0})["met"] is True
    assert report.judge({"eager": 2.0}, {})["met"] is None
    # What was not measured in this run is not judged.
    assert report.judge({"eager": 2.0}, {"eager": 1.0, "compile": 1.5}) == {"goals": {"eager": 1.0}, "met": True}


def test_step_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--shape", "matrix", "--batch", "3", "--steps", "2"]
    assert main(["bench", "step", "--algo", "vdn", *sizes, "--rounds", "2", "--threads", "1", "--json", "-"]) == 0
    content = json.loads(capsys.readouterr().out)
    recorded = {"fastmix", "torch", "python", "cpu", "threads", "command", "load_average", "backends", "core"}
    assert recorded <= content["environment"].keys()
    assert content["environment"]["threads"] == 1 and content["dtype"] == "float32"
    (result,) = content["results"]
    assert result["op"] == "step vdn" and result["sizes"] == {"episodes": 3, "steps": 2}
    assert result["parity"]["passed"] and result["parity"]["error"] < EXACT
    assert result["contestants"].keys() == {"ours", "eager"}
    assert result["contestants"]["ours"].keys() == {"median_ms", "p20_ms", "p80_ms", "n"}
    assert result["ratios"].keys() == {"eager"} and result["ratios"]["eager"] > 0


def test_ops_as_text_and_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    ops = ["--op", "returns", "--op", "td_loss", "--op", "monotonic", "--op", "recurrent", "--acting"]
    effort = ["--rounds", "2", "--baseline", "eager", "--shape", "matrix", "--rows", "2", "--dtype", "float64"]
    assert main(["bench", "ops", *ops, *effort, "--json", str(tmp_path / "sub" / "ops.json")]) == 0
    printed = capsys.readouterr().out
    assert "returns forward, 128x1" in printed and "x ours" in printed
    content = json.loads((tmp_path / "sub" / "ops.json").read_text())
    assert [result["op"] for result in content["results"]] == ["returns", "td_loss", "monotonic", "recurrent"]
    assert content["dtype"] == "float64"
    tables = report.markdown(content)
    assert (
        "### monotonic, forward+backward" in tables
        and "| shape | rows | ours | eager | products | goal | met |" in tables
    )


@pytest.mark.parametrize(
    "arguments", [["step", "--baseline", "jax"], ["step", "--batch", "0"], ["step", "--algo", "reinforce"], []]
)
def test_wrong_arguments_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status = main(["bench", *arguments])
    except SystemExit as stopped:  # argparse's way
        status = int(stopped.code or 0)
    assert status == 2
    assert capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch.compile's own
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_compiled_baselines_compute_the_same() -> None:
    case = steps.step("qmix", "matrix", 4, 2, against=steps.BASELINES)
    for _ in range(2):
        losses = {name: call()["loss"] for name, call in case.contestants.items()}  # type: ignore[index]
        for name in ("ours", "compile", "autotune", "whole"):
            assert_close(losses[name], losses["eager"], 1e-5, name=name)
