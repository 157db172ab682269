"""What a model answered: the pairs and the rewrite in a text that ought to be JSON and often nearly is.

Fences and talk around the JSON, thoughts before it, commas too many, one object where a list was asked for,
and an end that is missing cost nothing that is whole.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from polyprag.augment.base import Pair

#: What is read of one answer, in characters, and how often a bracket may open nothing whole.
LONGEST = 200_000
_FALSE_STARTS = 1000

_DECODER = json.JSONDecoder(strict=False)  # line breaks within strings are let through
_STRING = r'"[^"\\]*(?:\\.[^"\\]*)*"'
_TRAILING_COMMA = re.compile(rf"({_STRING})|,(?=\s*[}}\]])", re.DOTALL)
_REWRITE = re.compile(rf'"rewrite"\s*:\s*({_STRING})', re.DOTALL | re.IGNORECASE)
_START = re.compile(r"[{\[]")


@dataclass(frozen=True)
class Answer:
    """The pairs in their order, the rewrite if there is one, and how many pairs were malformed."""

    pairs: tuple[Pair, ...]
    rewrite: str | None = None
    malformed: int = 0


def parse_answer(text: str) -> Answer | None:
    """The pairs and the rewrite that ``text`` holds; None if it holds neither. Never raises."""
    body = text.rpartition("</think>")[2][:LONGEST]
    found = _collect(body)
    mended = _TRAILING_COMMA.sub(lambda match: match.group(1) or "", body)
    if mended != body:
        found = max(found, _collect(mended), key=lambda answer: len(answer.pairs))
    if not found.pairs and found.rewrite is None and not found.malformed:
        return None
    return found


def pair_of(value: dict[str, Any]) -> Pair | None:
    """The pair in an object with a question and an answer; None if either is no text."""
    question, answer = (_text(value[name]) for name in ("question", "answer"))
    return Pair(question, answer) if question and answer else None


def _collect(body: str) -> Answer:
    pairs: list[Pair] = []
    rewrite: str | None = None
    malformed = 0
    for value in _objects(body):
        if "question" in value and "answer" in value:
            pair = pair_of(value)
            malformed += pair is None
            pairs += [] if pair is None else [pair]
        elif rewrite is None:
            rewrite = _text(value.get("rewrite"))
    if rewrite is None:  # its object may lack an end
        match = _REWRITE.search(body)
        try:
            rewrite = _text(_DECODER.decode(match.group(1))) if match else None
        except ValueError:
            rewrite = None
    return Answer(tuple(pairs), rewrite, malformed)


def _objects(body: str) -> Iterator[dict[str, Any]]:
    """Every object in ``body``, outer ones before inner ones, with folded names."""
    place, false_starts = 0, 0
    while false_starts < _FALSE_STARTS and (start := _START.search(body, place)) is not None:
        try:
            value, place = _DECODER.raw_decode(body, start.start())
        except (ValueError, RecursionError):
            place, false_starts = start.start() + 1, false_starts + 1
            continue
        stack = [value]
        while stack:
            value = stack.pop()
            if isinstance(value, dict):
                yield {name.strip().lower(): inner for name, inner in value.items()}
                stack += reversed(list(value.values()))
            elif isinstance(value, list):
                stack += reversed(value)


def _text(value: object) -> str | None:
    """A text in one line; numbers and truth values as they are said; None for all else."""
    if isinstance(value, bool):
        value = "yes" if value else "no"
    elif isinstance(value, int | float):
        value = str(value)
    if not isinstance(value, str):
        return None
    line = " ".join(value.split())
    try:
        line.encode("utf-8")
    except UnicodeEncodeError:  # half of a surrogate pair, which no file can keep
        return None
    return line or None
