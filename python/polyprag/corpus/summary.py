"""What a corpus is like, before hours are spent on it."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from polyprag._polyprag import Document
from polyprag.corpus.chunks import count_words


@dataclass
class Summary:
    """Counts over documents; see :meth:`of`. ``lengths``: of each text, in ``unit``."""

    unit: str
    documents: int = 0
    titled: int = 0
    text_bytes: int = 0
    lengths: array[int] = field(default_factory=lambda: array("L"))
    fields: Counter[str] = field(default_factory=Counter)  # documents that have each field of metadata
    first: list[Document] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        documents: Iterable[Document],
        *,
        unit: str = "words",
        count: Callable[[str], int] = count_words,
        first: int = 3,
    ) -> Summary:
        """The summary of all documents, which are read once; the ``first`` few are kept."""
        summary = cls(unit)
        for _ in summary.through(documents, count=count, first=first):
            pass
        return summary

    def through(
        self, documents: Iterable[Document], *, count: Callable[[str], int] = count_words, first: int = 3
    ) -> Iterator[Document]:
        """Hands documents on and counts them."""
        for document in documents:
            text = document.text or ""
            self.documents += 1
            self.titled += document.title is not None
            self.text_bytes += len(text.encode("utf-8"))
            self.lengths.append(count(text))
            self.fields.update(list(document.metadata or ()))
            if len(self.first) < first:
                self.first.append(document)
            yield document

    def quantiles(self) -> dict[str, int]:
        """The shortest, a tenth, the middle, nine tenths and the longest of the lengths; or nothing."""
        if not self.lengths:
            return {}
        names = {"shortest": 0.0, "p10": 0.1, "median": 0.5, "p90": 0.9, "longest": 1.0}
        found = np.quantile(np.asarray(self.lengths), list(names.values()), method="inverted_cdf")
        return {name: int(value) for name, value in zip(names, found, strict=True)}

    def histogram(self, bins: int = 8) -> list[tuple[int, int, int]]:
        """(from, to, how many) of equally wide ranges of length; the last one takes its end in."""
        if not self.lengths:
            return []
        lengths = np.asarray(self.lengths)
        low, high = int(lengths.min()), int(lengths.max()) + 1
        edges = np.unique(np.linspace(low, high, min(bins, high - low) + 1).astype(np.int64))
        counts, edges = np.histogram(lengths, edges)
        return [(int(a), int(b) - 1, int(n)) for a, b, n in zip(edges[:-1], edges[1:], counts, strict=True)]

    def to_json(self) -> dict[str, Any]:
        """All but the documents themselves."""
        return {
            "documents": self.documents,
            "with_title": self.titled,
            "text_bytes": self.text_bytes,
            "unit": self.unit,
            "total": int(sum(self.lengths)),
            "lengths": self.quantiles(),
            "metadata_fields": dict(self.fields.most_common()),
        }
