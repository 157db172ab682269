"""polyprag inside of LangChain, LlamaIndex and datasets, as these libraries call it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from polyprag import Document, Engine, Store
from polyprag.corpus import read_corpus
from polyprag.errors import CorpusError, InvalidInput
from polyprag.stops import cut

QUESTION = "Where is the amber mill?"
DOCUMENTS = [
    Document("a", "The amber mill stands in Ost.", "Amber", {"year": 1850}),
    Document("b", "The birch mill stands in West.", "Birch"),
    Document("c", "A fjord that no route knows."),
]


@pytest.fixture(scope="module")
def path(make_store: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("integrations")
    return make_store(folder / "s", DOCUMENTS, unrouted=1, filters={"year": "i64"})


@pytest.fixture(scope="module")
def engine(path: Path, model_folder: Path) -> Iterator[Engine]:
    with Engine.open(path, model_folder, device="cpu", dtype="fp32") as opened:
        yield opened


@pytest.fixture
def bare(make_store: Callable[..., Path], tmp_path: Path) -> Iterator[Store]:
    with Store.open(make_store(tmp_path / "bare", DOCUMENTS, keep_text=False)) as store:
        yield store


def test_texts_are_cut_at_the_first_stop() -> None:
    assert cut("one\ntwo. three", [". ", "\n"]) == "one"
    assert cut("one", ()) == cut("one", []) == cut("one", [""]) == cut("one", ["x"]) == "one"


# --- LangChain --------------------------------------------------------------------------------------


def test_langchain_retrieves(engine: Engine, bare: Store) -> None:
    pytest.importorskip("langchain_core")
    from polyprag.integrations.langchain import PolypragRetriever

    found = PolypragRetriever(store=engine.store, k=2).invoke(QUESTION)
    assert [document.id for document in found] == [str(hit.id) for hit in engine.store.search(QUESTION, 2)]
    first = found[0]
    assert first.page_content == "The amber mill stands in Ost."
    assert first.metadata == {
        "title": "Amber",
        "score": engine.store.search(QUESTION, 1)[0].score,
        "year": 1850,
    }
    only = PolypragRetriever(store=engine.store, filter={"year": {"gte": 1900}})
    assert only.invoke(QUESTION) == []
    with pytest.raises(InvalidInput, match="keeps no texts"):
        PolypragRetriever(store=bare).invoke(QUESTION)
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        PolypragRetriever(store=engine.store, k=0)


def test_langchain_answers_alone_and_in_a_chain(engine: Engine) -> None:
    pytest.importorskip("langchain_core")
    from langchain_core.output_parsers import StrOutputParser
    from langchain_core.runnables import RunnableLambda

    from polyprag.integrations.langchain import PolypragLLM

    llm = PolypragLLM(engine=engine, k=2, max_new_tokens=6)
    expected = engine.ask(QUESTION, k=2, max_new_tokens=6).text
    assert llm.invoke(QUESTION) == expected
    assert llm.batch([QUESTION, QUESTION]) == [expected, expected]
    assert "".join(llm.stream(QUESTION)).split("\n")[0].strip() == expected
    assert (RunnableLambda(str.strip) | llm | StrOutputParser()).invoke(f"  {QUESTION} ") == expected
    stop = expected[2]
    assert llm.invoke(QUESTION, stop=[stop]) == expected[: expected.index(stop)]
    assert "".join(llm.stream(QUESTION, stop=[stop])) == expected[: expected.index(stop)]
    assert engine.store.digest() in str(llm)


@pytest.mark.parametrize(
    ("pieces", "stop", "chunks"),
    [
        (["foo X", "Y bar"], ["XY"], ["foo "]),
        (["foo X", "Z"], ["XY"], ["foo ", "XZ"]),
        (["foo X"], ["XY"], ["foo ", "X"]),
        (["foo XY", "Z"], ["Y", "XYZ"], ["foo "]),
        (["foo XY", "W"], ["Y", "XYZ"], ["foo ", "X"]),
        (["foo ", "bar"], None, ["foo ", "bar"]),
    ],
)
def test_what_langchain_streams_has_no_beginning_of_a_stop(
    pieces: list[str], stop: list[str] | None, chunks: list[str]
) -> None:
    pytest.importorskip("langchain_core")
    from polyprag.integrations.langchain import PolypragLLM

    class Said:
        def stream(self, *_: object, **__: object) -> Iterator[object]:
            yield from [*pieces, object()]

    found = [chunk.text for chunk in PolypragLLM(engine=Said())._stream(QUESTION, stop=stop)]
    assert found == chunks
    assert "".join(found) == cut("".join(pieces), stop or ())


# --- LlamaIndex -------------------------------------------------------------------------------------


def test_llama_index_retrieves(engine: Engine, bare: Store) -> None:
    pytest.importorskip("llama_index.core")
    from polyprag.integrations.llama_index import PolypragRetriever

    found = PolypragRetriever(engine.store, k=2).retrieve(QUESTION)
    hits = engine.store.search(QUESTION, 2)
    assert [(node.node_id, node.score) for node in found] == [
        (hit.id, pytest.approx(hit.score)) for hit in hits
    ]
    assert found[0].text == "The amber mill stands in Ost."
    assert (found[0].metadata["title"], found[0].metadata["year"]) == ("Amber", 1850)
    with pytest.raises(InvalidInput, match="keeps no texts"):
        PolypragRetriever(bare).retrieve(QUESTION)


def test_llama_index_answers(engine: Engine) -> None:
    pytest.importorskip("llama_index.core")
    from polyprag.integrations.llama_index import PolypragLLM

    llm = PolypragLLM(engine, k=2, max_new_tokens=6)
    answer = engine.ask(QUESTION, k=2, max_new_tokens=6)
    done = llm.complete(QUESTION)
    assert done.text == answer.text
    assert [source["id"] for source in done.additional_kwargs["documents"]] == [
        s.id for s in answer.documents
    ]
    pieces = list(llm.stream_complete(QUESTION))
    assert "".join(piece.delta or "" for piece in pieces) == pieces[-1].text
    assert pieces[-1].text.split("\n")[0].strip() == answer.text
    assert llm.metadata.model_name == engine.base.name


# --- datasets ---------------------------------------------------------------------------------------


def test_a_store_as_a_data_set(engine: Engine) -> None:
    pytest.importorskip("datasets")
    from polyprag.integrations.datasets import to_dataset

    store = engine.store
    found = to_dataset(store, "w")
    assert found["id"][:] == ["a", "b", "c"]
    assert found["title"][:] == ["Amber", "Birch", None]
    assert json.loads(found[0]["metadata"]) == {"year": 1850}
    np.testing.assert_array_equal(np.array(found[1]["route"], np.float32), store.routes(["b"])[0])
    assert found[2]["route"] is None
    assert to_dataset(store).column_names == ["id", "title", "text", "metadata"]


def test_a_data_set_as_a_corpus(engine: Engine) -> None:
    datasets = pytest.importorskip("datasets")
    from polyprag.integrations.datasets import to_dataset

    again = list(read_corpus(to_dataset(engine.store)))
    assert [(d.id, d.title, d.text, d.metadata) for d in again] == [
        (d.id, d.title, d.text, d.metadata) for d in DOCUMENTS
    ]
    rows = datasets.Dataset.from_dict({"text": ["x", "y", "z"], "metadata": ["no JSON", "[1]", None]})
    assert [d.metadata for d in read_corpus(rows)] == [{"metadata": "no JSON"}, {"metadata": "[1]"}, None]
    streamed = datasets.Dataset.from_dict({"text": ["x", "y"]}).to_iterable_dataset()
    assert [document.text for document in read_corpus(streamed)] == ["x", "y"]


def test_rows_in_memory() -> None:
    rows: list[dict[str, Any]] = [{"id": 1, "text": "x", "n": 2}, {"id": 1, "text": "y"}]
    first = next(read_corpus(rows))
    assert (first.id, first.text, first.metadata) == (1, "x", {"n": 2})
    assert rows[0] == {"id": 1, "text": "x", "n": 2}, "the rows stay as they are"
    with pytest.raises(CorpusError, match=r"rows in memory, row 2: the id 1 is already that of row 1"):
        list(read_corpus(rows))
    with pytest.raises(InvalidInput, match="rows in memory have no format"):
        read_corpus(rows, format="jsonl")
    with pytest.raises(CorpusError, match="rows in memory: no document"):
        list(read_corpus([]))
