"""Benchmarks on CUDA: what of them needs no device, and timing itself where there is one."""

from __future__ import annotations

import inspect
import json
import os
import stat
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import profile_gpu
from fastmix.cli import main
from fastmix.experiments.bench import PARTS, bounds, cases, report, table_cuda
from fastmix.experiments.bench.bounds import Ceilings
from fastmix.experiments.bench.report import Planned
from fastmix.testing import bench
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
    assert list(PARTS) == list(table_cuda._PARTS)
    planned = {part: list(table_cuda.plan([part])) for part in PARTS}
    assert all(planned.values())
    goals = {part: {name for entry in entries for name in entry.goals} for part, entries in planned.items()}
    for entry in (entry for entries in planned.values() for entry in entries):
        assert isinstance(entry.build, partial)
        inspect.signature(entry.build.func).bind(*entry.build.args, **entry.build.keywords)
    assert goals["small"] == {"floor", "eager"} and goals["monotonic"] == {"eager", "floor"}
    assert goals["recurrent"] == {"gru"} and goals["step"] == {"eager"} and goals["compile"] >= {"compile"}


def test_rotating_calls_take_turns() -> None:
    seen: list[str] = []
    call = Rotating([lambda name=name: seen.append(name) for name in "abc"])  # type: ignore[misc]
    for _ in range(5):
        call()
    assert "".join(seen) == "abcab"


def test_contestants_on_several_sets_of_inputs_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases.Setting, "sets", lambda self, n_bytes: 3)
    for case in (cases.returns(2, 5), cases.select(2, 3, 2, 4, True), cases.td_loss(2, 5), cases.monotonic("3m", 4)):
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
        "parity": {"error": 1e-4, "tolerance": 1e-3, "passed": True},
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
    assert "eager 7.00x of 6, compile 2.00x of 2.5; NOT MET" in printed
    assert "NVIDIA X" in printed and "4.00 TB/s" in printed
    header = next(line for line in tables.read_text().splitlines() if line.startswith("| shape"))
    assert header == "| shape | rows | precision | error | ours | ours graph | eager | compile | goal | met |"


def test_a_device_that_is_not_there_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert main(["bench", "ops", "--op", "returns", "--device", "cuda"]) == 2
    assert "--device must be cpu" in capsys.readouterr().err


def test_kernels_are_summed() -> None:
    calls = profile_gpu.CALLS
    events = [("a", 10.0 * i, 10.0 * i + 2) for i in range(calls)] + [("b", 0.0, 5.0 * calls)]
    found = profile_gpu.summarise(events)
    assert [entry["name"] for entry in found["entries"]] == ["b", "a"]
    assert found["kernels"] == 1 + 1 / calls and found["busy_us"] == 7.0
    assert found["entries"][1] == {"name": "a", "calls": 1.0, "us": 2.0, "us_each": 2.0}
    assert "28.6%" in profile_gpu.table("title", found)
    assert profile_gpu.summarise([])["elapsed_us"] == 0.0


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

    def run(self, *stages: str, **environment: str) -> tuple[int, str, dict[str, str]]:
        inherited = {name: value for name, value in os.environ.items() if name != "FASTMIX_GOLDEN"}
        done = subprocess.run(
            [str(SCRIPT), *stages],
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
    correct = {"test", "test-large", "memcheck", "racecheck", "warm"}
    assert next(iter(stages)) == "build" and set(list(stages)[1:6]) == correct
    assert list(stages)[6:] == [*benches, "profile"]
    assert stages["memcheck"] == "absent" and stages["build"] == "ok"
    calls = machine.calls()
    assert "--no-build-isolation --no-deps" in calls and "[-DCMAKE_CUDA_ARCHITECTURES=90-real]" in calls
    assert "-m pytest -m gpu" in calls
    assert not (machine.folder / "tree" / "fastmix").exists() and (machine.folder / "tree" / "tests").exists()


def test_a_failing_stage_takes_nothing_from_the_others(machine: Machine) -> None:
    machine.program(
        "python", 'case "$*" in *"-m pytest"*) echo broken; exit 1 ;; *"--part step"*) exec sleep 60 ;; esac'
    )
    script = SCRIPT.read_text().replace("step) limit=60", "step) limit=1")
    patched = machine.folder / "benchmarks" / "gpu.sh"
    patched.parent.mkdir()
    patched.write_text(script)
    (machine.folder / "tree").mkdir()
    done = subprocess.run(
        ["bash", str(patched), "test", "bench"],
        env={"PATH": f"{machine.bin}:/usr/bin:/bin", "PYTHON": str(machine.bin / "python")}
        | {"OUT": str(machine.folder / "out"), "TREE": str(machine.folder / "tree")},
        capture_output=True,
        text=True,
    )
    stages = dict(line.split("\t")[:2] for line in (machine.folder / "out" / "stages.tsv").read_text().splitlines())
    assert done.returncode == 1
    assert stages["test"] == "failed" and stages["bench-step"] == "timeout" and stages["bench-autotune"] == "ok"
    assert "broken" in done.stdout


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
    out = machine.folder / "out"
    joins = [line for line in machine.calls().splitlines() if " join " in line]
    assert len(joins) == 1 and f"join {out}/bench-small.json {out}/bench-step.json" in joins[0]
    assert f"--json {out}/gpu-h200.json --markdown {out}/gpu-h200.md" in joins[0]


def test_an_unknown_stage_is_named(machine: Machine) -> None:
    status, output, _ = machine.run("deploy")
    assert status == 2 and "got deploy" in output and not machine.calls()


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
    assert case.error() <= case.tolerance  # and nothing was left patched


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("train", [True, False])
def test_a_case_on_the_device(train: bool) -> None:
    effort = report.Effort(rounds=3, max_time=0.5, ceilings=NOMINAL)
    result = report.measure(cases.monotonic("3m", 200, train, table_cuda.HIGHEST, ()), effort, {})
    assert result["parity"]["passed"] and not result["absent"]
    assert {"ours", "ours graph", "eager", "eager graph", "floor", "empty kernel"} <= result["contestants"].keys()
    assert result["contestants"]["ours"]["host_us"] > 0
    assert result["ratios"]["floor"] < 1
