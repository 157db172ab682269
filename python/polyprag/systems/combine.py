"""Combine: the passages in the prompt and their documents' route in the weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from polyprag.engine import Engine
from polyprag.evaluation.data import Question
from polyprag.systems.rag import retrieved_passages


@dataclass(frozen=True)
class Combine:
    engine: Engine
    k: int = 1
    name: str = "combine"

    def answer(self, questions: Sequence[Question]) -> list[str]:
        store = self.engine.store
        combination = store.spec.combination
        passages = retrieved_passages(store, questions, self.k)
        hits = store.search_many([q.question for q in questions], self.k)
        routes = [self.engine.combine(h, combination.rule, combination.temperature)[0] for h in hits]  # type: ignore[arg-type]
        return self.engine.answer([q.question for q in questions], routes, passages=passages)
