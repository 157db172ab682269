"""What an evaluation found: per system, against each other, in bytes; as JSON and as tables."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from typing import TYPE_CHECKING, Any

from polyprag.errors import InvalidInput
from polyprag.evaluation.data import Prediction, Question
from polyprag.evaluation.metrics import score
from polyprag.evaluation.statistics import (
    RESAMPLES,
    Difference,
    Interval,
    bootstrap_mean,
    paired_difference,
)
from polyprag.jsonl import write_atomic

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from polyprag._polyprag import StoreInfo

#: The usual systems, in the order of the table, and what people read for them.
LABELS: Mapping[str, str] = {
    "closed_book": "closed book",
    "rag": "RAG, BM25 passages",
    "rag_gold": "RAG, gold passages",
    "own_route": "own route",
    "bm25_route": "route by BM25, k=1",
    "bm25_route_k3": "route by BM25, k=3",
    "amortised_route": "route by the amortised router",
    "wrong_route": "wrong route",
    "uniform_route": "uniform route",
    "mean_route": "mean route",
    "combine": "combine",
    "combine_wrong_route": "combine, wrong route",
}

_ROUTED = ("own_route", "bm25_route", "bm25_route_k3", "amortised_route", "combine")

#: Differences that every report states where it has both systems: (name, a, b) for a minus b.
DIFFERENCES: Sequence[tuple[str, str, str]] = (
    ("own_minus_wrong", "own_route", "wrong_route"),
    ("own_minus_uniform", "own_route", "uniform_route"),
    ("own_minus_closed_book", "own_route", "closed_book"),
    ("own_minus_rag", "own_route", "rag"),
    ("bm25_minus_own", "bm25_route", "own_route"),
    ("own_minus_mean", "own_route", "mean_route"),
    ("combine_minus_rag", "combine", "rag"),
    ("combine_minus_combine_wrong", "combine", "combine_wrong_route"),
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
class SystemResult:
    """One system on all questions; made by :func:`score_system`. Scores are means in [0, 1]."""

    name: str
    answers: tuple[Answered, ...]
    f1: float
    em: float
    precision: float
    recall: float
    interval: Interval
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
            "costs": None if self.costs is None else asdict(self.costs),
            "answers": [asdict(answer) for answer in self.answers],
        }


def score_system(
    name: str,
    questions: Sequence[Question],
    *draws: Sequence[str | Prediction],
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
        scores = [score(prediction, question.answers) for prediction in predictions]
        em, f1, precision, recall = (
            sum(values) / len(draws)
            for values in zip(*((s.em, s.f1, s.precision, s.recall) for s in scores), strict=True)
        )
        answers.append(Answered(question.id, predictions, em, f1, precision, recall))
    interval = bootstrap_mean(
        [answer.f1 for answer in answers], confidence=confidence, resamples=resamples, seed=seed
    )
    return SystemResult(
        name,
        tuple(answers),
        interval.mean,
        sum(answer.em for answer in answers) / len(answers),
        sum(answer.precision for answer in answers) / len(answers),
        sum(answer.recall for answer in answers) / len(answers),
        interval,
        costs,
    )


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


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes of a store, by part. lora_bytes_per_document: what one LoRA a document would take instead."""

    documents: int
    parts: Mapping[str, int]
    route_bytes_per_document: float
    lora_bytes_per_document: int

    @classmethod
    def of(cls, info: StoreInfo) -> Footprint:
        """From what a store tells of itself (``store.info()``)."""
        parts = {part.role: part.bytes for part in info.parts}
        return cls(info.documents, parts, info.route_bytes_per_document, info.lora_bytes_per_document)

    @property
    def total_bytes(self) -> int:
        return sum(self.parts.values())

    @property
    def bytes_per_document(self) -> float:
        return self.total_bytes / self.documents if self.documents else 0.0

    def to_json(self) -> dict[str, Any]:
        return {
            "documents": self.documents,
            "parts": {
                role: {"bytes": size, "bytes_per_document": size / self.documents if self.documents else 0.0}
                for role, size in self.parts.items()
            },
            "total_bytes": self.total_bytes,
            "bytes_per_document": self.bytes_per_document,
            "route_bytes_per_document": self.route_bytes_per_document,
            "lora_bytes_per_document": self.lora_bytes_per_document,
        }


def versions() -> dict[str, Any]:
    """What ran, and on what: versions of the packages that matter and the machine's processor.

    No host name, user or path is in it. Asks the installed packages' metadata, so nothing is imported.
    """
    found: dict[str, Any] = {"python": platform.python_version(), "system": platform.system()}
    for package in ("polyprag", "torch", "transformers", "numpy"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    # the core is compiled in: it alone knows its Tantivy
    found["tantivy"] = getattr(sys.modules.get("polyprag._polyprag"), "tantivy_version", None)
    found["machine"] = {"processor": _processor(), "architecture": platform.machine(), "cores": _cores()}
    return found


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


@dataclass(frozen=True)
class Report:
    """One evaluation. Made by :meth:`of`; ``differences`` holds (a, b, a minus b) under a name.

    leaked: ids of the questions that training pairs give away, None where the pairs are not known;
    leaked_pairs: how many such pairs.
    settings: JSON values only, and no secret: they are written out as they are.
    seconds: how long each stage took, or the whole.
    """

    systems: Mapping[str, SystemResult]
    differences: Mapping[str, tuple[str, str, Difference]]
    leaked: frozenset[str] | None
    leaked_pairs: int
    footprint: Footprint | None
    settings: Mapping[str, Any]
    seed: int
    seconds: float | Mapping[str, float]
    versions: Mapping[str, Any] = field(default_factory=versions)

    @classmethod
    def of(
        cls,
        systems: Sequence[SystemResult],
        *,
        leaked: Collection[str] | None = None,
        leaked_pairs: int = 0,
        footprint: Footprint | None = None,
        settings: Mapping[str, Any] | None = None,
        seed: int = 0,
        seconds: float | Mapping[str, float] = 0.0,
        differences: Sequence[tuple[str, str, str]] = DIFFERENCES,
        confidence: float = 0.95,
        resamples: int = RESAMPLES,
    ) -> Report:
        """Put systems side by side and compare them.

        differences: (name, a, b) for a minus b; those of which a system is missing are left out.
        Raises InvalidInput for two systems of one name, or for a pair that answered different questions.
        """
        by_name = {system.name: system for system in systems}
        if len(by_name) != len(systems):
            raise InvalidInput("two systems of the report have the same name")
        compared = {
            name: (
                a,
                b,
                compare(by_name[a], by_name[b], confidence=confidence, resamples=resamples, seed=seed),
            )
            for name, a, b in differences
            if a in by_name and b in by_name
        }
        return cls(
            by_name,
            compared,
            None if leaked is None else frozenset(leaked),
            leaked_pairs,
            footprint,
            dict(settings or {}),
            seed,
            seconds,
        )

    @property
    def warnings(self) -> list[str]:
        """What a reader must know before believing the figures."""
        found = []
        difference = self.differences.get("own_minus_wrong")
        if difference is None and not self.systems.keys().isdisjoint(_ROUTED):
            found.append(
                "own minus wrong was not measured: F1 alone does not say that a document is in its route"
            )
        elif difference is not None and not (difference[2].real and difference[2].mean > 0):
            found.append(
                "own route is not above wrong route: these figures do not show that routes hold documents"
            )
        if self.leaked is None and not self.systems.keys().isdisjoint(_ROUTED):
            found.append(
                "the training pairs are not known, so leaked questions (a training pair asks the same) "
                "are not counted"
            )
        if self.leaked:
            asked = len(next(iter(self.systems.values())).answers) if self.systems else 0
            found.append(
                f"{len(self.leaked)} of {asked} questions leaked (a training pair asks the same): "
                "see F1 without leaks"
            )
        return found

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values, every answer included."""
        stages = dict(self.seconds) if isinstance(self.seconds, Mapping) else {}
        return {
            "systems": {
                name: {**system.to_json(), "f1_without_leaks": self._without_leaks(system)}
                for name, system in self.systems.items()
            },
            "differences": {
                name: {
                    "a": a,
                    "b": b,
                    "mean": d.mean,
                    "interval": [d.low, d.high],
                    "p_value": d.p_value,
                    "real": d.real,
                    "questions": d.n,
                    "confidence": d.confidence,
                    "resamples": d.resamples,
                }
                for name, (a, b, d) in self.differences.items()
            },
            "leaked_questions": None if self.leaked is None else len(self.leaked),
            "leaked_question_ids": None if self.leaked is None else sorted(self.leaked),
            "leaked_training_pairs": None if self.leaked is None else self.leaked_pairs,
            "bytes_per_document": None if self.footprint is None else self.footprint.bytes_per_document,
            "footprint": None if self.footprint is None else self.footprint.to_json(),
            "seconds": sum(stages.values()) if stages else self.seconds,
            "stage_seconds": stages,
            "settings": dict(self.settings),
            "seed": self.seed,
            "versions": dict(self.versions),
            "warnings": self.warnings,
        }

    def _without_leaks(self, system: SystemResult) -> float | None:
        return None if self.leaked is None else system.f1_without(self.leaked)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write :meth:`to_json` to a file, the whole of it or nothing. Raises OSError."""
        text = json.dumps(self.to_json(), ensure_ascii=False, allow_nan=False, indent=1)
        write_atomic(path, text + "\n")

    def print(self, console: Console) -> None:
        """Tables for the terminal: systems, differences, footprint, then the warnings."""
        console.print(self._systems_table())
        if self.differences:
            console.print(self._differences_table())
        if self.footprint is not None:
            console.print(footprint_table(self.footprint))
        for warning in self.warnings:
            console.print(f"Warning: {warning}.", style="yellow", markup=False, highlight=False)

    def _systems_table(self) -> Table:
        first = next(iter(self.systems.values()), None)
        questions = len(first.answers) if first else 0
        confidence = first.interval.confidence if first else 0.95
        table = _table(
            f"{questions} questions", "system", "F1", f"{confidence:.0%} interval", "EM", "F1 without leaks"
        )
        for name in [
            *filter(self.systems.__contains__, LABELS),
            *(n for n in self.systems if n not in LABELS),
        ]:
            system = self.systems[name]
            clean = self._without_leaks(system)
            unknown = "unknown" if self.leaked is None else "none left"
            table.add_row(
                _plain(LABELS.get(name, name)),
                f"{system.f1:.3f}",
                f"{system.interval.low:.3f} to {system.interval.high:.3f}",
                f"{system.em:.3f}",
                unknown if clean is None else f"{clean:.3f}",
                style="bold" if name == "own_route" else None,
            )
        return table

    def _differences_table(self) -> Table:
        table = _table("Differences in F1", "", "mean", "interval", "p", "")
        for a, b, difference in self.differences.values():
            table.add_row(
                _plain(f"{LABELS.get(a, a)} minus {LABELS.get(b, b)}"),
                f"{difference.mean:+.3f}",
                f"{difference.low:+.3f} to {difference.high:+.3f}",
                f"{difference.p_value:.4f}",
                "real" if difference.real else "not shown",
            )
        return table


def _plain(text: str) -> str:
    """Names may come from users: brackets in them are no markup."""
    from rich.markup import escape

    return escape(text)


def _table(title: str, *columns: str) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if place else "left")
    return table


def footprint_table(footprint: Footprint) -> Table:
    """The bytes of each part, in all and a document, beside one LoRA a document."""
    table = _table(f"Footprint, {footprint.documents} documents", "part", "bytes", "bytes a document")
    table.add_row(
        "all of it", f"{footprint.total_bytes:,}", f"{footprint.bytes_per_document:,.1f}", style="bold"
    )
    table.add_section()
    for role, size in footprint.parts.items():
        each = size / footprint.documents if footprint.documents else 0.0
        table.add_row(_plain(role), f"{size:,}", f"{each:,.1f}")
    table.add_section()
    lora = footprint.lora_bytes_per_document
    table.add_row("one LoRA a document", f"{lora * footprint.documents:,}", f"{lora:,.1f}")
    return table
