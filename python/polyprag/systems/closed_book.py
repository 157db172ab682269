"""Closed book: the bare base model, no passage and no route."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from polyprag.engine import ANSWERS
from polyprag.evaluation.data import Question
from polyprag.generation import generate
from polyprag.models import BaseModel, answer_text, question_prompt
from polyprag.systems.prompts import closed_book_examples


@dataclass(frozen=True)
class ClosedBook:
    base: BaseModel
    name: str = "closed_book"

    def answer(self, questions: Sequence[Question]) -> list[str]:
        prompts = [question_prompt(q.question) for q in questions]
        done = sorted(generate(self.base, prompts, ANSWERS, prefix=closed_book_examples()))
        return [answer_text(text) for _, text in done]
