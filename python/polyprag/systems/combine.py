"""Combine: the passages in the prompt and their documents' route in the weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from polyprag.engine import Engine
from polyprag.evaluation.data import Question
from polyprag.systems.rag import passages_of


@dataclass(frozen=True)
class Combine:
    """The k passages that BM25 finds, and the route of the same documents or of given ones.

    documents: whose route each question is given instead: that of wrong ones shows what the route adds to
    the passages.
    """

    engine: Engine
    k: int = 1
    documents: Sequence[Sequence[str | int]] | None = None
    name: str = "combine"

    def answer(self, questions: Sequence[Question]) -> list[str]:
        store = self.engine.store
        combination = store.spec.combination
        found = store.search_many([q.question for q in questions], self.k)
        passages = [passages_of(store, hits) for hits in found]
        if self.documents is None:
            routes = [self.engine.combine(h, combination.rule, combination.temperature)[0] for h in found]  # type: ignore[arg-type]
        else:
            routes = [store.combined_route(list(ids)) for ids in self.documents]
        return self.engine.answer([q.question for q in questions], routes, passages=passages)
