"""What is shipped: light imports, the wheel, the stub of the compiled module, and pages that tell the truth."""

from __future__ import annotations

import argparse
import ast
import importlib
import os
import re
import shlex
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import pytest

import fastmix
from fastmix import doctor
from tests import core_stub
from tests.generators import own_presets

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = ["README.md", "CHANGELOG.md", *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/**/*.md"))]


def python(code: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
        cwd=ROOT,
    ).stdout.strip()


def blocks(page: str, language: str) -> list[str]:
    """The fenced code blocks of a page in one language."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def words(cell: str) -> set[str]:
    return set(re.findall(r"`([\w-]+)`", cell))


def row(title: str) -> list[str]:
    """Cells of the README's table row with this title."""
    (line,) = re.findall(rf"^\| {re.escape(title)} \|(.*)\|$", README, re.MULTILINE)
    return [str(cell).strip() for cell in line.split("|")]


def test_import_is_light() -> None:
    assert python("import fastmix, sys; print(sorted({'torch', 'numpy', 'fastmix._core'} & set(sys.modules)))") == "[]"


def test_working_with_the_package_loads_no_triton_no_plots_and_makes_no_cuda_context() -> None:
    code = (
        "import sys, fastmix; from fastmix import agents, algorithms, cli, envs, mixers, ops, train; import torch;"
        "print(torch.cuda.is_initialized(), {'triton', 'matplotlib', 'tensorboard'} & set(sys.modules))"
    )
    assert python(code) == "False set()"


def test_public_names_load_on_first_use() -> None:
    code = (
        "import fastmix;"
        "print([callable(fastmix.backend), *(getattr(fastmix, name).__name__ for name in fastmix.__all__[2:])])"
    )
    assert python(code) == "[True, 'fastmix.ops', 'fastmix.mixers', 'fastmix.agents', 'fastmix.algorithms']"
    assert set(fastmix.__all__) <= set(dir(fastmix))
    with pytest.raises(AttributeError, match="module 'fastmix' has no attribute 'mixer'"):
        fastmix.mixer  # noqa: B018


def test_version_is_the_projects() -> None:
    declared = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert declared is not None
    assert fastmix.__version__ in (declared[1], "0+source")
    assert f"version = {{{declared[1]}}}" in README


def test_stub_tells_what_the_compiled_module_has() -> None:
    stub = ast.parse(core_stub.STUB.read_text(encoding="utf-8"))
    wanted = ast.parse(core_stub.render())
    assert ast.dump(stub) == ast.dump(wanted), "write the stub again: python -m tests.core_stub"


def test_wheel_holds_the_package_and_nothing_else(tmp_path: Path) -> None:
    pytest.importorskip("scikit_build_core", reason="the build tools come with the extra 'dev'")
    # Without running CMake: what the compiler makes is looked at below.
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "--no-index"]
    command += ["--disable-pip-version-check", "-C", "wheel.cmake=false", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    (wheel,) = tmp_path.glob("fastmix-*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    wanted = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "fastmix").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".so"
    }
    wanted |= {f"fastmix/baselines/{path.name}" for path in (ROOT / "benchmarks" / "baselines").glob("*.py")}
    assert names == wanted
    assert {"fastmix/py.typed", "fastmix/_core.pyi"} <= names
    metadata = [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith("licenses/LICENSE")]
    assert len(metadata) == 1

    from fastmix import _core

    # With the core as a wheel packs it; most of it are CUDA kernels for five architectures.
    assert wheel.stat().st_size + len(zlib.compress(Path(_core.__file__).read_bytes())) < 10e6


def test_readme_drop_in_runs_as_it_stands() -> None:
    (block,) = blocks("README.md", "python")
    code_lines = [line for line in block.splitlines() if line.strip()]
    assert len(code_lines) <= 6
    shape = python(block + "\nprint(tuple(q_tot.shape), type(mixer).__module__)")
    assert shape == "(32, 60, 1) fastmix.mixers.qmix"


def test_readme_lists_what_exists_and_not_more() -> None:
    from fastmix import agents, algorithms, mixers, ops

    assert words(row("algorithms")[0]) == set(algorithms.REGISTRY)
    assert words(row("mixers")[0]) == set(mixers.REGISTRY)
    assert words(row("agents")[0]) == set(agents.REGISTRY)
    assert words(row("operators")[0]) == set(ops.__all__)
    assert set(algorithms.PRESETS) == words(row("hyper-parameters")[0])
    for planned in ("algorithms", "mixers", "agents", "operators"):
        assert not words(row(planned)[0]) & words(row(planned)[1])


def test_readme_and_doctor_know_the_same_variables() -> None:
    table = dict(re.findall(r"^\| `(FASTMIX_\w+)` \| (.+) \|$", README, re.MULTILINE))
    assert table == doctor.VARIABLES


def test_every_algorithm_has_its_page() -> None:
    from fastmix import algorithms

    pages = {path.stem for path in (ROOT / "docs" / "algorithms").glob("*.md")}
    assert pages == set(algorithms.REGISTRY)


def test_pages_tell_the_hyper_parameters_of_every_preset() -> None:
    from fastmix import algorithms

    for name in algorithms.REGISTRY:
        page = (ROOT / "docs" / "algorithms" / f"{name}.md").read_text(encoding="utf-8")
        (head,) = re.findall(r"^\| hyper-parameter \|(.*)\|$", page, re.MULTILINE)
        presets = re.findall(r"`(\w+)`", head)
        assert presets == own_presets(name)
        cells = r" \| (\S+)" * len(presets)
        rows = re.findall(rf"^\| `(\w+)`{cells} \|$", page, re.MULTILINE)
        assert len(rows) > 15
        for field, *values in rows:
            for preset, value in zip(presets, values, strict=True):
                config = algorithms.configure(name, preset)
                assert value == str(getattr(config, field)), f"{name}: {field} of {preset}"


@pytest.mark.parametrize("page", PAGES)
def test_links_between_pages_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if not target.startswith(("http://", "https://")):
            assert ((ROOT / page).parent / target).exists(), f"{page} links to {target}"


@pytest.mark.parametrize("page", PAGES)
def test_python_of_the_pages_runs(page: str) -> None:
    for block in blocks(page, "python"):
        python(block)


def test_commands_of_the_pages_are_understood() -> None:
    """Every ``fastmix ...`` line of a shell block is parsed (not run) by the command line."""
    from fastmix import cli

    lines = {line for page in PAGES for block in blocks(page, "sh") for line in block.splitlines()}
    commands = {line.split(" #")[0].strip() for line in lines if line.startswith("fastmix ")}
    assert len(commands) > 10
    for command in sorted(commands):
        _, name, *arguments = shlex.split(command)
        parser = argparse.ArgumentParser(prog=f"fastmix {name}", exit_on_error=False)
        importlib.import_module(cli.COMMANDS[name][0]).add_arguments(parser)
        parser.parse_args(arguments)
