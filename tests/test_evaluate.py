"""One evaluation on a tiny store: every system is asked rightly, and the report says what it knows."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from polyprag import Combination, Document
from polyprag.combining import strength_beside_passages
from polyprag.encode import Recipe, add, encode
from polyprag.engine import Engine
from polyprag.errors import CorpusError, InvalidInput
from polyprag.evaluation.data import Question
from polyprag.evaluation.report import Report
from polyprag.evaluation.run import Evaluation, evaluate
from polyprag.models import BaseModel
from polyprag.recipes import with_settings
from polyprag.systems import Combine, Rag, RetrievedRoute, RouteOfDocuments, UniformRoute
from polyprag.systems.polyprag import engine_identity

NAMES = ["amber", "birch", "coral", "denim", "ebony", "fjord"]
DOCUMENTS = [Document(f"d{i}", f"The {n} mill stands in {n}ost.", f"Mill {n}") for i, n in enumerate(NAMES)]
QUESTIONS = [
    Question(f"q{i}", f"Where is the {n} mill?", (f"{n}ost",), None, (f"d{i}",)) for i, n in enumerate(NAMES)
]
SYSTEMS = [
    *("closed_book", "own_route", "bm25_route", "bm25_route_k3", "wrong_route", "uniform_route"),
    "mean_route",
]
WITH_TEXT = ["rag", "rag_gold", "combine", "combine_wrong_route"]
DRAWN = ("wrong_route", "combine_wrong_route")
MakeStore = Callable[..., Path]

pytestmark = pytest.mark.usefixtures("short_answers")


@pytest.fixture
def engine(make_store: MakeStore, tmp_path: Path, tiny_base: BaseModel) -> Any:
    with Engine.open(make_store(tmp_path / "s", DOCUMENTS), tiny_base) as engine:
        yield engine


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[Any], list[list[str]] | None]]:
    """The routes and the passages of every call of ``Engine.answer``."""
    calls: list[tuple[list[Any], list[list[str]] | None]] = []
    answer = Engine.answer

    def spy(self: Engine, questions: Sequence[str], routes: Any, **more: Any) -> list[str]:
        calls.append((list(routes), more.get("passages")))
        return answer(self, questions, routes, **more)

    monkeypatch.setattr(Engine, "answer", spy)
    return calls


def test_every_system_has_its_figures(engine: Engine, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    report = evaluate(
        engine,
        QUESTIONS,
        training_pairs=[
            ("Where is the amber mill?", "x"),
            ("Who built it?", "y"),
            ("where is amber mill", "z"),
        ],
        seed=3,
        settings={"note": "tiny"},
        progress=lambda *step: seen.append(step),
    )
    path = tmp_path / "report.json"
    path.write_text("old")
    report.save(path)
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["report.json"]
    found = json.loads(path.read_text(encoding="utf-8"))
    assert sorted(found["systems"]) == sorted(SYSTEMS + WITH_TEXT)
    for name, system in found["systems"].items():
        assert 0 <= system["em"] <= 1
        assert 0 <= system["f1"] <= 1
        assert [a["id"] for a in system["answers"]] == [q.id for q in QUESTIONS]
        assert {len(a["predictions"]) for a in system["answers"]} == {3 if name in DRAWN else 1}
        costs = system["costs"]
        stages = {"prefill", "decode", "total"}
        stages |= {"retrieve"} if name.startswith(("rag", "bm25", "combine")) else set()
        stages |= {"route"} if "route" in name or name == "combine" else set()
        assert costs["seconds"].keys() == stages
        assert all(seconds > 0 for seconds in costs["seconds"].values())
        assert costs["prompt_tokens"] > 10
        assert costs["new_tokens"] > 0
        assert costs["peak_bytes"]["process"] > 1 << 20
    assert found["leaked_questions"] == 1
    assert found["leaked_question_ids"] == ["q0"]
    assert found["leaked_training_pairs"] == 2
    assert found["bytes_per_document"] == pytest.approx(engine.store.info().bytes_per_document)
    assert found["seconds"] == found["stage_seconds"]["evaluate"] > 0
    assert found["seed"] == 3
    settings = found["settings"]
    assert (settings["base_model"], settings["dtype"]) == ("tiny", "float32")
    assert found["stores"][""]["codec"] == "f32"
    assert (settings["note"], settings["wrong_draws"]) == ("tiny", 3)
    assert "own_minus_wrong" in found["differences"]
    assert seen[-1] == ("combine_wrong_route", 3 * len(QUESTIONS), 3 * len(QUESTIONS))
    again = evaluate(engine, QUESTIONS, seed=3, only=["own_route", "wrong_route"])
    for name in ("own_route", "wrong_route"):
        assert again.systems[name].answers == report.systems[name].answers


def test_another_model_of_the_same_name_is_asked_anew(
    make_store: MakeStore, tmp_path: Path, tiny_base: BaseModel, build_model: Callable[..., Any]
) -> None:
    answers, digests = tmp_path / "answers.jsonl", set()
    retrained = BaseModel(build_model(seed=1), tiny_base.tokenizer, tiny_base.name)
    for base, kept in ((tiny_base, 6), (tiny_base, 6), (retrained, 12)):
        evaluation = Evaluation(QUESTIONS, answers=answers)
        evaluation.ask_base(base)
        assert len(answers.read_text().splitlines()) == kept
        digests.add(evaluation.report().settings["base_model_digest"])
    assert len(digests) == 2
    path = make_store(tmp_path / "s", DOCUMENTS)
    with Engine.open(path, tiny_base) as engine:
        assert engine_identity(engine)[0] == tiny_base.digest, "an attached store changes nothing"


def test_own_and_wrong_documents(engine: Engine, asked: list[Any]) -> None:
    evaluate(engine, QUESTIONS)
    rows = {
        row.tobytes(): id
        for id, row in zip(engine.store, engine.store.routes(list(engine.store)), strict=True)
    }
    named = [
        [rows.get(np.asarray(r, dtype=np.float32).tobytes()) for r in routes]
        for routes, passages in asked
        if passages is None
    ]
    own = [q.documents[0] for q in QUESTIONS]
    assert named[0] == own
    assert named[1] == own, "the question names its mill, so BM25 finds it"
    assert named[2] == [None] * len(own), "three are mixed"
    for draw in named[3:6]:
        assert sorted(draw) == sorted(own), "each is wrong for one question"
        assert all(a != b for a, b in zip(draw, own, strict=True))
    uniform = asked[6][0]
    assert all((route == 0.25).all() for route in uniform)
    mean = engine.store.routes(list(engine.store)).mean(0)
    assert all(np.allclose(route, mean, atol=1e-6) for route in asked[7][0])
    combined, *others = [call for call in asked if call[1] is not None]
    assert len(others) == 3, "combine with a wrong route"
    assert all(call[1] == combined[1] for call in others), "the passages stay"
    assert combined[1][0] == ["Mill amber\nThe amber mill stands in amberost."]


def test_gold_documents_of_a_question_are_mixed_alike(engine: Engine, asked: list[Any]) -> None:
    RouteOfDocuments(engine, {"q0": ("d0", "d3")}).answer(QUESTIONS[:1])
    np.testing.assert_allclose(asked[0][0][0], engine.store.routes(["d0", "d3"]).mean(0), atol=1e-6)
    RouteOfDocuments(engine, {"q0": ("d0", "d3")}, rule="sum").answer(QUESTIONS[:1])
    np.testing.assert_allclose(asked[1][0][0], engine.store.routes(["d0", "d3"]).sum(0), atol=1e-6)


def test_a_store_without_text_has_no_passages_to_give(
    make_store: MakeStore, tmp_path: Path, tiny_base: BaseModel
) -> None:
    path = make_store(tmp_path / "s", DOCUMENTS, keep_text=False, combination=Combination(2, "score", 0.3))
    with Engine.open(path, tiny_base) as engine:
        report = evaluate(engine, QUESTIONS, training_pairs=[], passages=2)
        assert sorted(report.systems) == sorted(SYSTEMS)
        assert report.to_json()["leaked_questions"] == 0
        assert report.settings["passages"] == 2
        assert not any("leaked" in warning for warning in report.warnings)


def test_leaks_that_nobody_counted_are_unknown(engine: Engine) -> None:
    report = evaluate(engine, QUESTIONS, only=["own_route", "wrong_route"])
    found = report.to_json()
    for key in ("leaked_questions", "leaked_question_ids", "leaked_training_pairs"):
        assert found[key] is None
    assert {system["f1_without_leaks"] for system in found["systems"].values()} == {None}
    assert any("training pairs are not known" in warning for warning in found["warnings"])


def test_questions_that_cannot_be_measured_are_named(engine: Engine) -> None:
    def refuse(match: str, *questions: Question) -> None:
        with pytest.raises(CorpusError, match=match):
            evaluate(engine, questions)

    refuse("no question")
    match = r"'q9' \('Why\?'\) names no gold document, but others do"
    refuse(match, *QUESTIONS, Question("q9", "Why?", ("x",)))
    refuse(
        r"'q9' \('Why\?'\): its document 'd9' is not in",
        *QUESTIONS,
        Question("q9", "Why?", ("x",), None, ("d0", "d9")),
    )
    with engine.store.writer() as writer:
        writer.add([Document("bare", "A mill without a route.")])
    engine.store.refresh()
    refuse("'bare' has no route", *QUESTIONS, Question("q9", "Why?", ("x",), None, ("bare",)))


def test_without_wrong_documents_the_rest_is_asked(engine: Engine, tmp_path: Path) -> None:
    report = evaluate(engine, QUESTIONS[:1])
    assert set(report.systems) == {*SYSTEMS, *WITH_TEXT} - {*DRAWN}
    assert any("no wrong route was asked: question 'q0': every document" in w for w in report.warnings)
    report.save(tmp_path / "r.json")
    assert Report.load(tmp_path / "r.json").warnings == report.warnings
    assert not any("no wrong route" in w for w in evaluate(engine, QUESTIONS[:1], only=["rag"]).warnings)
    with pytest.raises(InvalidInput, match="nobody to ask: question 'q0': every document"):
        evaluate(engine, QUESTIONS[:1], only=["wrong_route"])


def test_ids_that_are_numbers_are_named_as_text(
    make_store: MakeStore, tmp_path: Path, tiny_base: BaseModel
) -> None:
    numbered = [Document(i, d.text, d.title) for i, d in enumerate(DOCUMENTS)]
    with Engine.open(make_store(tmp_path / "s", numbered), tiny_base) as engine:
        questions = [replace(q, documents=(q.id[1:],)) for q in QUESTIONS]
        report = evaluate(engine, questions, only=["own_route", "bm25_route"])
        assert [q.documents for q in report.questions] == [(i,) for i in range(6)]
        assert report.systems["bm25_route"].to_json()["retrieval"]["recall@1"] == 1
        with pytest.raises(CorpusError, match="its document 'd0' is not in"):
            evaluate(engine, QUESTIONS)


def test_systems_are_what_the_engine_does(engine: Engine) -> None:
    for k in (1, 3):
        expected = [a.text for a in engine.ask_batch([q.question for q in QUESTIONS], k=k)]
        found = RetrievedRoute(engine, k=k).answer(QUESTIONS)
        assert [p.text for p in found] == expected
        assert all(p.documents is not None and len(p.documents) <= k for p in found)
    answers = [p.text for p in UniformRoute(engine).answer(QUESTIONS)]
    assert len(set(answers)) > 1, "the questions differ"
    for system in (Rag(engine.base, engine.store, k=2), Combine(engine, k=2)):
        assert len(system.answer(QUESTIONS)) == len(QUESTIONS)
    nothing = [Question("q", "?!", ("x",))]
    assert len(Combine(engine).answer(nothing)) == len(Rag(engine.base, engine.store).answer(nothing)) == 1


def test_combine_takes_the_route_of_other_documents(
    engine: Engine, asked: list[tuple[list[Any], list[list[str]] | None]]
) -> None:
    Combine(engine, k=1).answer(QUESTIONS)
    Combine(engine, k=1, documents={q.id: ("d5", "d4") for q in QUESTIONS}).answer(QUESTIONS)
    (own, passages), (other, same_passages) = asked
    assert passages == same_passages
    expected = strength_beside_passages(engine.store.spec.phi) * engine.store.combined_route(["d5", "d4"])
    assert all(np.array_equal(route, expected) for route in other)
    assert not any(np.array_equal(route, expected) for route in own)


def test_a_route_beside_passages_has_the_strength_that_is_asked_for(
    engine: Engine, asked: list[tuple[list[Any], list[list[str]] | None]]
) -> None:
    whole = Combine(engine, strength=1.0).answer(QUESTIONS)
    nothing = Combine(engine, strength=0.0).answer(QUESTIONS)
    (routes, passages), (none, _) = asked
    hits = [engine.store.search(q.question, 1) for q in QUESTIONS]
    assert all(
        np.array_equal(r, engine.store.combined_route([h[0].id])) for r, h in zip(routes, hits, strict=True)
    )
    assert not np.any(none)
    bare: list[Any] = [None] * len(QUESTIONS)
    expected = engine.answer([q.question for q in QUESTIONS], bare, passages=passages)
    assert [p.text for p in nothing] == expected != [p.text for p in whole]
    identities = {json.dumps(Combine(engine, strength=s).identity(QUESTIONS[0])) for s in (None, 0.25, 1.0)}
    assert len(identities) == 3 - (strength_beside_passages(engine.store.spec.phi) == 1.0)
    assert (strength_beside_passages("linear"), strength_beside_passages("sigmoid")) == (0.5, 1.0)


def test_the_amortised_router_makes_the_routes_that_adding_would(
    tiny_base: BaseModel, tmp_path: Path, asked: list[tuple[list[Any], list[list[str]] | None]]
) -> None:
    recipe = with_settings(
        Recipe(), ["train.router=true", "train.epochs=1", "train.experts=4", "augment.pairs=1"]
    )
    encode(tiny_base, DOCUMENTS[:4], tmp_path / "s", recipe)
    # What the router makes of a text is the route of a document that is added by it.
    copies = [Document(f"copy {d.id}", d.text, d.title) for d in DOCUMENTS[:4]]
    add(tiny_base, copies, tmp_path / "s", amortised=True)
    with Engine.open(tmp_path / "s", tiny_base) as engine:
        questions = QUESTIONS[:4]
        report = evaluate(engine, questions, only=["amortised_route", "own_route", "wrong_route"])
        assert set(report.systems) == {"amortised_route", "own_route", "wrong_route"}
        assert "amortised_minus_own" in report.differences
        routes = np.stack(asked[1][0])  # asked after the own route
        added = engine.store.routes([f"copy {q.documents[0]}" for q in questions])
        # The store keeps codes as small whole numbers.
        moved = np.abs(routes - added).max()
        assert moved < 0.1 * np.abs(added).max()
        assert moved < np.abs(added[0] - added[1]).max(), "nearer to its own than documents are to each other"
