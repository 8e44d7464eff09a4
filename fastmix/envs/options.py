"""Rules of an environment behind its name: ``p-1.5,toroidal=true,world_shape=6x7``."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar

Rules = TypeVar("Rules")


def changed(env: str, rules: Rules, changes: Sequence[str]) -> Rules:
    """The dataclass ``rules`` with ``changes`` like ``n_agents=4``; ``env`` is the whole name, for messages.

    Values are read in the type of what they replace; numbers of a tuple are joined by x (``6x7``), and those of a fixed
    length keep it. Raises ``ValueError`` for a rule that does not exist or a value that is none.
    """
    known = {field.name: field for field in dataclasses.fields(rules)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for change in changes:
        name, equals, text = change.partition("=")
        if not equals or name not in known:
            raise ValueError(f"env is {env!r}; {change!r} must be rule=value with one of {', '.join(known)}")
        fixed = "..." not in str(known[name].type)
        values[name] = _parse(env.partition(":")[0], name, text, getattr(rules, name), fixed)
    return dataclasses.replace(rules, **values)  # type: ignore[type-var]


def _parse(family: str, name: str, text: str, replaced: Any, fixed_length: bool) -> Any:
    try:
        if isinstance(replaced, bool):
            return {"true": True, "false": False}[text.lower()]
        if isinstance(replaced, tuple):
            numbers = tuple(int(part) for part in text.split("x")) if text else ()
            if fixed_length and len(numbers) != len(replaced):
                raise ValueError
            return numbers
        return type(replaced)(text)
    except (KeyError, ValueError):
        kinds = {bool: "true or false", int: "a whole number", float: "a number", tuple: "numbers like 6x7"}
        raise ValueError(f"{family}: {name} is {text!r}; it must be {kinds.get(type(replaced), 'a name')}") from None
