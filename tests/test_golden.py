"""Reference numbers of public implementations: every file of the folder, on every backend of this machine.

The folder is `FASTMIX_GOLDEN`, by default `tests/golden`. Each file says what it holds; `tests/golden_rules.py` knows
how to rebuild it.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

import pytest

from fastmix.testing import golden as reference
from tests.golden_rules import PENDING, RULES, Rule, Setting, find_rule, label

FOLDER = reference.folder(Path(__file__).parent / "golden")

load = cache(reference.load)


def cases() -> list[object]:
    """One case for each file, backend, dtype and device; unknown files become a case that fails."""
    found: list[object] = []
    for path in sorted(FOLDER.glob("**/*.npz")):
        name = path.relative_to(FOLDER).as_posix().removesuffix(".npz")
        try:
            rule = find_rule(load(path))
        except (LookupError, ValueError) as error:
            found.append(pytest.param(path, None, None, str(error), id=name))
            continue
        if isinstance(rule, str):
            found.append(pytest.param(path, None, None, rule, id=name, marks=pytest.mark.skip(reason=rule)))
            continue
        for setting in rule.settings():
            marks = [pytest.mark.gpu] if setting.device == "cuda" else []
            found.append(pytest.param(path, rule, setting, "", id=f"{name}-{setting}", marks=marks))
    return found


@pytest.mark.parametrize(("path", "rule", "setting", "problem"), cases())
def test_reference_numbers(path: Path, rule: Rule | None, setting: Setting | None, problem: str) -> None:
    if rule is None or setting is None:
        pytest.fail(problem)
    rule.run(load(path), setting)


def test_folder_holds_files() -> None:
    assert any(FOLDER.glob("**/*.npz")), f"{FOLDER} holds no golden files"


def test_no_kind_is_both_implemented_and_pending() -> None:
    labels = {label(load(path)) for path in FOLDER.glob("**/*.npz")}
    handled = {name for name in labels if any(fnmatchcase(name, pattern) for pattern in RULES)}
    pending = {name for name in labels if any(fnmatchcase(name, pattern) for pattern in PENDING)}
    assert not handled & pending
