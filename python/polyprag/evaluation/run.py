"""One evaluation of a store: every system and control on the same questions."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyprag._polyprag import Store
from polyprag.engine import Engine
from polyprag.errors import CorpusError
from polyprag.evaluation.controls import Derangement, derangement, leaked
from polyprag.evaluation.data import Question
from polyprag.evaluation.harness import Harness
from polyprag.evaluation.report import Footprint, Report
from polyprag.models import BaseModel
from polyprag.routing import CombinationRule
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

WRONG_DRAWS = 3
ROUTES_MIXED = 3


@dataclass(frozen=True)
class Row:
    """A row of the table: one system, or the draws of one control."""

    name: str
    draws: tuple[System, ...]


def base_rows(
    base: BaseModel, store: Store, questions: Sequence[Question], *, passages: int = 1
) -> list[Row]:
    """The systems that need no route: closed book, and RAG where the store has texts."""
    rows = [Row("closed_book", (ClosedBook(base),))]
    if store.spec.keep_text:
        rows.append(Row("rag", (Rag(base, store, k=passages),)))
        if all(q.documents for q in questions):
            rows.append(Row("rag_gold", (Rag(base, store, gold=True, name="rag_gold"),)))
    return rows


def store_rows(
    engine: Engine, questions: Sequence[Question], *, passages: int = 1, seed: int = 0, label: str = ""
) -> list[Row]:
    """The systems and controls of one store, those that its questions and parts allow.

    Own and wrong route, RAG's gold passages and the amortised router need the gold documents of the
    questions; Combine needs texts, and the amortised router a router. In a store of one LoRA a document
    several documents' LoRAs are summed, as PRAG does.

    label: stands before the names, ``label/own_route``, to tell stores apart.
    """
    lora = engine.store.spec.recipe.get("train", {}).get("routing") == "lora"
    rule: CombinationRule | None = "sum" if lora else None
    text, gold = engine.store.spec.keep_text, all(q.documents for q in questions)
    wrong = [_by_id(questions, draw) for draw in wrong_documents(questions, seed).draws] if gold else []
    found: dict[str, list[System]] = {}
    if gold:
        found["own_route"] = [RouteOfDocuments(engine, rule=rule)]
    found["bm25_route"] = [RetrievedRoute(engine, k=1, rule=rule)]
    found["bm25_route_k3"] = [RetrievedRoute(engine, k=ROUTES_MIXED, rule=rule)]
    if gold and text and engine.store.router is not None:
        found["amortised_route"] = [AmortisedRoute(engine)]
    if gold:
        found["wrong_route"] = [RouteOfDocuments(engine, draw, rule=rule) for draw in wrong]
    found["uniform_route"] = [UniformRoute(engine)]
    found["mean_route"] = [MeanRoute(engine)]
    if text:
        found["combine"] = [Combine(engine, k=passages, rule=rule)]
        if gold:
            found["combine_wrong_route"] = [Combine(engine, passages, draw, rule=rule) for draw in wrong]
    before = f"{label}/" if label else ""
    return [Row(before + name, tuple(draws)) for name, draws in found.items()]


def wrong_documents(questions: Sequence[Question], seed: int = 0) -> Derangement:
    """The wrong documents that every report uses: see :func:`~polyprag.evaluation.controls.derangement`."""
    return derangement(questions, seed=seed, draws=WRONG_DRAWS)


def _by_id(
    questions: Sequence[Question], draw: Sequence[Sequence[str | int]]
) -> dict[str, Sequence[str | int]]:
    return {question.id: documents for question, documents in zip(questions, draw, strict=True)}


def evaluate(
    engine: Engine,
    questions: Sequence[Question],
    *,
    training_pairs: Iterable[tuple[str, str]] | None = None,
    passages: int = 1,
    seed: int = 0,
    answers: Path | None = None,
    settings: Mapping[str, Any] | None = None,
    progress: Callable[[str, int, int], None] = lambda system, done, total: None,
) -> Report:
    """Ask every system every question.

    Args:
        questions: with their gold documents, which have to be in the store; without any, what needs them is
            left out, own and wrong route among it.
        training_pairs: (question, answer) that training has seen, to count the leaked questions; None is
            not known, and the report says so.
        passages: how many RAG and Combine put into a prompt.
        answers: a file to keep answers in as they come: the same call goes on from it.
        progress: called with (system, questions done, questions in all) as it goes on.

    Raises:
        CorpusError: no question, or a question whose gold document is unknown to the store or has no route.
    """
    check_questions(engine, questions)
    started = time.monotonic()
    harness = Harness(questions, answers=answers, seed=seed, progress=progress)
    for row in [
        *base_rows(engine.base, engine.store, questions, passages=passages),
        *store_rows(engine, questions, passages=passages, seed=seed),
    ]:
        harness.ask(*row.draws, name=row.name)
    leaks = None if training_pairs is None else leaked(questions, training_pairs)
    gold = all(q.documents for q in questions)
    return Report.of(
        list(harness.results.values()),
        leaked=None if leaks is None else leaks.questions,
        leaked_pairs=0 if leaks is None else len(leaks.pairs),
        footprint=Footprint.of(engine.store.info()),
        settings={
            "base_model": engine.base.name,
            "dtype": str(engine.base.model.dtype).removeprefix("torch."),
            "recipe": engine.store.spec.recipe,
            "codec": engine.store.spec.codec,
            "passages": passages,
            "routes_mixed": ROUTES_MIXED,
            "wrong_draws": WRONG_DRAWS,
            "wrong_of_other_type": wrong_documents(questions, seed).other_type if gold else None,
            **(settings or {}),
        },
        seed=seed,
        seconds={"evaluate": time.monotonic() - started},
    )


def check_questions(engine: Engine, questions: Sequence[Question]) -> None:
    """Raise CorpusError unless there are questions and the store has a route for all their gold documents.

    Either all of them name gold documents, or none does.
    """
    if not questions:
        raise CorpusError("there is no question to ask")
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
