"""Documents from files, folders and data sets, checked and split into pieces where that is asked for.

Readers stream: what they keep of a row that has been read is a hash of its id. Nothing is dropped
silently; every row is a document, is counted as left out, or is a CorpusError that names file, line and
remedy.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from hashlib import blake2b
from types import TracebackType
from typing import Any, Literal, TypeAlias, cast, get_args

from typing_extensions import Self

from polyprag._polyprag import Document
from polyprag.corpus.chunks import Chunker
from polyprag.corpus.files import markdown_rows, pdf_rows, suffix, text_rows, walk
from polyprag.corpus.hub import SCHEME, dataset_rows, is_saved_dataset
from polyprag.corpus.ids import MAX_TEXT_BYTES, DocumentId, PathOrName, Place, Rows, content_id
from polyprag.corpus.tables import csv_rows, dpr_rows, jsonl_rows, one_column, parquet_rows, plain, tsv_rows
from polyprag.errors import CorpusError, InvalidInput
from polyprag.jsonl import open_binary

CorpusFormat: TypeAlias = Literal[
    "jsonl", "csv", "tsv", "dpr", "parquet", "text", "markdown", "pdf", "folder", "beir", "datasets"
]
#: Documents as mappings; a Hugging Face data set is one of those.
RowsInMemory: TypeAlias = Iterable[Mapping[str, Any]]
OnEmpty: TypeAlias = Literal["error", "skip", "title"]

_Rows: TypeAlias = Generator[tuple[CorpusFormat, Place, dict[str, Any]], None, None]

_MAX_U64 = (1 << 64) - 1

_OF_FILES: Mapping[str, Callable[..., Rows]] = {
    "jsonl": jsonl_rows,
    "csv": csv_rows,
    "tsv": tsv_rows,
    "dpr": dpr_rows,
    "parquet": parquet_rows,
    "text": text_rows,
    "markdown": markdown_rows,
    "pdf": pdf_rows,
}
_SUFFIXES: Mapping[str, CorpusFormat] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".txt": "text",
    ".text": "text",
    ".md": "markdown",
    ".markdown": "markdown",
    ".pdf": "pdf",
}
_TYPED: frozenset[CorpusFormat] = frozenset({"parquet", "datasets"})  # whose values JSON may have no form for
#: Formats whose documents are whole texts, to be split into pieces before they are encoded.
WHOLE_TEXTS: frozenset[CorpusFormat] = frozenset({"text", "markdown", "pdf"})
_BEIR = ("corpus.jsonl", "corpus.jsonl.gz")


def infer_format(path: PathOrName) -> CorpusFormat:
    """The format that a name or a folder tells. Raises InvalidInput if it tells none.

    A file by its suffix, with or without ``.gz``; DPR's passages by their usual name (``psgs_w100.tsv``);
    a folder of BEIR by its ``corpus.jsonl`` beside queries or qrels, one of ``save_to_disk`` by its
    ``state.json``; a set of the hub by ``hf://datasets/``.
    """
    name = os.fspath(path)
    if name.startswith(SCHEME):
        return "datasets"
    if os.path.isdir(name):
        if is_saved_dataset(name):
            return "datasets"
        beside = any(os.path.exists(os.path.join(name, other)) for other in ("queries.jsonl", "qrels"))
        return "beir" if beside and _beir_file(name) is not None else "folder"
    if os.path.basename(name).removesuffix(".gz") == "psgs_w100.tsv":
        return "dpr"
    if suffix(name) not in _SUFFIXES:
        known = ", ".join(_SUFFIXES)
        raise InvalidInput(
            f"{name}: the name tells no format; rename it to one of {known} or pass format= (--format)"
        )
    return _SUFFIXES[suffix(name)]


@dataclass
class LeftOut:
    """What a reader has met that is in no document."""

    duplicates: int = 0
    empty: int = 0
    files: Counter[str] | None = None  # files of other kinds in a folder, by suffix


class CorpusReader(Iterator[Document]):
    """The documents of one corpus, in its order; made by :func:`read_corpus`.

    ``left_out`` counts exact duplicates (only with ``on_duplicate="skip"``), rows without a text (only with
    ``on_empty="skip"``), and files of a folder whose kind is not known. ``skipped`` is the number of
    duplicates. Files are closed at their end, at an error, by :meth:`close` or by leaving a ``with`` block.
    """

    def __init__(
        self,
        source: PathOrName | RowsInMemory,
        format: CorpusFormat,
        *,
        id_field: str | None,
        text_field: str,
        title_field: str | None,
        metadata: bool,
        split: str | None,
        subset: str | None,
        chunker: Chunker | None,
        chunk_tables: bool,
        on_duplicate: Literal["error", "skip"],
        on_empty: OnEmpty,
        max_text_bytes: int,
    ) -> None:
        self._given = None if isinstance(source, str | os.PathLike) else source
        self.path = os.fspath(source) if isinstance(source, str | os.PathLike) else "rows in memory"
        self.format = format
        self.left_out = LeftOut()
        self._id_field, self._text_field, self._title_field = id_field, text_field, title_field
        self._metadata, self._skip, self._on_empty = metadata, on_duplicate == "skip", on_empty
        self._chunker, self._chunk_tables, self._max_text_bytes = chunker, chunk_tables, max_text_bytes
        self._id_type: type | None = None  # str, int, or NoneType where ids are made from the content
        self._seen: dict[bytes, int] = {}  # hash of an id -> its place, packed
        self._contents: set[bytes] = set()  # hashes of id and content, kept only to tell what may be skipped
        self._paths: list[Place] = []  # a place of each file, for `_seen`
        self._open = ExitStack()
        self._documents = self._read(self._rows(split, subset))

    @property
    def skipped(self) -> int:
        """How many exact duplicates were left out."""
        return self.left_out.duplicates

    def __next__(self) -> Document:
        try:
            return next(self._documents)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close what is open; no document comes after that."""
        self._documents.close()
        self._open.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # -- rows ------------------------------------------------------------------------------------------------

    def _rows(self, split: str | None, subset: str | None) -> _Rows:
        """The rows of the corpus. What cannot be opened fails here, before the first is asked for."""
        if self._given is not None:
            return _of_kind("datasets", _in_memory(self._given, self.path))
        if self.format == "datasets":
            if not self.path.startswith(SCHEME):
                os.stat(self.path)
            return _of_kind("datasets", dataset_rows(self.path, split=split, subset=subset))
        if split is not None or subset is not None:
            raise InvalidInput(f"{self.path}: only Hugging Face data sets have splits and subsets")
        if self.format == "folder":
            return self._folder_rows([*walk(self.path, frozenset(_SUFFIXES))])
        path = self.path
        if self.format == "beir" and os.path.isdir(path):
            path = _beir_file(path) or os.path.join(path, _BEIR[0])
        kind: CorpusFormat = "jsonl" if self.format == "beir" else self.format
        stream = self._open.enter_context(open_binary(path))
        rows = _OF_FILES[kind](stream, path, max_text_bytes=self._max_text_bytes)
        return _of_kind(kind, rows, os.path.basename(path))

    def _folder_rows(self, found: list[tuple[str, bool]]) -> _Rows:
        self.left_out.files = Counter(suffix(name) or "no suffix" for name, known in found if not known)
        for name, known in found:
            if not known:
                continue
            path = os.path.join(self.path, name)
            kind = _SUFFIXES[suffix(name)]
            with open_binary(path) as stream:
                rows = _OF_FILES[kind](stream, path, max_text_bytes=self._max_text_bytes)
                yield from _of_kind(kind, rows, name.replace(os.sep, "/"))

    # -- documents -------------------------------------------------------------------------------------------

    def _read(self, rows: _Rows) -> Generator[Document, None, None]:
        rows_read = 0
        try:
            for kind, place, row in rows:
                rows_read += 1
                try:
                    yield from self._documents_of(kind, row, place)
                except UnicodeEncodeError as error:
                    problem = "the id or the text is not valid Unicode (a lone surrogate)"
                    raise place.error(problem, "change the row") from error
        finally:
            rows.close()
        if not rows_read:
            remedy = "it needs one row a document"
            if self.format == "folder":
                remedy = f"a folder needs files of {', '.join(_SUFFIXES)}"
            what = "folder" if self.format == "folder" else "file"
            raise CorpusError(f"{self.path}: no document in the {what}; {remedy}")

    def _documents_of(self, kind: CorpusFormat, row: dict[str, Any], place: Place) -> Iterator[Document]:
        chunker = self._chunker if self._chunk_tables or kind in WHOLE_TEXTS else None
        title = self._take_title(row, place)
        text = self._take_text(row, title, place)
        if text is None:
            self.left_out.empty += 1
            return
        given = self._take_id(row, place)
        if isinstance(given, int) and chunker is not None:
            given = str(given)  # pieces have no whole numbers to be called by
        id = content_id(title, text) if given is None else given
        if not self._is_new(id, title, text, place):
            return
        metadata = self._take_metadata(kind, row, place)
        pieces = [(0, text)] if chunker is None else chunker.split(text, markdown=kind == "markdown")
        if len(pieces) == 1:
            pieces = [(0, text)]
        taken = {"chunk", "start"} & (metadata or {}).keys()
        if taken and len(pieces) > 1:
            problem = f"the field {min(taken)!r} is where each piece of a text keeps its own place"
            remedy = "rename it, leave the row whole (--chunk 0), or read without metadata (--no-metadata)"
            raise place.error(problem, remedy)
        for number, (start, piece) in enumerate(pieces, 1):
            size = len(piece.encode("utf-8"))
            if size > self._max_text_bytes:
                problem = f"the text has {size} bytes, more than {self._max_text_bytes}"
                raise place.error(problem, "split it into passages (--chunk), or raise max_text_bytes")
            if len(pieces) == 1:
                yield self._document(id, piece, title, metadata, place)
            else:
                about = {**(metadata or {}), "chunk": number, "start": start} if self._metadata else None
                yield self._document(_chunk_id(id, number), piece, title, about, place)

    def _document(
        self, id: DocumentId, text: str, title: str | None, metadata: dict[str, Any] | None, place: Place
    ) -> Document:
        try:
            return Document(id, text, title, metadata)
        except (ValueError, TypeError, OverflowError) as error:  # such as a metadata number of 100 digits
            raise place.error(str(error), "change the row") from error

    def _take_text(self, row: dict[str, Any], title: str | None, place: Place) -> str | None:
        """The text of a row; None for an empty one that is to be left out."""
        field = self._text_field
        if field not in row:
            fields = ", ".join(map(repr, row)) or "none"
            remedy = (
                f"the row has {fields}: add the field, or name the right one with text_field (--text-field)"
            )
            if len(row) == 1:
                remedy = one_column(next(iter(row))) or remedy
            raise place.error(f"the field {field!r} is missing", remedy)
        text = row.pop(field)
        if text is None and self._on_empty != "error":
            text = ""
        if not isinstance(text, str):
            raise place.error(f"the field {field!r} is no string", "write the text as a JSON string")
        if text.strip():
            return text
        if self._on_empty == "title" and title is not None:
            return title
        if self._on_empty == "error":
            remedy = 'fill it in, remove the row, or pass on_empty="skip" (--on-empty skip)'
            raise place.error(f"the text in {field!r} is empty", remedy)
        return None

    def _take_title(self, row: dict[str, Any], place: Place) -> str | None:
        title = None if self._title_field is None else row.pop(self._title_field, None)
        if title is not None and not isinstance(title, str):
            remedy = "write the title as a JSON string, or null"
            raise place.error(f"the field {self._title_field!r} is no string", remedy)
        return title or None

    def _take_metadata(self, kind: CorpusFormat, row: dict[str, Any], place: Place) -> dict[str, Any] | None:
        """What is left of a row; an object under the name ``metadata`` is the metadata, not a part of it.

        In a table with types it may be the text of a JSON object: that is how objects of many forms are kept.
        """
        if not self._metadata:
            return None
        inner = row.get("metadata")
        if inner is None:
            row.pop("metadata", None)
        elif kind in _TYPED and isinstance(inner, str):
            inner = _object_in(inner)
        if isinstance(inner, dict):
            del row["metadata"]
            twice = next((name for name in inner if name in row), None)
            if twice is not None:
                problem = f"{twice!r} stands both in the row and in its metadata"
                raise place.error(problem, "remove one of them")
            row |= inner
        if kind in _TYPED:
            row = {name: plain(value, name, place) for name, value in row.items()}
        return row or None

    def _take_id(self, row: dict[str, Any], place: Place) -> DocumentId | None:
        """The id of a row, or None where ids come from the content: the first row decides for all."""
        field = self._id_field
        if field is None:
            return None
        if self._id_type is None and field == "id" and field not in row and "_id" in row:
            field = self._id_field = "_id"  # BEIR's name, and that of some databases
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
            raise place.error(problem, "give every row a string, every row a number, or none an id")
        return cast("DocumentId | None", id)

    def _is_new(self, id: DocumentId, title: str | None, text: str, place: Place) -> bool:
        """Remember an id; False for a duplicate to be skipped. Raises CorpusError for any other duplicate."""
        from_content = self._id_type is type(None) or self._id_field is None
        key = blake2b(f"{type(id).__name__}:{id}".encode(), digest_size=16).digest()
        content = b""
        if self._skip and not from_content:
            content = blake2b(key + content_id(title, text).encode(), digest_size=16).digest()
        here = self._packed(place)
        first = self._seen.setdefault(key, here)
        if first == here:
            self._contents.add(content)
            return True
        if self._skip and (from_content or content in self._contents):
            self.left_out.duplicates += 1
            return False
        there = self._unpacked(first)
        before = str(there) if there.path != place.path else f"{there.unit} {there.number}"
        if from_content:
            problem = f"the same title and text as in {before}"
            remedy = 'remove one of them, or pass on_duplicate="skip" (--skip-duplicates)'
        else:
            problem = f"the id {id!r} is already that of {before}"
            remedy = "give each row its own id"
            if not self._skip:
                remedy += ', or pass on_duplicate="skip" (--skip-duplicates) if the rows are equal'
        raise place.error(problem, remedy)

    def _packed(self, place: Place) -> int:
        """A place as one number: millions of them are kept."""
        if not self._paths or self._paths[-1].path != place.path:
            self._paths.append(Place(place.path, place.unit))
        return (len(self._paths) - 1) << 40 | place.number

    def _unpacked(self, packed: int) -> Place:
        file = self._paths[packed >> 40]
        return Place(file.path, file.unit, packed & ((1 << 40) - 1))


def read_corpus(
    source: PathOrName | RowsInMemory,
    *,
    format: CorpusFormat | None = None,
    id_field: str | None = "id",
    text_field: str = "text",
    title_field: str | None = "title",
    metadata: bool = True,
    split: str | None = None,
    subset: str | None = None,
    chunker: Chunker | None = None,
    chunk_tables: bool = True,
    on_duplicate: Literal["error", "skip"] = "error",
    on_empty: OnEmpty | None = None,
    max_text_bytes: int = MAX_TEXT_BYTES,
) -> CorpusReader:
    """The documents of a corpus, one at a time.

    source: a file or a folder; or rows in memory, a list of dicts or a Hugging Face ``Dataset``.
    Tables give a document a row: ``.jsonl`` (one object a line), ``.csv``, ``.tsv`` (a header, then one row a
    line; cells are taken as they are, quotes included) and ``.parquet``, DPR's ``psgs_w100.tsv`` and BEIR's
    folders; all but Parquet also as ``.gz``. Texts give a document a file: ``.txt``, ``.md``, and ``.pdf``
    one a page. A folder gives what its files of these kinds give, in the order of their names, ids below the
    folder. ``hf://datasets/OWNER/NAME`` is a set of the Hugging Face hub, streamed, and a folder that
    ``save_to_disk`` wrote one on disk. Text is UTF-8, a byte order mark is accepted.
    format: where the name does not tell (:func:`infer_format`).
    id_field: strings, or whole numbers from 0 to 2**64 - 1, for all rows; where no row has the field, or with
    None, ids are made from the content (:func:`content_id`). ``_id`` is taken where there is no ``id``.
    title_field: optional in the file.
    metadata: keep all other fields as the document's metadata, with those of an object named ``metadata``.
    split, subset: of a Hugging Face data set.
    chunker: splits each text; pieces are called ``ID#chunk=N``, with N and the first character's place in
    their metadata. A text that is one piece stays as it is. chunk_tables: split the rows of tables too, not
    only texts and pages.
    on_duplicate: ``"skip"`` leaves out rows that repeat the id (if the file has ids), title and text of an
    earlier one and counts them; an id with two contents is an error all the same.
    on_empty: what to do with a row that has no text: ``"skip"`` counts it, ``"title"`` takes the title for
    the text if there is one, else skips. None is ``"title"`` for BEIR, whose sets have such rows, and else
    ``"error"``.
    max_text_bytes: the longest text, or piece of one, in bytes of UTF-8.

    Raises OSError if the file cannot be opened, InvalidInput for a wrong argument, ImportError where a format
    needs a package that is not installed, and, while reading, CorpusError for an empty file, a missing field,
    a line that is no JSON object, a duplicate, an empty or too long text, invalid UTF-8, a row with the wrong
    number of columns, or a damaged file.
    """
    in_memory = not isinstance(source, str | os.PathLike)
    if in_memory and (format, split, subset) != (None, None, None):
        raise InvalidInput("rows in memory have no format, split or subset: leave them out")
    chosen = format
    if isinstance(source, str | os.PathLike):
        chosen = infer_format(source) if format is None else format
    elif format is None:
        chosen = "datasets"
    if chosen not in get_args(CorpusFormat):
        known = ", ".join(map(repr, get_args(CorpusFormat)))
        raise InvalidInput(f"format is {format!r}; expected one of {known}")
    if on_duplicate not in ("error", "skip"):
        raise InvalidInput(f'on_duplicate is {on_duplicate!r}; expected "error" or "skip"')
    if on_empty is None:
        on_empty = "title" if chosen == "beir" else "error"
    if on_empty not in get_args(OnEmpty):
        raise InvalidInput(f'on_empty is {on_empty!r}; expected "error", "skip" or "title"')
    if max_text_bytes < 1:
        raise InvalidInput(f"max_text_bytes is {max_text_bytes}; expected at least 1")
    return CorpusReader(
        source,
        cast(CorpusFormat, chosen),
        id_field=id_field,
        text_field=text_field,
        title_field=title_field,
        metadata=metadata,
        split=split,
        subset=subset,
        chunker=chunker,
        chunk_tables=chunk_tables,
        on_duplicate=on_duplicate,
        on_empty=on_empty,
        max_text_bytes=max_text_bytes,
    )


def _in_memory(rows: RowsInMemory, path: str) -> Rows:
    for number, row in enumerate(rows, 1):
        yield Place(path, "row", number), dict(row)


def _of_kind(kind: CorpusFormat, rows: Rows, name: str = "") -> _Rows:
    """Rows with their kind; those of a text are called by the name of its file, and a page by its number."""
    for place, row in rows:
        if kind in WHOLE_TEXTS:
            try:
                name.encode()
            except UnicodeEncodeError as error:
                problem = "the name of the file, by which its text is called, is no UTF-8"
                raise place.error(problem, "rename the file") from error
            row["id"] = f"{name}#page={row['page']}" if "page" in row else name
            row["source"] = name
        yield kind, place, row


def _object_in(text: str) -> dict[str, Any] | None:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _chunk_id(id: DocumentId, number: int) -> str:
    return f"{id}{'&' if isinstance(id, str) and '#' in id else '#'}chunk={number}"


def _beir_file(folder: str) -> str | None:
    return next((p for name in _BEIR if os.path.isfile(p := os.path.join(folder, name))), None)
