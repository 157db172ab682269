"""An evaluation: stores and systems, asked the same questions one after the other, and the report of it."""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from polyprag._polyprag import Store
from polyprag.engine import Engine
from polyprag.errors import CorpusError, InvalidInput
from polyprag.evaluation.answers import source_of
from polyprag.evaluation.controls import Derangement, Leaks, derangement, leaked
from polyprag.evaluation.data import Question
from polyprag.evaluation.footprint import Footprint
from polyprag.evaluation.harness import TOGETHER, Harness, system_name
from polyprag.evaluation.metrics import Scoring
from polyprag.evaluation.report import LABELS, Report, split_label
from polyprag.evaluation.results import SystemResult
from polyprag.evaluation.routes import route_facts
from polyprag.models import BaseModel
from polyprag.recoding import recode
from polyprag.systems import (
    AmortisedRoute,
    ClosedBook,
    Combine,
    MeanRoute,
    Rag,
    RetrievedRoute,
    RouteOfDocuments,
    System,
    UniformRoute,
)
from polyprag.systems.base import model_identity
from polyprag.systems.polyprag import engine_identity

WRONG_DRAWS = 3
ROUTES_MIXED = 3


@dataclass(frozen=True)
class Row:
    """A row of the table: one system, or the draws of one control."""

    name: str
    draws: tuple[System, ...]


def base_rows(
    base: BaseModel, store: Store | None, questions: Sequence[Question], *, passages: int = 1
) -> list[Row]:
    """The systems that need no route: closed book, and RAG where there is a store with texts."""
    rows = [Row("closed_book", (ClosedBook(base),))]
    if store is not None and store.spec.keep_text:
        rows.append(Row("rag", (Rag(base, store, k=passages),)))
        if all(q.documents for q in questions):
            rows.append(Row("rag_gold", (Rag(base, store, gold=True, name="rag_gold"),)))
    return rows


def store_rows(
    engine: Engine, questions: Sequence[Question], *, passages: int = 1, seed: int = 0, label: str = ""
) -> list[Row]:
    """The systems and controls of one store, those that its questions and parts allow.

    Own and wrong route and the amortised router need the gold documents of the questions; Combine needs
    texts, and the amortised router a router. Several routes become one as the store says.

    label: stands before the names, ``label/own_route``, to tell stores apart.
    """
    text, gold = engine.store.spec.keep_text, all(q.documents for q in questions)
    wrong = [_by_id(questions, draw) for draw in wrong_documents(questions, seed).draws] if gold else []
    found: dict[str, list[System]] = {}
    if gold:
        found["own_route"] = [RouteOfDocuments(engine)]
    found["bm25_route"] = [RetrievedRoute(engine, k=1)]
    found["bm25_route_k3"] = [RetrievedRoute(engine, k=ROUTES_MIXED)]
    if gold and text and engine.store.router is not None:
        found["amortised_route"] = [AmortisedRoute(engine)]
    if gold:
        found["wrong_route"] = [RouteOfDocuments(engine, draw) for draw in wrong]
    found["uniform_route"] = [UniformRoute(engine)]
    found["mean_route"] = [MeanRoute(engine)]
    if text:
        found["combine"] = [Combine(engine, k=passages)]
        if gold:
            found["combine_wrong_route"] = [Combine(engine, passages, draw) for draw in wrong]
    before = f"{label}/" if label else ""
    return [Row(before + name, tuple(draws)) for name, draws in found.items()]


def wrong_documents(questions: Sequence[Question], seed: int = 0) -> Derangement:
    """The wrong documents that every report uses: see :func:`~polyprag.evaluation.controls.derangement`."""
    return derangement(questions, seed=seed, draws=WRONG_DRAWS)


def _by_id(
    questions: Sequence[Question], draw: Sequence[Sequence[str | int]]
) -> dict[str, Sequence[str | int]]:
    return {question.id: documents for question, documents in zip(questions, draw, strict=True)}


class Evaluation:
    """Questions, and what is asked them one after the other; :meth:`report` at the end.

    Args:
        questions: with their gold documents, which have to be in the stores; without any, what needs them is
            left out, own and wrong route among it.
        passages: how many RAG and Combine put into a prompt.
        only: names of the systems to ask, ``own_route`` meaning that of every store; None is all of them.
        answers: a file to keep answers in as they come: the same evaluation goes on from it.
        scoring, together: see :class:`~polyprag.evaluation.harness.Harness`.
        seed: of the wrong documents and the intervals.
        progress: called with (system, questions done, questions in all) as it goes on.
    """

    def __init__(
        self,
        questions: Sequence[Question],
        *,
        passages: int = 1,
        only: Collection[str] | None = None,
        answers: Path | None = None,
        scoring: Scoring = "squad",
        together: int = TOGETHER,
        seed: int = 0,
        progress: Callable[[str, int, int], None] = lambda system, done, total: None,
    ) -> None:
        if not questions:
            raise CorpusError("there is no question to ask")
        if unknown := sorted(name for name in only or () if split_label(name)[1] not in LABELS):
            raise InvalidInput(f"there is no system {unknown[0]!r}; there are: {', '.join(LABELS)}")
        self.questions = tuple(questions)
        self._passages, self._only, self._seed = passages, only, seed
        self._harness = Harness(
            questions, answers=answers, together=together, scoring=scoring, seed=seed, progress=progress
        )
        self._stores: dict[str, Footprint] = {}
        self._leaks: Leaks | None = None
        self._leaks_known = True
        self._codecs: list[dict[str, Any]] = []
        self._routes: dict[str, Any] = {}
        self._settings: dict[str, Any] = {}
        self._started = time.monotonic()

    @property
    def results(self) -> Mapping[str, SystemResult]:
        """What was asked so far."""
        return self._harness.results

    def ask_base(self, base: BaseModel, store: Store | None = None) -> None:
        """Ask the base model alone: closed book, and RAG from a store's texts."""
        self._settings["base_model"] = base.name
        self._settings["base_model_digest"] = base.digest
        self._settings["dtype"] = str(base.model.dtype).removeprefix("torch.")
        self._ask(base_rows(base, store, self.questions, passages=self._passages))

    def ask_store(
        self, engine: Engine, training_pairs: Iterable[tuple[str, str]] | None = None, label: str = ""
    ) -> None:
        """Ask with a store's routes, and its controls.

        training_pairs: (question, answer) that its training has seen, to count the leaked questions; None is
        not known, and the report says so. label: tells it from other stores; that of the first is "".

        Raises CorpusError for a question whose gold document is unknown to the store or has no route, and
        InvalidInput for a second store of one label.
        """
        if label in self._stores or "/" in label:
            raise InvalidInput(
                f"the label {label!r} of a store has a slash, or is that of another one already"
            )
        check_questions(engine, self.questions)
        self._stores[label] = Footprint.of(engine.store)
        if training_pairs is None:
            self._leaks_known = False
        else:
            found = leaked(self.questions, training_pairs)
            before = self._leaks or Leaks((), frozenset())
            self._leaks = Leaks(before.pairs + found.pairs, before.questions | found.questions)
        if not self._routes:
            self._routes = route_facts(
                engine.store, [id for q in self.questions for id in q.documents], self._seed
            )
        self._ask(store_rows(engine, self.questions, passages=self._passages, seed=self._seed, label=label))

    def ask_system(self, system: Any, made_of: Mapping[str, Any] | None = None) -> SystemResult:
        """Ask anything with ``answer(questions)``, whatever it is.

        made_of: what it was given (``base``, ``store``, ``engine``). Its answers are asked again where that
        changed, unless it has an ``identity`` of its own.
        """
        name = system_name(system)
        if split_label(name)[1] in LABELS or "/" in name:
            raise InvalidInput(f"the name {name!r} of a system is that of one of polyprag's, or has a slash")
        self._settings.setdefault("systems", {})[name] = source_of(type(system))
        return self._harness.ask(system, name=name, made_of=_identities(made_of or {}))

    def ask_codecs(self, store: str | Path, base: BaseModel, codecs: Sequence[str]) -> None:
        """Ask own and wrong route with the routes of a store in other codecs.

        No engine may be open on ``base``. Raises InvalidInput for a codec that its routes cannot be put in,
        or if the questions have no gold documents.
        """
        if not all(q.documents for q in self.questions):
            raise InvalidInput("other codecs are compared by the own route: questions need gold documents")
        with tempfile.TemporaryDirectory(prefix="polyprag-codec-") as folder:
            for number, codec in enumerate(codecs):
                path = Path(folder) / f"{number}.polyprag"
                recode(store, path, codec=codec)
                with Engine.open(path, base) as engine:
                    self._codecs.append(self._codec(engine))

    def _codec(self, engine: Engine) -> dict[str, Any]:
        codec = engine.store.spec.codec
        rows = store_rows(engine, self.questions, seed=self._seed)
        own, wrong = (
            self._harness.ask(*row.draws, name=f"{row.name} in {codec}", listed=False)
            for row in rows
            if row.name in ("own_route", "wrong_route")
        )
        return {
            "codec": codec,
            "bytes_per_document": engine.store.info().route_bytes_per_document,
            "f1": own.f1,
            "interval": [own.interval.low, own.interval.high],
            "wrong_f1": wrong.f1,
        }

    def _ask(self, rows: Sequence[Row]) -> None:
        for row in rows:
            if self._only is None or row.name in self._only or split_label(row.name)[1] in self._only:
                self._harness.ask(*row.draws, name=row.name)

    def report(self, settings: Mapping[str, Any] | None = None) -> Report:
        """The report of what was asked. settings: more of them; JSON values."""
        gold = all(q.documents for q in self.questions)
        known = self._leaks if self._leaks_known else None
        return Report.of(
            self.questions,
            list(self._harness.results.values()),
            leaked=None if known is None else known.questions,
            leaked_pairs=0 if known is None else len(known.pairs),
            stores=self._stores,
            codecs=self._codecs,
            routes=self._routes,
            settings={
                **self._settings,
                "questions": digest(self.questions),
                "passages": self._passages,
                "routes_mixed": ROUTES_MIXED,
                "wrong_draws": WRONG_DRAWS,
                "wrong_of_other_type": wrong_documents(self.questions, self._seed).other_type
                if gold and self._stores
                else None,
                **(settings or {}),
            },
            scoring=self._harness.scoring,
            seed=self._seed,
            seconds={"evaluate": time.monotonic() - self._started},
        )


def _identities(given: Mapping[str, Any]) -> dict[str, Any]:
    """What a system was given, as JSON values that change when it does."""
    known: Mapping[str, Callable[[Any], Any]] = {
        "base": model_identity,
        "store": lambda store: store.digest(),
        "engine": engine_identity,
    }
    return {name: known[name](value) for name, value in given.items()}


def digest(questions: Sequence[Question]) -> str:
    """What tells sets of questions apart, in 32 hex digits."""
    text = json.dumps([asdict(question) for question in questions])
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def evaluate(
    engine: Engine,
    questions: Sequence[Question],
    *,
    training_pairs: Iterable[tuple[str, str]] | None = None,
    settings: Mapping[str, Any] | None = None,
    systems: Iterable[Any] = (),
    **options: Any,
) -> Report:
    """Ask the base model, every route and control of one store, and further systems; ``options`` are those of
    :class:`Evaluation`.
    """
    evaluation = Evaluation(questions, **options)
    check_questions(engine, questions)
    evaluation.ask_base(engine.base, engine.store)
    evaluation.ask_store(engine, training_pairs)
    for system in systems:
        evaluation.ask_system(system)
    return evaluation.report(settings)


def check_questions(engine: Engine, questions: Sequence[Question]) -> None:
    """Raise CorpusError unless the store has a route for all gold documents of the questions.

    Either all of them name gold documents, or none does.
    """
    if not any(question.documents for question in questions):
        return
    for question in questions:
        if not question.documents:
            raise CorpusError(
                f"question {question.id!r} names no gold document, but others do: own and wrong route cannot "
                'be measured; add "documents": [id, ...] to it'
            )
        for id in question.documents:
            if id not in engine.store:
                raise CorpusError(
                    f"question {question.id!r}: its document {id!r} is not in {engine.store.path}; "
                    "is this the store of that corpus?"
                )
            if not engine.store.is_routed(id):
                raise CorpusError(
                    f"question {question.id!r}: its document {id!r} has no route; "
                    "encode it with `polyprag add --on-duplicate replace`"
                )
