"""The generation of a store that answers, and the next one when there is one."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from polyprag._polyprag import Document, Store
from polyprag.combining import strength_beside_passages
from polyprag.engine import Engine
from polyprag.errors import InvalidInput
from polyprag.models import passage_text
from polyprag.routing import CombinationRule, combination_weights
from polyprag.serving.protocol import Extension


@dataclass(frozen=True)
class Found:
    """What a question is answered with, all of one generation.

    route: [groups, K], or None where no document has one. sources: plain values, ready for JSON.
    """

    route: NDArray[np.float32] | None
    sources: list[dict[str, Any]]
    passages: list[str]
    generation: int


class Library:
    """Finds documents and their routes in the newest generation that was loaded; safe to share.

    A question is answered from one generation, whichever comes while it waits: what holds on to an older one
    keeps it open, and the last that does closes it.
    """

    def __init__(self, engine: Engine) -> None:
        self._first = engine
        self._now = engine
        self._reloading = threading.Lock()

    @property
    def store(self) -> Store:
        return self._now.store

    def find(self, question: str, asked: Extension) -> Found:
        """Documents for a question, and their combined route.

        Raises:
            InvalidInput: passages of a store that keeps no text, and what the store raises for ids.
        """
        engine = self._now
        store = engine.store
        if asked.documents is not None:
            route, sources = self._given(store, asked)
        else:
            route, sources = self._searched(engine, question, asked)
        passages: list[str] = []
        if asked.combine and sources:
            first = store.documents([source["id"] for source in sources[: asked.passages]])
            passages = [_passage(document) for document in first]
        strength = asked.strength
        if strength is None and passages:
            strength = strength_beside_passages(store.spec.phi)
        if route is not None and strength is not None:
            route = route * np.float32(strength)
        return Found(route, sources, passages, store.generation)

    def _given(
        self, store: Store, asked: Extension
    ) -> tuple[NDArray[np.float32] | None, list[dict[str, Any]]]:
        ids = asked.documents or []
        weights = combination_weights([0.0] * len(ids), asked.rule or "mean")
        route = store.combined_route(ids, weights)
        return route, _sources(store, ids, [None] * len(ids), dict(zip(ids, weights.tolist(), strict=True)))

    def _searched(
        self, engine: Engine, question: str, asked: Extension
    ) -> tuple[NDArray[np.float32] | None, list[dict[str, Any]]]:
        combination = engine.store.spec.combination
        rule = asked.rule or cast(CombinationRule, combination.rule)
        temperature = combination.temperature if asked.temperature is None else asked.temperature
        hits = engine.store.search(question, combination.k if asked.k is None else asked.k, asked.filter)
        route, weights = engine.combine(hits, rule, temperature)
        ids = [hit.id for hit in hits]
        return route, _sources(engine.store, ids, [hit.score for hit in hits], weights)

    def reload(self) -> bool:
        """Go on with the newest generation; True if there was one.

        Raises:
            InvalidInput: the store at this path has other experts by now, which need a new start.
            Whatever ``Store.open`` raises. The generation before goes on answering.
        """
        with self._reloading:
            new = Store.open(self.store.path)
            if new.digest() == self.store.digest():
                return False
            if not _same_experts(self._first.store, new):
                raise InvalidInput(
                    f"{new.path}: the store has other experts than the one that is served; start anew"
                )
            self._now = Engine(new, self._first.base, self._first.routed, owns_store=False)
            return True


def _sources(
    store: Store, ids: list[str | int], scores: Sequence[float | None], weights: dict[Any, float]
) -> list[dict[str, Any]]:
    return [
        {"id": document.id, "title": document.title, "score": score, "weight": weights.get(document.id, 0.0)}
        for document, score in zip(store.documents(ids), scores, strict=True)
    ]


def _passage(document: Document) -> str:
    if document.text is None:
        raise InvalidInput(f"the document {document.id!r} has no text here: this store cannot combine")
    return passage_text(document.title, document.text)


def _same_experts(old: Store, new: Store) -> bool:
    a, b = old.spec, new.spec
    names = [(m.name, m.in_features, m.out_features, m.group) for m in a.modules]
    if names != [(m.name, m.in_features, m.out_features, m.group) for m in b.modules]:
        return False
    if (a.experts, a.rank, a.alpha, a.mixing) != (b.experts, b.rank, b.alpha, b.mixing):
        return False
    known = old.experts
    return all(np.array_equal(known[name], array) for name, array in new.experts.items())
