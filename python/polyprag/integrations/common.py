"""What the integrations share: texts that a store finds, in the form in which other libraries want them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from polyprag._polyprag import Store
from polyprag.errors import InvalidInput


@dataclass(frozen=True)
class Found:
    """A document that BM25 found; ``metadata`` has its title and score beside what it has of its own."""

    id: str | int
    text: str
    score: float
    metadata: dict[str, Any]


def found_texts(store: Store, query: str, k: int, filter: Mapping[str, Any] | None) -> list[Found]:
    """The best ``k`` documents for a text, with their texts.

    Raises:
        InvalidInput: the store keeps no texts.
    """
    if not store.spec.keep_text:
        raise InvalidInput(f"{store.path} keeps no texts (encode --no-keep-text): there is none to hand on")
    hits = store.search(query, k, filter)
    documents = store.documents([hit.id for hit in hits])
    return [
        Found(
            hit.id,
            document.text or "",
            hit.score,
            {**(document.metadata or {}), "title": document.title, "score": hit.score},
        )
        for hit, document in zip(hits, documents, strict=True)
    ]
