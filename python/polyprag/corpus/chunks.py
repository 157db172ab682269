"""Long texts in pieces: as many whole sentences as fit, by tokens, words or characters."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

from polyprag.errors import InvalidInput
from polyprag.extras import lacking

#: What a piece is measured in: characters, words, what a function counts, or the tokens of a tokenizer
#: of the library tokenizers or of transformers.
Measure: TypeAlias = Literal["characters", "words"] | Callable[[str], int] | Any

_WORD = re.compile(r"\w+(?:['’.\-]\w+)*")
#: One heading or several, with nothing under them.
_HEADINGS = re.compile(r"(?:(?:#{1,6}[ \t][^\n]*|[^\n#>\s-][^\n]*\n(?:=+|-+)[ \t\r]*)(?:\n\s*|\Z))+")
_BREAK = re.compile(r"[\r\n]")
_BLANK_LINE = re.compile(r"\n[^\S\n]*\n")


def count_words(text: str) -> int:
    """Words of a text; a number, a contraction and a compound are one each."""
    return sum(1 for _ in _WORD.finditer(text))


class Chunker:
    """Splits a text where it means to be split: between paragraphs, sentences, words, the first of these that
    makes pieces small enough; Markdown by its headings and blocks before that.

    A piece has at most ``size`` of ``measure``. ``overlap``: at most so much of a piece's end comes again at
    the beginning of the next, in whole sentences or words. The boundaries are those of the Unicode
    standard's annex 29, found by the library semantic-text-splitter.

    Raises:
        InvalidInput: a size below 1, or an overlap that is not smaller than the size.
        ImportError: semantic-text-splitter is not installed (``polyprag[corpus]``).
    """

    def __init__(self, size: int, *, overlap: int = 0, measure: Measure = "words") -> None:
        if size < 1:
            raise InvalidInput(f"the size of a chunk is at least 1, not {size}")
        if not 0 <= overlap < size:
            raise InvalidInput(
                f"the overlap of chunks is from 0 to less than their size {size}, not {overlap}"
            )
        try:
            import semantic_text_splitter as library
        except ImportError as error:
            raise lacking("chunks", "semantic-text-splitter", "corpus") from error
        self.size, self.overlap = size, overlap
        new, self._count = _measured(measure)
        self._text = new(library.TextSplitter, size, overlap)
        self._markdown = new(library.MarkdownSplitter, size, overlap)

    def split(self, text: str, *, markdown: bool = False) -> list[tuple[int, str]]:
        """(first character, piece) of each piece, in order; white space at their ends is cut off."""
        pieces = self._pieces(self._markdown if markdown else self._text, text)
        return self._with_what_follows(text, pieces) if markdown else pieces

    @staticmethod
    def _pieces(splitter: Any, text: str) -> list[tuple[int, str]]:
        return [(int(start), piece) for start, piece in splitter.chunk_indices(text)]

    def _with_what_follows(self, text: str, pieces: list[tuple[int, str]]) -> list[tuple[int, str]]:
        """The pieces of Markdown, none of them a heading alone where that can be helped.

        A block too long to stand in one piece with its heading would leave the heading behind as a piece that
        says nothing, which BM25, to which short texts are dear, finds before those that do.
        """
        found: list[tuple[int, str]] = []
        at = 0
        while at < len(pieces):
            begin = at
            while at < len(pieces) and _HEADINGS.fullmatch(pieces[at][1]):
                at += 1
            headings, first = pieces[begin:at], pieces[begin][0]
            block = _block(text, pieces, at)
            at += len(block)
            # An overlap may have brought the headings along.
            if not headings or not block or block[0][0] <= first:
                found += block or headings
                continue
            # In one line, headings and block are parted no sooner than sentences or words are.
            end = block[-1][0] + len(block[-1][1])
            under = _HEADINGS.match(text, first, end)
            below = block[0][0] if under is None else under.end()
            line = _BREAK.sub(" ", text[first:below]) + text[below:end]
            together = [
                (first + start, text[first + start : first + start + len(piece)])
                for start, piece in self._pieces(self._text, line)
            ]
            parted = first + len(together[0][1]) <= below
            if parted or any(self._count(piece) > self.size for _, piece in together):
                together = headings + block
            found += together
        return found


def _block(text: str, pieces: list[tuple[int, str]], begin: int) -> list[tuple[int, str]]:
    """The pieces of a block that was too long for one: up to a blank line or a heading."""
    end = begin
    while end < len(pieces):
        if end > begin:
            before, last = pieces[end - 1]
            between = text[before + len(last) : pieces[end][0]]
            if _BLANK_LINE.search(between) or _HEADINGS.match(pieces[end][1]):
                break
        end += 1
    return pieces[begin:end]


#: How a splitter is made of a kind, a size and an overlap.
_New: TypeAlias = Callable[[Any, int, int], Any]


def _measured(measure: Measure) -> tuple[_New, Callable[[str], int]]:
    """Splitters by a measure, and the measure of a text."""
    if measure == "characters":
        return (lambda kind, size, overlap: kind(size, overlap)), len
    if isinstance(measure, str):
        if measure != "words":
            raise InvalidInput(f"measure is {measure!r}; expected characters, words or a tokenizer")
        measure = count_words
    # transformers' fast tokenizers hold one of the library tokenizers, which counts without Python.
    inner: Any = getattr(measure, "backend_tokenizer", measure)
    if type(inner).__module__.partition(".")[0] == "tokenizers":
        inner = type(inner).from_str(inner.to_str())  # a copy: truncation would stop the counting
        inner.no_truncation()
        inner.no_padding()
        return (
            lambda kind, size, overlap: kind.from_huggingface_tokenizer(inner, size, overlap),
            lambda text: len(inner.encode(text, add_special_tokens=False).ids),
        )
    count: Any = measure
    if (tokenize := getattr(measure, "tokenize", None)) is not None:
        count = lambda text: len(tokenize(text))  # noqa: E731
    elif not callable(measure):
        raise InvalidInput(f"measure is of type {type(measure).__name__}; expected a tokenizer or a function")
    return (lambda kind, size, overlap: kind.from_callback(count, size, overlap)), count
