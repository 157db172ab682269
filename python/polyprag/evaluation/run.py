"""An evaluation: stores and systems, asked the same questions one after the other, and the report of it."""

from __future__ import annotations

import hashlib
import json
import tempfile
import textwrap
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from polyprag._polyprag import Store, StoreSpec
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


# Which systems need gold documents, texts and wrong documents; and those that need no routes.
_OF_GOLD = frozenset({"rag_gold", "own_route", "amortised_route", "wrong_route", "combine_wrong_route"})
_OF_TEXTS = frozenset({"rag", "rag_gold", "amortised_route", "combine", "combine_wrong_route"})
_OF_WRONG = frozenset({"wrong_route", "combine_wrong_route"})
_OF_BASE = frozenset({"closed_book", "rag", "rag_gold"})


def lacks(system: str, store: Store | None, questions: Sequence[Question]) -> str | None:
    """What one of polyprag's systems would need and there is not; None if it can be asked."""
    if system == "closed_book":
        return None
    if store is None:
        return "a store"
    if system in _OF_TEXTS and not store.spec.keep_text:
        return "a store that keeps the texts"
    if system in _OF_GOLD and not all(q.documents for q in questions):
        return "the gold documents of every question"
    if system == "amortised_route" and store.router is None:
        return "a store with an amortised router"
    return None


def base_rows(
    base: BaseModel, store: Store | None, questions: Sequence[Question], *, passages: int = 1
) -> list[Row]:
    """The systems that need no route: closed book, and RAG where there is a store with texts."""
    found: dict[str, System] = {"closed_book": ClosedBook(base)}
    if store is not None:
        found["rag"] = Rag(base, store, k=passages)
        found["rag_gold"] = Rag(base, store, gold=True, name="rag_gold")
    return [Row(name, (system,)) for name, system in found.items() if lacks(name, store, questions) is None]


def store_rows(
    engine: Engine,
    questions: Sequence[Question],
    *,
    passages: int = 1,
    seed: int = 0,
    label: str = "",
    wanted: Callable[[str], bool] = lambda name: True,
) -> list[Row]:
    """The systems and controls of one store, those that its questions and parts allow.

    Own and wrong route and the amortised router need the gold documents of the questions; Combine needs
    texts, and the amortised router a router; without wrong documents there is no wrong route. Several routes
    become one as the store says.

    label: stands before the names, ``label/own_route``, to tell stores apart. wanted: whether one is, by its
    name.
    """
    before = f"{label}/" if label else ""

    def asked(name: str) -> bool:
        return lacks(name, engine.store, questions) is None and wanted(before + name)

    wrong: list[dict[str, Sequence[str | int]]] = []
    if any(map(asked, _OF_WRONG)):
        with suppress(InvalidInput):  # which the report warns of
            wrong = [_by_id(questions, draw) for draw in wrong_documents(questions, seed).draws]
    found: dict[str, Callable[[], list[System]]] = {
        "own_route": lambda: [RouteOfDocuments(engine)],
        "bm25_route": lambda: [RetrievedRoute(engine, k=1)],
        "bm25_route_k3": lambda: [RetrievedRoute(engine, k=ROUTES_MIXED)],
        "amortised_route": lambda: [AmortisedRoute(engine)],
        "wrong_route": lambda: [RouteOfDocuments(engine, draw) for draw in wrong],
        "uniform_route": lambda: [UniformRoute(engine)],
        "mean_route": lambda: [MeanRoute(engine)],
        "combine": lambda: [Combine(engine, k=passages)],
        "combine_wrong_route": lambda: [Combine(engine, passages, draw) for draw in wrong],
    }
    rows = [Row(before + name, tuple(draws())) for name, draws in found.items() if asked(name)]
    return [row for row in rows if row.draws]


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
        check_label(label, self._stores)
        check_questions(engine.store, self.questions)
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
        self._ask(
            store_rows(
                engine,
                self.questions,
                passages=self._passages,
                seed=self._seed,
                label=label,
                wanted=self._wanted,
            )
        )

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
        and what :func:`check_codecs` raises.
        """
        with Store.open(store) as source:
            check_codecs(source, codecs, self.questions, self._seed)
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
            if self._wanted(row.name):
                self._harness.ask(*row.draws, name=row.name)

    def _wanted(self, name: str) -> bool:
        return self._only is None or name in self._only or split_label(name)[1] in self._only

    def _wrong(self) -> dict[str, Any]:
        """What the report says of the wrong documents."""
        names = {f"{label}/{name}" if label else name for label in self._stores for name in _OF_WRONG}
        wrong, why = None, None
        if any(map(self._wanted, names)) and all(q.documents for q in self.questions):
            try:
                wrong = wrong_documents(self.questions, self._seed)
            except InvalidInput as error:
                why = str(error)
        found = {"wrong_of_other_type": None if wrong is None else wrong.other_type}
        return found if why is None else {**found, "no_wrong_documents": why}

    def report(self, settings: Mapping[str, Any] | None = None) -> Report:
        """The report of what was asked. settings: more of them; JSON values.

        Raises InvalidInput if nobody was.
        """
        wrong = self._wrong()
        if not self.results:
            why = wrong.get("no_wrong_documents", "name other systems, or none, which asks all (--only)")
            raise InvalidInput(f"there was nobody to ask: {why}")
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
                **wrong,
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
    questions = with_ids_of(engine.store, questions)
    evaluation = Evaluation(questions, **options)
    check_questions(engine.store, questions)
    evaluation.ask_base(engine.base, engine.store)
    evaluation.ask_store(engine, training_pairs)
    for system in systems:
        evaluation.ask_system(system)
    return evaluation.report(settings)


def with_ids_of(store: Store, questions: Sequence[Question]) -> list[Question]:
    """The questions, with numbers for gold documents where a store has them: CSV and TSV know text alone."""
    if store.spec.id_type == "string":
        return list(questions)
    return [replace(q, documents=tuple(map(_number, q.documents))) for q in questions]


def _number(id: str | int) -> str | int:
    # Of 20 digits is the largest id. What is no number is named as it stands, as unknown to the store.
    return int(id) if isinstance(id, str) and id.isascii() and id.isdigit() and len(id) <= 20 else id


def check_label(label: str, others: Collection[str]) -> None:
    """Raise InvalidInput for a label that does not tell a store from others."""
    if label in others or "/" in label:
        raise InvalidInput(f"the label {label!r} of a store has a slash, or is that of another one already")


def check_only(
    only: Iterable[str], stores: Mapping[str, Store], questions: Sequence[Question], *, base: bool = True
) -> None:
    """Raise InvalidInput for a system that nobody could be asked as.

    stores: by label. base: whether there is a base model to ask, beside that of the stores.
    """
    for name in only:
        label, system = split_label(name)
        found = {
            other: store
            for other, store in stores.items()
            if (other == label or not label) and not (other and system in _OF_BASE)
        }
        missing = [lacks(system, store, questions) for store in found.values()]
        if not missing:
            missing = [f"a store that is called {label}" if label else lacks(system, None, questions)]
            if missing == [None] and not base:
                missing = ["a base model (--model)"]
        if None not in missing:
            raise InvalidInput(f"{name} cannot be asked: it needs {missing[0]}; give that, or leave it out")


def check_codecs(store: Store, codecs: Iterable[str], questions: Sequence[Question], seed: int = 0) -> None:
    """Raise InvalidInput for a codec that there is not, or if the questions have no gold documents, or no
    wrong ones to compare them with.
    """
    spec = store.spec
    for codec in codecs:
        StoreSpec(
            modules=spec.modules,
            experts=spec.experts,
            rank=spec.rank,
            alpha=spec.alpha,
            codec=codec,
            base_model=spec.base_model,
        )
    if not all(q.documents for q in questions):
        raise InvalidInput("other codecs are compared by the own route: questions need gold documents")
    wrong_documents(questions, seed)


def _called(question: Question) -> str:
    """A question for people: its id may be one that was made of its content, and stand in no file."""
    return f"question {question.id!r} ({textwrap.shorten(question.question, 80, placeholder=' ...')!r})"


def check_questions(store: Store, questions: Sequence[Question]) -> None:
    """Raise CorpusError unless the store has a route for all gold documents of the questions.

    Either all of them name gold documents, or none does.
    """
    if not any(question.documents for question in questions):
        return
    for question in questions:
        if not question.documents:
            raise CorpusError(
                f"{_called(question)} names no gold document, but others do: own and wrong route cannot "
                'be measured; add "documents": [id, ...] to it'
            )
        for id in question.documents:
            if id not in store:
                raise CorpusError(
                    f"{_called(question)}: its document {id!r} is not in {store.path}; "
                    "is this the store of that corpus?"
                )
            if not store.is_routed(id):
                raise CorpusError(
                    f"{_called(question)}: its document {id!r} has no route; "
                    "encode it with `polyprag add --on-duplicate replace`"
                )
