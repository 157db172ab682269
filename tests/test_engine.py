"""The engine on a tiny model: the route of what was found decides the answer, in batches and in threads."""

from __future__ import annotations

import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from polyprag import Combination, Document, Store
from polyprag.engine import Answer, Engine
from polyprag.errors import BaseModelMismatch, BaseModelMissing, InvalidInput, StoreClosed
from polyprag.forms import FormChoice, FormCosts
from polyprag.generation import GenerationSettings, Spent
from polyprag.models import BaseModel, fingerprint
from polyprag.serving.decode import check

NAMES = ["amber", "birch", "coral", "denim", "ebony", "fjord", "grove", "haven"]
DOCUMENTS = [Document(f"d{i}", f"The {n} mill stands in Ost.", f"Mill {n}") for i, n in enumerate(NAMES)]
QUESTIONS = [f"Where is the {name}?" for name in NAMES]
MakeStore = Callable[..., Path]


@pytest.fixture
def path(make_store: MakeStore, tmp_path: Path) -> Path:
    """Eight documents, the last of them without a route."""
    return make_store(tmp_path / "mills.polyprag", DOCUMENTS, unrouted=1)


@pytest.fixture
def engine(path: Path, tiny_base: BaseModel) -> Any:
    with Engine.open(path, tiny_base) as engine:
        yield engine


def essence(answer: Answer) -> tuple[Any, ...]:
    return answer.question, answer.text, answer.documents


def test_an_answer_comes_from_the_route_of_what_was_found(engine: Engine) -> None:
    answer = engine.ask("Where is the coral?", k=1)
    (source,) = answer.documents
    assert (source.id, source.title, source.weight) == ("d2", "Mill coral", 1.0)
    assert source.score == engine.store.search("Where is the coral?", 1)[0].score > 0
    route = engine.store.routes(["d2"])[0]
    assert answer.text == engine.answer(["Where is the coral?"], [route])[0] != ""
    assert answer.question == "Where is the coral?"
    timings = answer.timings
    assert min(timings.retrieve, timings.route, timings.generate) > 0


def test_only_documents_that_a_filter_lets_through_answer(
    make_store: MakeStore, tmp_path: Path, tiny_base: BaseModel
) -> None:
    documents = [Document(d.id, d.text, d.title, {"year": 1990 + i}) for i, d in enumerate(DOCUMENTS)]
    path = make_store(tmp_path / "years", documents, filters={"year": "i64"})
    question, late = "Where is the mill?", {"year": {"gte": 1996}}
    with Engine.open(path, tiny_base) as engine:
        answer = engine.ask(question, k=5, filter=late)
        assert {source.id for source in answer.documents} == {"d6", "d7"}
        assert answer.text != engine.ask(question, k=5).text
        assert essence(engine.ask_batch([question], k=5, filter=late)[0]) == essence(answer)
        *_, whole = engine.stream(question, k=5, filter=late)
        assert isinstance(whole, Answer)
        assert essence(whole) == essence(answer)
        with pytest.raises(InvalidInput, match="year"):
            engine.ask(question, filter={"month": 3})


def test_every_row_of_a_batch_is_answered_as_if_alone(engine: Engine) -> None:
    questions = [*QUESTIONS, "?!", "A mill of amber, or rather a mill of birch?", QUESTIONS[0]]
    for settings in ({}, {"k": 3}, {"k": 2, "rule": "score", "temperature": 0.5}, {"max_new_tokens": 5}):
        together = engine.ask_batch(questions, **settings)  # type: ignore[arg-type]
        alone = [engine.ask(q, **settings) for q in questions]  # type: ignore[arg-type]
        assert list(map(essence, together)) == list(map(essence, alone))
    assert len({a.text for a in engine.ask_batch(QUESTIONS)}) == len(QUESTIONS), "the routes tell them apart"
    assert engine.ask_batch([]) == []


def test_whatever_computes_attention_the_answers_are_the_same(
    path: Path, model_folder: Path, engine: Engine
) -> None:
    questions = [*QUESTIONS, "A mill of amber, or rather a mill of birch?"]
    expected = list(map(essence, engine.ask_batch(questions)))
    for attention in ("eager", "sdpa"):
        with Engine.open(path, model_folder, device="cpu", dtype="fp32", attention=attention) as other:
            assert other.base.model.config._attn_implementation == attention
            assert list(map(essence, other.ask_batch(questions))) == expected
            check(other.base, other.routed)  # it can be served


def test_the_store_says_how_many_and_how(make_store: MakeStore, tmp_path: Path, tiny_base: BaseModel) -> None:
    path = make_store(tmp_path / "s", DOCUMENTS, combination=Combination(3, "score", 0.5))
    with Engine.open(path, tiny_base) as engine:
        question = "the amber mill"
        weights = [d.weight for d in engine.ask(question).documents]
        assert len(weights) == 3
        assert weights[0] > weights[1]
        assert sum(weights) == pytest.approx(1)
        assert essence(engine.ask(question)) == essence(
            engine.ask(question, k=3, rule="score", temperature=0.5)
        )
        assert [d.weight for d in engine.ask(question, rule="mean").documents] == pytest.approx([1 / 3] * 3)
        assert [d.weight for d in engine.ask(question, rule="first", k=2).documents] == [1, 0]
        assert [d.weight for d in engine.ask(question, rule="sum", k=2).documents] == [1, 1]
        assert len(engine.ask(question, k=100).documents) == len(DOCUMENTS), "all of them have 'mill'"


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_experts_of_a_narrow_dtype_are_attached_as_they_are_decoded(
    make_store: MakeStore, tmp_path: Path, tiny_base: BaseModel, path: Path, dtype: Any
) -> None:
    narrow = make_store(tmp_path / dtype, DOCUMENTS, unrouted=1, expert_dtype=dtype)
    with Store.open(path) as wide:
        exact = wide.experts
    with Engine.open(narrow, tiny_base) as engine:
        assert engine.store.expert_dtype == dtype
        answers = engine.ask_batch(QUESTIONS)
        assert len({a.text for a in answers}) == len(NAMES), "the routes tell them apart"
        attached = engine.routed.experts()
        for name, array in engine.store.experts.items():
            np.testing.assert_array_equal(attached[name], array)
            # 8 binary digits, or half of a row's largest number / 127.
            bound = np.abs(exact[name]) / 256 if dtype == "bfloat16" else np.abs(exact[name]).max() / 254
            assert np.all(np.abs(array - exact[name]) <= bound * (1 + 1e-6))
            assert not np.array_equal(array, exact[name])
        narrowed = {name: array.copy() for name, array in engine.store.experts.items()}
        spec = engine.store.spec
        routes = engine.store.routes([d.id for d in DOCUMENTS[:-1]], "z")
    # A store of exactly these numbers in float32 gives the same answers.
    with Store.create(tmp_path / "same", spec, narrowed) as writer:
        writer.add(DOCUMENTS[:-1], routes)
        writer.add(DOCUMENTS[-1:])
    with Engine.open(tmp_path / "same", tiny_base) as engine:
        assert engine.store.expert_dtype == "float32"
        assert list(map(essence, engine.ask_batch(QUESTIONS))) == list(map(essence, answers))


def test_what_has_no_route_is_found_and_never_mixed(engine: Engine) -> None:
    both = engine.ask("haven amber", k=2)
    assert {d.id: d.weight for d in both.documents} == {"d7": 0.0, "d0": 1.0}
    assert both.text == engine.answer(["haven amber"], [engine.store.routes(["d0"])[0]])[0]
    alone = engine.ask("haven", k=1)
    assert [(d.id, d.weight) for d in alone.documents] == [("d7", 0.0)]
    assert alone.text == engine.answer(["haven"], [None])[0]


@pytest.mark.parametrize("question", ['?!:"', "…", "()", "«»", "zzz unheard-of"])
def test_where_nothing_is_found_the_bare_model_answers(engine: Engine, question: str) -> None:
    answer = engine.ask(question)
    assert answer.documents == ()
    bare = engine.answer([question], [None])[0]
    engine.routed.detach()
    assert answer.text == bare == engine.answer([question], [None])[0], "as the model without experts"


@pytest.mark.parametrize(
    "question",
    ["coral AND", "title:coral", '"coral', "(coral", "coral*", "NOT coral^2", "coral: a \"mill'", "CORAL\0"],
)
def test_questions_are_text_and_no_query(engine: Engine, question: str) -> None:
    assert engine.ask(question, k=1).documents[0].id == "d2"


def test_questions_that_ask_nothing_are_refused(engine: Engine) -> None:
    for empty in ("", " \n\t"):
        with pytest.raises(InvalidInput, match="question 2 of 2 is empty"):
            engine.ask_batch(["amber", empty])
    with pytest.raises(InvalidInput, match="question 1 of 1 is no valid Unicode"):
        engine.ask("amber \udcff")  # as Python reads a byte that is no UTF-8 on the command line
    with pytest.raises(InvalidInput, match="k is at least 1"):
        engine.ask("amber", k=0)
    with pytest.raises(InvalidInput, match="rule"):
        engine.ask("amber", rule="best")  # type: ignore[arg-type]


def test_rows_with_and_without_a_route_share_a_batch(engine: Engine) -> None:
    routes = [engine.store.routes([f"d{i}"])[0] for i in range(3)]
    given = [routes[0], None, routes[1], None, routes[2]]
    questions = QUESTIONS[:5]
    alone = [engine.answer([q], [route])[0] for q, route in zip(questions, given, strict=True)]
    assert engine.answer(questions, given) == alone
    spent: dict[int, Spent] = {}
    settings = GenerationSettings(6, temperature=1.0, sequences=2)
    made = engine.generate(["Q", "QQ"], [None, routes[0]], settings, spent=spent)
    assert len(made) == 4
    assert [spent[i].prompt_tokens for i in range(2)] == [1, 2]
    with pytest.raises(InvalidInput, match="1 routes for 2 prompts"):
        engine.generate(["Q", "Q"], [None])


def test_an_answer_comes_in_pieces_and_then_whole(engine: Engine) -> None:
    for question in ("Where is the coral?", "haven", "?!"):
        *pieces, last = engine.stream(question, k=1, max_new_tokens=8)
        expected = engine.ask(question, k=1, max_new_tokens=8)
        assert isinstance(last, Answer)
        assert essence(last) == essence(expected)
        assert "".join(map(str, pieces)).strip() == expected.text
    with pytest.raises(InvalidInput, match="k is at least 1"):
        next(engine.stream("amber", k=0))


@pytest.mark.parametrize("form", ["merged", "auto"])
def test_every_form_gives_the_same_answers(
    path: Path, tiny_base: BaseModel, form: Any, make_store: MakeStore, tmp_path: Path
) -> None:
    with Engine.open(path, tiny_base) as engine:
        expected = [engine.ask(q).text for q in QUESTIONS]
    with Engine.open(path, tiny_base, form=form) as engine:
        for _ in range(3):
            assert [engine.ask(q).text for q in QUESTIONS] == expected
        assert [a.text for a in engine.ask_batch(QUESTIONS)] == expected
        if form == "merged":
            assert len(engine.forms.merged) == len(QUESTIONS) - 1, "one document has no route"
    assert len(engine.forms.merged) == 0


def test_sixteen_threads_get_the_answers_computed_alone(path: Path, tiny_base: BaseModel) -> None:
    """Each its own routes, alone, in batches and in streams, in both forms at once."""
    with Engine.open(path, tiny_base, form="auto") as engine:
        engine.forms = FormChoice(engine.routed, "auto", 1 << 20, FormCosts(merge=1, step=0.03, token=0))
        expected = [[engine.ask(q, k=k, max_new_tokens=6).text for k in (1, 2)] for q in QUESTIONS[:3]]
        barrier = Barrier(16)

        def ask(number: int) -> list[list[str]]:
            barrier.wait(60)
            found = [["", ""] for _ in expected]
            for step in range(len(expected) * 2):
                question, k = divmod((step + number) % (len(expected) * 2), 2)
                options: Any = {"k": k + 1, "max_new_tokens": 6}
                if number % 3 == 0:
                    *_, last = engine.stream(QUESTIONS[question], **options)
                    assert isinstance(last, Answer)
                    found[question][k] = last.text
                elif number % 3 == 1:
                    found[question][k] = engine.ask(QUESTIONS[question], **options).text
                else:
                    others = [QUESTIONS[(number + i) % len(QUESTIONS)] for i in range(2)]
                    found[question][k] = engine.ask_batch([QUESTIONS[question], *others], **options)[0].text
            return found

        with ThreadPoolExecutor(16) as pool:
            assert all(found == expected for found in pool.map(ask, range(16)))
        assert len(engine.forms.merged) > 0


# --- opening and closing ----------------------------------------------------------------------------


def test_close_detaches_and_closes_what_it_opened(path: Path, tiny_base: BaseModel) -> None:
    before = [(name, id(module)) for name, module in tiny_base.model.named_modules()]
    with Store.open(path) as store:
        engine = Engine.open(store, tiny_base)
        assert len(list(tiny_base.model.modules())) > len(before)
        engine.close()
        engine.close()
        assert [(name, id(module)) for name, module in tiny_base.model.named_modules()] == before
        assert not store.closed, "the store was passed in"
        with pytest.raises(StoreClosed, match="engine"):
            engine.ask("amber")
        engine = Engine.open(store, tiny_base)
        engine.close()
    own = Engine.open(path, tiny_base)
    own.close()
    assert own.store.closed
    with pytest.raises(StoreClosed):
        own.ask("amber")


def test_a_model_folder_answers_as_the_model(path: Path, engine: Engine, model_folder: Path) -> None:
    with Engine.open(path, model_folder, device="cpu", dtype="fp32") as other:
        assert other.base.name == "tiny"
        assert [a.text for a in other.ask_batch(QUESTIONS)] == [a.text for a in engine.ask_batch(QUESTIONS)]
    for device, dtype, match in (("abacus", "fp32", "device"), ("cpu", "fp4", "dtype")):
        with pytest.raises(InvalidInput, match=match):
            Engine.open(path, model_folder, device=device, dtype=dtype)


def test_another_base_model_is_refused(
    path: Path, build_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast
) -> None:
    for changes, what in (({"num_hidden_layers": 3}, "layers"), ({"vocab_size": 120}, "vocabulary")):
        other = BaseModel(build_model(**changes), tokenizer, "another")
        for allow in (False, True):
            with pytest.raises(BaseModelMismatch, match=f"made for tiny, where {what} is") as refused:
                Engine.open(path, other, allow_base_mismatch=allow)
            assert "--model" in str(refused.value)
        assert not any("Routed" in type(m).__name__ for m in other.model.modules())

    other = BaseModel(build_model(seed=1), tokenizer, "other weights")
    with pytest.raises(BaseModelMismatch, match=r"weights of other weights differ.*allow_base_mismatch"):
        Engine.open(path, other)
    with (
        pytest.warns(UserWarning, match="answers may differ"),
        Engine.open(path, other, allow_base_mismatch=True) as engine,
    ):
        assert engine.ask("amber").documents


def test_another_tokenizer_is_refused(make_store: MakeStore, tmp_path: Path, tiny_base: BaseModel) -> None:
    stored = {**fingerprint(tiny_base), "tokens": "0" * 64}
    path = make_store(tmp_path / "s", DOCUMENTS, base_model=stored)
    with pytest.raises(BaseModelMismatch, match="tokenizer"):
        Engine.open(path, tiny_base, allow_base_mismatch=True)


def test_a_store_that_does_not_say_its_model_is_refused(
    make_store: MakeStore, tmp_path: Path, tiny_base: BaseModel
) -> None:
    path = make_store(tmp_path / "s", DOCUMENTS, base_model={})
    with pytest.raises(BaseModelMissing, match="--model"):
        Engine.open(path)
    with pytest.raises(BaseModelMismatch, match="does not say"):
        Engine.open(path, tiny_base)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What tried to reach the network: nothing may."""
    tried: list[Any] = []

    def refuse(*address: Any, **_: Any) -> None:
        tried.append(address)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return tried


@pytest.mark.parametrize("name", ["nobody/has-this-model", "tiny", "a/../../b", "x.gguf"])
def test_a_model_that_a_store_names_is_never_downloaded(
    make_store: MakeStore, tmp_path: Path, tiny_base: BaseModel, no_network: list[Any], name: str
) -> None:
    path = make_store(tmp_path / "s", DOCUMENTS, base_model={**fingerprint(tiny_base), "name": name})
    with pytest.raises(BaseModelMissing) as missing:
        Engine.open(path)
    assert name in str(missing.value)
    assert "give a folder" in str(missing.value) or "no such GGUF file" in str(missing.value)
    assert no_network == []
    with Engine.open(path, tiny_base) as engine:
        assert engine.ask("amber").documents


def test_a_path_that_a_store_names_is_not_opened(
    make_store: MakeStore,
    tmp_path: Path,
    tiny_base: BaseModel,
    model_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inside = tmp_path / "inside"
    (inside / "sub").mkdir(parents=True)
    monkeypatch.chdir(inside)
    (tmp_path / "near").symlink_to(model_folder)
    (inside / "here").symlink_to(model_folder)
    for number, name in enumerate([str(model_folder), "../near", "./here", "here", ".", "sub/../here"]):
        stored = {**fingerprint(tiny_base), "name": name}
        path = make_store(tmp_path / f"s{number}", DOCUMENTS, base_model=stored)
        with pytest.raises(BaseModelMissing, match="--model") as refused:
            Engine.open(path)
        assert repr(name) in str(refused.value)
        with Engine.open(path, "./here", dtype="fp32") as engine:
            assert engine.ask("amber").documents, "given by hand, it is taken"
