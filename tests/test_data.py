from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from polyprag.corpus import Passage, UnifiedRow, content_id
from polyprag.errors import CorpusError, InvalidInput
from polyprag.evaluation.data import (
    Question,
    evaluation_set,
    popqa_rows,
    popqa_sample,
    read_questions,
    read_unified_set,
)


def _write(path: Path, data: str | bytes) -> Path:
    path.write_bytes(data if isinstance(data, bytes) else data.encode("utf-8"))
    return path


def test_questions_from_jsonl(tmp_path: Path) -> None:
    rows = [
        {"id": "a", "type": "born", "question": "Where?", "answers": ["Here"], "documents": ["d", 2], "x": 1},
        {"id": 7, "question": "When?", "answer": "1850"},
        {"question": "Who?", "answer": ["Me", "I"], "type": None},
    ]
    first, second, third = read_questions(_write(tmp_path / "q.jsonl", "\n".join(map(json.dumps, rows))))
    assert first == Question("a", "Where?", ("Here",), "born", ("d", 2))
    assert second == Question("7", "When?", ("1850",))
    assert (third.answers, third.type, len(third.id)) == (("Me", "I"), None, 32)


def test_questions_from_csv(tmp_path: Path) -> None:
    data = (
        '\ufeffid,question,answers,type,documents\r\na,"Where, exactly?",Here|There,born,d1|d2\r\n'
        'b,"Two\nlines?",1850,,\r\n'
    )
    first, second = read_questions(_write(tmp_path / "q.csv", data))
    assert first == Question("a", "Where, exactly?", ("Here", "There"), "born", ("d1", "d2"))
    assert second == Question("b", "Two\nlines?", ("1850",))
    (only,) = read_questions(_write(tmp_path / "q.tsv", "question\tanswer\nWho?\tMe;I\n"), separator=";")
    assert only.answers == ("Me", "I")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"question": " "}, "question is missing, empty"),
        ({"answers": []}, "answers is missing or empty"),
        ({"answers": None}, "answers is missing or empty"),
        ({"answers": ["x", ""]}, "an answer is empty"),
        ({"answers": [3]}, "an answer is empty or no string"),
        ({"type": 3}, "type is neither"),
        ({"documents": "d"}, "documents is no array"),
        ({"documents": [True]}, "documents is no array of strings or numbers"),
        ({"id": ""}, "id is empty"),
        ({"id": 1.5}, "id is empty, or neither"),
        ({"id": "a"}, "the id 'a' is already that of line 1"),
    ],
)
def test_bad_questions_are_named(tmp_path: Path, change: dict[str, Any], problem: str) -> None:
    good = {"id": "a", "question": "Where?", "answers": ["Here"]}
    rows = [good, {**good, "id": "b", **change}]
    path = _write(tmp_path / "q.jsonl", "\n".join(map(json.dumps, rows)))
    with pytest.raises(CorpusError) as caught:
        read_questions(path)
    assert f"{path}, line 2: {problem}" in str(caught.value)


@pytest.mark.parametrize(
    ("data", "line", "problem"),
    [
        (b"id,text\na,b\n", 1, "the header lacks question or answers"),
        (b"question,answers,answers\na,b,c\n", 1, "names 'answers' twice"),
        (b'question,answers\n"two\nlines",b\nc,d,e\n', 4, "3 columns, but the header has 2"),
        (b'question,answers\na,b\nc,"d\n', 3, "no valid CSV"),
        (b"question,answers\na,b\nc,\n", 3, "answers is missing or empty"),
        (b"question,answers\na,\xff\n", 2, "no valid UTF-8"),
        (b"question,answers\na,b\na,b\n", 3, "is already that of line 2"),
    ],
)
def test_bad_csv_is_named(tmp_path: Path, data: bytes, line: int, problem: str) -> None:
    path = _write(tmp_path / "q.csv", data)
    with pytest.raises(CorpusError) as caught:
        read_questions(path)
    assert str(caught.value).startswith(f"{path}, line {line}: ")
    assert problem in str(caught.value)


def test_no_question_no_format_no_file(tmp_path: Path) -> None:
    for name, data in (("q.jsonl", ""), ("q.csv", ""), ("r.csv", "question,answers\n")):
        with pytest.raises(CorpusError, match="no question in the file"):
            read_questions(_write(tmp_path / name, data))
    with pytest.raises(InvalidInput, match="format"):
        read_questions(tmp_path / "q.parquet")
    with pytest.raises(FileNotFoundError):
        read_questions(tmp_path / "none.jsonl")


_SHARED, _OTHER, _FAR = Passage("T", "shared", True), Passage("T", "other", False), Passage(None, "far", True)
_ROWS = [
    UnifiedRow("q1", "born", "Where?", ("Here",), (_SHARED, _OTHER), 1),
    UnifiedRow("q2", None, "When?", ("Now",), (_OTHER, Passage("T", "shared"), _FAR, _FAR), 2),
]


def test_a_passage_of_two_questions_is_one_document() -> None:
    documents, questions = evaluation_set(_ROWS, keep="all")
    assert [document.text for document in documents] == ["shared", "other", "far"]
    assert questions[0] == Question("q1", "Where?", ("Here",), "born", (content_id("T", "shared"),))
    assert questions[1].documents == (_FAR.id,)


def test_which_passages_are_kept() -> None:
    assert [d.text for d in evaluation_set(_ROWS).documents] == ["shared", "far"]
    first = evaluation_set(_ROWS, keep="first")
    assert [d.text for d in first.documents] == ["shared", "other"]
    assert first.questions[1].documents == (_OTHER.id,)
    last = evaluation_set(_ROWS, keep=lambda row: row.passages[-1:])
    assert [q.documents for q in last.questions] == [(_OTHER.id,), (_FAR.id,)]
    with pytest.raises(InvalidInput, match="'q9'"):
        evaluation_set([UnifiedRow("q9", None, "?", ("x",), (_OTHER,), 1)])


def test_popqa(real_data: Callable[[str], Path]) -> None:
    path = real_data("popqa/popqa_1000_unified.jsonl")
    assert len(popqa_rows(path)) == 737
    assert len(popqa_rows(path, "substring")) == 758
    sample = popqa_sample(path)
    assert sample == popqa_sample(path)
    assert len(sample.questions) == len(sample.documents) == 100
    by_id = {document.id: document for document in sample.documents}
    assert all(by_id[question.documents[0]].text for question in sample.questions)
    assert {question.type for question in sample.questions} == {"occupation", "place of birth"}
    with pytest.raises(InvalidInput, match="only 737"):
        popqa_sample(path, n=900)
    with pytest.raises(InvalidInput, match="matching"):
        popqa_rows(path, "words")  # type: ignore[arg-type]


def test_real_questions(real_data: Callable[[str], Path]) -> None:
    assert len(read_questions(real_data("cwq/cwq_test_3531.jsonl"))) == 3531
    assert len(read_questions(real_data("2wikimultihopqa/2wiki_dev_first1000_qa.jsonl"))) == 1000
    documents, questions = read_unified_set(real_data("2wikimultihopqa/2wiki_sampled_unified.jsonl"))
    assert len(questions) == 500
    assert len(documents) > 500
    assert all(len(question.documents) >= 2 for question in questions)
