"""Documents that are files: plain text, Markdown and PDF."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from typing import IO, Any

from polyprag.corpus.ids import Place, Rows
from polyprag.errors import CorpusError
from polyprag.extras import lacking

_MAX_FILE_BYTES = 256 << 20
_QUIET = logging.NullHandler()  # what is wrong with a file is said once, by the error that names it
_FRONT_MATTER = re.compile(r"\A---\r?\n(.*?)^(?:---|\.\.\.)[ \t]*\r?$\n?", re.DOTALL | re.MULTILINE)
_TITLE = re.compile(r"^title:[ \t]*(.+?)[ \t]*\r?$", re.MULTILINE)
_HEADING = re.compile(r"^#[ \t]+(.+?)[ \t]*#*[ \t]*\r?$", re.MULTILINE)
_FENCED = re.compile(
    r"^ {0,3}(`{3,}(?=[^`\n]*$)|~{3,}).*?(?:^ {0,3}\1[`~]*[ \t]*\r?$|\Z)", re.DOTALL | re.MULTILINE
)
_HYPHEN = re.compile(r"(?<=[^\W\d_])-\n(?=[^\W\d_])")
_SOFT_BREAK = re.compile(r"(?<!\n)\n(?!\n)")


def text_rows(stream: IO[bytes], path: str, *, max_text_bytes: int = 0) -> Rows:  # noqa: ARG001
    """The whole file as one row; the title is the name of the file."""
    text = _decoded(stream, path)
    yield Place(path), {"title": _stem(path), "text": text}


def markdown_rows(stream: IO[bytes], path: str, *, max_text_bytes: int = 0) -> Rows:  # noqa: ARG001
    """The whole file as one row, without its front matter.

    The title is the front matter's, or the first heading of the first level, or the name of the file.
    """
    text = _decoded(stream, path)
    front = _FRONT_MATTER.match(text)
    if front is not None:
        text = text[front.end() :]
    named = _TITLE.search(front[1]) if front is not None else None
    heading = _HEADING.search(_FENCED.sub("", text))  # in code, # begins a comment
    title = named[1].strip("\"'") if named is not None else heading[1] if heading is not None else _stem(path)
    yield Place(path), {"title": title, "text": text}


def pdf_rows(stream: IO[bytes], path: str, *, max_text_bytes: int = 0) -> Rows:  # noqa: ARG001
    """A row for each page that has text; its id ends in ``#page=N``, the fragment of RFC 8118.

    Words that a line break parts are joined, and lines of a paragraph. Raises CorpusError for a file that is
    encrypted, damaged, or has no text at all (a scan).
    """
    try:
        from pypdf import PdfReader
        from pypdf.errors import DependencyError, PyPdfError
    except ImportError as error:
        raise lacking("PDF files", "pypdf", "corpus") from error
    logging.getLogger("pypdf").addHandler(_QUIET)
    found = False
    number = 0
    try:
        reader = PdfReader(stream)
        if reader.is_encrypted and not reader.decrypt(""):
            raise Place(path).error("the file is encrypted", "save it without its password")
        title = (reader.metadata.title if reader.metadata is not None else None) or _stem(path)
        for number, page in enumerate(reader.pages, 1):
            text = _SOFT_BREAK.sub(" ", _HYPHEN.sub("", page.extract_text())).strip()
            if text:
                found = True
                row: dict[str, Any] = {"title": title.strip(), "text": text, "page": number}
                yield Place(path, "page", number), row
    except DependencyError as error:
        raise Place(path).error(f"pypdf cannot decrypt it ({error})", "save it without encryption") from error
    except CorpusError:
        raise
    # A damaged file makes pypdf fail in many ways of its own and of Python's.
    except (PyPdfError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        at = Place(path, "page", number) if number else Place(path)
        raise at.error(f"no valid PDF ({error})", "open it in a viewer and save it again") from error
    if not found:
        raise Place(path).error("no page has text", "a scan needs text recognition first, such as ocrmypdf")


def walk(folder: str, known: frozenset[str]) -> Iterator[tuple[str, bool]]:
    """(path below ``folder``, whether its suffix is known) of all files, in an order that is always the same.

    Hidden files and folders are left out, and links to folders are not followed.
    """
    for at, folders, names in os.walk(folder, onerror=_raise):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith("."):
                path = os.path.relpath(os.path.join(at, name), folder)
                yield path, suffix(name) in known


def suffix(name: str) -> str:
    """The suffix of a file name in lower case, ``.gz`` aside."""
    return os.path.splitext(name.removesuffix(".gz"))[1].lower()


def _raise(error: OSError) -> None:
    raise error


def _stem(path: str) -> str:
    return os.path.splitext(os.path.basename(path).removesuffix(".gz"))[0]


def _decoded(stream: IO[bytes], path: str) -> str:
    data = stream.read(_MAX_FILE_BYTES + 1)
    if len(data) > _MAX_FILE_BYTES:
        raise Place(path).error(f"the file has more than {_MAX_FILE_BYTES >> 20} MiB", "split it")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        place = Place(path, "line", data.count(b"\n", 0, error.start) + 1)
        raise place.error("no valid UTF-8", "save the file as UTF-8") from error
