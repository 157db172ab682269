"""Passages that are only searched: where RAG finds its own, and questions the documents to be encoded."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice

import numpy as np

from polyprag._polyprag import Document, Module, Store, StoreSpec
from polyprag.corpus import Passage, UnifiedRow

_BLOCK = 50_000  # documents that are written at a time


def text_store(
    path: str | os.PathLike[str],
    documents: Iterable[Document],
    progress: Callable[[int], None] = lambda done: None,
) -> None:
    """Write a store of documents without routes. Its one expert belongs to no model.

    progress: called with how many documents are written.
    """
    blocks = _blocks(documents)
    first = next(blocks, [])
    spec = StoreSpec(
        modules=[Module("none", 1, 1, 0)],
        experts=1,
        rank=1,
        alpha=1.0,
        codec="f32",
        id_type="u64" if first and isinstance(first[0].id, int) else "string",
    )
    nothing = {f"none.{end}": np.zeros((1, 1, 1), np.float32) for end in "AB"}
    done = 0
    with Store.create(path, spec, nothing) as writer:
        for block in chain([first], blocks):
            done += writer.add(block)
            progress(done)


def with_found(rows: Sequence[UnifiedRow], store: Store, k: int) -> list[UnifiedRow]:
    """Rows whose passages are the k that BM25 finds in a store, best first; rows of no passage stay without.

    Nobody labelled these passages gold.
    """
    hits = store.search_many([row.question for row in rows], k)
    documents = {d.id: d for d in store.documents(list({hit.id for found in hits for hit in found}))}
    return [
        UnifiedRow(
            row.id,
            row.type,
            row.question,
            row.answers,
            tuple(Passage(documents[h.id].title, documents[h.id].text or "") for h in found),
            row.line,
        )
        for row, found in zip(rows, hits, strict=True)
    ]


def _blocks(documents: Iterable[Document]) -> Iterator[list[Document]]:
    rest = iter(documents)
    while block := list(islice(rest, _BLOCK)):
        yield block
