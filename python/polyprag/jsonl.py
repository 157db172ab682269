"""Lines of JSON on disk: read with line numbers, written whole or not at all, appended to without loss.

Shared by the corpus readers, the augmentation and the reports; knows nothing of what the rows mean.
"""

from __future__ import annotations

import contextlib
import errno
import gzip
import io
import json
import math
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NoReturn, cast

from polyprag.errors import CorpusError

_BOM = b"\xef\xbb\xbf"
_OTHER_BOMS = (b"\xff\xfe", b"\xfe\xff")

#: The longest line that is read, in bytes: far above any sensible row, far below what fills a machine.
MAX_LINE_BYTES = 16 << 20


def line_error(path: str | os.PathLike[str], line: int, problem: str, remedy: str) -> CorpusError:
    """The one form of complaint about a line of a file."""
    return CorpusError(f"{os.fspath(path)}, line {line}: {problem}; {remedy}")


def open_binary(path: str | os.PathLike[str]) -> IO[bytes]:
    """A file, or what a ``.gz`` file holds, for reading. OSError if it cannot be opened."""
    if os.fspath(path).endswith(".gz"):
        return cast("IO[bytes]", gzip.open(path, "rb"))
    return open(path, "rb")


def text_lines(
    stream: IO[bytes], path: str | os.PathLike[str], *, max_line_bytes: int = MAX_LINE_BYTES
) -> Iterator[tuple[int, str]]:
    """(line number from 1, line with its end) of a UTF-8 stream, one line in memory at a time.

    A byte order mark is accepted. Raises CorpusError for invalid UTF-8, a line longer than
    ``max_line_bytes`` and damaged gzip data.
    """
    number = 0
    while True:
        try:
            raw = stream.readline(max_line_bytes + 2)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise line_error(
                path, number + 1, f"the gzip data is damaged ({error})", "copy the file again"
            ) from error
        if not raw:
            return
        number += 1
        if number == 1:
            if raw.startswith(_OTHER_BOMS):
                raise line_error(path, 1, "the file is UTF-16", "save it as UTF-8")
            raw = raw.removeprefix(_BOM)
        if len(raw.rstrip(b"\r\n")) > max_line_bytes:
            raise line_error(
                path,
                number,
                f"the line is longer than {max_line_bytes} bytes",
                "put one row on a line, or raise the limit",
            )
        try:
            yield number, raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise line_error(
                path,
                number,
                f"byte {error.start + 1} of the line is no valid UTF-8",
                "save the file as UTF-8",
            ) from error


def numbered_lines(
    stream: IO[bytes], path: str | os.PathLike[str], *, max_line_bytes: int = MAX_LINE_BYTES
) -> Iterator[tuple[int, str]]:
    """(line number from 1, line without its end) of what :func:`text_lines` reads.

    CRLF ends and empty lines at the end of the file are accepted. Raises CorpusError, beside what
    ``text_lines`` raises, for an empty line before other lines.
    """
    empty = 0
    for number, line in text_lines(stream, path, max_line_bytes=max_line_bytes):
        if not line.strip():
            empty = empty or number
            continue
        if empty:
            raise line_error(path, empty, "the line is empty", "remove it, or put the missing row there")
        yield number, line.rstrip("\r\n")


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _finite(literal: str) -> float:
    value = float(literal)
    if not math.isfinite(value):
        raise ValueError(f"{literal} is too large for a number")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the field {next(name for name in names if names.count(name) > 1)!r} appears twice")
    return row


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse, parse_float=_finite)


def parse_object(line: str, path: str | os.PathLike[str], number: int) -> dict[str, Any]:
    """The JSON object of one line.

    Raises CorpusError if the line is no JSON or no object, repeats a field, or holds NaN, infinity, or
    half of a surrogate pair (which no UTF-8 file can keep).
    """
    remedy = "write one JSON object on each line"
    try:
        row = _DECODER.decode(line)
    except json.JSONDecodeError as error:
        said = error.msg.removesuffix(" starting at")
        raise line_error(path, number, f"no valid JSON ({said} at column {error.colno})", remedy) from error
    except (ValueError, RecursionError) as error:
        raise line_error(path, number, f"no valid JSON ({error})", remedy) from error
    if not isinstance(row, dict):
        raise line_error(path, number, f"a JSON object was expected, found {_kind(row)}", remedy)
    if "\\u" in line:  # only an escape can bring a lone surrogate in
        try:
            _encode(row)
        except UnicodeEncodeError as error:
            raise line_error(
                path, number, "half of a surrogate pair (\\ud800 to \\udfff)", "remove that escape"
            ) from error
    return row


def _kind(value: object) -> str:
    names = {list: "an array", str: "a string", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), "null")


def read_jsonl(
    path: str | os.PathLike[str], *, max_line_bytes: int = MAX_LINE_BYTES
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, row) of a ``.jsonl`` or ``.jsonl.gz`` file. Raises OSError and CorpusError."""
    with open_binary(path) as stream:
        for number, line in numbered_lines(stream, path, max_line_bytes=max_line_bytes):
            yield number, parse_object(line, path, number)


def _encode(row: Mapping[str, Any]) -> bytes:
    return json.dumps(row, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode("utf-8")


def _write_all(stream: io.FileIO, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[stream.write(view) :]


def append_lines(path: str | os.PathLike[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Append rows to a JSONL file, which is made if need be, and sync it to disk.

    A failed write (a full disk) leaves the file as it was. Raises CorpusError if the file ends in a torn
    line: :func:`read_resumable` mends it first.
    """
    data = b"".join(_encode(row) + b"\n" for row in rows)
    if not data:
        return
    with open(path, "a+b", buffering=0) as stream:
        before = stream.seek(0, os.SEEK_END)
        if before:
            stream.seek(before - 1)
            if stream.read(1) != b"\n":
                raise CorpusError(
                    f"{os.fspath(path)}: the last line has no end; resume from the file, which mends it"
                )
        try:
            _write_all(stream, data)
            os.fsync(stream.fileno())
        except BaseException:
            with contextlib.suppress(OSError):
                stream.truncate(before)
            raise


def read_resumable(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows of a file that :func:`append_lines` was writing when it was stopped; none if there is no file.

    The one line that a crash can leave half written is the last one without an end: it is cut off, in the
    file too, so that the next append starts cleanly. A last row that only lacks its line end gets one.
    Any other damage raises CorpusError, for no crash explains it.
    """
    try:
        with open(path, "rb") as stream:
            data = stream.read()
    except FileNotFoundError:
        return []
    whole = data.rfind(b"\n") + 1
    rows = [
        parse_object(line, path, number)
        for number, line in numbered_lines(io.BytesIO(data[:whole]), path, max_line_bytes=max(len(data), 1))
    ]
    tail = data[whole:]
    if not tail:
        return rows
    try:
        rows.append(
            parse_object((tail if whole else tail.removeprefix(_BOM)).decode("utf-8"), path, len(rows) + 1)
        )
        end = b"\n"
    except (CorpusError, UnicodeDecodeError):
        end = b""
    with open(path, "r+b", buffering=0) as file:
        if end:
            file.seek(0, os.SEEK_END)
            _write_all(file, end)
        else:
            file.truncate(whole)
        os.fsync(file.fileno())
    return rows


def absent(path: str | os.PathLike[str]) -> Path:
    """The path of something new. Raises FileExistsError if there is anything."""
    target = Path(path)
    if os.path.lexists(target):
        raise FileExistsError(
            errno.EEXIST, "there is something here already; choose another path or delete it", str(target)
        )
    return target


def last_name(path: str | os.PathLike[str]) -> str:
    """What a path is called by; ``.`` by the folder that it is."""
    return Path(os.path.abspath(path)).name


@contextlib.contextmanager
def open_atomic(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A stream for a file's new content: readers see the old or the new, never a part.

    The file is replaced where the block ends; if it fails, the old one stays. Follows a symbolic link. What
    is no regular file (a pipe, ``/dev/stdout``) is written straight. Raises OSError that names ``path``.
    """
    given = Path(path)
    if given.exists() and not given.is_file() and not given.is_dir():
        with open(given, "wb") as stream:
            yield stream
        return
    target = Path(os.path.realpath(given))
    beside = target.with_name(f".{target.name}.{os.getpid()}.{os.urandom(4).hex()}.tmp")
    try:
        with open(beside, "xb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(beside, target)
    except BaseException as error:
        with contextlib.suppress(OSError):
            beside.unlink()
        if isinstance(error, OSError) and error.filename == str(beside):
            raise OSError(error.errno, error.strerror, str(given)) from error  # as the caller knows it
        raise
    sync_folder(target.parent)  # the rename itself must last too


def write_atomic(path: str | os.PathLike[str], data: str | bytes) -> None:
    """Replace a file's content as :func:`open_atomic` does."""
    with open_atomic(path) as stream:
        stream.write(data.encode("utf-8") if isinstance(data, str) else data)


def write_at(file: int, content: bytes, where: int, what: str, path: Path | None = None) -> None:
    """Write all of ``content`` at a place of an open file; OSError names ``what`` it was."""
    if os.pwrite(file, content, where) != len(content):
        name = None if path is None else str(path)
        raise OSError(errno.ENOSPC, f"{what} was not written whole: is the disk full?", name)


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Make the names in a folder last, where the system lets folders be synced."""
    if os.name != "posix":
        return
    directory = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def write_jsonl(path: str | os.PathLike[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as JSONL, one in memory at a time, and atomically (see :func:`open_atomic`).

    Compressed where the name ends in ``.gz``, as :func:`read_jsonl` expects.
    """
    lines = (_encode(row) + b"\n" for row in rows)
    with open_atomic(path) as stream:
        if os.fspath(path).endswith(".gz"):
            with gzip.GzipFile("", "wb", fileobj=stream, mtime=0) as packed:
                packed.writelines(lines)
        else:
            stream.writelines(lines)
