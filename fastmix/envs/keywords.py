"""Keywords behind the name of somebody else's environment: ``3m,timeout=30,difficulty=7``.

One string says everything about an environment. What these keywords may be, and of what type, is known by the program
they are for; rules of our own environments are read by ``fastmix.envs.options``.
"""

from __future__ import annotations

import ast
from typing import Any


def parse_keywords(spec: str) -> tuple[str, dict[str, Any]]:
    """``"3m,timeout=30,difficulty=7"`` as ``("3m", {"timeout": 30, "difficulty": 7})``.

    Values are Python literals (numbers, lists, ...), true, false and none in any case, and else text; commas within
    brackets belong to the value. Raises ``ValueError`` naming the part that is not ``key=value``, or is given twice.
    """
    name, *parts = _split(spec)
    options: dict[str, Any] = {}
    for part in parts:
        key, equals, text = part.partition("=")
        if not equals or not key.isidentifier():
            raise ValueError(f"{spec!r} holds {part!r}; after the name come options such as key=value, with commas")
        if key in options:
            raise ValueError(f"{spec!r} gives {key} twice")
        options[key] = _value(text)
    return name, options


def take_number(options: dict[str, Any], name: str, default: float, least: float) -> float:
    """Remove the option ``name`` and return it; ``default`` where it is not given.

    Raises ``ValueError`` unless it is a number and at least ``least``.
    """
    value = options.pop(name, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value < float("inf"):
        raise ValueError(f"the environment's {name} is {value!r}; it must be a number of at least {least:g}")
    return value


def take_count(options: dict[str, Any], name: str, default: int, least: int) -> int:
    """As :func:`take_number`, for whole numbers."""
    value = take_number(options, name, default, least)
    if not isinstance(value, int):
        raise ValueError(f"the environment's {name} is {value!r}; it must be a whole number")
    return value


_WORDS = {"true": True, "false": False, "none": None}


def _split(spec: str) -> list[str]:
    """At commas outside brackets."""
    parts, depth = [""], 0
    for character in spec:
        depth += (character in "[({") - (character in "])}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def _value(text: str) -> Any:
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
