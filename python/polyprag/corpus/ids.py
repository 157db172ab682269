"""Ids of documents, and where in a corpus something stands."""

from __future__ import annotations

import os
from collections.abc import Generator
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Literal, TypeAlias

from polyprag.errors import CorpusError

DocumentId: TypeAlias = str | int

#: The longest text of one document, in bytes of UTF-8, unless the caller sets another limit.
MAX_TEXT_BYTES = 1 << 20


def content_id(title: str | None, text: str) -> str:
    """The id of a document that has none of its own: 32 hex digits, blake2b-128 of title, NUL and text."""
    content = f"{title or ''}\0{text}".encode()
    return blake2b(content, digest_size=16).hexdigest()


@dataclass(frozen=True, slots=True)
class Place:
    """A line, row or page of a file, counted from 1; ``number`` is 0 for the file itself."""

    path: str
    unit: Literal["line", "row", "page"] = "line"
    number: int = 0

    def __str__(self) -> str:
        path = self.path.encode(errors="backslashreplace").decode()  # a name that is no UTF-8 can be printed
        return f"{path}, {self.unit} {self.number}" if self.number else path

    def error(self, problem: str, remedy: str) -> CorpusError:
        """The one form of complaint about a place."""
        return CorpusError(f"{self}: {problem}; {remedy}")


#: What a source yields: where a row stands, and its fields.
Rows: TypeAlias = Generator[tuple[Place, dict[str, Any]], None, None]
PathOrName: TypeAlias = str | os.PathLike[str]
