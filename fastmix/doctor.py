"""``fastmix doctor``: what this installation is made of, what works, and the command that mends what does not.

Nothing here changes anything. The GPU is tried in a process of its own, so that the caller never gets a CUDA context,
and third-party environments are judged by their files, because importing some of them has side effects (smac parses the
flags of the command line).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import fastmix
from fastmix.requirements import CHECKS, Problem
from fastmix.requirements import installed as _installed
from fastmix.requirements import installed_version as _version

VARIABLES: Final[dict[str, str]] = {
    "FASTMIX_BACKEND": "reference, native, triton or cudnn for every op, or it raises (default: by device and dtype)",
    "FASTMIX_ISA": "baseline, avx2 or avx512: the widest instruction set the core may use (default: what the CPU has)",
    "FASTMIX_CUDA": "AUTO, ON or OFF while building: CUDA kernels when nvcc is found, always, never (default: AUTO)",
    "FASTMIX_GOLDEN": "folder of reference numbers the golden tests read (default: tests/golden)",
    "FASTMIX_COMMIT": "revision that benchmark results name where git cannot tell it (default: what git says)",
}
"""Every environment variable fastmix reads, with its meaning and default."""


@dataclass
class Environment:
    """One family of environments: whether fastmix has an adapter for it, and what its own software lacks here."""

    about: str
    adapter: bool
    problems: list[Problem] = field(default_factory=list)

    @property
    def ready(self) -> bool:
        """Whether ``fastmix train --env <family>:...`` can start."""
        return self.adapter and not any(problem.blocking for problem in self.problems)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``fastmix doctor``."""
    parser.add_argument("--json", action="store_true", help="print everything as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print the findings; 0 unless the compiled core cannot be used."""
    findings = collect()
    print(json.dumps(findings, indent=2) if args.json else _text(findings, colour=_wants_colour()))
    return 0 if findings["core"]["usable"] else 1


def collect() -> dict[str, Any]:
    """Everything the doctor knows, as plain JSON types.

    Keys: ``fastmix python versions cpu threads core backends gpu triton environments variables problems``; ``problems``
    is the list of ``{what, fix}`` that concern the installation itself, those of an environment stand in its own entry.
    """
    core = _core()
    threads = _threads()
    gpu = _gpu()
    return {
        "fastmix": {"version": fastmix.__version__, "location": str(Path(fastmix.__file__).parent)},
        "python": {"version": platform.python_version(), "executable": sys.executable},
        "versions": {
            name: _version(name) for name in ("torch", "triton", "numpy", "safetensors", "tensorboard", "matplotlib")
        },
        "cpu": _cpu(),
        "threads": threads,
        "core": core,
        "backends": _backends(gpu),
        "gpu": gpu,
        "triton": _triton(),
        "environments": {name: asdict(env) | {"ready": env.ready} for name, env in _environments().items()},
        "variables": {name: value for name, value in sorted(os.environ.items()) if _concerns_us(name)},
        "problems": [asdict(problem) for problem in _problems(core, threads, gpu)],
    }


# --- findings ---


def _cpu() -> dict[str, Any]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        text = ""
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    interesting = re.compile(r"sse4_2|avx\w*|fma|amx_\w+|f16c|asimd\w*|sve\w*|bf16")
    features = sorted(flag for flag in flags[1].split() if interesting.fullmatch(flag)) if flags else []
    return {
        "model": model[1] if model else platform.processor() or platform.machine(),
        "architecture": platform.machine(),
        "features": features,
    }


def _threads() -> dict[str, Any]:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        import torch
    except ImportError:
        torch_threads = None
    else:
        torch_threads = torch.get_num_threads()
    return {"cpus": usable, "cpu_quota": _cpu_quota(), "torch": torch_threads, "openmp_runtimes": _openmp_runtimes()}


def _cpu_quota() -> float | None:
    """CPUs that the control group of a container allows, None without a limit."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):  # no control groups of version 2
        return None
    return None if quota == "max" else int(quota) / int(period)


def _openmp_runtimes() -> list[str]:
    """OpenMP libraries in this process; two of them fight for the cores."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return []
    return sorted(set(re.findall(r"\S+/lib(?:gomp|omp|iomp5)\b\S*", maps)))


def _core() -> dict[str, Any]:
    try:
        import torch  # noqa: F401

        from fastmix import backends
    except ImportError as error:
        return {"usable": False, "problem": f"torch cannot be imported ({error})"}
    problem = backends.core_problem()
    if problem:
        return {"usable": False, "problem": problem}
    from fastmix import _core

    problem = _wrong_answer()
    return {
        "usable": problem is None,
        "problem": problem,
        "compiler": _core.compiler,
        "openmp": _core.openmp,
        "isa": _core.isa(),
        "cuda_kernels": _core.cuda,
        "file": _core.__file__,
        "megabytes": round(Path(_core.__file__).stat().st_size / 1e6, 2),
    }


def _wrong_answer() -> str | None:
    """Runs one small op through the compiled core and compares it with plain PyTorch."""
    import torch

    from fastmix import ops

    rewards = torch.arange(6.0).reshape(2, 3, 1)
    terminated, mask = torch.zeros_like(rewards), torch.ones_like(rewards)
    target_qs = torch.arange(8.0).reshape(2, 4, 1).cos()
    try:
        native, reference = (
            ops.returns(rewards, terminated, mask, target_qs, gamma=0.99, td_lambda=0.6, backend=name)
            for name in ("native", "reference")
        )
    except RuntimeError as error:
        return f"the compiled core failed on a small problem: {error}"
    if not torch.allclose(native, reference, rtol=1e-5, atol=1e-5):
        return "the compiled core gives wrong numbers on a small problem"
    return None


def _backends(gpu: dict[str, Any]) -> dict[str, dict[str, list[str]]]:
    """For each op and device that is usable here, the backends that run it, the preferred one first."""
    try:
        from fastmix import backends
    except ImportError:  # no torch; already told under "core"
        return {}
    return {op: {"cpu": list(backends.available(op))} | gpu["backends"].get(op, {}) for op in backends.TABLE}


_GPU_TRIAL = """
import json, torch
from fastmix import backends
devices = []
for index in range(torch.cuda.device_count()):
    p = torch.cuda.get_device_properties(index)
    assert torch.ones(8, device=f"cuda:{index}").sum().item() == 8
    gigabytes = round(p.total_memory / 2**30, 1)
    devices.append({"name": p.name, "capability": f"{p.major}.{p.minor}", "gigabytes": gigabytes})
ops = {op: {"cuda": list(backends.available(op, "cuda"))} for op in backends.TABLE} if devices else {}
print(json.dumps({"devices": devices, "backends": ops}))
"""


def _gpu() -> dict[str, Any]:
    hardware = (
        Path("/dev/nvidiactl").exists() or Path("/proc/driver/nvidia/version").exists() or Path("/dev/dxg").exists()
    )
    nvcc = shutil.which("nvcc")
    try:
        import torch
    except ImportError:
        built = None
    else:
        built = torch.version.cuda
    found: dict[str, Any] = {
        "driver": hardware,
        "torch_cuda": built,
        "nvcc": nvcc,
        "usable": False,
        "devices": [],
        "backends": {},
        "reason": None,
    }
    if built is None:
        found["reason"] = "this torch is a CPU build" if _installed("torch") else "torch is not installed"
        return found
    try:
        # The package's own folder goes first, so that the trial imports this very fastmix.
        paths = [str(Path(fastmix.__file__).parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        trial = subprocess.run(
            [sys.executable, "-c", _GPU_TRIAL],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )
    except subprocess.TimeoutExpired:
        found["reason"] = "a small sum on the GPU did not end within 120 s"
        return found
    if trial.returncode != 0:
        found["reason"] = (trial.stderr.strip().splitlines() or [f"exit status {trial.returncode}"])[-1]
        return found
    found |= json.loads(trial.stdout.strip().splitlines()[-1])
    found["usable"] = bool(found["devices"])
    found["reason"] = None if found["usable"] else "torch sees no CUDA device"
    return found


def _triton() -> dict[str, Any]:
    installed = _installed("triton")
    interpreter = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
    return {"installed": installed, "version": _version("triton"), "interpreter": interpreter}


def _concerns_us(variable: str) -> bool:
    return variable.startswith(("FASTMIX_", "OMP_", "KMP_", "MKL_NUM", "TRITON_")) or variable in (
        "CUDA_VISIBLE_DEVICES",
        "PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION",
        "SC2PATH",
    )


def _problems(core: dict[str, Any], threads: dict[str, Any], gpu: dict[str, Any]) -> Iterator[Problem]:
    reinstall = "pip install --force-reinstall --no-deps ."
    if not core["usable"]:
        yield Problem(core["problem"], "pip install torch" if "torch cannot" in core["problem"] else reinstall)
    allowed = threads["cpu_quota"] or threads["cpus"]
    if threads["torch"] is not None and threads["torch"] > max(1, round(allowed)):
        yield Problem(
            f"torch uses {threads['torch']} threads where {allowed:g} CPUs are allowed: they will wait for each other",
            f"export OMP_NUM_THREADS={max(1, round(allowed))}",
        )
    if len(threads["openmp_runtimes"]) > 1:
        runtimes = " and ".join(threads["openmp_runtimes"])
        fix = "CXX=g++ pip install --force-reinstall --no-deps ."
        yield Problem(f"torch and the core wait on each other in two OpenMP runtimes, {runtimes}", fix)
    if gpu["driver"] and not gpu["usable"]:
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1")
        fix = "unset CUDA_VISIBLE_DEVICES" if hidden else "nvidia-smi"
        if gpu["torch_cuda"] is None:
            fix = "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu130"
        yield Problem(f"there is an NVIDIA driver, but {gpu['reason']}", fix)
    if gpu["usable"] and core["usable"] and not core["cuda_kernels"]:
        fix = "FASTMIX_CUDA=ON pip install --force-reinstall --no-build-isolation --no-deps ."
        yield Problem(
            "the GPU is usable, but the core was built without CUDA kernels: ops on it run through plain PyTorch", fix
        )
    for name in sorted(os.environ):
        if name.startswith("FASTMIX_") and name not in VARIABLES:
            yield Problem(f"fastmix reads no variable {name} (a misspelling?)", f"unset {name}")


# --- environments ---


def _environments() -> dict[str, Environment]:
    families = {
        "matrix": "one-step matrix games, built in",
        "prey": "predator-prey, built in",
        "group_matching": "REFIL's group matching, built in",
        "smac": "StarCraft Multi-Agent Challenge, the real game",
        "smax": "SMAC-like battles in JAX (JaxMARL)",
        "pettingzoo": "PettingZoo parallel environments, such as MPE (mpe2)",
        "gym": "Gymnasium-style multi-agent environments, such as level-based foraging",
    }
    return {name: Environment(about, _has_adapter(name), list(_lacks(name))) for name, about in families.items()}


def _has_adapter(family: str) -> bool:
    folder = Path(fastmix.__file__).parent / "envs"
    return (folder / f"{family}.py").is_file() or (folder / family).is_dir()


def _lacks(family: str) -> Iterator[Problem]:
    if not _installed("torch"):
        yield Problem("torch is not installed", "pip install torch")
    if family in CHECKS:
        yield from CHECKS[family]()


# --- text ---

_GREEN, _YELLOW, _RED, _BOLD, _PLAIN = "\033[32m", "\033[33m", "\033[31m", "\033[1m", "\033[0m"


def _wants_colour() -> bool:
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"


def _text(findings: dict[str, Any], *, colour: bool) -> str:
    def paint(code: str, text: str) -> str:
        return f"{code}{text}{_PLAIN}" if colour else text

    lines: list[str] = []

    def section(title: str) -> None:
        lines.extend(([""] if lines else []) + [paint(_BOLD, title)])

    def row(name: str, value: str, mark: str = "") -> None:
        lines.append(f"  {name:<15}{paint(mark, value) if mark else value}")

    def mend(problem: dict[str, str], indent: str) -> None:
        lines.append(f"{indent}- {problem['what']}")
        lines.append(f"{indent}  {paint(_BOLD, problem['fix'])}")

    section("Versions")
    row("fastmix", f"{findings['fastmix']['version']}  {findings['fastmix']['location']}")
    row("python", f"{findings['python']['version']}  {findings['python']['executable']}")
    for name, number in findings["versions"].items():
        row(name, number or "not installed")

    section("CPU")
    cpu, threads, core = findings["cpu"], findings["threads"], findings["core"]
    row("model", f"{cpu['model']} ({cpu['architecture']})")
    row("features", " ".join(cpu["features"]) or "unknown")
    quota = "" if threads["cpu_quota"] is None else f", quota {threads['cpu_quota']:g}"
    row("threads", f"torch uses {threads['torch'] or 'none'}; CPUs allowed {threads['cpus']}{quota}")

    section("Compiled core")
    if core["usable"]:
        row("status", "works", _GREEN)
        row("runs on", core["isa"])
        row("compiler", f"{core['compiler']}, {'with' if core['openmp'] else 'without'} OpenMP, {core['megabytes']} MB")
        row("CUDA kernels", "built" if core["cuda_kernels"] else "not built")
    else:
        row("status", f"cannot be used: {core['problem']}", _RED)

    section("GPU")
    gpu, triton = findings["gpu"], findings["triton"]
    for device in gpu["devices"]:
        row("device", f"{device['name']}, capability {device['capability']}, {device['gigabytes']} GiB", _GREEN)
    if not gpu["usable"]:
        row("device", f"none usable: {gpu['reason']}")
    row("nvcc", gpu["nvcc"] or "not found")
    interpreted = " (interpreted: TRITON_INTERPRET is set)" if triton["interpreter"] else ""
    row("triton", f"{triton['version'] or 'installed'}{interpreted}" if triton["installed"] else "not installed")

    if findings["backends"]:
        section("Backends by op (the first is taken)")
        for op, devices in findings["backends"].items():
            row(op, "   ".join(f"{device}: {', '.join(names)}" for device, names in devices.items()))

    section("Environments")
    for name, env in findings["environments"].items():
        state, mark = (
            ("ready", _GREEN) if env["ready"] else ("missing", _YELLOW) if env["adapter"] else ("later", _YELLOW)
        )
        row(name, f"{paint(mark, f'{state:<9}')}{env['about']}")
        if not env["adapter"]:
            lines.append(
                " " * 17
                + "this version of fastmix has no adapter for it yet"
                + ("; it will need:" if env["problems"] else "")
            )
        for problem in env["problems"]:
            mend(problem, " " * 17)

    if findings["variables"]:
        section("Environment variables")
        for name, value in findings["variables"].items():
            lines.append(f"  {name}={value}")

    section("Problems")
    for problem in findings["problems"]:
        mend(problem, "  ")
    if not findings["problems"]:
        lines.append("  none")
    return "\n".join(lines)
