"""What one system answered, scored: means, intervals, costs; and the difference of two of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from polyprag.errors import InvalidInput
from polyprag.evaluation.data import Prediction, Question
from polyprag.evaluation.metrics import Scoring, score
from polyprag.evaluation.retrieval import retrieval_scores
from polyprag.evaluation.statistics import (
    RESAMPLES,
    Difference,
    Interval,
    bootstrap_mean,
    paired_difference,
)


@dataclass(frozen=True, slots=True)
class Answered:
    """One question of one system. With several draws, the scores are their means, in [0, 1]."""

    id: str
    predictions: tuple[str, ...]
    em: float
    f1: float
    precision: float
    recall: float


@dataclass(frozen=True, slots=True)
class Costs:
    """What an answer took, in the mean over questions and draws.

    seconds: by stage (``retrieve``, ``route``, ``prefill``, ``decode``), and ``total``, the wall time of a
    question: its share of the batch that it was answered in. peak_bytes: the highest of all batches, of the
    ``process`` and, with an accelerator, of the ``device``.
    """

    seconds: Mapping[str, float]
    prompt_tokens: float | None
    new_tokens: float | None
    peak_bytes: Mapping[str, int]

    @classmethod
    def of(
        cls, predictions: Sequence[Prediction], seconds: Sequence[float], peaks: Sequence[Mapping[str, int]]
    ) -> Costs:
        """From each prediction, its wall time and the peak memory of its batch."""
        stages = list(dict.fromkeys(stage for p in predictions for stage in p.seconds))
        peak: dict[str, int] = {}
        for each in peaks:
            for where, size in each.items():
                peak[where] = max(size, peak.get(where, 0))
        n = len(predictions)
        return cls(
            {
                **{stage: sum(p.seconds.get(stage, 0.0) for p in predictions) / n for stage in stages},
                "total": sum(seconds) / n,
            },
            _mean_of_known([p.prompt_tokens for p in predictions]),
            _mean_of_known([p.new_tokens for p in predictions]),
            peak,
        )


def _mean_of_known(counts: Sequence[int | None]) -> float | None:
    known = [count for count in counts if count is not None]
    return sum(known) / len(known) if known else None


@dataclass(frozen=True, slots=True)
class Part:
    """The questions of one type."""

    f1: float
    em: float
    interval: Interval


@dataclass(frozen=True, slots=True)
class SystemResult:
    """One system on all questions; made by :func:`score_system`. Scores are means in [0, 1].

    by_type: of each type of question, where they have types. retrieval: ``recall@k`` and ``mrr`` of the
    documents that it found, where it tells them and gold ones are known.
    """

    name: str
    answers: tuple[Answered, ...]
    f1: float
    em: float
    precision: float
    recall: float
    interval: Interval
    by_type: Mapping[str, Part] = field(default_factory=dict)
    retrieval: Mapping[str, float] = field(default_factory=dict)
    costs: Costs | None = None

    def f1_without(self, leaked: Collection[str]) -> float | None:
        """F1 over the questions whose id is not among ``leaked``; None if that leaves none."""
        clean = [answer.f1 for answer in self.answers if answer.id not in leaked]
        return sum(clean) / len(clean) if clean else None

    def to_json(self) -> dict[str, Any]:
        return {
            "f1": self.f1,
            "em": self.em,
            "precision": self.precision,
            "recall": self.recall,
            "f1_interval": [self.interval.low, self.interval.high],
            "questions": len(self.answers),
            "by_type": {
                kind: {
                    "questions": part.interval.n,
                    "f1": part.f1,
                    "em": part.em,
                    "f1_interval": [part.interval.low, part.interval.high],
                }
                for kind, part in self.by_type.items()
            },
            "retrieval": dict(self.retrieval),
            "costs": None if self.costs is None else asdict(self.costs),
            "answers": [asdict(answer) for answer in self.answers],
        }


def score_system(
    name: str,
    questions: Sequence[Question],
    *draws: Sequence[str | Prediction],
    scoring: Scoring = "squad",
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
    costs: Costs | None = None,
) -> SystemResult:
    """Score a system's predictions.

    draws: one sequence of predictions, one for each question in order, or several (of a control that was
    drawn several times): a question then counts with the mean of its draws. costs: what its answers took,
    if known.
    Raises InvalidInput for no question, no draw, or a draw of another length.
    """
    if not questions or not draws:
        raise InvalidInput(f"{name}: no question or no prediction to score")
    for draw in draws:
        if len(draw) != len(questions):
            raise InvalidInput(f"{name}: {len(draw)} predictions for {len(questions)} questions")
    answers = []
    for place, question in enumerate(questions):
        predictions = tuple(_text(draw[place]) for draw in draws)
        scores = [score(prediction, question.answers, scoring) for prediction in predictions]
        em, f1, precision, recall = (
            sum(values) / len(draws)
            for values in zip(*((s.em, s.f1, s.precision, s.recall) for s in scores), strict=True)
        )
        answers.append(Answered(question.id, predictions, em, f1, precision, recall))
    return summarised(
        name,
        questions,
        answers,
        retrieval=_retrieval(questions, draws[0]),
        costs=costs,
        confidence=confidence,
        resamples=resamples,
        seed=seed,
    )


def summarised(
    name: str,
    questions: Sequence[Question],
    answers: Sequence[Answered],
    *,
    retrieval: Mapping[str, float],
    costs: Costs | None,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> SystemResult:
    """Scored answers, one for each question in order, with their means and intervals."""

    def interval(some: Sequence[Answered]) -> Interval:
        return bootstrap_mean([a.f1 for a in some], confidence=confidence, resamples=resamples, seed=seed)

    kinds: dict[str, list[Answered]] = {}
    for question, answer in zip(questions, answers, strict=True):
        if question.type is not None:
            kinds.setdefault(question.type, []).append(answer)
    whole = interval(answers)
    return SystemResult(
        name,
        tuple(answers),
        whole.mean,
        _mean([a.em for a in answers]),
        _mean([a.precision for a in answers]),
        _mean([a.recall for a in answers]),
        whole,
        {
            kind: Part(_mean([a.f1 for a in some]), _mean([a.em for a in some]), interval(some))
            for kind, some in sorted(kinds.items())
        },
        dict(retrieval),
        costs,
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _retrieval(questions: Sequence[Question], draw: Sequence[str | Prediction]) -> dict[str, float]:
    found = [p.documents if isinstance(p, Prediction) else None for p in draw]
    if all(documents is None for documents in found):
        return {}
    return retrieval_scores([q.documents for q in questions], [documents or () for documents in found])


def _text(answer: str | Prediction) -> str:
    return answer if isinstance(answer, str) else answer.text


def compare(
    a: SystemResult, b: SystemResult, *, confidence: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> Difference:
    """F1 of a minus F1 of b, paired by question. Raises InvalidInput if they answered different questions."""
    if [answer.id for answer in a.answers] != [answer.id for answer in b.answers]:
        raise InvalidInput(f"{a.name} and {b.name} answered different questions, so they cannot be compared")
    return paired_difference(
        [answer.f1 for answer in a.answers],
        [answer.f1 for answer in b.answers],
        confidence=confidence,
        resamples=resamples,
        seed=seed,
    )
