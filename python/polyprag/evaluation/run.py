"""One evaluation of a store: every system and control on the same questions."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from polyprag.engine import Engine
from polyprag.errors import CorpusError
from polyprag.evaluation.controls import derangement, leaked
from polyprag.evaluation.data import Question
from polyprag.evaluation.report import Footprint, Report, SystemResult, score_system
from polyprag.systems import (
    ClosedBook,
    Combine,
    Rag,
    RetrievedRoute,
    RouteOfDocuments,
    System,
    UniformRoute,
)

WRONG_DRAWS = 3
ROUTES_MIXED = 3


def evaluate(
    engine: Engine,
    questions: Sequence[Question],
    *,
    training_pairs: Iterable[tuple[str, str]] | None = None,
    passages: int = 1,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    progress: Callable[[str, int, int], None] = lambda system, done, total: None,
) -> Report:
    """Ask every system every question.

    Args:
        questions: with their gold documents, which have to be in the store.
        training_pairs: (question, answer) that training has seen, to count the leaked questions; None is
            not known, and the report says so.
        passages: how many RAG and Combine put into a prompt.
        progress: called with (system, systems done, systems in all) before each system and at the end.

    Raises:
        CorpusError: no question, or a question whose gold document is unknown to the store or has no route.
    """
    check_questions(engine, questions)
    wrong = derangement(questions, seed=seed, draws=WRONG_DRAWS)
    systems: list[list[System]] = [
        [ClosedBook(engine.base)],
        [RouteOfDocuments(engine, [q.documents for q in questions])],
        [RetrievedRoute(engine, k=1)],
        [RetrievedRoute(engine, k=ROUTES_MIXED, name="bm25_route_k3")],
        [RouteOfDocuments(engine, draw, name="wrong_route") for draw in wrong.draws],
        [UniformRoute(engine)],
    ]
    if engine.store.spec.keep_text:
        systems += [[Rag(engine.base, engine.store, k=passages)], [Combine(engine, k=passages)]]
    results: list[SystemResult] = []
    started = time.monotonic()
    for number, draws in enumerate(systems):
        name = draws[0].name
        progress(name, number, len(systems))
        begun = time.monotonic()
        answers = [system.answer(questions) for system in draws]
        results.append(score_system(name, questions, *answers, seed=seed, seconds=time.monotonic() - begun))
    progress("", len(systems), len(systems))
    leaks = None if training_pairs is None else leaked(questions, training_pairs)
    return Report.of(
        results,
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
            "wrong_of_other_type": wrong.other_type,
            **(settings or {}),
        },
        seed=seed,
        seconds={"evaluate": time.monotonic() - started},
    )


def check_questions(engine: Engine, questions: Sequence[Question]) -> None:
    """Raise CorpusError unless there are questions and the store has a route for all their gold documents."""
    if not questions:
        raise CorpusError("there is no question to ask")
    for question in questions:
        if not question.documents:
            raise CorpusError(
                f"question {question.id!r} names no gold document: own and wrong route cannot be measured; "
                'add "documents": [id, ...] to it'
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
