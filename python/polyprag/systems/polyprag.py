"""polyprag itself and its controls: the route of retrieved documents, of given ones, or of none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from polyprag.engine import Engine
from polyprag.evaluation.data import Question
from polyprag.routing import CombinationRule


@dataclass(frozen=True)
class RetrievedRoute:
    """The whole path: BM25, routes, combined route, answer."""

    engine: Engine
    k: int
    rule: CombinationRule | None = None
    name: str = "bm25_route"

    def answer(self, questions: Sequence[Question]) -> list[str]:
        answers = self.engine.ask_batch([q.question for q in questions], k=self.k, rule=self.rule)
        return [a.text for a in answers]


@dataclass(frozen=True)
class RouteOfDocuments:
    """The combined route of given documents, with equal weights: ``own_route`` with each question's gold
    documents, ``wrong_route`` with a derangement's.
    """

    engine: Engine
    documents: Sequence[Sequence[str | int]]
    name: str = "own_route"

    def answer(self, questions: Sequence[Question]) -> list[str]:
        routes = [self.engine.store.combined_route(list(ids)) for ids in self.documents]
        return self.engine.answer([q.question for q in questions], routes)


@dataclass(frozen=True)
class UniformRoute:
    """Every expert with weight 1/K: what the experts know without any document's route."""

    engine: Engine
    name: str = "uniform_route"

    def answer(self, questions: Sequence[Question]) -> list[str]:
        spec = self.engine.store.spec
        route = np.full((spec.groups, spec.experts), 1.0 / spec.experts, dtype=np.float32)
        return self.engine.answer([q.question for q in questions], [route] * len(questions))
