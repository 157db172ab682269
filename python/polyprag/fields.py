"""Settings out of JSON: which fields a value has, and whether each is of its type."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import is_dataclass, replace
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from polyprag.errors import InvalidInput

T = TypeVar("T")


def read_fields(default: T, value: object, name: str) -> T:
    """A dataclass out of a JSON object; what that lacks, or has of another version, is as in ``default``.

    Raises:
        InvalidInput: it is no object, or a field is of another type or out of its range; says which, by its
            dotted name from ``name`` on, and what it takes.
    """
    if not isinstance(value, Mapping):
        raise InvalidInput(f"{name}: expected an object of settings, found {value!r}")
    hints = get_type_hints(type(default))
    given = {
        field: _read(hints[field], getattr(default, field), value[field], f"{name}.{field}")
        for field in hints
        if field in value
    }
    try:
        return replace(default, **given)  # type: ignore[type-var]
    except InvalidInput as error:
        raise InvalidInput(f"{name}: {error}") from error


def _read(hint: Any, default: object, value: object, name: str) -> object:
    kinds = (hint, *get_args(hint))
    whole = next((each for each in kinds if isinstance(each, type) and is_dataclass(each)), None)
    if whole is not None and (value is not None or whole is hint):
        return read_fields(whole() if default is None else default, value, name)
    value = tuple(value) if isinstance(value, list) else value
    if not fits(hint, value):
        raise InvalidInput(f"{name}: expected {said(hint)}, found {value!r}")
    return value


def fits(hint: Any, value: object) -> bool:
    """Whether a value is of an annotation made of plain types, Literal, unions and tuples of one type."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return value in inner
    if origin in (Union, types.UnionType):
        return any(fits(each, value) for each in inner)
    if origin is tuple:
        return isinstance(value, tuple) and all(fits(inner[0], each) for each in value)
    if hint is float:
        return type(value) in (int, float)
    return type(value) is hint


def said(hint: Any) -> str:
    """An annotation that :func:`fits` takes, in words."""
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(repr, get_args(hint)))}"
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(map(said, get_args(hint)))
    if get_origin(hint) is tuple:
        return f"a list of {said(get_args(hint)[0])}"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}.get(hint, "null")
