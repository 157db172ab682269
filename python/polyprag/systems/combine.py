"""Combine: the passages in the prompt and their documents' route in the weights."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from polyprag.combining import strength_beside_passages
from polyprag.engine import Engine
from polyprag.evaluation.data import Prediction, Question
from polyprag.generation import Spent
from polyprag.routing import CombinationRule
from polyprag.systems.base import passages_of, predictions
from polyprag.systems.polyprag import Documents, combined, engine_identity, retrieval_rule


@dataclass(frozen=True)
class Combine:
    """The k passages that BM25 finds, and the route of the same documents or of given ones.

    documents: whose route each question is given instead, by its id: that of wrong ones shows what the route
    adds to the passages. rule: how several routes become one; None is what the store was trained for.
    strength: what the route is multiplied by; None is
    :func:`~polyprag.combining.strength_beside_passages`.
    """

    engine: Engine
    k: int = 1
    documents: Mapping[str, Documents] | None = None
    rule: CombinationRule | None = None
    strength: float | None = None
    name: str = "combine"

    def identity(self, question: Question) -> list[Any]:
        given = None if self.documents is None else list(self.documents[question.id])
        return [*engine_identity(self.engine), self.k, given, self.rule, self._strength]

    @property
    def _strength(self) -> float:
        own = strength_beside_passages(self.engine.store.spec.phi)
        return own if self.strength is None else self.strength

    def answer(self, questions: Sequence[Question]) -> list[Prediction]:
        store = self.engine.store
        rule, temperature = retrieval_rule(self.engine, self.rule)
        started = time.perf_counter()
        found = store.search_many([q.question for q in questions], self.k)
        passages = [passages_of(store, hits) for hits in found]
        retrieved = time.perf_counter()
        if self.documents is None:
            routes = [self.engine.combine(hits, rule, temperature)[0] for hits in found]
        else:
            routes = [combined(store, self.documents[q.id], self.rule) for q in questions]
        strength = np.float32(self._strength)
        routes = [None if route is None else route * strength for route in routes]
        routed = time.perf_counter()
        spent: dict[int, Spent] = {}
        texts = self.engine.answer([q.question for q in questions], routes, passages=passages, spent=spent)
        return predictions(texts, spent, found=found, retrieve=retrieved - started, route=routed - retrieved)
