"""Closed book: the bare base model, no passage and no route."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from polyprag.engine import ANSWERS
from polyprag.evaluation.data import Prediction, Question
from polyprag.generation import Spent, generate
from polyprag.models import BaseModel, answer_text, question_prompt
from polyprag.systems.base import model_identity, predictions
from polyprag.systems.prompts import closed_book_examples


@dataclass(frozen=True)
class ClosedBook:
    base: BaseModel
    name: str = "closed_book"

    def identity(self, question: Question) -> list[Any]:  # noqa: ARG002 - of every question the same
        return model_identity(self.base)

    def answer(self, questions: Sequence[Question]) -> list[Prediction]:
        prompts = [question_prompt(q.question) for q in questions]
        spent: dict[int, Spent] = {}
        done = sorted(generate(self.base, prompts, ANSWERS, prefix=closed_book_examples(), spent=spent))
        return predictions([answer_text(text) for _, text in done], spent)
