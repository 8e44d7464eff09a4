"""`fastmix doctor`: what it finds in installations made up for the purpose, and that looking leaves no trace."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

import fastmix
from fastmix import backends, doctor, envs, requirements
from tests.starcraft import install_game

CALM: dict[str, Any] = {"cpus": 2, "cpu_quota": None, "torch": 2, "openmp_runtimes": []}
"""What `doctor._threads` finds where nothing is wrong."""


def findings_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    parser = argparse.ArgumentParser()
    doctor.add_arguments(parser)
    status = doctor.run(parser.parse_args(arguments))
    return status, capsys.readouterr().out


def fixes(family: str) -> str:
    return "\n".join(problem.fix for problem in doctor._environments()[family].problems)


def problems(family: str) -> str:
    return "\n".join(problem.what for problem in doctor._environments()[family].problems)


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder in front of ``sys.path`` for made-up packages."""
    folder = tmp_path / "site-packages"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    return folder


@pytest.fixture
def starcraft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A made-up installation of the game with everything the adapter needs."""
    return install_game(tmp_path, monkeypatch)


def package(folder: Path, name: str, number: str | None = None, files: dict[str, str] | None = None) -> None:
    for path, text in {f"{name}/__init__.py": "raise AssertionError('imported')", **(files or {})}.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    if number is not None:
        metadata = folder / f"{name}-{number}.dist-info" / "METADATA"
        metadata.parent.mkdir()
        metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {number}\n")


def test_json_is_complete_and_agrees_with_the_machine(capsys: pytest.CaptureFixture[str]) -> None:
    status, out = findings_of(capsys, "--json")
    found = json.loads(out)
    assert status == 0
    assert found["core"]["usable"] and found["core"]["isa"] in ("baseline", "avx2", "avx512")
    assert found["versions"]["torch"] == version("torch")
    assert found["python"]["executable"] == sys.executable
    assert found["environments"]["matrix"] == {
        "about": "one-step matrix games, built in",
        "adapter": True,
        "problems": [],
        "ready": True,
    }
    assert set(found["environments"]) == set(envs.REGISTRY) - {"python"}  # which is the user's own
    assert set(found["backends"]) == set(backends.TABLE)
    if found["core"]["compiler"].startswith("GNU"):  # Clang brings a runtime of its own, which is told as a problem
        assert len(found["threads"]["openmp_runtimes"]) <= 1, "the core and torch must share one OpenMP runtime"


def test_text_is_aligned_and_plain_off_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    status, out = findings_of(capsys)
    assert status == 0
    assert "\033" not in out
    titles = [line for line in out.splitlines() if line and not line.startswith(" ")]
    assert titles[:5] == ["Versions", "CPU", "Compiled core", "GPU", "Backends by op (the first is taken)"]
    assert re.search(r"^  torch          \d+\.\d+", out, re.MULTILINE)
    assert re.search(r"^  runs on        (baseline|avx2|avx512)$", out, re.MULTILINE)
    assert re.search(r"^  matrix         ready    one-step matrix games", out, re.MULTILINE)


def test_colour_marks_but_does_not_shift() -> None:
    found = doctor.collect()
    coloured = doctor._text(found, colour=True)
    assert "\033[32m" in coloured
    assert re.sub(r"\033\[\d+m", "", coloured) == doctor._text(found, colour=False)


def test_a_core_that_cannot_be_imported_is_status_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastmix.backends.core_problem", lambda: "the compiled core cannot be imported (gone)")
    status, out = findings_of(capsys, "--json")
    found = json.loads(out)
    assert status == 1
    assert found["core"] == {"usable": False, "problem": "the compiled core cannot be imported (gone)"}
    assert found["problems"][0]["fix"] == "pip install --force-reinstall --no-deps ."


def test_a_core_that_computes_nonsense_is_status_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastmix.ops.returns import native, reference

    monkeypatch.setattr(native, "returns", lambda *args: reference.returns(*args) + 1)
    status, out = findings_of(capsys, "--json")
    assert status == 1
    assert json.loads(out)["core"]["problem"] == "the compiled core gives wrong numbers on a small problem"


def test_without_torch_nothing_is_ready(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    find = doctor._installed
    monkeypatch.setattr(doctor, "_installed", lambda module: module != "torch" and find(module))
    monkeypatch.setitem(sys.modules, "torch", None)
    status, out = findings_of(capsys, "--json")
    found = json.loads(out)
    assert status == 1
    assert "torch cannot be imported" in found["core"]["problem"]
    assert found["problems"][0]["fix"] == "pip install torch"
    assert found["gpu"]["reason"] == "torch is not installed"
    assert not any(environment["ready"] for environment in found["environments"].values())


def test_smac_from_pypi_is_recognised_as_another_project(packages: Path, starcraft: Path) -> None:
    package(packages, "smac", "2.4.0", {"smac/facade/__init__.py": "", "smac/main/__init__.py": ""})
    assert f"smac 2.4.0 in {packages} is another project" in problems("smac")
    assert "pip uninstall -y smac && pip install git+https://github.com/oxwhirl/smac.git" in fixes("smac")


def test_a_complete_smac_has_no_problem(packages: Path, starcraft: Path) -> None:
    package(packages, "smac", "1.0.0", {"smac/env/starcraft2/starcraft2.py": "class StarCraft2Env: ..."})
    package(packages, "pysc2", "4.0.0")
    package(packages, "s2clientprotocol", "5.0.15", {"s2clientprotocol/sc2api_pb2.py": "AddSerializedFile()"})
    assert problems("smac") == ""


def test_smac_that_is_not_there(packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SC2PATH", str(tmp_path / "nowhere"))
    assert "StarCraft II is not installed: SC2PATH" in problems("smac")
    assert "SC2.4.10.zip" in fixes("smac")
    monkeypatch.delenv("SC2PATH")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert f"SC2PATH is not set and {tmp_path / 'StarCraftII'} is no folder" in problems("smac")


def test_old_messages_clash_with_todays_protobuf(packages: Path) -> None:
    assert not requirements.protobuf_clash()
    generated = {"s2clientprotocol/sc2api_pb2.py": "x = _descriptor.FieldDescriptor(name='a')"}
    package(packages, "s2clientprotocol", "5.0.14", generated)
    package(packages, "protobuf", "7.36.2")
    assert requirements.protobuf_clash()


def test_protobuf_3_20_loads_old_messages(packages: Path) -> None:
    generated = {"s2clientprotocol/sc2api_pb2.py": "x = _descriptor.FieldDescriptor(name='a')"}
    package(packages, "s2clientprotocol", "5.0.14", generated)
    package(packages, "protobuf", "3.20.3")
    assert not requirements.protobuf_clash()


def test_enum34_is_told_to_go(packages: Path, starcraft: Path) -> None:
    package(packages, "smac", "1.0.0", {"smac/env/starcraft2/starcraft2.py": "class StarCraft2Env: ..."})
    package(packages, "pysc2", "4.0.0")
    package(packages, "enum34", "1.1.10")
    assert fixes("smac") == "pip uninstall -y enum34"
    assert doctor._environments()["smac"].ready  # it is in nobody's way but where PYTHONPATH names it


def test_a_binary_without_the_executable_bit(starcraft: Path) -> None:
    binary = starcraft / "Versions" / "Base75689" / "SC2_x64"
    binary.chmod(0o644)
    assert f"chmod +x {binary}" in fixes("smac")


def test_missing_binary_and_missing_maps(starcraft: Path) -> None:
    (starcraft / "Versions" / "Base75689" / "SC2_x64").unlink()
    (starcraft / "Maps" / "SMAC_Maps" / "3m.SC2Map").unlink()
    assert "an incomplete install" in problems("smac")
    assert f"unzip -o SMAC_Maps.zip -d {starcraft / 'Maps'}" in fixes("smac")


def test_installed_packages_are_found_without_importing_them(packages: Path) -> None:
    for name in ("jaxmarl", "pettingzoo", "mpe2", "gymnasium", "lbforaging"):
        package(packages, name, "1.0")
    for family in ("pettingzoo", "gym"):
        assert problems(family) == ""
    assert "jaxmarl is not" not in problems("smax")


def test_misspelt_variables_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTMIX_BACKENDS", "native")
    monkeypatch.setenv("FASTMIX_ISA", "avx2")
    found = doctor.collect()
    assert [p["fix"] for p in found["problems"] if "misspelling" in p["what"]] == ["unset FASTMIX_BACKENDS"]
    assert found["variables"]["FASTMIX_ISA"] == "avx2"


def test_too_many_threads_for_the_cpus_allowed() -> None:
    threads = {"cpus": 8, "cpu_quota": 2.0, "torch": 8, "openmp_runtimes": []}
    gpu = {"driver": False, "usable": False}
    assert [p.fix for p in doctor._problems({"usable": True}, threads, gpu)] == ["export OMP_NUM_THREADS=2"]


def test_two_openmp_runtimes() -> None:
    threads = CALM | {"openmp_runtimes": ["/a/libgomp.so.1", "/b/libomp.so.5"]}
    (problem,) = doctor._problems({"usable": True}, threads, {"driver": False, "usable": False})
    assert "/a/libgomp.so.1 and /b/libomp.so.5" in problem.what
    assert problem.fix.startswith("CXX=g++ pip install")


def test_the_trial_of_the_gpu_tells_devices_and_backends() -> None:
    done = subprocess.run([sys.executable, "-c", doctor._GPU_TRIAL], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert bool(found["devices"]) == bool(found["backends"])
    assert all(devices["cuda"][-1] == "reference" for devices in found["backends"].values())


def test_a_driver_that_torch_cannot_use() -> None:
    gpu = {"driver": True, "usable": False, "torch_cuda": None, "reason": "this torch is a CPU build"}
    (problem,) = doctor._problems({"usable": True}, CALM, gpu)
    assert problem.what == "there is an NVIDIA driver, but this torch is a CPU build"
    assert problem.fix.startswith("pip install --force-reinstall torch --index-url")


def test_a_gpu_without_our_kernels() -> None:
    gpu = {"driver": True, "usable": True, "torch_cuda": "13.0", "reason": None}
    (problem,) = doctor._problems({"usable": True, "cuda_kernels": False}, CALM, gpu)
    assert problem.fix.startswith("FASTMIX_CUDA=ON pip install")


def test_every_variable_that_the_package_reads_is_listed() -> None:
    folder, root = Path(fastmix.__file__).parent, Path(__file__).parent.parent
    sources = "\n".join(path.read_text() for path in folder.rglob("*.py") if path.name != "doctor.py")
    for pattern in ("csrc/**/*", "bindings/*"):
        sources += "\n".join(path.read_text() for path in root.glob(pattern) if path.is_file())
    read = set(re.findall(r"(?:environ(?:\.get\(|\[)|getenv\()\s*\"(FASTMIX_\w+)\"", sources))
    assert read <= set(doctor.VARIABLES)
    assert {"FASTMIX_BACKEND", "FASTMIX_ISA"} <= read


def test_importing_and_collecting_import_no_third_party_environment_and_make_no_cuda_context() -> None:
    code = (
        "import sys, fastmix.doctor as d; d.collect(); import torch;"
        "print(torch.cuda.is_initialized(), {'smac', 'pysc2', 'jax', 'pettingzoo', 'triton'} & set(sys.modules))"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "False set()"
