"""RAG: passages in the prompt of the bare base model, those that BM25 finds or the gold ones."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from polyprag._polyprag import Hit, Store
from polyprag.engine import ANSWERS
from polyprag.evaluation.data import Prediction, Question
from polyprag.generation import Spent, generate
from polyprag.models import BaseModel, answer_text, question_prompt
from polyprag.systems.base import model_identity, passage_texts, passages_of, predictions
from polyprag.systems.prompts import rag_examples


@dataclass(frozen=True)
class Rag:
    """k passages a question, best first; with ``gold`` those of its gold documents, however many.

    A store without kept text cannot do this.
    """

    base: BaseModel
    store: Store
    k: int = 1
    gold: bool = False
    name: str = "rag"

    def identity(self, question: Question) -> list[Any]:
        passages = list(question.documents) if self.gold else self.k
        return [*model_identity(self.base), self.store.digest(), passages]

    def answer(self, questions: Sequence[Question]) -> list[Prediction]:
        started = time.perf_counter()
        found: list[list[Hit]] | None = None
        if self.gold:
            passages = [passage_texts(self.store, q.documents) for q in questions]
        else:
            found = self.store.search_many([q.question for q in questions], self.k)
            passages = [passages_of(self.store, hits) for hits in found]
        retrieved = time.perf_counter() - started
        prompts = [question_prompt(q.question, p) for q, p in zip(questions, passages, strict=True)]
        spent: dict[int, Spent] = {}
        done = sorted(generate(self.base, prompts, ANSWERS, prefix=rag_examples(), spent=spent))
        return predictions([answer_text(text) for _, text in done], spent, found=found, retrieve=retrieved)
