from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyprag.corpus import content_id, infer_format, read_corpus, read_unified
from polyprag.errors import CorpusError, InvalidInput

_ONE = {"id": "a", "title": "Tern", "text": "A tern is a bird."}
_TWO = {"id": "b", "title": "Skua", "text": "A skua is another."}


def _jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("packed", [False, True])
def test_jsonl(tmp_path: Path, packed: bool) -> None:
    path = _jsonl(tmp_path / "c.jsonl", {**_ONE, "year": 1850}, {**_TWO, "title": None})
    if packed:
        data = path.read_bytes()
        path = path.with_name("c.jsonl.gz")
        path.write_bytes(gzip.compress(data))
    first, second = read_corpus(path)
    assert (first.id, first.title, first.text) == ("a", "Tern", "A tern is a bird.")
    assert first.metadata == {"year": 1850}
    assert (second.title, second.metadata) == (None, None)


@pytest.mark.parametrize("packed", [False, True])
def test_tsv(tmp_path: Path, packed: bool) -> None:
    data = b'id\ttitle\ttext\tlang\r\na\tTern\tA "tern", so called.\ten\r\nb\t\tSkua\t\r\n'
    path = tmp_path / ("c.tsv.gz" if packed else "c.tsv")
    path.write_bytes(gzip.compress(data) if packed else data)
    first, second = read_corpus(path)
    assert (first.id, first.title, first.text) == ("a", "Tern", 'A "tern", so called.')
    assert first.metadata == {"lang": "en"}
    assert (second.title, second.text) == (None, "Skua")


def test_fields_can_be_named(tmp_path: Path) -> None:
    path = _jsonl(tmp_path / "c.txt", {"pid": 7, "body": "text", "head": "title", "src": "x"})
    (document,) = read_corpus(
        path, format="jsonl", id_field="pid", text_field="body", title_field="head", metadata=False
    )
    assert (document.id, document.text, document.title) == (7, "text", "title")
    assert document.metadata is None


def test_an_object_named_metadata_is_the_metadata(tmp_path: Path) -> None:
    (document,) = read_corpus(_jsonl(tmp_path / "c.jsonl", {**_ONE, "metadata": {"kind": "bird"}, "year": 1}))
    assert document.metadata == {"kind": "bird", "year": 1}
    (without,) = read_corpus(_jsonl(tmp_path / "n.jsonl", {**_ONE, "metadata": None}))
    assert without.metadata is None
    with pytest.raises(CorpusError, match="'year' stands both"):
        list(read_corpus(_jsonl(tmp_path / "d.jsonl", {**_ONE, "metadata": {"year": 2}, "year": 1})))


def test_ids_from_the_content(tmp_path: Path) -> None:
    rows = [{"title": "Tern", "text": "x"}, {"text": "Tern\nx"}, {"title": "", "text": "x"}]
    ids = [document.id for document in read_corpus(_jsonl(tmp_path / "c.jsonl", *rows))]
    assert ids == [content_id("Tern", "x"), content_id(None, "Tern\nx"), content_id(None, "x")]
    assert len(set(ids)) == 3
    assert content_id("Tern", "x") == "377434b3536ef0e4132f321987a9f740"  # frozen: stores keep these ids
    path = _jsonl(tmp_path / "d.jsonl", _ONE)
    (document,) = read_corpus(path, id_field=None)
    assert document.id == content_id(_ONE["title"], _ONE["text"])
    assert document.metadata == {"id": "a"}


_TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40).filter(str.strip)


@given(
    rows=st.lists(
        st.fixed_dictionaries(
            {"id": _TEXT, "text": _TEXT, "title": st.none() | _TEXT, "n": st.integers(0, 9)}
        ),
        min_size=1,
        max_size=5,
        unique_by=lambda row: row["id"],
    )
)
def test_jsonl_round_trip(rows: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = _jsonl(tmp_path_factory.mktemp("c") / "c.jsonl", *rows)
    read = [(d.id, d.text, d.title, d.metadata) for d in read_corpus(path)]
    assert read == [(row["id"], row["text"], row["title"], {"n": row["n"]}) for row in rows]


@pytest.mark.parametrize(
    ("rows", "line", "problem", "remedy"),
    [
        ([_ONE, {"id": "b", "title": "x"}], 2, "the field 'text' is missing", "text_field"),
        ([_ONE, {**_TWO, "id": "a"}], 2, "the id 'a' is already that of line 1", "its own id"),
        ([_ONE, {"text": "x"}], 2, "the field 'id' is missing", "every row"),
        ([{"text": "x"}, _ONE], 2, "the id 'a', where the rows before it have none", "every row"),
        ([_ONE, {**_TWO, "id": 1}], 2, "the id 1, where the rows before it have strings", "every row"),
        ([{**_ONE, "id": True}], 1, "neither a string nor a whole number", "an id"),
        ([{**_ONE, "id": 1.5}], 1, "neither a string nor a whole number", "an id"),
        ([{**_ONE, "id": -1}], 1, "outside of 0 to 2**64 - 1", "an id"),
        ([{**_ONE, "id": 1 << 64}], 1, "outside of 0 to 2**64 - 1", "an id"),
        ([{**_ONE, "id": " "}], 1, "the id in 'id' is empty", "an id"),
        ([{**_ONE, "text": " \n"}], 1, "the text in 'text' is empty", "remove the row"),
        ([{**_ONE, "text": ["x"]}], 1, "the field 'text' is no string", "JSON string"),
        ([{**_ONE, "title": 3}], 1, "the field 'title' is no string", "null"),
        ([{**_ONE, "text": "é" * 600_000}], 1, "1200000 bytes, more than 1048576", "max_text_bytes"),
        ([{"text": "x"}, {"text": "x"}], 2, "the same title and text as in line 1", "on_duplicate"),
        ([["x"]], 1, "found an array", "one JSON object"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, rows: list[Any], line: int, problem: str, remedy: str) -> None:
    path = _jsonl(tmp_path / "c.jsonl", *rows)
    with pytest.raises(CorpusError) as caught:
        list(read_corpus(path))
    message = str(caught.value)
    assert message.startswith(f"{path}, line {line}: ")
    assert problem in message
    assert remedy in message


@pytest.mark.parametrize(
    ("data", "line", "problem"),
    [
        (b"id\ttext\na\tx\nb\tx\ty\n", 3, "3 columns, but the header has 2"),
        (b"id\ttext\na\n", 2, "1 columns, but the header has 2"),
        (b"id\tid\na\tx\n", 1, "names 'id' twice"),
        (b"id\tbody\na\tx\n", 2, "the field 'text' is missing"),
        (b"id\ttext\na\t\xff\n", 2, "no valid UTF-8"),
        (b"id\ttext\n\tx\n", 2, "the id in 'id' is empty"),
    ],
)
def test_bad_tsv_is_named(tmp_path: Path, data: bytes, line: int, problem: str) -> None:
    path = tmp_path / "c.tsv"
    path.write_bytes(data)
    with pytest.raises(CorpusError) as caught:
        list(read_corpus(path))
    assert str(caught.value).startswith(f"{path}, line {line}: ")
    assert problem in str(caught.value)


@pytest.mark.parametrize(("name", "data"), [("c.jsonl", b""), ("c.jsonl", b"\n\n"), ("c.tsv", b"id\ttext\n")])
def test_an_empty_file_is_an_error(tmp_path: Path, name: str, data: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(CorpusError, match="no document in the file"):
        list(read_corpus(path))


def test_the_limit_of_a_text_can_be_moved(tmp_path: Path) -> None:
    path = _jsonl(tmp_path / "c.jsonl", {**_ONE, "text": "x" * 1_100_000})
    (document,) = read_corpus(path, max_text_bytes=1 << 21)
    assert document.text is not None
    assert len(document.text) == 1_100_000
    with pytest.raises(CorpusError, match="more than 10"):
        list(read_corpus(path, max_text_bytes=10))


def test_exact_duplicates_can_be_skipped_and_are_counted(tmp_path: Path) -> None:
    with read_corpus(
        _jsonl(tmp_path / "c.jsonl", {"text": "x"}, {"text": "x"}, {"text": "y"}), on_duplicate="skip"
    ) as reader:
        assert [document.text for document in reader] == ["x", "y"]
        assert reader.skipped == 1
    reader = read_corpus(_jsonl(tmp_path / "d.jsonl", _ONE, _TWO, _ONE), on_duplicate="skip")
    assert len(list(reader)) == 2
    assert reader.skipped == 1
    reader = read_corpus(_jsonl(tmp_path / "e.jsonl", _ONE, {**_ONE, "text": "changed"}), on_duplicate="skip")
    with pytest.raises(CorpusError, match="the id 'a' is already that of line 1"):
        list(reader)


def test_failures_of_the_system_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_corpus(tmp_path / "none.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(OSError):
        read_corpus(tmp_path / "folder.jsonl", format="jsonl")
    with pytest.raises(OSError):
        read_corpus(_jsonl(tmp_path / "c.jsonl", _ONE), format="folder")


def test_wrong_arguments(tmp_path: Path) -> None:
    path = _jsonl(tmp_path / "c.jsonl", _ONE)
    with pytest.raises(InvalidInput, match="format"):
        read_corpus(tmp_path / "c.docx")
    with pytest.raises(InvalidInput, match="format"):
        read_corpus(path, format="xml")  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="on_duplicate"):
        read_corpus(path, on_duplicate="replace")  # type: ignore[arg-type]
    assert infer_format("x.JSONL") == infer_format("x.ndjson.gz") == "jsonl"


def test_the_reader_streams(tmp_path: Path) -> None:
    path = _jsonl(tmp_path / "c.jsonl", _ONE, {"bad": 1})
    reader = read_corpus(path)
    assert next(reader).id == "a"  # before the bad row is looked at
    with pytest.raises(CorpusError):
        next(reader)
    with pytest.raises(StopIteration):
        next(reader)


_ROW: dict[str, Any] = {
    "id": "q1",
    "type": "birthplace",
    "question": "Where?",
    "answers": ["Here", "There"],
    "passages": [{"title": "T", "text": "x", "gold": True}, {"text": "y"}],
}


def test_unified_rows(tmp_path: Path) -> None:
    first, second = read_unified(_jsonl(tmp_path / "u.jsonl", _ROW, {**_ROW, "id": 2, "type": None}))
    assert (first.id, first.type, first.answers, first.line) == ("q1", "birthplace", ("Here", "There"), 1)
    assert [(p.title, p.text, p.gold) for p in first.passages] == [("T", "x", True), (None, "y", None)]
    assert (second.id, second.type, second.line) == ("2", None, 2)
    assert first.passages[0].id == second.passages[0].id == content_id("T", "x")
    document = first.passages[0].document()
    assert (document.id, document.title, document.text) == (content_id("T", "x"), "T", "x")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"id": None}, "id is missing"),
        ({"question": ""}, "question is missing, empty"),
        ({"answers": []}, "answers is missing, empty"),
        ({"answers": "Here"}, "answers is missing, empty or no array"),
        ({"answers": ["Here", " "]}, "an answer is missing, empty"),
        ({"passages": []}, "passages is missing, empty"),
        ({"passages": ["x"]}, "passage 1 is no object"),
        ({"passages": [{"text": "x"}, {"text": ""}]}, "the text of passage 2"),
        ({"passages": [{"text": "x", "gold": "yes"}]}, "gold of passage 1"),
        ({"type": 3}, "type is neither"),
        ({}, "the id 'q1' is already that of line 1"),
    ],
)
def test_bad_unified_rows_are_named(tmp_path: Path, change: dict[str, Any], problem: str) -> None:
    path = _jsonl(tmp_path / "u.jsonl", _ROW, {**_ROW, **change})
    with pytest.raises(CorpusError) as caught:
        list(read_unified(path))
    assert f"{path}, line 2: {problem}" in str(caught.value)


def test_real_corpus(real_data: Callable[[str], Path]) -> None:
    documents = list(read_corpus(real_data("corpus/wiki_passages_00.jsonl.gz"), id_field="pid"))
    assert len(documents) > 1000
    assert (documents[0].id, documents[0].title) == (0, "Teutberga")
    assert documents[0].metadata == {"src": "hipporag_2wiki"}


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("popqa/popqa_1000_unified.jsonl", 1000),
        ("2wikimultihopqa/2wiki_sampled_unified.jsonl", 500),
        ("hotpotqa/hotpotqa_300_unified.jsonl", 300),
    ],
)
def test_real_unified_rows(real_data: Callable[[str], Path], name: str, rows: int) -> None:
    assert sum(1 for _ in read_unified(real_data(name))) == rows
