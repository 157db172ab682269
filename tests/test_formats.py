"""Question sets as they were published: small files of the very form, and what is wrong in others."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from polyprag.corpus import Passage, UnifiedRow
from polyprag.errors import CorpusError, InvalidInput
from polyprag.evaluation.data import Question
from polyprag.evaluation.formats import format_of, read_rows, read_set, write_rows
from polyprag.evaluation.sampling import chosen

HOTPOT: dict[str, Any] = {
    "_id": "5a8b57f25542995d1e6f1371",
    "answer": "yes",
    "question": "Were Ann Holt and Bo Lind of the same town?",
    "supporting_facts": [["Ann Holt", 0], ["Bo Lind", 0]],
    "context": [
        ["Mill", ["A mill grinds.", " It has a wheel."]],
        ["Ann Holt", ["Ann Holt was born in Ost.", " She wrote."]],
        ["Bo Lind", ["Bo Lind was born in Ost."]],
    ],
    "type": "comparison",
    "level": "hard",
}
TWO_WIKI = {
    **HOTPOT,
    "_id": "13f5ad2c088c11ebbd6fac1f6bf848b6",
    "type": "inference",
    "answer": "Ost",
    "evidences": [["Ann Holt", "place of birth", "Ost"]],
    "evidences_id": [["Q1", "place of birth", "Q9"]],
    "answer_id": "Q9",
}
CWQ = {
    "ID": "WebQTest-832_c334509bb5e02cacae1ba2e80c176499",
    "webqsp_ID": "WebQTest-832",
    "webqsp_question": "what year",
    "machine_question": "what is",
    "question": "Lou Seal is the mascot for the team that last won when?",
    "sparql": "SELECT",
    "compositionality_type": "composition",
    "answers": [
        {"answer_id": "m.1", "answer": "2014 World Series", "aliases": ["WS 2014"]},
        {"answer_id": "m.2", "answer": None, "aliases": ["2014"]},
    ],
    "created": "2018-02-13T02:27:38",
}
POPQA_HEADER = (
    "id\tsubj\tprop\tobj\tsubj_id\tprop_id\tobj_id\ts_aliases\to_aliases\ts_uri\to_uri\ts_wiki_title\t"
    "o_wiki_title\ts_pop\to_pop\tquestion\tpossible_answers"
)


PLAIN = {"question": "Who?", "answer": "x"}


def popqa_line(id: int, question: str, answers: str, prop: str = "occupation") -> str:
    quoted = '"' + answers.replace('"', '""') + '"'
    return "\t".join(
        [str(id), "s", prop, "o", *["1"] * 3, '"[""x""]"', "[]", *["u"] * 4, "5", "6", question, quoted]
    )


def write(path: Path, value: Any) -> Path:
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


def test_hotpotqa(tmp_path: Path) -> None:
    path = write(
        tmp_path / "hotpot_dev_distractor_v1.json", [HOTPOT, {**HOTPOT, "_id": "b", "type": "bridge"}]
    )
    assert format_of(path) == "hotpotqa"
    found = read_set(path)
    assert [d.title for d in found.documents] == ["Ann Holt", "Bo Lind"]
    assert found.documents[0].text == "Ann Holt was born in Ost. She wrote."
    first = found.questions[0]
    assert (first.id, first.type, first.answers) == (HOTPOT["_id"], "comparison", ("yes",))
    assert first.documents == tuple(d.id for d in found.documents)
    assert len(read_set(path, keep="all").documents) == 3


def test_2wikimultihopqa_with_aliases(tmp_path: Path) -> None:
    path = write(tmp_path / "dev.json", [TWO_WIKI, {**TWO_WIKI, "_id": "b", "answer_id": "Q8"}])
    lines = [
        {"Q_id": "Q9", "aliases": ["Osten", "Ost"], "demonyms": ["Oster"]},
        {"Q_id": "Q7", "aliases": ["West"], "demonyms": []},
    ]
    aliases = write(tmp_path / "id_aliases.json", "\n".join(map(json.dumps, lines)))
    assert format_of(path) == "2wiki"
    assert read_set(path).questions[0].answers == ("Ost",)
    found = read_set(path, aliases=aliases).questions
    assert [q.answers for q in found] == [("Ost", "Osten", "Oster"), ("Ost",)]
    assert found[0].type == "inference"
    write(aliases, '{"Q_id": "Q9"}')
    with pytest.raises(CorpusError, match=r"id_aliases.json, line 1: no Q_id or no list aliases"):
        read_set(path, aliases=aliases)
    with pytest.raises(InvalidInput, match="belong to 2Wiki"):
        read_set(write(tmp_path / "h.json", [HOTPOT]), aliases=aliases)


def test_complex_web_questions(tmp_path: Path) -> None:
    path = write(tmp_path / "ComplexWebQuestions_dev.json", [CWQ])
    assert format_of(path) == "cwq"
    (question,) = read_set(path).questions
    assert question == Question(
        CWQ["ID"], CWQ["question"], ("2014 World Series", "WS 2014", "2014"), "composition"
    )  # type: ignore[arg-type]
    with pytest.raises(CorpusError, match="entry 1: there is no answer in it"):
        read_set(write(path, [{**CWQ, "answers": []}]))


def test_popqa(tmp_path: Path) -> None:
    lines = [
        POPQA_HEADER,
        popqa_line(4222362, "What is George Rankin's occupation?", '["politician", "pol"]'),
        popqa_line(7, "Where was X born?", '["Qu\\u00e9bec"]', "place of birth"),
    ]
    path = write(tmp_path / "popQA.tsv", "\n".join(lines) + "\n")
    assert format_of(path) == "popqa"
    found = read_set(path)
    assert found.documents == ()
    assert found.questions == (
        Question("4222362", "What is George Rankin's occupation?", ("politician", "pol"), "occupation"),
        Question("7", "Where was X born?", ("Québec",), "place of birth"),
    )
    with pytest.raises(CorpusError, match=r"popQA.tsv, line 3: possible_answers is no JSON list"):
        read_set(write(path, "\n".join([*lines[:2], popqa_line(8, "Who?", "[politician]")])))
    long = popqa_line(9, "Who " + "was " * 40_000 + "it?", '["he"]')
    assert len(read_set(write(path, "\n".join([*lines, long]))).questions[2].question) > 160_000
    with pytest.raises(CorpusError, match=r"popQA.tsv, line 3: no valid CSV"):
        read_set(write(path, "\n".join([*lines[:2], '9\t"Who?'])))
    with pytest.raises(CorpusError, match=r"line 1: the header lacks prop"):
        read_set(write(path, "\n".join(lines).replace("\tprop\t", "\trelation\t")), "popqa")
    with pytest.raises(CorpusError, match=r"line 3: the id '4222362' is already that of line 2"):
        read_set(write(path, "\n".join([*lines[:2], lines[1]])))


def test_prag_and_unified_and_plain(tmp_path: Path) -> None:
    entry = {
        "test_id": 0,
        "question": "Where?",
        "answer": ["Ost", "East"],
        "augment": [{"pid": 0, "passage": "It is in Ost.", "m_rewrite": "In Ost.", "m_qa": []}],
    }
    prag = write(tmp_path / "total.json", [entry])
    assert format_of(prag) == "prag"
    assert len(read_set(prag).questions[0].documents) == 1

    rows = [
        UnifiedRow("a", "t", "Where?", ("Ost",), (Passage("T", "In Ost.", True), Passage(None, "No.", None)))
    ]
    write_rows(tmp_path / "unified.jsonl", rows)
    assert format_of(tmp_path / "unified.jsonl") == "unified"
    (again,) = read_rows(tmp_path / "unified.jsonl")
    assert (again.passages, again.answers, again.type) == (rows[0].passages, ("Ost",), "t")

    plain = [
        {"question": "Were they?", "answer": "yes", "type": "comparison"},
        {"_id": "x", "question": "Who?", "answers": ["A", "B"], "documents": ["d"]},
    ]
    path = write(tmp_path / "simplified.json", plain)
    assert format_of(path) == "json"
    first, second = read_set(path).questions
    assert (first.answers, first.type, len(first.id)) == (("yes",), "comparison", 32)
    assert second == Question("x", "Who?", ("A", "B"), None, ("d",))
    with gzip.open(tmp_path / "q.jsonl.gz", "wt") as file:
        file.write(json.dumps(plain[1]))
    assert read_set(tmp_path / "q.jsonl.gz").questions == (second,)
    write_rows(tmp_path / "out.jsonl", read_rows(path))
    assert read_set(tmp_path / "out.jsonl").questions[0] == first
    csv = write(tmp_path / "q.csv", "question,answer\nWho?,A|B\n")
    assert read_set(csv).questions[0].answers == ("A", "B")


@pytest.mark.parametrize(
    ("entries", "problem"),
    [
        ([{**HOTPOT, "answer": ""}], "entry 1: answer is missing, empty"),
        (
            [HOTPOT, {**HOTPOT, "_id": "b", "context": [["T", "no list"], 3]}],
            "entry 2: supporting_facts is no list",
        ),
        ([HOTPOT, HOTPOT], "entry 2: the id '5a8b57f25542995d1e6f1371' is already that of entry 1"),
        ([HOTPOT, 3], "entry 2: it is no object"),
        ([{**HOTPOT, "_id": None}], "entry 1: _id is missing"),
        ([{"question": "Who?"}], "entry 1: answers is missing"),
        ([], "no question in the file"),
        ('[{"a": 1},\n{"b": }]', "line 2: no valid JSON"),
        (
            [{"id": "a", "question": q, "answer": "x"} for q in ("Who?", "When?")],
            "entry 2: the id 'a' is already that of entry 1",
        ),
        ([PLAIN, {**PLAIN, "question": "Who\ud83d?"}], "entry 2: half of a surrogate pair"),
        ("", "the file is empty"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, entries: Any, problem: str) -> None:
    path = write(tmp_path / "dev.json", entries)
    with pytest.raises(CorpusError) as caught:
        read_set(path)
    assert f"{path}" in str(caught.value)
    assert problem in str(caught.value)


def test_a_file_of_no_known_form_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text('{"question": "Who?"}', encoding="utf-16")
    with pytest.raises(CorpusError, match=r"q.jsonl, line 1: the file is UTF-16; save it as UTF-8"):
        read_set(path)
    with pytest.raises(InvalidInput, match="name one of jsonl, json, csv"):
        read_set(write(tmp_path / "q.txt", "Who?\n"))
    with pytest.raises(InvalidInput, match="format is 'xml'"):
        read_rows(write(tmp_path / "q.txt", "Who?\n"), "xml")  # type: ignore[arg-type]


def test_real_files(real_data: Callable[[str], Path]) -> None:
    found = read_set(real_data("hotpotqa/hotpot_dev_v1_simplified.json"))
    assert len(found.questions) == 7405 or len({q.id for q in found.questions}) <= 7405
    kinds = Counter(q.type for q in chosen(found.questions, 300, per_type=True))
    assert kinds == {"bridge": 300, "comparison": 300}
    assert len(read_set(real_data("cwq/cwq_test_3531.jsonl")).questions) == 3531
    wiki = read_set(real_data("2wikimultihopqa/2wiki_sampled_unified.jsonl"))
    assert {q.type for q in wiki.questions} == {
        "compositional",
        "comparison",
        "bridge_comparison",
        "inference",
    }
    assert all(q.documents for q in wiki.questions)


# -- which questions -------------------------------------------------------------------------------------

ROWS = [Question(f"q{n}", "?", ("x",), "ab"[n % 2] if n < 10 else "c") for n in range(12)]


def test_the_first_and_the_first_of_each_type() -> None:
    assert [q.id for q in chosen(ROWS, 3)] == ["q0", "q1", "q2"]
    assert [q.id for q in chosen(ROWS, 2, per_type=True)] == ["q0", "q1", "q2", "q3", "q10", "q11"]
    assert len(chosen(ROWS, 5, per_type=True)) == 12
    for n, match in ((0, "at least 1"), (13, "13 questions are asked for, but there are 12")):
        with pytest.raises(InvalidInput, match=match):
            chosen(ROWS, n)


def test_a_draw_depends_on_its_seed_alone() -> None:
    drawn = chosen(ROWS, 6, seed=1)
    assert drawn == chosen(ROWS, 6, seed=1)
    assert drawn != chosen(ROWS, 6, seed=2)
    assert [q.id for q in drawn] == sorted((q.id for q in drawn), key=lambda id: int(id[1:]))
    of_a = [q for q in chosen(ROWS, 2, per_type=True, seed=1) if q.type == "a"]
    assert of_a == chosen([q for q in ROWS if q.type == "a"], 2, per_type=True, seed=1)
