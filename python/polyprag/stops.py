"""Stop strings: where they cut a text, and what of an unfinished one they leave."""

from __future__ import annotations

from collections.abc import Collection


def cut(text: str, stops: Collection[str]) -> str:
    """The text up to the first of the stop strings."""
    return text[: min((at for stop in stops if stop and (at := text.find(stop)) >= 0), default=len(text))]


def begun(text: str, stops: Collection[str]) -> int:
    """How many characters at the end of an unfinished text may be the beginning of a stop string."""
    return max((n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
