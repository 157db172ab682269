"""RAG: the passages that BM25 finds, in the prompt of the bare base model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from polyprag._polyprag import Hit, Store
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
        found = self.store.search_many([q.question for q in questions], self.k)
        prompts = [
            question_prompt(q.question, passages_of(self.store, hits))
            for q, hits in zip(questions, found, strict=True)
        ]
        done = sorted(generate(self.base, prompts, ANSWERS, prefix=rag_examples()))
        return [answer_text(text) for _, text in done]


def passages_of(store: Store, hits: Sequence[Hit]) -> list[str]:
    """The texts of the documents that were found, as they stand in prompts."""
    return [passage_text(d.title, d.text or "") for d in store.documents([hit.id for hit in hits])]
