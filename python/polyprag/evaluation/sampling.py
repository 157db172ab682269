"""Which questions of a set are asked: the first, or a seeded draw; of all, or of each type."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Protocol, TypeVar

from polyprag.errors import InvalidInput


class _Typed(Protocol):
    @property
    def type(self) -> str | None: ...


_T = TypeVar("_T", bound=_Typed)


def chosen(rows: Sequence[_T], n: int, *, per_type: bool = False, seed: int | None = None) -> list[_T]:
    """n of the rows, in their order.

    per_type: n of each type, or all where there are fewer. seed: draw them; None takes the first.
    A draw does not change with the order of types, nor with other types than its own.
    Raises InvalidInput if n is below 1, or there are fewer rows than n in all.
    """
    if n < 1:
        raise InvalidInput(f"n is at least 1, not {n}")
    if per_type:
        groups: dict[str | None, list[int]] = {}
        for place, row in enumerate(rows):
            groups.setdefault(row.type, []).append(place)
        places = [p for kind, group in groups.items() for p in _some(group, n, seed, str(kind))]
    else:
        if n > len(rows):
            raise InvalidInput(f"{n} questions are asked for, but there are {len(rows)}")
        places = _some(range(len(rows)), n, seed, "")
    return [rows[place] for place in sorted(places)]


def _some(places: Sequence[int], n: int, seed: int | None, kind: str) -> list[int]:
    if seed is None or n >= len(places):
        return list(places[:n])
    return random.Random(f"{seed}:{kind}").sample(places, n)
