"""polyprag itself and its controls: the route of retrieved documents, of given ones, or of none."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from numpy.typing import NDArray

from polyprag._polyprag import Store
from polyprag.encode import router_of
from polyprag.engine import Engine
from polyprag.errors import InvalidInput
from polyprag.evaluation.data import Prediction, Question
from polyprag.generation import Spent
from polyprag.router import text_features
from polyprag.routing import CombinationRule, Phi, PhiKind, combination_weights
from polyprag.systems.base import model_identity, passage_texts, predictions

Documents: TypeAlias = Sequence[str | int]
_Route: TypeAlias = NDArray[np.float32]

_BLOCK = 1_024  # routes that are read at a time


def engine_identity(engine: Engine) -> list[Any]:
    """What an answer under a route depends on, but for the route."""
    return [*model_identity(engine.base), engine.store.digest()]


def retrieval_rule(engine: Engine, rule: CombinationRule | None) -> tuple[CombinationRule, float]:
    """The rule for documents that BM25 found, and its temperature: the store's own unless one is given."""
    combination = engine.store.spec.combination
    return rule or cast(CombinationRule, combination.rule), combination.temperature


def combined(store: Store, documents: Documents, rule: CombinationRule | None) -> _Route:
    """The route [groups, K] of documents that nobody ranked: with equal weights, or their sum.

    rule: None is the store's own.
    """
    summed = (rule or store.spec.combination.rule) == "sum"
    weights = combination_weights([1.0] * len(documents), "sum" if summed else "mean")
    return store.combined_route(list(documents), weights)


@dataclass(frozen=True)
class RetrievedRoute:
    """The whole path: BM25, routes, combined route, answer."""

    engine: Engine
    k: int
    rule: CombinationRule | None = None
    name: str = "bm25_route"

    def identity(self, question: Question) -> list[Any]:  # noqa: ARG002 - of every question the same
        return [*engine_identity(self.engine), self.k, self.rule]

    def answer(self, questions: Sequence[Question]) -> list[Prediction]:
        rule, temperature = retrieval_rule(self.engine, self.rule)
        started = time.perf_counter()
        found = self.engine.store.search_many([q.question for q in questions], self.k)
        retrieved = time.perf_counter()
        routes = [self.engine.combine(hits, rule, temperature)[0] for hits in found]
        routed = time.perf_counter()
        spent: dict[int, Spent] = {}
        texts = self.engine.answer([q.question for q in questions], routes, spent=spent)
        return predictions(texts, spent, found=found, retrieve=retrieved - started, route=routed - retrieved)


@dataclass(frozen=True)
class RouteOfDocuments:
    """The combined route of given documents, with equal weights (or their sum, where ``rule`` says so).

    documents: by the question's id: a derangement's for ``wrong_route``; None are its own gold documents.
    """

    engine: Engine
    documents: Mapping[str, Documents] | None = None
    rule: CombinationRule | None = None
    name: str = "own_route"

    def _of(self, question: Question) -> Documents:
        return question.documents if self.documents is None else self.documents[question.id]

    def identity(self, question: Question) -> list[Any]:
        return [*engine_identity(self.engine), list(self._of(question)), self.rule]

    def answer(self, questions: Sequence[Question]) -> list[Prediction]:
        started = time.perf_counter()
        routes = [combined(self.engine.store, self._of(q), self.rule) for q in questions]
        return _answer(self.engine, questions, routes, started)


@dataclass(frozen=True)
class AmortisedRoute:
    """The route that the store's router makes of the texts of the question's gold documents, with equal
    weights: what a document would have that was added without training.

    Raises InvalidInput if the store has no router or keeps no texts.
    """

    engine: Engine
    name: str = "amortised_route"

    def __post_init__(self) -> None:
        if self.engine.store.router is None or not self.engine.store.spec.keep_text:
            raise InvalidInput(f"{self.engine.store.path} has no amortised router, or no texts for it")

    def identity(self, question: Question) -> list[Any]:
        return [*engine_identity(self.engine), list(question.documents)]

    def answer(self, questions: Sequence[Question]) -> list[Prediction]:
        started = time.perf_counter()
        routes = [self._route(q.documents) for q in questions]
        return _answer(self.engine, questions, routes, started)

    def _route(self, documents: Documents) -> _Route:
        store, spec = self.engine.store, self.engine.store.spec
        V, b = cast(Any, store.decoder)  # a router makes codes, which need one
        features = text_features(self.engine.base, passage_texts(store, documents))
        logits = self._router.codes(features) @ V.T + b
        phi = Phi(cast(PhiKind, spec.phi), spec.top_k)
        w = phi(torch.from_numpy(logits.reshape(len(logits), spec.groups, spec.experts)))
        return np.asarray(w.mean(0).numpy(), dtype=np.float32)

    @cached_property
    def _router(self) -> Any:
        return router_of(self.engine.base, self.engine.store)


@dataclass(frozen=True)
class UniformRoute:
    """Every expert with weight 1/K: what the experts know without any document's route."""

    engine: Engine
    name: str = "uniform_route"

    def identity(self, question: Question) -> list[Any]:  # noqa: ARG002 - of every question the same
        return engine_identity(self.engine)

    def answer(self, questions: Sequence[Question]) -> list[Prediction]:
        spec = self.engine.store.spec
        route = np.full((spec.groups, spec.experts), 1.0 / spec.experts, dtype=np.float32)
        return _answer(self.engine, questions, [route] * len(questions), time.perf_counter())


@dataclass(frozen=True)
class MeanRoute:
    """The mean route of all documents: what there is without knowing which document is asked about."""

    engine: Engine
    name: str = "mean_route"

    def identity(self, question: Question) -> list[Any]:  # noqa: ARG002 - of every question the same
        return engine_identity(self.engine)

    def answer(self, questions: Sequence[Question]) -> list[Prediction]:
        started = time.perf_counter()
        return _answer(self.engine, questions, [self._route] * len(questions), started)

    @cached_property
    def _route(self) -> _Route:
        store = self.engine.store
        ids = [id for id in store if store.is_routed(id)]
        if not ids:
            raise InvalidInput(f"{store.path}: no document has a route, so there is no mean of them")
        total = np.zeros((store.spec.groups, store.spec.experts))
        for begin in range(0, len(ids), _BLOCK):
            total += store.routes(ids[begin : begin + _BLOCK]).sum(0, dtype=np.float64)
        return (total / len(ids)).astype(np.float32)


def _answer(
    engine: Engine, questions: Sequence[Question], routes: Sequence[_Route], started: float
) -> list[Prediction]:
    routed = time.perf_counter() - started
    spent: dict[int, Spent] = {}
    texts = engine.answer([q.question for q in questions], routes, spent=spent)
    return predictions(texts, spent, route=routed)
