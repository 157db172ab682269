"""``polyprag eval`` and ``polyprag questions``: stores, other people's systems, reports, comparison."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from polyprag import Document, Store
from polyprag.cli.exits import ExitCode
from polyprag.evaluation.passages import text_store
from polyprag.evaluation.report import Report
from polyprag.evaluation.run import Evaluation

NAMES = ["amber", "birch", "coral", "denim", "ebony", "fjord"]
DOCUMENTS = [Document(f"d{i}", f"The {n} mill is in Ost {n}.", f"Mill {n}") for i, n in enumerate(NAMES)]
ROUTES = {"own_route", "bm25_route", "bm25_route_k3", "wrong_route", "uniform_route", "mean_route"}
EVERY = {*ROUTES, "closed_book", "rag", "rag_gold", "combine", "combine_wrong_route"}
MINE = """
class Mine:
    def __init__(self, store):
        self.store = store
    def answer(self, questions):
        found = self.store.search_many([q.question for q in questions], 1)
        print("asked", len(questions))
        return [self.store.documents([h[0].id])[0].text[-6:-1] for h in found]

class Half:
    def answer(self, questions):
        return [q.question.split()[3] if int(q.id[1:]) % 2 else "x" for q in questions]

class Whole:
    name = "Half"
    def answer(self, questions):
        return [q.question.split()[3] for q in questions]
"""
Run = Callable[..., tuple[int, str, str]]

pytestmark = pytest.mark.usefixtures("short_answers")


@pytest.fixture
def options(model_folder: Path) -> list[Any]:
    return ["--model", model_folder, "--device", "cpu", "--dtype", "fp32"]


@pytest.fixture
def asked(tmp_path: Path) -> Path:
    rows = [
        {"id": f"q{i}", "question": f"Where is the {n} mill?", "answers": [n], "documents": [f"d{i}"]}
        for i, n in enumerate(NAMES)
    ]
    return write(tmp_path / "q.jsonl", rows)


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_stores_systems_and_reports(
    run: Run, tmp_path: Path, make_store: Callable[..., Path], asked: Path, options: list[Any]
) -> None:
    one = make_store(tmp_path / "one.polyprag", DOCUMENTS)
    other = make_store(tmp_path / "other.polyprag", DOCUMENTS, codec="q8")
    mine = tmp_path / "mine.py"
    mine.write_text(MINE)
    report = tmp_path / "r.json"
    words = ["eval", one, other, asked, *options, "--system", f"{mine}:Mine", "--codecs", "q8,sparse(2)"]
    words += ["--report", report, "--report", tmp_path / "r.html", "--report", tmp_path / "r.md"]
    code, out, err = run(*words)
    assert code == 0, err
    assert "asked 6" in out
    found = json.loads(report.read_text(encoding="utf-8"))
    assert set(found["systems"]) == EVERY | {
        f"other/{n}" for n in EVERY - {"closed_book", "rag", "rag_gold"}
    } | {"Mine"}
    assert found["systems"]["Mine"]["em"] == 1
    assert "Mine_minus_rag" in found["differences"]
    assert "other/own_minus_wrong" in found["differences"]
    assert [point["codec"] for point in found["codecs"]] == ["q8", "sparse(2)"]
    assert set(found["stores"]) == {"", "other"}
    assert found["systems"]["rag"]["retrieval"] == {"recall@1": 1.0, "mrr": 1.0}
    assert len(found["routes"]["nearest"]) == 6
    assert "<svg" in (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "| other: own route |" in (tmp_path / "r.md").read_text(encoding="utf-8").replace("*", "")

    # The same command asks nobody again; another scoring needs no new answers.
    lines = (tmp_path / "r.answers.jsonl").read_text(encoding="utf-8")
    words = [*words[: words.index("--codecs")], "--report", report]
    code, out, err = run(*words, "--scoring", "prag", "--only", "own_route,rag,wrong_route")
    assert code == 0, err
    assert "asked" not in out
    assert len((tmp_path / "r.answers.jsonl").read_text(encoding="utf-8")) == len(lines)
    again = json.loads(report.read_text(encoding="utf-8"))
    assert again["scoring"] == "prag"
    assert any("cut before they are scored" in w for w in again["warnings"])


def test_a_system_is_asked_again_where_its_store_changed(
    run: Run, tmp_path: Path, make_store: Callable[..., Path], asked: Path, options: list[Any]
) -> None:
    mine, store = tmp_path / "mine.py", tmp_path / "s"
    mine.write_text(MINE)
    words = ["eval", store, asked, *options, "--system", f"{mine}:Mine", "--only", "closed_book"]
    words += ["--report", tmp_path / "r.json"]
    make_store(store, DOCUMENTS)
    assert "asked 6" in run(*words)[1]
    assert "asked" not in run(*words)[1]
    shutil.rmtree(store)
    make_store(store, [*DOCUMENTS, Document("d6", "The gable mill is in Ost gable.", "Mill gable")])
    assert "asked 6" in run(*words)[1]


def test_a_part_of_the_systems_and_of_the_questions(
    run: Run, tmp_path: Path, make_store: Callable[..., Path], asked: Path, options: list[Any]
) -> None:
    store, report = make_store(tmp_path / "s", DOCUMENTS), tmp_path / "r.json"
    words = ["eval", store, asked, *options, "--report", report]
    code, _, err = run(*words, "--only", "own_route, wrong_route", "--first", "4", "--together", "1")
    assert code == 0, err
    found = json.loads(report.read_text())
    assert set(found["systems"]) == {"own_route", "wrong_route"}
    assert [q["id"] for q in found["questions"]] == ["q0", "q1", "q2", "q3"]
    run(*words, "--only", "closed_book", "--sample", "3", "--seed", "5")
    drawn = [q["id"] for q in json.loads(report.read_text())["questions"]]
    assert len(drawn) == 3
    for wrong, problem in (
        (["--first", "2", "--sample", "2"], "give one"),
        (["--only", "own_rute"], "there is no system 'own_rute'; there are: closed_book, rag"),
        (["--per-type"], "--per-type needs --first or --sample"),
        (["--first", "7"], "7 questions are asked for, but there are 6"),
    ):
        code, _, err = run(*words, *wrong)
        assert code == ExitCode.INPUT
        assert problem in " ".join(err.split())


def test_without_a_store(run: Run, tmp_path: Path, asked: Path, options: list[Any]) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text(MINE)
    report = tmp_path / "r.json"
    code, _, err = run("eval", asked, "--system", f"{mine}:Half", "--report", report)
    assert code == 0, err
    found = json.loads(report.read_text())
    assert set(found["systems"]) == {"Half"}
    assert found["stores"] == {}
    code, out, err = run("eval", asked, *options, "--json")
    assert code == 0, err
    assert set(json.loads(out)["systems"]) == {"closed_book"}
    for words, problem in (
        ([asked], "there is nobody to ask"),
        ([asked, "--system", f"{mine}:Mine"], "'store' needs a store or a model"),
        ([tmp_path], "is a folder: name the file of the questions"),
    ):
        code, _, err = run("eval", *words)
        assert code == ExitCode.INPUT
        assert problem in " ".join(err.split())


def test_what_cannot_be_asked_is_refused_before_anybody_is(
    run: Run,
    tmp_path: Path,
    make_store: Callable[..., Path],
    asked: Path,
    options: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def asks(self: Evaluation, *_: Any, **__: Any) -> None:
        raise AssertionError("somebody is asked")

    for name in ("ask_base", "ask_store", "ask_system"):
        monkeypatch.setattr(Evaluation, name, asks)
    mine = tmp_path / "mine.py"
    mine.write_text(MINE)
    one, bare = make_store(tmp_path / "one", DOCUMENTS), make_store(tmp_path / "bare", DOCUMENTS[:2])
    without = make_store(tmp_path / "without", DOCUMENTS, keep_text=False)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    own = ["--system", f"{mine}:Half"]
    for words, problem in (
        ([asked, *options, "--only", "rag"], "rag cannot be asked: it needs a store"),
        ([asked, *own, "--only", "own_route"], "own_route cannot be asked: it needs a store"),
        ([asked, *own, "--only", "closed_book"], "closed_book cannot be asked: it needs a base model"),
        ([asked, *own, "--codecs", "nonsense"], "--codecs is for a store: name one before"),
        ([asked, *own, "--augmentation", asked], "--augmentation is for a store"),
        ([one, asked, *options, "--codecs", "q8,nonsense"], 'codec "nonsense" is unknown'),
        ([one, asked, *options, "--codecs", "q8", "--first", "1"], "every document is its own"),
        ([one, asked, *options, "--only", "own_route,amortised_route"], "it needs a store with an amortised"),
        ([one, asked, *options, "--only", "other/own_route"], "it needs a store that is called other"),
        ([one, without, asked, *options, "--only", "without/combine"], "needs a store that keeps the texts"),
        ([one, bare, asked, *options], "its document 'd2' is not in"),
        ([one, one, one, asked, *options], "the label 'one' of a store"),
        ([asked, *own, "--report", tmp_path / "r.csv"], ".csv is no form of a report; use one of .json, .md"),
    ):
        code, _, err = run("eval", *words)
        assert (code, problem in " ".join(err.split())) == (ExitCode.INPUT, True), (problem, err)
    code, _, err = run("eval", asked, *own, "--report", tmp_path / "r.json", "--report", tmp_path / "r.html")
    assert code == ExitCode.MISSING
    assert "pages (.html) need jinja2: pip install 'polyprag[eval]'" in " ".join(err.split())
    assert not (tmp_path / "r.json").exists()


def test_a_second_store_of_another_model_is_refused_at_first(
    run: Run, tmp_path: Path, make_store: Callable[..., Path], asked: Path, options: list[Any]
) -> None:
    one = make_store(tmp_path / "one", DOCUMENTS)
    other = make_store(tmp_path / "other", DOCUMENTS, base_model={"name": "another"})
    code, _, err = run("eval", one, other, asked, *options, "--report", tmp_path / "r.json")
    assert code == ExitCode.INPUT, err
    assert "another" in err
    assert not (tmp_path / "r.answers.jsonl").exists(), "nobody was asked"


def test_csv_names_ids_that_are_numbers(
    run: Run, tmp_path: Path, make_store: Callable[..., Path], options: list[Any]
) -> None:
    store = make_store(tmp_path / "s", [Document(i, d.text, d.title) for i, d in enumerate(DOCUMENTS)])
    asked = tmp_path / "q.csv"
    asked.write_text("question,answers,documents\nWhere is amber?,amber|Ost amber,0|1\nAnd coral?,coral,2\n")
    code, out, err = run("eval", store, asked, *options, "--only", "own_route,wrong_route", "--json")
    assert code == 0, err
    assert [q["documents"] for q in json.loads(out)["questions"]] == [[0, 1], [2]]


def test_what_ends_the_printing_loses_no_report(
    run: Run, tmp_path: Path, asked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def closed(*_: Any) -> None:
        raise OSError(5, "nobody reads this")

    monkeypatch.setattr(Report, "print", closed)
    mine = tmp_path / "mine.py"
    mine.write_text(MINE)
    code, _, err = run("eval", asked, "--system", f"{mine}:Half", "--report", tmp_path / "r.json")
    assert (code, "nobody reads this" in err) == (ExitCode.FAILED, True)
    assert Report.load(tmp_path / "r.json").systems.keys() == {"Half"}


def test_comparison(run: Run, tmp_path: Path) -> None:
    names = [f"town{n}" for n in range(40)]
    rows = [
        {"id": f"q{i}", "question": f"Where is the {n} mill?", "answers": [n]} for i, n in enumerate(names)
    ]
    asked = write(tmp_path / "q.jsonl", rows)
    mine = tmp_path / "mine.py"
    mine.write_text(MINE)
    for name, system in (("a", "Half"), ("b", "Whole")):
        code, _, err = run(
            "eval", asked, "--system", f"{mine}:{system}", "--report", tmp_path / f"{name}.json"
        )
        assert code == 0, err
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    # Both are called alike; what their classes are tells them apart.
    reports = [
        "--report",
        tmp_path / "c.json",
        "--report",
        tmp_path / "c.html",
        "--report",
        tmp_path / "c.md",
    ]
    code, out, err = run("eval", "--compare", a, b, *reports)
    assert code == 0, err
    assert "F1 of b minus a" in out
    assert "+0.500" in out
    (difference,) = json.loads((tmp_path / "c.json").read_text())["differences"]
    assert (difference["system"], difference["mean"], difference["real"]) == ("Half", 0.5, True)
    assert "Comparison" in (tmp_path / "c.html").read_text(encoding="utf-8")
    assert "| **Half** |" in (tmp_path / "c.md").read_text(encoding="utf-8")
    code, out, err = run("eval", "--compare", a, b, "--json")
    assert json.loads(out) == json.loads((tmp_path / "c.json").read_text())
    code, _, err = run("eval", "--compare", a)
    assert code == ExitCode.INPUT
    assert "two reports or more" in err
    code, _, err = run("eval", "--compare", a, asked)
    assert code == ExitCode.INPUT
    assert "q.jsonl: no report of an evaluation" in " ".join(err.split())


def test_questions_with_the_passages_that_are_found(run: Run, tmp_path: Path, asked: Path) -> None:
    wiki, out_file = tmp_path / "wiki.polyprag", tmp_path / "out.jsonl"
    written: list[int] = []
    text_store(wiki, iter(DOCUMENTS), written.append)
    assert written == [6]
    with Store.open(wiki) as store:
        assert store.info().unrouted == 6
    code, out, err = run("questions", asked, out_file, "--first", "4", "--search", wiki, "-k", "2")
    assert code == 0, err
    assert "4 questions" in out
    rows = [json.loads(line) for line in out_file.read_text().splitlines()]
    assert [row["passages"][0]["title"] for row in rows] == [f"Mill {n}" for n in NAMES[:4]]
    assert {len(row["passages"]) for row in rows} == {2}
    assert rows[0]["passages"][0]["gold"] is None
    code, out, err = run("questions", asked, out_file)
    assert code == 0, err
    first = json.loads(out_file.read_text().splitlines()[0])
    assert "passages" not in first
    assert first["documents"] == ["d0"]
