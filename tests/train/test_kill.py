"""kill -9 at random moments of a real run: resumed, it ends with the weights of a run that was left alone."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import torch

from fastmix.train import checkpoint

KILLS = 3
# Checkpoints every 16 steps, so that a good part of the kills fall into the writing of one.
RUN = [
    "--algo", "qmix", "--env", "matrix:stochastic", "--t-max", "1280", "--checkpoint-interval", "16",
    "--test-interval", "320", "--log-interval", "160", "--seed", "5", "--threads", "1", "--workers", "1",
    "--batch-size", "32", "--buffer-size", "300", "--no-progress",
]  # fmt: skip


def start(*arguments: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "fastmix", "train", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen[bytes]) -> None:
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors.decode() + output.decode()


def newest(folder: Path) -> Path | None:
    found = checkpoint.list_checkpoints(folder / "seed-5" / "checkpoints")
    return found[-1] if found else None


def wait_for_news(folder: Path, process: subprocess.Popen[bytes]) -> bool:
    """Until a checkpoint appears that was not there; False when the process ends first."""
    before = newest(folder)
    while process.poll() is None:
        if newest(folder) != before:
            return True
        time.sleep(0.002)
    return False


def test_killed_at_random_moments(tmp_path: Path) -> None:
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    reference = start(*RUN, "--out", str(undisturbed))
    draw = random.Random()
    kills = 0
    process = start(*RUN, "--out", str(disturbed))
    for _ in range(KILLS):
        if not wait_for_news(disturbed, process):
            break
        time.sleep(draw.uniform(0.0, 0.15))
        process.kill()
        process.communicate()
        kills += 1
        process = start("--resume", str(disturbed), "--workers", "1", "--no-progress")
    finish(process)
    finish(reference)
    assert kills >= 1, "the run was over before anybody could kill it"
    ours, theirs = newest(disturbed), newest(undisturbed)
    assert ours is not None and theirs is not None and ours.name == theirs.name
    a, b = (checkpoint.load(path, only="algo")["algo"] for path in (ours, theirs))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not list(disturbed.glob("**/*.tmp"))
