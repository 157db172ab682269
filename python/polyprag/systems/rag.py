"""RAG: the passages that BM25 finds, in the prompt of the bare base model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from polyprag._polyprag import Store
from polyprag.engine import ANSWERS
from polyprag.evaluation.data import Question
from polyprag.generation import generate
from polyprag.models import BaseModel, answer_text, passage_text, question_prompt
from polyprag.systems.prompts import rag_examples


@dataclass(frozen=True)
class Rag:
    """k passages a question, best first; a store without kept text cannot do this."""

    base: BaseModel
    store: Store
    k: int = 1
    name: str = "rag"

    def answer(self, questions: Sequence[Question]) -> list[str]:
        prompts = [
            question_prompt(q.question, passages)
            for q, passages in zip(questions, retrieved_passages(self.store, questions, self.k), strict=True)
        ]
        done = sorted(generate(self.base, prompts, ANSWERS, prefix=rag_examples()))
        return [answer_text(text) for _, text in done]


def retrieved_passages(store: Store, questions: Sequence[Question], k: int) -> list[list[str]]:
    """The texts of the k documents that BM25 finds for each question, best first."""
    found = store.search_many([q.question for q in questions], k)
    return [
        [passage_text(d.title, d.text or "") for d in store.documents([hit.id for hit in hits])]
        for hits in found
    ]
