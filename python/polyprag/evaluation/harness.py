"""The harness: asks systems the same questions, keeps each answer at once, and makes the report."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from polyprag.errors import InvalidInput
from polyprag.evaluation.answers import Answers, Kept, checked, key_of
from polyprag.evaluation.data import Question
from polyprag.evaluation.memory import peak_bytes, reset_peak
from polyprag.evaluation.metrics import Scoring
from polyprag.evaluation.results import Costs, SystemResult, score_system

#: Questions that a system is asked at a time, and that are asked again after a kill.
TOGETHER = 32


class Harness:
    """One set of questions, and the results of every system that was asked them.

    A system is anything with ``answer(questions)`` that returns a string or a Prediction for each, in order.

    answers: a file that answers are kept in as they come; what is in it is not asked again.
    together: how many questions a system is given at a time; with 1, times are those of one asked alone.
    scoring: see :mod:`polyprag.evaluation.metrics`. Answers are kept as they were given, for any scoring.
    """

    def __init__(
        self,
        questions: Sequence[Question],
        *,
        answers: Path | None = None,
        together: int = TOGETHER,
        scoring: Scoring = "squad",
        seed: int = 0,
        progress: Callable[[str, int, int], None] = lambda system, done, total: None,
    ) -> None:
        if not questions:
            raise InvalidInput("there is no question to ask")
        if together < 1:
            raise InvalidInput(f"together is at least 1, not {together}")
        if seed < 0:  # numpy takes none, which would be found out once the first system was asked
            raise InvalidInput(f"seed is at least 0, not {seed}")
        if len({question.id for question in questions}) < len(questions):
            raise InvalidInput("two questions have the same id: give each its own")
        self.questions = tuple(questions)
        self.results: dict[str, SystemResult] = {}
        self._answers = Answers(answers)
        self.scoring: Scoring = scoring
        self._together = together
        self._seed = seed
        self._progress = progress

    def ask(
        self, *draws: Any, name: str | None = None, listed: bool = True, made_of: Any = None
    ) -> SystemResult:
        """Ask a system every question. Several are draws of one control: a question counts with their mean.

        listed: whether it goes into :attr:`results`. progress is told (name, questions done, in all).
        made_of: see :func:`~polyprag.evaluation.answers.key_of`.
        Raises InvalidInput for a second system of one name, or one that does not answer.
        """
        if not draws:
            raise InvalidInput("there is no system to ask")
        name = name or system_name(draws[0])
        if name in self.results:
            raise InvalidInput(f"two systems have the name {name!r}: give one another name")
        kept = [self._draw(name, number, system, len(draws), made_of) for number, system in enumerate(draws)]
        predictions = [[each.prediction for each in draw] for draw in kept]
        every = [each for draw in kept for each in draw]
        costs = Costs.of(
            [each.prediction for each in every],
            [each.seconds for each in every],
            [each.peak_bytes for each in every],
        )
        result = score_system(
            name, self.questions, *predictions, scoring=self.scoring, seed=self._seed, costs=costs
        )
        if listed:
            self.results[name] = result
        return result

    def _draw(self, name: str, draw: int, system: Any, draws: int, made_of: Any) -> list[Kept]:
        keys = [key_of(system, name, draw, self._together, q, made_of) for q in self.questions]
        todo = [place for place, key in enumerate(keys) if self._answers.get(key) is None]
        done, total = draw * len(keys), draws * len(keys)
        self._progress(name, done + len(keys) - len(todo), total)
        for begin in range(0, len(todo), self._together):
            places = todo[begin : begin + self._together]
            asked = [self.questions[place] for place in places]
            found = self._timed(name, system, asked)
            self._answers.add(
                name, draw, {keys[p]: (self.questions[p], k) for p, k in zip(places, found, strict=True)}
            )
            self._progress(name, done + len(keys) - len(todo) + begin + len(places), total)
        answered = [self._answers.get(key) for key in keys]
        return [kept for kept in answered if kept is not None]

    def _timed(self, name: str, system: Any, asked: list[Question]) -> list[Kept]:
        reset_peak()
        started = time.perf_counter()
        predictions = checked(name, system.answer(asked), asked)
        each = (time.perf_counter() - started) / len(asked)
        peak = peak_bytes()
        return [Kept(prediction, each, peak) for prediction in predictions]


def system_name(system: object) -> str:
    """The name of a system: its own, or that of its class."""
    name = getattr(system, "name", None)
    return name if isinstance(name, str) and name else type(system).__name__
