"""Documents from files: JSONL and TSV (plain or ``.gz``), and the unified rows of question answering data.

Readers stream: what they keep of a row that has been read is a hash of its id. Nothing is dropped
silently; every row is a document, or a CorpusError that names file, line and remedy.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from types import TracebackType
from typing import IO, Any, Literal, TypeAlias, cast

from typing_extensions import Self

from polyprag._polyprag import Document
from polyprag.errors import CorpusError, InvalidInput
from polyprag.jsonl import line_error, numbered_lines, open_binary, parse_object

DocumentId: TypeAlias = str | int
CorpusFormat: TypeAlias = Literal["jsonl", "tsv"]
_Path: TypeAlias = str | os.PathLike[str]
_Rows: TypeAlias = Iterator[tuple[int, dict[str, Any]]]

#: The longest text of one document, in bytes of UTF-8, unless the caller sets another limit.
MAX_TEXT_BYTES = 1 << 20
_MAX_U64 = (1 << 64) - 1


def content_id(title: str | None, text: str) -> str:
    """The id of a document that has none of its own: 32 hex digits, blake2b-128 of title, NUL and text."""
    content = f"{title or ''}\0{text}".encode()
    return blake2b(content, digest_size=16).hexdigest()


# -- rows of a file ------------------------------------------------------------------------------------------


def _jsonl_rows(lines: Iterator[tuple[int, str]], path: _Path) -> _Rows:
    for number, line in lines:
        yield number, parse_object(line, path, number)


def _tsv_rows(lines: Iterator[tuple[int, str]], path: _Path) -> _Rows:
    header: list[str] | None = None
    for number, line in lines:
        cells = line.split("\t")
        if header is None:
            header = [cell.strip() for cell in cells]
            repeated = next((name for name in header if header.count(name) > 1), None)
            if repeated is not None:
                raise line_error(
                    path, number, f"the header names {repeated!r} twice", "give each column its own name"
                )
            continue
        if len(cells) != len(header):
            raise line_error(
                path,
                number,
                f"{len(cells)} columns, but the header has {len(header)}",
                "replace tabs and line breaks inside of a cell by spaces",
            )
        yield number, dict(zip(header, cells, strict=True))


_FORMATS: Mapping[str, Callable[[Iterator[tuple[int, str]], _Path], _Rows]] = {
    "jsonl": _jsonl_rows,
    "tsv": _tsv_rows,
}
_SUFFIXES: Mapping[str, CorpusFormat] = {".jsonl": "jsonl", ".ndjson": "jsonl", ".tsv": "tsv"}


def infer_format(path: _Path) -> CorpusFormat:
    """The format that a file name tells, with or without ``.gz``. Raises InvalidInput if it tells none."""
    name = os.fspath(path).removesuffix(".gz")
    suffix = os.path.splitext(name)[1].lower()
    if suffix not in _SUFFIXES:
        known = ", ".join(_SUFFIXES)
        raise InvalidInput(
            f"{os.fspath(path)}: the name tells no format; rename it to one of {known} or pass format="
        )
    return _SUFFIXES[suffix]


# -- documents -----------------------------------------------------------------------------------------------


class CorpusReader(Iterator[Document]):
    """The documents of one file, in its order; made by :func:`read_corpus`.

    ``skipped`` counts the exact duplicates that were left out (only with ``on_duplicate="skip"``).
    The file is closed at its end, at an error, by :meth:`close` or by leaving a ``with`` block.
    """

    def __init__(
        self,
        path: _Path,
        format: CorpusFormat,
        id_field: str | None,
        text_field: str,
        title_field: str | None,
        metadata: bool,
        on_duplicate: Literal["error", "skip"],
        max_text_bytes: int,
    ) -> None:
        self.path = os.fspath(path)
        self.skipped = 0
        self._id_field, self._text_field, self._title_field = id_field, text_field, title_field
        self._metadata, self._skip, self._max_text_bytes = metadata, on_duplicate == "skip", max_text_bytes
        self._id_type: type | None = None  # str, int, or NoneType where ids are made from the content
        self._seen: dict[bytes, int] = {}  # hash of an id -> its line
        self._contents: set[bytes] = set()  # hashes of id and content, kept only to tell what may be skipped
        self._stream: IO[bytes] = open_binary(path)
        # JSON may need six bytes for one of text, and the other fields of the row want room as well
        lines = numbered_lines(self._stream, self.path, max_line_bytes=8 * max_text_bytes + (8 << 20))
        self._documents = self._read(_FORMATS[format](lines, self.path))

    def __next__(self) -> Document:
        try:
            return next(self._documents)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file; no document comes after that."""
        self._documents.close()
        self._stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _read(self, rows: _Rows) -> Generator[Document, None, None]:
        rows_read = 0
        for line, row in rows:
            rows_read += 1
            text, title = self._take_text(row, line), self._take_title(row, line)
            given = self._take_id(row, line)
            id = content_id(title, text) if given is None else given
            if self._is_new(id, title, text, line):
                yield self._document(id, text, title, self._take_metadata(row, line), line)
        if not rows_read:
            raise CorpusError(f"{self.path}: no document in the file; it needs one row a document")

    def _document(
        self, id: DocumentId, text: str, title: str | None, metadata: dict[str, Any] | None, line: int
    ) -> Document:
        try:
            return Document(id, text, title, metadata)
        except (ValueError, TypeError, OverflowError) as error:  # such as a metadata number of 100 digits
            raise line_error(self.path, line, str(error), "change the row") from error

    def _take_text(self, row: dict[str, Any], line: int) -> str:
        field = self._text_field
        if field not in row:
            fields = ", ".join(map(repr, row)) or "none"
            remedy = f"the row has {fields}: add the field, or name the right one with text_field"
            raise line_error(self.path, line, f"the field {field!r} is missing", remedy)
        text = row.pop(field)
        if not isinstance(text, str):
            raise line_error(
                self.path, line, f"the field {field!r} is no string", "write the text as a JSON string"
            )
        if not text.strip():
            raise line_error(
                self.path, line, f"the text in {field!r} is empty", "fill it in or remove the row"
            )
        size = len(text.encode("utf-8"))
        if size > self._max_text_bytes:
            problem = f"the text has {size} bytes, more than {self._max_text_bytes}"
            raise line_error(self.path, line, problem, "split it into passages, or raise max_text_bytes")
        return text

    def _take_title(self, row: dict[str, Any], line: int) -> str | None:
        title = None if self._title_field is None else row.pop(self._title_field, None)
        if title is not None and not isinstance(title, str):
            remedy = "write the title as a JSON string, or null"
            raise line_error(self.path, line, f"the field {self._title_field!r} is no string", remedy)
        return title or None

    def _take_metadata(self, row: dict[str, Any], line: int) -> dict[str, Any] | None:
        """What is left of a row; an object under the name ``metadata`` is the metadata, not a part of it."""
        if not self._metadata:
            return None
        inner = row.get("metadata")
        if isinstance(inner, dict):
            del row["metadata"]
            twice = next((name for name in inner if name in row), None)
            if twice is not None:
                problem = f"{twice!r} stands both in the row and in its metadata"
                raise line_error(self.path, line, problem, "remove one of them")
            row |= inner
        return row or None

    def _take_id(self, row: dict[str, Any], line: int) -> DocumentId | None:
        """The id of a row, or None where ids come from the content: the first row decides for all."""
        field = self._id_field
        if field is None:
            return None
        id = row.pop(field, None)
        kind = type(id)
        if self._id_type is None:
            self._id_type = kind
        problem = None
        if kind not in (str, int, type(None)):  # bool is a type of its own here
            problem = f"the id in {field!r} is neither a string nor a whole number"
        elif kind is not self._id_type:
            before = {str: "have strings", int: "have numbers"}.get(self._id_type, "have none")
            problem = (
                f"the id {id!r}, where the rows before it {before}"
                if id is not None
                else f"the field {field!r} is missing"
            )
        elif isinstance(id, int) and not 0 <= id <= _MAX_U64:
            problem = f"the id {id} is outside of 0 to 2**64 - 1"
        elif isinstance(id, str) and not id.strip():
            problem = f"the id in {field!r} is empty"
        if problem is not None:
            raise line_error(
                self.path, line, problem, "give every row a string, every row a number, or none an id"
            )
        return cast("DocumentId | None", id)

    def _is_new(self, id: DocumentId, title: str | None, text: str, line: int) -> bool:
        """Remember an id; False for a duplicate to be skipped. Raises CorpusError for any other duplicate."""
        from_content = self._id_type is type(None) or self._id_field is None
        key = blake2b(f"{type(id).__name__}:{id}".encode(), digest_size=16).digest()
        content = b""
        if self._skip and not from_content:
            content = blake2b(key + content_id(title, text).encode(), digest_size=16).digest()
        first = self._seen.setdefault(key, line)
        if first == line:
            self._contents.add(content)
            return True
        if self._skip and (from_content or content in self._contents):
            self.skipped += 1
            return False
        if from_content:
            problem = f"the same title and text as in line {first}"
            remedy = 'remove one of them, or pass on_duplicate="skip"'
        else:
            problem = f"the id {id!r} is already that of line {first}"
            remedy = "give each row its own id"
            if not self._skip:
                remedy += ', or pass on_duplicate="skip" if the rows are equal'
        raise line_error(self.path, line, problem, remedy)


def read_corpus(
    path: _Path,
    *,
    format: CorpusFormat | None = None,
    id_field: str | None = "id",
    text_field: str = "text",
    title_field: str | None = "title",
    metadata: bool = True,
    on_duplicate: Literal["error", "skip"] = "error",
    max_text_bytes: int = MAX_TEXT_BYTES,
) -> CorpusReader:
    """The documents of a corpus file, one at a time.

    path: ``.jsonl`` (one object a line) or ``.tsv`` (a header, then one row a line; cells are taken as they
    are, quotes included), either also as ``.gz``; UTF-8, with or without a byte order mark.
    format: ``"jsonl"`` or ``"tsv"`` where the name does not tell.
    id_field: strings, or whole numbers from 0 to 2**64 - 1, for all rows; where no row has the field, or with
    None, ids are made from the content (:func:`content_id`). title_field: optional in the file.
    metadata: keep all other fields as the document's metadata, with those of an object named ``metadata``.
    on_duplicate: ``"skip"`` leaves out rows that repeat the id (if the file has ids), title and text of an
    earlier one and counts them in ``.skipped``; an id with two contents is an error all the same.
    max_text_bytes: the longest text, in bytes of UTF-8.

    Raises OSError if the file cannot be opened, InvalidInput for a wrong argument, and, while reading,
    CorpusError for an empty file, a missing field, a line that is no JSON object, a duplicate, an empty or
    too long text, invalid UTF-8 or a row with the wrong number of columns.
    """
    chosen = infer_format(path) if format is None else format
    if chosen not in _FORMATS:
        raise InvalidInput(f"format is {format!r}; expected one of {', '.join(map(repr, _FORMATS))}")
    if on_duplicate not in ("error", "skip"):
        raise InvalidInput(f'on_duplicate is {on_duplicate!r}; expected "error" or "skip"')
    if max_text_bytes < 1:
        raise InvalidInput(f"max_text_bytes is {max_text_bytes}; expected at least 1")
    return CorpusReader(
        path, chosen, id_field, text_field, title_field, metadata, on_duplicate, max_text_bytes
    )


# -- unified rows --------------------------------------------------------------------------------------------


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


def read_unified(path: _Path, *, max_text_bytes: int = MAX_TEXT_BYTES) -> Iterator[UnifiedRow]:
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


def _unified_row(row: dict[str, Any], path: _Path, line: int, max_text_bytes: int) -> UnifiedRow:
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
