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
        self._text = _splitter(library.TextSplitter, size, overlap, measure)
        self._markdown = _splitter(library.MarkdownSplitter, size, overlap, measure)

    def split(self, text: str, *, markdown: bool = False) -> list[tuple[int, str]]:
        """(first character, piece) of each piece, in order; white space at their ends is cut off."""
        pieces = (self._markdown if markdown else self._text).chunk_indices(text)
        return [(int(start), piece) for start, piece in pieces]


def _splitter(kind: Any, size: int, overlap: int, measure: Measure) -> Any:
    if measure == "characters":
        return kind(size, overlap)
    if measure == "words":
        return kind.from_callback(count_words, size, overlap)
    if isinstance(measure, str):
        raise InvalidInput(f"measure is {measure!r}; expected characters, words or a tokenizer")
    # transformers' fast tokenizers hold one of the library tokenizers, which counts without Python.
    inner: Any = getattr(measure, "backend_tokenizer", measure)
    if type(inner).__module__.partition(".")[0] == "tokenizers":
        inner = type(inner).from_str(inner.to_str())  # a copy: truncation would stop the counting
        inner.no_truncation()
        inner.no_padding()
        return kind.from_huggingface_tokenizer(inner, size, overlap)
    tokenize = getattr(measure, "tokenize", None)
    if tokenize is not None:
        return kind.from_callback(lambda text: len(tokenize(text)), size, overlap)
    if callable(measure):
        return kind.from_callback(measure, size, overlap)
    raise InvalidInput(f"measure is of type {type(measure).__name__}; expected a tokenizer or a function")
