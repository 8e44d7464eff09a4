"""Command-line arguments from dataclass fields: the field's name, type, default and help are the argument's."""

from __future__ import annotations

import argparse
import dataclasses
import types
from collections.abc import Collection
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

# Marks "not given on the command line", so that presets and saved configs keep their say.
UNSET = argparse.SUPPRESS


def add_dataclass_arguments(
    parser: argparse._ActionsContainer, cls: type[Any], *, skip: Collection[str] = (), show_defaults: bool = True
) -> None:
    """One ``--field-name`` for every field of ``cls`` that carries help and is not in ``skip``.

    int, float, str, bool (``--x`` / ``--no-x``), ``Literal`` and ``X | None`` are understood. Arguments that are not
    given leave no attribute in the namespace; :func:`given` collects those that were.
    """
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if field.name in skip or "help" not in field.metadata:
            continue
        text = field.metadata["help"].replace("%", "%%")
        if show_defaults and field.default not in (None, dataclasses.MISSING):
            text += f" (default: {field.default})"
        flag = "--" + field.name.replace("_", "-")
        kind = _without_none(hints[field.name])
        options: dict[str, Any] = {"dest": field.name, "default": UNSET, "help": text}
        if kind is bool:
            argument = parser.add_argument(flag, action=argparse.BooleanOptionalAction, dest=field.name, default=UNSET)
            argument.help = text  # set afterwards: Python 3.10 appends the default to what it is given
        elif get_origin(kind) is Literal:
            parser.add_argument(flag, choices=get_args(kind), type=type(get_args(kind)[0]), **options)
        elif kind in (int, float, str):
            convert = _integer if kind is int else kind
            metavar = {int: "N", float: "X", str: "NAME"}[kind]
            parser.add_argument(flag, type=convert, metavar=metavar, **options)
        else:
            raise TypeError(f"{cls.__name__}.{field.name} has the type {kind}, which no argument can be made of")


def given(args: argparse.Namespace, cls: type[Any]) -> dict[str, Any]:
    """The fields of ``cls`` that were given on the command line."""
    names = {field.name for field in dataclasses.fields(cls)}
    return {name: value for name, value in vars(args).items() if name in names}


def _integer(text: str) -> int:
    """Whole numbers, also written as 1e6 or 20_000."""
    try:
        return int(text)
    except ValueError:
        value = float(text)
        if not value.is_integer():
            raise
        return int(value)


_integer.__name__ = "integer"  # argparse names the type in its error message


def _without_none(hint: Any) -> Any:
    if get_origin(hint) in (Union, types.UnionType):
        rest = [kind for kind in get_args(hint) if kind is not type(None)]
        if len(rest) == 1:
            return rest[0]
    return hint
