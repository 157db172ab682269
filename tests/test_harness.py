"""The harness with systems of other people: what it asks, what it keeps, what it refuses."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from polyprag.errors import CorpusError, InvalidInput
from polyprag.evaluation.data import Prediction, Question
from polyprag.evaluation.harness import Harness

QUESTIONS = [Question(f"q{n}", f"What is {n}?", (f"number {n}",), None, (f"d{n}",)) for n in range(10)]


@dataclass
class Numbers:
    """Knows what it is asked, and remembers being asked."""

    version: int = 1
    stop_after: int = 10**9
    seen: list[str] = field(default_factory=list)
    name: str = "numbers"

    def identity(self, question: Question) -> Any:
        return [self.version, list(question.documents)]

    def answer(self, questions: Sequence[Question]) -> list[str | Prediction]:
        if len(self.seen) >= self.stop_after:
            raise KeyboardInterrupt
        self.seen += [q.id for q in questions]
        return [
            Prediction(f"number {q.id[1:]}", ("d0",), {"think": 2.0}, 3, 4) if q.id != "q1" else "nothing"
            for q in questions
        ]


def test_a_class_with_answer_is_a_system() -> None:
    class Mine:
        def answer(self, questions: Sequence[Question]) -> list[str]:
            return ["number 3"] * len(questions)

    harness = Harness(QUESTIONS)
    result = harness.ask(Mine())
    assert (result.name, result.em) == ("Mine", 0.1)
    assert result.costs is not None
    assert result.costs.seconds.keys() == {"total"}
    assert result.costs.new_tokens is None


def test_a_stopped_evaluation_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    stopped = Numbers(stop_after=6)
    with pytest.raises(KeyboardInterrupt):
        Harness(QUESTIONS, answers=path, together=3).ask(stopped)
    assert stopped.seen == [f"q{n}" for n in range(6)]
    with path.open("ab") as file:
        file.write(b'{"key": "torn')  # what a kill may leave

    again = Numbers()
    steps: list[tuple[str, int, int]] = []
    harness = Harness(QUESTIONS, answers=path, together=3, progress=lambda *step: steps.append(step))
    result = harness.ask(again)
    assert again.seen == [f"q{n}" for n in range(6, 10)]
    assert steps == [("numbers", 6, 10), ("numbers", 9, 10), ("numbers", 10, 10)]
    whole = Harness(QUESTIONS).ask(Numbers())
    assert result.answers == whole.answers
    assert result.em == 0.9
    assert result.costs is not None
    assert result.costs.seconds["think"] == pytest.approx(1.8)
    assert (result.costs.prompt_tokens, result.costs.new_tokens) == (3, 4)
    assert result.costs.peak_bytes["process"] > 0


def test_only_what_an_answer_depends_on_asks_anew(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    Harness(QUESTIONS, answers=path).ask(Numbers())

    def asked(system: Numbers, questions: Sequence[Question] = QUESTIONS, **more: Any) -> list[str]:
        Harness(questions, answers=path).ask(system, **more)
        return system.seen

    assert asked(Numbers(), QUESTIONS[:4]) == []
    assert asked(Numbers(version=2)) == [q.id for q in QUESTIONS]
    assert asked(Numbers(version=2)) == []
    assert asked(Numbers(), name="other") == [q.id for q in QUESTIONS]
    moved = [*QUESTIONS[:9], Question("q9", "What is 9?", ("number 9",), None, ("d3",))]
    assert asked(Numbers(), moved) == ["q9"]
    reworded = [Question("q0", "What is zero?", ("number 0",), None, ("d0",)), *QUESTIONS[1:]]
    assert asked(Numbers(), reworded) == ["q0"]


def test_another_version_of_polyprag_asks_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "answers.jsonl"
    Harness(QUESTIONS, answers=path).ask(Numbers())
    monkeypatch.setattr("polyprag.evaluation.answers.__version__", "99.0")
    again = Numbers()
    Harness(QUESTIONS, answers=path).ask(again)
    assert again.seen == [q.id for q in QUESTIONS]


def test_draws_are_kept_apart(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    draws = [Numbers(), Numbers(), Numbers()]
    result = Harness(QUESTIONS, answers=path).ask(*draws)
    assert all(len(draw.seen) == 10 for draw in draws)
    assert len(result.answers[0].predictions) == 3
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["draw"], line["question"]) for line in lines[9:11]] == [(0, "q9"), (1, "q0")]
    again = Numbers()
    Harness(QUESTIONS, answers=path).ask(again, Numbers(), Numbers())
    assert again.seen == []


@pytest.mark.parametrize(
    ("given", "match"),
    [
        (["one"], "1 of them"),
        ("one string for all", "str"),
        (None, "NoneType"),
        ([3] * 10, "'q0' is int"),
        ([Prediction(None)] * 10, "Mine: the answer to question 'q0' cannot be kept: its text is NoneType"),  # type: ignore[arg-type]
        (["x"] * 9 + ["\ud800"], "'q9' cannot be kept: its text has half"),
        ([Prediction("x", tuple(np.arange(2)))] * 10, "documents hold int64"),
        ([Prediction("x", seconds={"think": math.nan})] * 10, "seconds of think are nan"),
        ([Prediction("x", new_tokens=np.int64(3))] * 10, "tokens are int64"),  # type: ignore[arg-type]
    ],
)
def test_a_system_that_does_not_answer_is_refused(given: Any, match: str) -> None:
    class Mine:
        def answer(self, questions: Sequence[Question]) -> Any:
            return given

    with pytest.raises(InvalidInput, match=match):
        Harness(QUESTIONS).ask(Mine())


def test_what_cannot_be_asked_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="no question"):
        Harness([])
    with pytest.raises(InvalidInput, match="same id"):
        Harness([QUESTIONS[0], QUESTIONS[0]])
    with pytest.raises(InvalidInput, match="seed is at least 0"):
        Harness(QUESTIONS, seed=-1)
    harness = Harness(QUESTIONS)
    harness.ask(Numbers())
    with pytest.raises(InvalidInput, match="another name"):
        harness.ask(Numbers())
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"id": "d0", "text": "No answers."}\n')
    with pytest.raises(CorpusError, match=r"corpus.jsonl, line 1"):
        Harness(QUESTIONS, answers=path)
