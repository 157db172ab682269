"""The unified rows of question answering data: a question, its answers, and the passages beside it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from polyprag._polyprag import Document
from polyprag.corpus.ids import MAX_TEXT_BYTES, PathOrName, content_id
from polyprag.errors import CorpusError
from polyprag.jsonl import line_error, numbered_lines, open_binary, parse_object


@dataclass(frozen=True, slots=True)
class Passage:
    """One passage beside a question; ``gold`` is None where nobody labelled it."""

    title: str | None
    text: str
    gold: bool | None = None

    @property
    def id(self) -> str:
        """Made from the content, so the same passage of two questions is one document."""
        return content_id(self.title, self.text)

    def document(self) -> Document:
        return Document(self.id, self.text, self.title)


@dataclass(frozen=True, slots=True)
class UnifiedRow:
    """A question with its answers and passages; ``line`` is where it stands in its file."""

    id: str
    type: str | None
    question: str
    answers: tuple[str, ...]
    passages: tuple[Passage, ...]
    line: int = 0


def read_unified(path: PathOrName, *, max_text_bytes: int = MAX_TEXT_BYTES) -> Iterator[UnifiedRow]:
    """Rows ``{id, type, question, answers[], passages[{title, text, gold}]}`` of a ``.jsonl`` (``.gz``) file.

    ``type``, ``title`` and ``gold`` may be null or missing. Raises OSError if the file cannot be opened and
    CorpusError, with the line, for anything that does not have this form, a duplicate id or an empty file.
    """
    seen: dict[str, int] = {}
    with open_binary(path) as stream:
        for line, text in numbered_lines(stream, path, max_line_bytes=64 * max_text_bytes):
            row = _unified_row(parse_object(text, path, line), path, line, max_text_bytes)
            first = seen.setdefault(row.id, line)
            if first != line:
                raise line_error(
                    path,
                    line,
                    f"the id {row.id!r} is already that of line {first}",
                    "give each row its own id",
                )
            yield row
    if not seen:
        raise CorpusError(f"{os.fspath(path)}: no row in the file; it needs one question a line")


def _unified_row(row: dict[str, Any], path: PathOrName, line: int, max_text_bytes: int) -> UnifiedRow:
    def fail(problem: str) -> CorpusError:
        return line_error(
            path,
            line,
            problem,
            "a row is {id, type, question, answers: [...], passages: [{title, text, gold}, ...]}",
        )

    def filled(value: object, name: str) -> str:
        if not isinstance(value, str) or not value.strip():
            raise fail(f"{name} is missing, empty or no string")
        return value

    def optional(value: object, name: str) -> str | None:
        if value is not None and not isinstance(value, str):
            raise fail(f"{name} is neither a string nor null")
        return value or None

    def many(name: str) -> list[Any]:
        value = row.get(name)
        if not isinstance(value, list) or not value:
            raise fail(f"{name} is missing, empty or no array")
        return value

    id = row.get("id")
    if isinstance(id, int) and not isinstance(id, bool):
        id = str(id)
    passages = []
    for place, passage in enumerate(many("passages"), 1):
        if not isinstance(passage, dict):
            raise fail(f"passage {place} is no object")
        body = filled(passage.get("text"), f"the text of passage {place}")
        if len(body.encode("utf-8")) > max_text_bytes:
            raise fail(f"the text of passage {place} has more than {max_text_bytes} bytes")
        gold = passage.get("gold")
        if gold is not None and not isinstance(gold, bool):
            raise fail(f"gold of passage {place} is neither true, false nor null")
        passages.append(Passage(optional(passage.get("title"), f"the title of passage {place}"), body, gold))
    return UnifiedRow(
        filled(id, "id"),
        optional(row.get("type"), "type"),
        filled(row.get("question"), "question"),
        tuple(filled(answer, "an answer") for answer in many("answers")),
        tuple(passages),
        line,
    )
