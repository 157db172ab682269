"""Rows of tables: JSONL, TSV, CSV (DPR's TSV too) and Parquet, each streamed, with where a row stands."""

from __future__ import annotations

import csv
import datetime as dt
import decimal
import math
from collections.abc import Iterator
from typing import IO, Any

from polyprag.corpus.ids import MAX_TEXT_BYTES, Place, Rows
from polyprag.extras import lacking
from polyprag.jsonl import numbered_lines, parse_object, text_lines

_BATCH = 1_024  # rows of a Parquet file in memory
_OWN_NAMES = "give each column its own name"


def jsonl_rows(stream: IO[bytes], path: str, *, max_text_bytes: int = MAX_TEXT_BYTES) -> Rows:
    """One JSON object a line."""
    for number, line in numbered_lines(stream, path, max_line_bytes=_line_bytes(max_text_bytes)):
        yield Place(path, "line", number), parse_object(line, path, number)


def tsv_rows(stream: IO[bytes], path: str, *, max_text_bytes: int = MAX_TEXT_BYTES) -> Rows:
    """A header, then one row a line; cells are taken as they are, quotes included."""
    lines = numbered_lines(stream, path, max_line_bytes=_line_bytes(max_text_bytes))
    cells = ((number, line.split("\t")) for number, line in lines)
    yield from _named(cells, path, "replace tabs and line breaks inside of a cell by spaces")


def csv_rows(
    stream: IO[bytes], path: str, *, delimiter: str = ",", max_text_bytes: int = MAX_TEXT_BYTES
) -> Rows:
    """A header, then rows as RFC 4180 has them: quoted cells may hold delimiters, quotes and line breaks."""
    cells = _csv_cells(stream, path, delimiter, max_text_bytes)
    yield from _named(cells, path, "quote a cell that holds the delimiter")


def dpr_rows(stream: IO[bytes], path: str, *, max_text_bytes: int = MAX_TEXT_BYTES) -> Rows:
    """Passages as DPR and PRAG have them (``psgs_w100.tsv``): id, text and title, quoted; ids are numbers."""
    for place, row in csv_rows(stream, path, delimiter="\t", max_text_bytes=max_text_bytes):
        id = row.get("id")
        if id is not None:
            if not (id.isascii() and id.isdigit()):
                raise place.error(f"the id {id!r} is no whole number", "read the file as tsv or csv")
            row["id"] = int(id)
        yield place, row


def parquet_rows(stream: IO[bytes], path: str, *, max_text_bytes: int = MAX_TEXT_BYTES) -> Rows:  # noqa: ARG001
    """The rows of a Parquet file, a thousand in memory at a time."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise lacking("Parquet files", "pyarrow", "corpus") from error
    number = 0
    try:
        with pq.ParquetFile(stream) as file:
            names = file.schema_arrow.names
            twice = _repeated(names)
            if twice is not None:
                raise Place(path).error(f"two columns are named {twice!r}", _OWN_NAMES)
            for batch in file.iter_batches(batch_size=_BATCH):
                columns = zip(names, batch.columns, strict=True)
                values = [_values(column, name, path, number) for name, column in columns]
                for row in zip(*values, strict=True):
                    number += 1
                    yield Place(path, "row", number), dict(zip(names, row, strict=True))
    except (pa.ArrowException, OSError) as error:
        place = Place(path, "row", number + 1)
        raise place.error(f"no valid Parquet ({error})", "write the file again") from error


def plain(value: Any, name: str, place: Place) -> Any:
    """A value of a typed column as JSON has it: dates and decimals as text, NaN as null.

    Raises CorpusError for what JSON has no form for, such as bytes and pictures.
    """
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return None if math.isnan(value) else value
    if isinstance(value, dt.date | dt.time):
        return value.isoformat()
    if isinstance(value, decimal.Decimal):
        return str(value)
    if isinstance(value, dict):
        return {str(key): plain(inner, name, place) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner, name, place) for inner in value]
    raise place.error(
        f"the field {name!r} holds {type(value).__name__}, which a document's metadata cannot keep",
        "take the column out, or read without metadata (--no-metadata)",
    )


def _values(column: Any, name: str, path: str, before: int) -> list[Any]:
    """A column of Parquet, ``before`` rows down. Raises CorpusError for a cell that Python cannot hold."""
    try:
        return list(column.to_pylist())
    except (ValueError, OverflowError):  # the year 10,000; nanoseconds; text that is no UTF-8
        for number, cell in enumerate(column, before + 1):
            try:
                cell.as_py()
            except (ValueError, OverflowError) as error:
                problem = f"the field {name!r}, of type {column.type}, cannot be read ({error})"
                remedy = "write the column as valid text, or take it out"
                raise Place(path, "row", number).error(problem, remedy) from error
        raise


def _repeated(names: list[str]) -> str | None:
    return next((name for name in names if names.count(name) > 1), None)


def _line_bytes(max_text_bytes: int) -> int:
    # JSON may need six bytes for one of text, and the other fields of the row want room as well.
    return 8 * max_text_bytes + (8 << 20)


def one_column(name: str) -> str | None:
    """A remedy where the names of all columns seem to stand in one, as with a CSV of semicolons."""
    kinds = {";": "semicolons", "\t": "tabs", ",": "commas", "|": "bars"}
    found = next((kinds[mark] for mark in kinds if mark in name), None)
    if found is None:
        return None
    return (
        f"the header is one column, {name!r}, and seems to part cells by {found}: a .csv "
        "parts them by commas, a .tsv by tabs"
    )


def _named(rows: Iterator[tuple[int, list[str]]], path: str, remedy: str) -> Rows:
    """Rows of cells under the names of the first one."""
    header: list[str] | None = None
    for number, cells in rows:
        place = Place(path, "line", number)
        if header is None:
            header = [cell.strip() for cell in cells]
            repeated = _repeated(header)
            if repeated is not None:
                raise place.error(f"the header names {repeated!r} twice", _OWN_NAMES)
            continue
        if len(cells) != len(header):
            advice = remedy if len(header) > 1 else one_column(header[0]) or remedy
            raise place.error(f"{len(cells)} columns, but the header has {len(header)}", advice)
        yield place, dict(zip(header, cells, strict=True))


def _csv_cells(
    stream: IO[bytes], path: str, delimiter: str, max_text_bytes: int
) -> Iterator[tuple[int, list[str]]]:
    """(line where the row begins, its cells)."""
    # The limit on a cell is the csv module's own and of the whole process: it is only ever raised.
    csv.field_size_limit(max(csv.field_size_limit(), max_text_bytes))
    lines = text_lines(stream, path, max_line_bytes=_line_bytes(max_text_bytes))
    reader = csv.reader((line for _, line in lines), delimiter=delimiter, strict=True)
    start = 1
    try:
        for cells in reader:
            line, start = start, reader.line_num + 1
            if cells:
                yield line, cells
    except csv.Error as error:
        raise Place(path, "line", start).error(
            f"no valid CSV ({error})", "close every quote, and double quotes inside of a cell"
        ) from error
