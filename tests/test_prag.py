"""PRAG's augmentation files: read as they are, every passage once, and what is wrong with one is said."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyprag import Document, Store
from polyprag.augment import Pair
from polyprag.augment.prag import is_prag, read_prag
from polyprag.cli import main
from polyprag.corpus import content_id
from polyprag.encode import training_pairs
from polyprag.errors import CorpusError

MODEL = "llama3.2-1b-instruct"
MILL = "Tarn Mill is a mill in Ost. It was built in 1761."
BRIDGE = "The bridge of Brask spans the Tarn."


def passage(text: str, pid: int, *qa: tuple[Any, Any], rewrite: Any = "In other words.") -> dict[str, Any]:
    pairs = [{"question": q, "answer": a, "full_answer": f"It is {a}."} for q, a in qa]
    return {"pid": pid, "passage": text, f"{MODEL}_rewrite": rewrite, f"{MODEL}_qa": pairs}


def entry(number: int, question: str, answer: Any, *passages: dict[str, Any], **more: Any) -> dict[str, Any]:
    texts = [p["passage"] for p in passages]
    row = {"test_id": number, "question": question, "answer": answer, "passages": texts, **more}
    return {**row, "augment": list(passages)}


WHEN, WHERE, WHAT = (
    ("When was Tarn Mill built?", "1761"),
    ("Where is Tarn Mill?", "Ost"),
    ("What spans the Tarn?", "a bridge"),
)
_MILL_AGAIN = passage(MILL, 0, ("Is it old?", True), ("Is it?", ["a"]), (None, "b"))
_BRIDGE_AGAIN = passage(BRIDGE, 0, WHAT, ("How wide is it?", 4), rewrite="Once more.")
FILE = [
    entry(
        0,
        "In what year was the mill of Ost built?",
        ["1761", "in 1761"],
        passage(MILL, 0, WHEN, WHERE),
        passage(BRIDGE, 1, WHAT),
    ),
    entry(1, "What is in Brask?", "a bridge", _BRIDGE_AGAIN, type="bridge", qid="x"),
    {"test_id": 2, "augment": [_MILL_AGAIN]},
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "total.json"
    path.write_text(json.dumps(FILE, indent=4))
    return path


def test_every_passage_is_one_document_with_all_its_pairs(path: Path) -> None:
    found = read_prag(path)
    assert found.model == MODEL
    assert [(d.text, d.title, d.id) for d in found.documents] == [
        (text, None, content_id(None, text)) for text in (MILL, BRIDGE)
    ]
    mill, bridge = found.augmentations
    assert (mill.id, bridge.id) == tuple(d.id for d in found.documents)
    assert mill.pairs == (Pair(*WHEN), Pair(*WHERE), Pair("Is it old?", "yes"))
    assert mill.dropped == {"malformed": 2}
    assert bridge.pairs == (Pair(*WHAT), Pair("How wide is it?", "4")), "not judged: taken as they are"
    assert bridge.dropped == {"duplicate": 1}
    assert (mill.rewrite, bridge.rewrite) == ("In other words.", "In other words.")


def test_the_questions_come_with_the_passages_that_were_found(path: Path) -> None:
    first, second = read_prag(path).rows
    assert (first.id, first.question, first.answers) == ("0", FILE[0]["question"], ("1761", "in 1761"))
    assert [p.text for p in first.passages] == [MILL, BRIDGE]
    assert {p.gold for p in first.passages} == {None}
    assert (second.answers, second.type) == (("a bridge",), "bridge")


def test_documents_of_a_corpus_are_found_by_their_text(path: Path) -> None:
    documents = [Document(7, BRIDGE.replace(" ", "\n"), "Bridge"), Document(8, MILL)]
    found = read_prag(path)
    assert [a.id for a in found.augmentations_of(path, documents)] == [7, 8]
    assert found.augmentations_of(path, documents)[1].pairs == found.augmentations[0].pairs
    with pytest.raises(CorpusError, match=r"total\.json: .*text of 1 of 2 documents, 9 for one"):
        found.augmentations_of(path, [documents[0], Document(9, "Other.")])


def test_of_several_models_one_is_named(path: Path) -> None:
    rows = json.loads(path.read_text())
    for row in rows:
        for p in row["augment"]:
            p |= {"qwen_qa": [{"question": "Of Qwen?", "answer": "yes"}], "qwen_rewrite": "So."}
    path.write_text(json.dumps(rows))
    with pytest.raises(
        CorpusError, match=rf"entry 1 \(test_id 0\), passage 1: is augmented by {MODEL}, qwen"
    ):
        read_prag(path)
    assert read_prag(path, "qwen").augmentations[0].pairs == (Pair("Of Qwen?", "yes"),)
    assert read_prag(path, MODEL).augmentations[0].pairs[0] == Pair(*WHEN)
    with pytest.raises(CorpusError, match="nothing of the model 'gpt', but of"):
        read_prag(path, "gpt")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda rows: rows.clear(), "no entry in the file"),
        (lambda rows: rows.append(3), "entry 4: is no object"),
        (lambda rows: rows[1].pop("augment"), r"entry 2 \(test_id 1\): has no list augment"),
        (lambda rows: rows[1].update(test_id=0), r"entry 2 \(test_id 0\): has the test_id of an earlier"),
        (lambda rows: rows[1]["augment"].append("x"), r"entry 2 \(test_id 1\), passage 2: is no object"),
        (lambda rows: rows[1]["augment"][0].pop("passage"), r"entry 2 .*, passage 1: has no text in passage"),
        (lambda rows: rows[1]["augment"][0].update(passage="\ud800"), "half of a surrogate pair"),
        (
            lambda rows: rows[0]["augment"][1].update({f"{MODEL}_qa": "x"}),
            r"entry 1 .*, passage 2: .*no list",
        ),
        (
            lambda rows: rows[0]["augment"][1].update({f"{MODEL}_rewrite": 3}),
            r"entry 1 .*, passage 2: .*no text",
        ),
        (lambda rows: rows[2]["augment"].append({"passage": "x"}), r"entry 3 .*, passage 2: has nothing of"),
    ],
)
def test_what_is_wrong_is_said_with_file_and_entry(
    path: Path, change: Callable[[Any], Any], said: str
) -> None:
    rows = json.loads(path.read_text())
    change(rows)
    path.write_text(json.dumps(rows))
    with pytest.raises(CorpusError, match=rf"total\.json[:,] .*{said}|total\.json, {said}"):
        read_prag(path)


@pytest.mark.parametrize("content", [b"", b"[", b"{}", b"null", b"[[[", b"\xff\xfe", b"[" * 10**5])
def test_what_is_no_such_file_is_said(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(CorpusError, match=r"total\.json"):
        read_prag(path)


_values = st.recursive(
    st.none() | st.booleans() | st.integers(0, 3) | st.sampled_from(["x", "", "\ud800", "Is it?"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["test_id", "question", "answer", "augment", "passage", "m_qa", "m_rewrite", "full_answer"]
            ),
            inner,
            max_size=6,
        )
    ),
    max_leaves=40,
)


@given(_values)
def test_any_other_json_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_text(json.dumps(value))
    try:
        found = read_prag(path)
    except CorpusError:
        return
    assert len(found.documents) == len(found.augmentations) > 0
    json.dumps([a.rewrite for a in found.augmentations], ensure_ascii=False).encode()


def test_a_file_is_told_from_lines(path: Path, tmp_path: Path) -> None:
    lines = tmp_path / "lines"
    for content, prag in ((b'{"id": 1}\n', False), (b"", False), (b"\xef\xbb\xbf\n [", True)):
        lines.write_bytes(content)
        assert is_prag(lines) == prag
    assert is_prag(path)


def test_encode_and_eval_of_the_file_alone(
    path: Path, tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["polyprag", *map(str, arguments)])
        main()
        return str(capsys.readouterr().out)

    store, report = tmp_path / "s", tmp_path / "r.json"
    base = ["--model", model_folder, "--device", "cpu", "--dtype", "fp32"]
    small = ["--epochs", "1", "--experts", "4", "--code-dim", "6"]
    texts = {name: f"The {name} mill stands in {name}burg." for name in ("amber", "birch", "coral", "denim")}
    rows = [
        entry(i, f"Where is the {n} mill?", f"{n}burg", passage(text, 0, (f"Where does {n} stand?", n)))
        for i, (n, text) in enumerate(texts.items())
    ]
    path.write_text(json.dumps(rows))
    out = run("encode", path, store, "--format", "prag", *base, *small)
    assert "4 pairs and 4 rewrites of 4 documents" in " ".join(out.split())
    with Store.open(store) as opened:
        assert sorted(opened) == sorted(content_id(None, text) for text in texts.values())
        assert opened.spec.recipe["augmenter"] == MODEL
        assert opened.spec.recipe["samples"]["with_passage"] == 2, "a pair behind the rewrite"
    assert len(training_pairs(store) or []) == 4
    run("eval", store, path, "--report", report, *base)
    assert {system["questions"] for system in json.loads(report.read_text())["systems"].values()} == {4}

    path.write_text(json.dumps(FILE))
    corpus = tmp_path / "c.jsonl"
    corpus.write_text(json.dumps({"id": 3, "title": "Tarn Mill", "text": MILL}) + "\n")
    run(
        "encode",
        corpus,
        tmp_path / "t",
        "--augmentation",
        path,
        *base,
        *small,
    )
    assert (training_pairs(tmp_path / "t") or [])[0] == WHEN
