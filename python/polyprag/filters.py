"""Keys of the metadata on which a store's searches can be filtered: declared, checked, asked for.

The store itself has the rules (:meth:`polyprag.Store.search`); here they meet the words of a command line,
and documents before the hours of a training whose store would refuse them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeAlias, cast

from polyprag._polyprag import Document
from polyprag.errors import InvalidInput

FilterKind: TypeAlias = Literal["string", "i64", "f64", "bool"]

_LONGEST = 4_096  # bytes of a string
_EXPECTED: Mapping[FilterKind, str] = {
    "string": f"a text of at most {_LONGEST:,} bytes or a list of such",
    "i64": "an integer of 64 bits",
    "f64": "a number",
    "bool": "true or false",
}
_CONDITION = re.compile(r"(.+?)(>=|<=|=|>|<)(.*)", re.DOTALL)
_RANGE = {">=": "gte", ">": "gt", "<=": "lte", "<": "lt"}


def declared(words: Sequence[str], documents: Sequence[Document]) -> dict[str, FilterKind]:
    """Filters by their names, ``year:i64``, or ``year`` alone, whose kind its values tell.

    Raises:
        InvalidInput: a key that no document has in its metadata, or that is named twice.
    """
    found: dict[str, FilterKind] = {}
    metadata = [document.metadata or {} for document in documents] if words else []
    for word in words:
        name, _, kind = word.rpartition(":")
        if not name or kind not in _EXPECTED:
            name, kind = word, ""
        values = [v for of_document in metadata if (v := of_document.get(name)) is not None]
        if not values:
            known = sorted({key for of_document in metadata for key in of_document})
            raise InvalidInput(
                f"filter {name!r}: no document has it in its metadata, but {', '.join(known) or 'nothing'}"
            )
        if name in found:
            raise InvalidInput(f"filter {name!r} is named twice")
        found[name] = cast(FilterKind, kind) if kind else _kind_of(values)
    return found


def _kind_of(values: Sequence[object]) -> FilterKind:
    kinds: tuple[FilterKind, ...] = ("bool", "i64", "f64")
    return next((kind for kind in kinds if all(_fits(value, kind) for value in values)), "string")


def _fits(value: object, kind: FilterKind) -> bool:
    if kind == "string":
        several = value if isinstance(value, list) else [value]
        return all(isinstance(text, str) and len(text.encode()) <= _LONGEST for text in several)
    if kind == "bool" or isinstance(value, bool):
        return kind == "bool" and isinstance(value, bool)
    if kind == "i64":
        return isinstance(value, int) and -(1 << 63) <= value < 1 << 63
    return isinstance(value, int | float) and math.isfinite(value)


def check(documents: Iterable[Document], filters: Mapping[str, FilterKind]) -> None:
    """Refuse documents that a store with these filters would refuse.

    Raises:
        InvalidInput: a value of another kind; names the document and the remedy.
    """
    for document in documents if filters else ():
        metadata = document.metadata or {}
        for name, kind in filters.items():
            value = metadata.get(name)
            if value is not None and not _fits(value, kind):
                raise InvalidInput(
                    f"document {document.id!r}: metadata field {name!r} is a filter: expected "
                    f"{_EXPECTED[kind]}, found {value!r}; correct it, or declare another kind in a new store"
                )


def conditions(words: Iterable[str], filters: Mapping[str, str]) -> dict[str, Any] | None:
    """What :meth:`polyprag.Store.search` takes as a filter, of ``lang=de``, ``year>=1990``, ``year<2000``.

    All have to hold; of several values that one key is to be equal to, one. None where there are no words.

    Raises:
        InvalidInput: no condition, a key that is no filter of the store, or a value of another kind.
    """
    found: dict[str, Any] = {}
    for word in words:
        parts = _CONDITION.fullmatch(word)
        if parts is None:
            raise InvalidInput(f"filter {word!r}: expected KEY=VALUE, or a bound such as year>=1990")
        name, sign, text = (part.strip() for part in parts.groups())
        asked = found.setdefault(name, [] if sign == "=" else {})
        if isinstance(asked, list) != (sign == "="):
            raise InvalidInput(
                f"filter {word!r}: {name!r} is to be equal to something, or has bounds; not both"
            )
        value = _value(word, text, filters.get(name))
        if sign == "=":
            asked.append(value)
        elif _RANGE[sign] in asked:
            raise InvalidInput(f"filter {word!r}: {name!r} has that bound already")
        else:
            asked[_RANGE[sign]] = value
    return found or None


def _value(word: str, text: str, kind: str | None) -> object:
    """A value as its key's kind has it; of a key that is none, which the store will name, a text."""
    try:
        if kind == "i64":
            return int(text)
        if kind == "f64":
            return float(text)
        if kind == "bool":
            return {"true": True, "false": False}[text.lower()]
    except (ValueError, KeyError):
        raise InvalidInput(f"filter {word!r}: expected {_EXPECTED[kind]}") from None  # type: ignore[index]
    return text
