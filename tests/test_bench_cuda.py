"""Benchmarks on CUDA: what of them needs no device, and timing itself where there is one."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import stat
import subprocess
import tarfile
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import fastmix
from benchmarks import profile_gpu, sanitize
from fastmix import backends, ops
from fastmix.cli import main
from fastmix.experiments.bench import LONG_PARTS, PARTS, baselines, bounds, cases, report, table_cuda
from fastmix.experiments.bench.bounds import Ceilings
from fastmix.experiments.bench.parity import Error
from fastmix.experiments.bench.report import Planned
from fastmix.experiments.bench.warm import share, warm
from fastmix.testing import bench, profile
from fastmix.testing.bench import Rotating, interleaved

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.sh"
NOMINAL = Ceilings(bandwidth=4.3e12, float32=55e12, tf32=400e12, bfloat16=790e12, launch=2e-6)
"""What the table below was computed with."""

# Microseconds: (agents, state), rows; forward in memory, in tf32 and in bf16; forward that stores, in tf32; backward in
# memory and in tf32.
FLOORS = [
    ((3, 48), 15_360, 0.8, 1.3, 0.7, 3.5, 12.3, 2.6),
    ((3, 48), 61_440, 3.0, 5.4, 2.7, 14.0, 49, 10),
    ((5, 98), 15_360, 1.5, 2.4, 1.2, 4.3, 13.2, 4.3),
    ((5, 98), 61_440, 6.0, 9.6, 4.8, 16.9, 53, 17),
    ((10, 322), 15_360, 4.8, 6.5, 3.3, 7.6, 16.8, 9.9),
    ((10, 322), 61_440, 19.1, 25.9, 13.1, 30.1, 67, 40),
    ((27, 1170), 15_360, 17.4, 21.7, 11.0, 21.7, 30.1, 30.5),
    ((27, 1170), 61_440, 68.7, 86.6, 43.9, 86.6, 120, 122),
]

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


# --------------------------------------------------------------------------------------------------------------- bounds


def printed(value: float) -> Any:
    """Equal to all the digits that the table has."""
    return pytest.approx(value, abs=0.6 if isinstance(value, int) or value > 35 else 0.11)


@pytest.mark.parametrize("row", FLOORS)
def test_floors_of_monotonic(row: tuple[Any, ...]) -> None:
    (A, S), rows, memory, tf32, bf16, stored, backward_memory, backward_tf32 = row
    assert 1e6 * bounds.monotonic_bytes(rows, A, S) / NOMINAL.bandwidth == printed(memory)
    flops = bounds.monotonic_flops(rows, A, S)
    assert 1e6 * flops / NOMINAL.rate("high") == printed(tf32)
    assert 1e6 * flops / NOMINAL.rate("high", torch.bfloat16) == printed(bf16)
    backward = bounds.monotonic_backward_flops(rows, A, S)
    assert 1e6 * backward / NOMINAL.rate("high") == printed(backward_tf32)
    forward = 1e6 * bounds.monotonic(rows, A, S, False, NOMINAL.rate("high"), NOMINAL)
    assert forward == printed(max(memory, tf32))
    both = 1e6 * bounds.monotonic(rows, A, S, True, NOMINAL.rate("high"), NOMINAL)
    assert both == printed(stored + max(backward_memory, backward_tf32))


def test_highest_precision_takes_the_faster_way() -> None:
    assert NOMINAL.rate("highest") == 400e12 / 3
    assert Ceilings(1.0, float32=2.0, tf32=3.0, bfloat16=4.0, launch=0.0).rate("highest") == 2.0


def test_bytes_of_small_ops() -> None:
    assert bounds.returns_bytes(2, 3) == 4 * (3 * 2 * 3 + 2 * 4 + 2 * 3)
    assert bounds.td_loss_bytes(7) == 4 * 7 * 5
    assert bounds.quantile_bytes(7, 8) == 4 * 7 * (6 * 8 + 2)
    # 6 steps of 2 agents, 3 actions: utilities, availability, action, target row (12 bytes), 3 values, greedy, flag.
    assert bounds.select_bytes(12, 2, 3, False) == 12 * (12 + 3 + 8 + 12 + 12 + 8) + 6
    assert bounds.select_bytes(12, 2, 18, True) - bounds.select_bytes(12, 2, 18, False) == 12 * (4 + 72 + 8)


def test_floors_of_recurrent() -> None:
    rate, n = NOMINAL.rate("high"), 320 * 60
    weights = 204 * 64 + 64 * 192 * 2 + 64 * 18
    memory, flops = 4 * n * (204 + 18) / NOMINAL.bandwidth, 2 * n * weights / rate
    assert bounds.recurrent(n, 204, 18, False, rate, NOMINAL) == pytest.approx(max(memory, flops))
    slow = 1e9
    assert bounds.recurrent(n, 204, 18, True, slow, NOMINAL) == pytest.approx(2 * n * (3 * weights - 204 * 64) / slow)


def test_ceilings_are_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "measured", lambda: NOMINAL)
    assert bounds.remembered(tmp_path / "ceilings.json") == NOMINAL
    monkeypatch.setattr(bounds, "measured", None)
    assert bounds.remembered(tmp_path / "ceilings.json") == NOMINAL


# ------------------------------------------------------------------------------------------------------ plan and report


def test_every_part_has_cases_and_every_goal_of_the_table_is_there() -> None:
    assert [*PARTS, *LONG_PARTS] == list(table_cuda._PARTS)
    planned = {part: list(table_cuda.plan([part])) for part in table_cuda._PARTS}
    assert all(planned.values())
    goals = {part: {name for entry in entries for name in entry.goals} for part, entries in planned.items()}
    for entry in (entry for entries in planned.values() for entry in entries):
        inspect.signature(entry.build.func).bind(*entry.build.args, **entry.build.keywords)
    assert goals["small"] == {"floor", "eager"} and goals["monotonic"] == {"eager", "eager graph", "floor"}
    assert goals["recurrent"] == {"gru", "gru graph"} and goals["step"] == {"eager"}
    assert goals["compile"] == {"compile", "compile graph"} and goals["autotune"] == {"autotune", "autotune graph"}
    assert goals["whole"] == set()


def test_a_part_of_the_plan() -> None:
    def kinds(*args: Any, **options: Any) -> set[tuple[str, str | None, str]]:
        entries = table_cuda.plan(*args, **options)
        return {(e.build.func.__name__, e.given("shape"), e.given("setting").name) for e in entries}

    assert kinds(["step"], ["MMM2"]) == {("step", "MMM2", "high"), ("step", "MMM2", "highest")}
    assert kinds(["step", "small"], ["MMM2"], "high") == {("step", "MMM2", "high")} | kinds(["small"])
    short = list(table_cuda.plan(["monotonic", "recurrent", "step"], precision="high", goals=True))
    assert all(entry.goals and entry.given("setting") == table_cuda.HIGH for entry in short)
    assert len(short) == 8 + 16 + 2
    assert not list(table_cuda.plan(["whole"], goals=True))


def test_processes_that_compile_share_the_cases() -> None:
    plan = list(table_cuda.plan(["monotonic", "compile"]))
    shares = [list(share(plan, index, 3)) for index in range(3)]
    assert all(shares) and sorted(plan.index(entry) for part in shares for entry in part) == list(range(len(plan)))
    for entry in plan:  # rows are run-time arguments: cases that differ in nothing else compile the same
        same = [e for e in plan if e.build.func == entry.build.func and all(
            e.given(name) == entry.given(name) for name in ("shape", "setting", "compiled", "against")
        )]  # fmt: skip
        assert sum(all(e in part for e in same) for part in shares) == 1


def test_what_is_compiled_ahead_runs_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[str] = []

    def build(name: str, broken: bool) -> cases.Case:
        contestants = {key: partial(calls.append, f"{name} {key}") for key in ("ours", "ours graph", "compile")}
        if broken:
            raise ImportError("no such thing")
        return cases.Case("op", "step", name, {}, contestants, {}, Error(0.0))

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    warm([Planned(partial(build, "a", False)), Planned(partial(build, "b", True)), Planned(partial(build, "c", False))])
    assert calls == ["a ours", "a compile", "c ours", "c compile"]
    assert "FAILED: ImportError: no such thing" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["0/3", "4/3", "1", "a/b", "/2"])
def test_shares_that_are_none(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "warm", "--share", text])
    assert "must be I/N" in capsys.readouterr().err


def test_backends_that_ours_did_not_choose_take_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "available", lambda op, device, dtype: ("native", "cudnn", "triton", "reference"))
    obs, networks = torch.randn(2, 3, 2, 5), baselines.load("networks")
    params = cases.utility_params(networks.CellAgent(5, 4))

    def call(backend: str | None) -> Any:
        return lambda: ops.recurrent(obs, [params], backend=backend)

    with fastmix.backend("reference"):
        found = cases._backends("recurrent", cases.Setting("cuda"), call)
    assert found.chosen == "reference" and found.others == ("native", "cudnn")
    assert "'triton' was asked for" in found.absent["triton"]
    assert cases._backends("recurrent", cases.FLOAT32, call) == cases._Backends()
    assert cases.returns(2, 3).backend == ""


def test_a_backend_that_errs_is_not_timed() -> None:
    errors = {"ours": Error(1e-4), "eager": Error(1.0), "cudnn": Error(1e-4, 1e-4), "triton": Error(2e-3)}
    assert report._wrong(errors, Error(1e-3, 1e-3)) == {"triton": "differs from the reference by 2.00e-03 / 0.00e+00"}


def test_which_of_ours_a_contestant_is_compared_with() -> None:
    timings = {name: bench.summarise([1.0]) for name in ("ours", "ours graph", "eager", "eager graph")}
    partners = {name: report._partner("ours", name, timings) for name in [*timings, "floor"] if name != "ours"}
    assert partners == {"ours graph": "ours", "eager": "ours", "eager graph": "ours graph", "floor": "ours graph"}
    assert report._partner("ours graph", "eager", timings) == "ours graph"  # of a learner step
    assert report._partner("ours graph", "ours graph", timings) == "ours"
    assert report._partner("ours graph", "eager", {"ours": timings["ours"]}) == "ours"


def test_rotating_calls_take_turns() -> None:
    seen: list[str] = []
    call = Rotating([lambda name=name: seen.append(name) for name in "abc"])  # type: ignore[misc]
    for _ in range(5):
        call()
    assert "".join(seen) == "abcab"


def test_contestants_on_several_sets_of_inputs_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases.Setting, "sets", lambda self, n_bytes: 3)
    for case in (
        cases.returns(2, 5),
        cases.select(2, 3, 2, 4, True),
        cases.td_loss(2, 5),
        cases.quantile(2, 5, 3),
        cases.monotonic("3m", 4),
    ):
        ours, eager = case.contestants["ours"], case.contestants["eager"]
        assert isinstance(ours, Rotating) and len(ours.calls) == 3
        results = [[flat(call()) for _ in range(3)] for call in (ours, eager)]
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a[0], b[0])
        assert not torch.equal(results[0][0][0], results[0][1][0])


def flat(result: Any) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else list(result)


def test_what_cannot_be_built_is_reported() -> None:
    def recurrent(shape: str, setting: cases.Setting) -> cases.Case:
        raise ImportError("no such kernel\nand a trace")

    build = Planned(partial(recurrent, "MMM2", table_cuda.HIGH), {"gru": 8.0})
    with pytest.raises(ImportError):
        report.run([build], report.Effort())
    noted: list[dict[str, Any]] = []
    (result,) = report.run([build], report.Effort(), noted.append, tolerant=True)
    assert noted == [result]
    assert result["note"] == "ImportError: no such kernel" and result["op"] == "recurrent" and result["met"] is False
    content = example([result])
    assert "failed: ImportError: no such kernel" in report.markdown(content)
    assert "failed: ImportError: no such kernel" in report.brief(content)
    assert not report.all_agree([result])


def example(results: list[dict[str, Any]]) -> dict[str, Any]:
    gpu = {"name": "NVIDIA X", "driver": "580", "cuda": "13.0", "cudnn": 91000}
    environment = bench.environment() | {"gpu": gpu}
    ceilings = {"bandwidth": 4e12, "float32": 5e13, "tf32": 4e14, "bfloat16": 8e14, "launch": 2e-6}
    return {"environment": environment, "dtype": "float32", "ceilings": ceilings, "results": results}


def entry(**changes: Any) -> dict[str, Any]:
    timing = {"median_ms": 2.0, "p20_ms": 1.9, "p80_ms": 2.1, "n": 5}
    return {
        "op": "monotonic",
        "phase": "forward+backward",
        "shape": "MMM2",
        "sizes": {"rows": 15_360},
        "precision": "high",
        "note": "",
        "backend": "native",
        "parity": report.parity({"ours": Error(1e-4, 2e-3), "eager": Error(3e-4, 4e-3)}, Error(1e-3, 1e-2)),
        "contestants": {"ours": timing, "ours graph": timing, "eager": timing},
        "absent": {},
        "ratios": {"ours graph": 1.0, "eager": 7.0},
        "goals": {"eager": 6.0},
        "met": True,
        **changes,
    }


def test_runs_are_joined(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    timing = {"median_ms": 4.0, "p20_ms": 1.9, "p80_ms": 2.1, "n": 5}
    later = entry(
        contestants={"ours": timing, "compile": timing},
        ratios={"compile": 2.0},
        goals={"compile": 2.5},
        absent={"compile graph": "why"},
        note="compiled",
    )
    other = entry(precision="highest")
    files = []
    for index, results in enumerate([[entry(), other], [later]]):
        files.append(tmp_path / f"{index}.json")
        files[-1].write_text(json.dumps(example(results)))
    target, tables = tmp_path / "out.json", tmp_path / "out.md"
    arguments = ["bench", "join", *map(str, files), "--json", str(target), "--markdown", str(tables), "--brief"]
    assert main(arguments) == 0
    first, second = json.loads(target.read_text())["results"]
    assert second["precision"] == "highest"
    assert first["contestants"]["ours"]["median_ms"] == 2.0 and first["contestants"]["compile"]["median_ms"] == 4.0
    assert first["ratios"] == {"ours graph": 1.0, "eager": 7.0, "compile": 2.0}
    assert first["goals"] == {"eager": 6.0, "compile": 2.5} and first["met"] is False
    assert first["note"] == "compiled"
    printed = capsys.readouterr().out
    told = "monotonic f+b MMM2 15360 high native 2000 2000 eager 7/6, compile 2/2.5!, error 1e-04 / 2e-03"
    assert told in " ".join(printed.split())
    assert "NVIDIA X" in printed and "4.00 TB/s" in printed
    header = next(line for line in tables.read_text().splitlines() if line.startswith("| shape"))
    told = "precision | error | eager's error | backend"
    assert header == f"| shape | rows | {told} | ours | ours graph | eager | compile | goal | met |"
    assert "| high | 1e-04 / 2e-03 | 3e-04 / 4e-03 | native |" in tables.read_text()


def test_a_wrong_gradient_is_told() -> None:
    parity = report.parity({"ours": Error(1e-4, 0.5)}, Error(1e-3, 1e-2))
    content = example([entry(parity=parity, contestants={}, ratios={})])
    assert "differs from the reference in a gradient by 5.00e-01, 1.00e-02 allowed" in report.brief(content)
    assert not report.all_agree(content["results"])


def test_other_backends_are_in_the_brief_report() -> None:
    contestants = entry()["contestants"] | {"triton": {"median_ms": 3.0}, "triton graph": {"median_ms": 2.5}}
    told = report.brief(example([entry(contestants=contestants, ratios={"eager": 3.0})]))
    assert "eager 3/6!, triton graph 2500, error" in told


def test_a_device_that_is_not_there_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert main(["bench", "ops", "--op", "returns", "--device", "cuda"]) == 2
    assert "--device must be cpu" in capsys.readouterr().err


def test_kernels_of_a_profile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = {f"kernel {i}": (1, 1e-6) for i in range(profile_gpu.SHOWN)}
    found = dataclasses.replace(profile(lambda: None, rounds=1), by_kernel={"large": (2, 4e-5), **names})
    step = tmp_path / "step.json"
    content = {"algo": "qmix", "shape": "3m", "episodes": 4, "steps": 5, "profiles": {"replay": found.to_json()}}
    step.write_text(json.dumps(content))
    target = tmp_path / "profile.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(profile_gpu, "targets", lambda: [(partial(cases.returns, 2, 3), ("ours", "triton"))])
        status = profile_gpu.main([str(step), "--json", str(target)])
    printed = capsys.readouterr().out
    assert "== qmix 3m 4x5: replay\na call: 27 kernels, 65.0 us in them" in printed
    assert "40.00  61.5%      2    20.00  large\n" in printed and "... and 1 more" in printed
    assert status == (0 if torch.cuda.is_available() else 2)
    (first, *others) = json.loads(target.read_text())["results"]
    assert first["contestant"] == "replay" and first["profile"]["by_kernel"]["large"] == [2, 4e-5]
    assert [other["contestant"] for other in others] == (["ours"] if torch.cuda.is_available() else [])


@pytest.mark.parametrize("op", sanitize.CHECKS)
def test_what_the_sanitizers_watch_computes_the_same(op: str, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    sanitize.CHECKS[op](cases.FLOAT32)
    assert f"{op} " in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------------------- script


class Machine:
    """A PATH whose programs only write down how they were called; a PYTHON like that."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bin, self.log = folder, folder / "bin", folder / "calls"
        self.bin.mkdir()
        self.log.touch()
        self.program("nvidia-smi", 'case "$*" in *compute_cap*) echo 9.0 ;; *) echo "NVIDIA H200" ;; esac')
        self.program("python", "exit 0")

    def program(self, name: str, body: str) -> None:
        path = self.bin / name
        path.write_text(f'#!/bin/bash\necho "{name} $* [${{SKBUILD_CMAKE_ARGS:-}}]" >>"{self.log}"\n{body}\n')
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def run(self, *stages: str, script: Path = SCRIPT, **environment: str) -> tuple[int, str, dict[str, str]]:
        inherited = {name: value for name, value in os.environ.items() if name != "FASTMIX_GOLDEN"}
        done = subprocess.run(
            ["bash", str(script), *stages],
            env=inherited
            | {"PATH": f"{self.bin}:/usr/bin:/bin", "PYTHON": str(self.bin / "python")}
            | {"OUT": str(self.folder / "out"), "TREE": str(self.folder / "tree")}
            | environment,
            capture_output=True,
            text=True,
        )
        rows = (self.folder / "out" / "stages.tsv").read_text().splitlines() if done.returncode != 2 else []
        return done.returncode, done.stdout + done.stderr, {row.split("\t")[0]: row.split("\t")[1] for row in rows}

    def calls(self) -> str:
        return self.log.read_text()


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_all_stages_run(machine: Machine) -> None:
    status, output, stages = machine.run()
    assert status == 0, output
    benches = [f"bench-{part}" for part in PARTS]
    together = {"test", "memcheck", "racecheck", "warm"}
    assert next(iter(stages)) == "build" and set(list(stages)[1:5]) == together
    profiles = ["profile-5m_vs_6m", "profile-MMM2", "profile-kernels"]
    assert list(stages)[5:] == [*benches[:-1], *profiles, "test-large", "bench-autotune"]
    assert stages["memcheck"] == "absent" and stages["build"] == "ok"
    calls = machine.calls()
    assert "--no-build-isolation --no-deps" in calls and "[-DCMAKE_CUDA_ARCHITECTURES=90-real]" in calls
    assert "-m pytest -m gpu" in calls and "--benchmark-disable" in calls
    assert "bench warm --part monotonic --part compile --share 8/8" in calls
    assert "profile --algo qmix --shape 5m_vs_6m --device cuda --graphs --against public" in calls
    assert not (machine.folder / "tree" / "fastmix").exists() and (machine.folder / "tree" / "tests").exists()
    expected, most = map(int, output.split("in all")[1].split()[:2])
    assert expected < most < 600


def test_what_comes_back_is_few_files(machine: Machine) -> None:
    machine.program("python", 'while [[ $# -gt 0 ]]; do [[ $1 != --json ]] || echo {} >"$2"; shift; done; echo said')
    status, output, _ = machine.run()
    assert status == 0, output
    files = {path.name for path in (machine.folder / "out").rglob("*")}
    names = {"gpu-h200.json", "gpu-h200-profile.json", "gpu-h200-profile.txt", "stages.tsv", "logs.tar.gz"}
    assert files == names
    with tarfile.open(machine.folder / "out" / "logs.tar.gz") as logs:
        assert {"./bench-step.json", "./test.log", "./profile-MMM2.json"} <= set(logs.getnames())
    assert (machine.folder / "out" / "gpu-h200-profile.txt").read_text() == "said\n\n" * 3


def test_a_selection(machine: Machine) -> None:
    (machine.folder / "tree").mkdir()
    status, output, stages = machine.run("bench", "profile", PARTS="step compile", SHAPES="MMM2", QUICK="1")
    assert status == 0, output
    assert list(stages) == ["warm", "bench-step", "bench-compile", "profile-MMM2", "profile-kernels"]
    selected = "--shape MMM2 --goals --precision high"
    calls = machine.calls()
    assert f"bench warm --part compile {selected} --share 1/8" in calls
    assert f"bench table --device cuda --part step {selected} --rounds 9 --seconds 0.5 " in calls
    assert "--against" not in calls
    assert list(machine.run("profile", QUICK="1")[2]) == ["profile-5m_vs_6m", "profile-kernels"]


def test_a_failing_stage_takes_nothing_from_the_others(machine: Machine) -> None:
    machine.program(
        "python",
        """case "$*" in
            *"-m pytest"*"-k not"*) echo "FAILED tests/x.py::test_y - broken"; exit 1 ;;
            *"--part step"*) exec sleep 60 ;;
            *"FASTMIX_CUDA"* | *pip*) [[ $FASTMIX_CUDA == OFF ]] || { echo "kernel.cu(7): error: odd"; exit 1; } ;;
            *racecheck*) exit 9 ;;
        esac""",
    )
    machine.program(
        "compute-sanitizer", 'if [[ $2 == racecheck ]]; then echo "Error: Device not supported"; exit 1; fi'
    )
    script = SCRIPT.read_text().replace("[step]=50", "[step]=10")
    root = machine.folder / "checkout"
    for name in ("benchmarks", "bindings", "csrc", "docs", "tests"):
        (root / name).mkdir(parents=True)
    for name in ("CMakeLists.txt", "Makefile", "README.md", "CHANGELOG.md", "conftest.py", "pyproject.toml"):
        (root / name).touch()
    (root / "benchmarks" / "gpu.sh").write_text(script)
    status, output, stages = machine.run(script=root / "benchmarks" / "gpu.sh")
    assert status == 1
    assert stages["build"] == "failed" and stages["build-without-cuda"] == "ok"
    assert stages["test"] == "failed" and stages["bench-step"] == "timeout" and stages["bench-autotune"] == "ok"
    assert stages["memcheck"] == "ok" and stages["racecheck"] == "absent"
    assert "kernel.cu(7): error: odd" in output
    assert output.rindex("FAILED tests/x.py::test_y - broken") > output.rindex("bench-step  ")


def test_time_that_is_up_ends_everything_but_the_report(machine: Machine) -> None:
    (machine.folder / "tree").mkdir()
    machine.program("python", 'while [[ $# -gt 0 ]]; do [[ $1 != --json ]] || echo {} >"$2"; shift; done; sleep 2')
    status, output, stages = machine.run("bench", PARTS="recurrent step small", LIMIT="25")
    assert status == 1 and stages == {"bench-recurrent": "ok", "bench-step": "ok", "bench-small": "skipped"}, output
    assert "join" in machine.calls()


def test_tests_that_are_cut_off_tell_what_failed(machine: Machine) -> None:
    """By pytest's own limit, or, where a test hangs, by ours."""
    (machine.folder / "tree").mkdir()
    progress = 'echo "[gw1] [ 10%] FAILED tests/x.py::test_y[1]"'
    for ending, told in (
        ("echo '!!! session-timeout: 8.0 sec exceeded !!!'; exit 2", "FAILED tests/x.py::test_y[1]"),
        ("kill -9 $$", "FAILED tests/x.py::test_y[1]"),
    ):
        machine.program("python", f'[[ "$*" != *"-k not"* ]] || {{ {progress}; {ending}; }}')
        status, output, stages = machine.run("test")
        assert status == 1 and stages == {"test": "timeout", "test-large": "ok"}, output
        assert output.rstrip().splitlines().count(told) == 1


def test_the_sanitizer_is_told_which_kernels(machine: Machine) -> None:
    (machine.folder / "tree").mkdir()
    machine.program("compute-sanitizer", 'if [[ $1 == --help ]]; then echo "  --kernel-regex arg"; fi')
    status, output, stages = machine.run("sanitize")
    assert status == 0 and stages == {"memcheck": "ok", "racecheck": "ok"}, output
    assert "--tool racecheck --target-processes all --error-exitcode 1 --kernel-regex kns=fastmix" in machine.calls()


def test_reports_of_the_parts_are_joined(machine: Machine) -> None:
    (machine.folder / "tree").mkdir()
    machine.program("python", 'while [[ $# -gt 0 ]]; do [[ $1 != --json ]] || echo {} >"$2"; shift; done')
    status, output, _ = machine.run("bench", PARTS="small step")
    assert status == 0, output
    out, logs = machine.folder / "out", machine.folder / "tree.logs"
    joins = [line for line in machine.calls().splitlines() if " join " in line]
    assert len(joins) == 1 and f"join {logs}/bench-small.json {logs}/bench-step.json" in joins[0]
    assert f"--json {out}/gpu-h200.json --markdown {out}/gpu-h200.md" in joins[0]


def test_an_unknown_stage_is_named(machine: Machine) -> None:
    status, output, _ = machine.run("deploy")
    assert status == 2 and "got deploy" in output and not machine.calls()
    status, output, _ = machine.run("bench", PARTS="small large")
    assert status == 2 and "got large" in output and not machine.calls()


# --------------------------------------------------------------------------------------------------------------- device


@pytest.mark.gpu
@needs_gpu
def test_events_time_the_device() -> None:
    """A kernel that waits a given number of cycles takes twice as long for twice as many."""
    timings = interleaved(
        {"short": lambda: torch.cuda._sleep(500_000), "long": lambda: torch.cuda._sleep(1_000_000)},
        rounds=9,
        device="cuda",
    )
    assert 1.8 < timings["long"].median / timings["short"].median < 2.2


@pytest.mark.gpu
@needs_gpu
def test_a_graph_counts_for_the_calls_in_it() -> None:
    graph = bench.graphed(lambda: torch.cuda._sleep(200_000), calls=5)
    timings = interleaved({"one": lambda: torch.cuda._sleep(200_000), "five": graph}, rounds=9, device="cuda")
    assert graph.calls == 5
    assert 0.8 < timings["one"].median / timings["five"].median < 1.3


@pytest.mark.gpu
@needs_gpu
def test_memory_of_the_device() -> None:
    size = 2**24
    assert bench.peak_memory(lambda: torch.ones(size, device="cuda").sum(), "cuda") == pytest.approx(4 * size, rel=0.05)


@pytest.mark.gpu
@needs_gpu
def test_host_time_does_not_wait() -> None:
    long = 50_000_000  # cycles: some 25 ms
    assert bench.host_time(lambda: torch.cuda._sleep(long), rounds=1, seconds=0) < 5e-3


@pytest.mark.gpu
@needs_gpu
def test_launches_of_the_core_are_timed() -> None:
    case = cases.returns(4, 9, cases.Setting("cuda"))
    seconds = bench.launch_time(case.contestants["ours"])
    assert len(seconds) == 1 and 0 < seconds[0] < 1e-3
    errors, allowed = case.measured_errors()
    assert errors["ours"].within(allowed)  # and nothing was left patched


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("train", [True, False])
def test_a_case_on_the_device(train: bool) -> None:
    effort = report.Effort(rounds=3, max_time=0.5, ceilings=NOMINAL)
    result = report.measure(cases.monotonic("3m", 200, train, table_cuda.HIGHEST, ()), effort, {})
    assert result["parity"]["passed"] and not result["absent"]
    assert result["backend"] == backends.available("monotonic", "cuda")[0]
    assert result["parity"]["others"]["eager"]["error"] > 0
    assert {"ours", "ours graph", "eager", "eager graph", "floor", "empty kernel"} <= result["contestants"].keys()
    assert result["contestants"]["ours"]["host_us"] > 0
    assert result["ratios"]["floor"] < 1
