"""The one interface of all systems."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from polyprag.evaluation.data import Question


class System(Protocol):
    """What the harness asks: a name (a key of the report) and an answer to each question, in order."""

    @property
    def name(self) -> str: ...

    def answer(self, questions: Sequence[Question]) -> list[str]: ...
