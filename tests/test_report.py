from __future__ import annotations

import io
import json
import os
import re
import socket
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, ClassVar

import pytest
from rich.console import Console

from polyprag.errors import CorpusError, InvalidInput
from polyprag.evaluation.data import Prediction, Question
from polyprag.evaluation.footprint import Footprint
from polyprag.evaluation.redaction import redacted
from polyprag.evaluation.report import Report, versions
from polyprag.evaluation.results import Costs, SystemResult, compare, score_system
from polyprag.evaluation.tables import Grid, print_grid

_QUESTIONS = [Question(f"q{n}", f"question {n}", (f"answer {n}",), None, (f"d{n}",)) for n in range(40)]
_RIGHT = [f"answer {n}" for n in range(40)]
_WRONG = ["nothing"] * 40
_PARTS = {"experts": 1_000_000, "routes": 1_280, "ids": 700, "documents": 9_000, "bm25": 6_000}


def _report(own: list[str], wrong: list[str], **more: object) -> Report:
    systems = [
        score_system("closed_book", _QUESTIONS, _WRONG),
        score_system("own_route", _QUESTIONS, own),
        score_system("wrong_route", _QUESTIONS, wrong, _WRONG, _WRONG),
    ]
    settings = {
        "leaked": ["q0", "q1"],
        "leaked_pairs": 3,
        "stores": {"": Footprint(40, _PARTS, 64.0, 1_474_560, "code(64)", {"train": {"seed": 42}})},
        "settings": {"k": 3},
        "seed": 42,
        "seconds": {"evaluate": 1.5},
    }
    return Report.of(_QUESTIONS, systems, **{**settings, **more})  # type: ignore[arg-type]


def _printed(report: Report, width: int = 120) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    report.print(console)
    return console.export_text()


def test_draws_are_averaged_before_anything_else() -> None:
    result = score_system("wrong_route", _QUESTIONS, _RIGHT, _WRONG, _WRONG)
    assert result.f1 == pytest.approx(1 / 3)
    assert result.em == pytest.approx(1 / 3)
    assert result.answers[0].predictions == ("answer 0", "nothing", "nothing")
    assert result.interval.low == pytest.approx(1 / 3)
    assert result.interval.n == 40


def test_without_leaks() -> None:
    predictions = [f"answer {n}" if n < 10 else "nothing" for n in range(40)]
    result = score_system("own_route", _QUESTIONS, predictions)
    assert result.f1 == pytest.approx(0.25)
    assert result.f1_without({f"q{n}" for n in range(10)}) == 0
    assert result.f1_without({f"q{n}" for n in range(40)}) is None


def test_json(tmp_path: Path) -> None:
    report = _report(_RIGHT, _WRONG)
    path = tmp_path / "report.json"
    report.save(path)
    read = json.loads(path.read_text(encoding="utf-8"))
    assert read == json.loads(json.dumps(report.to_json()))
    own = read["systems"]["own_route"]
    assert (own["f1"], own["em"], own["f1_interval"], own["f1_without_leaks"]) == (1, 1, [1, 1], 1)
    assert own["answers"][3]["predictions"] == ["answer 3"]
    assert read["differences"]["own_minus_wrong"]["mean"] == 1
    assert read["differences"]["own_minus_wrong"]["real"]
    assert read["leaked_questions"] == 2
    assert read["leaked_training_pairs"] == 3
    assert read["bytes_per_document"] == pytest.approx(sum(_PARTS.values()) / 40)
    store = read["stores"][""]
    assert store["parts"]["routes"] == {"bytes": 1280, "bytes_per_document": 32.0}
    assert store["total_bytes"] == sum(_PARTS.values())
    assert (read["seed"], read["settings"], read["seconds"]) == (42, {"k": 3}, 1.5)
    assert read["stage_seconds"] == {"evaluate": 1.5}
    assert read["versions"]["python"]


def test_tables() -> None:
    text = _printed(_report(_RIGHT, _WRONG))
    for piece in ("own route", "1.000 to 1.000", "own route minus wrong route", "+1.000", "real", "1,280"):
        assert piece in text
    assert "one LoRA a document" in text
    assert "58,982,400" in text
    assert "not above wrong" not in text
    assert "2 of 40 questions leaked" in text


def test_a_table_that_is_too_wide_for_the_terminal_is_several() -> None:
    stages = [f"stage{n}, ms" for n in range(9)]
    grid = Grid("Costs", ["system", *stages], [["closed book", *["1,234.5"] * 9], ["own", *["0.1"] * 9]])

    def shown(width: int) -> str:
        console = Console(width=width, record=True, file=io.StringIO())
        print_grid(grid, console)
        return console.export_text()

    assert shown(200).count("system") == 1
    narrow = shown(60)
    assert narrow.count("system") == 3
    assert narrow.count("1,234.5") == 9
    assert "…" not in narrow
    assert all(stage.removesuffix(", ms") in narrow for stage in stages)
    assert max(map(len, narrow.splitlines())) <= 60


def test_a_difference_that_spans_zero_is_never_called_real_and_is_warned_of() -> None:
    halves = [_RIGHT[n] if n % 2 else _WRONG[n] for n in range(40)]
    others = [_RIGHT[n] if n % 2 == 0 else _WRONG[n] for n in range(40)]
    systems = [
        score_system("own_route", _QUESTIONS, halves),
        score_system("wrong_route", _QUESTIONS, others),
    ]
    report = Report.of(_QUESTIONS, systems)
    difference = report.to_json()["differences"]["own_minus_wrong"]
    assert difference["interval"][0] < 0 < difference["interval"][1]
    assert not difference["real"]
    assert any("not above wrong route" in warning for warning in report.warnings)
    text = _printed(report)
    assert "not shown" in text
    assert "not above wrong route" in text.replace("\n", " ")


def test_own_below_wrong_is_warned_of_though_the_difference_is_real() -> None:
    systems = [score_system("own_route", _QUESTIONS, _WRONG), score_system("wrong_route", _QUESTIONS, _RIGHT)]
    report = Report.of(_QUESTIONS, systems)
    assert report.differences["own_minus_wrong"][2].real
    assert any("not above wrong route" in warning for warning in report.warnings)


def test_a_route_without_its_control_is_warned_of() -> None:
    own, rag = score_system("own_route", _QUESTIONS, _RIGHT), score_system("rag", _QUESTIONS, _RIGHT)
    assert any("not measured" in warning for warning in Report.of(_QUESTIONS, [own]).warnings)
    assert Report.of(_QUESTIONS, [rag]).warnings == []


def test_names_are_no_markup_and_unknown_systems_are_shown() -> None:
    report = Report.of(_QUESTIONS, [score_system("[red]mine[bold]", _QUESTIONS, _RIGHT)])
    assert "[red]mine[bold]" in _printed(report)


def test_what_does_not_fit_together_is_refused() -> None:
    whole, half = score_system("a", _QUESTIONS, _RIGHT), score_system("b", _QUESTIONS[:10], _RIGHT[:10])
    with pytest.raises(InvalidInput, match="different questions"):
        compare(whole, half)
    with pytest.raises(InvalidInput, match="same name"):
        Report.of(_QUESTIONS, [whole, whole])
    with pytest.raises(InvalidInput, match="10 predictions for 40 questions"):
        score_system("a", _QUESTIONS, _RIGHT[:10])
    with pytest.raises(InvalidInput):
        score_system("a", [], [])


def test_an_empty_store_has_no_bytes_a_document() -> None:
    assert Footprint(0, {"manifest": 100}, 0.0, 0).to_json()["bytes_per_document"] == 0.0


def test_versions_tell_no_names_and_no_paths() -> None:
    found = versions()
    text = json.dumps(found)
    assert found["python"]
    assert found["numpy"]
    assert found["machine"]["cores"] >= 1
    assert {"polyprag", "torch", "transformers", "tantivy"} <= set(found)
    assert socket.gethostname() not in text
    assert str(Path.home()) not in text
    assert os.getcwd() not in text


def test_nothing_of_it_imports_torch() -> None:
    code = (
        "import sys; import polyprag.evaluation.report as r, polyprag.evaluation.controls; r.versions();"
        "assert not {'torch', 'transformers'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


_TYPED = [
    Question(f"q{n}", f"question {n} <b>?", (f"answer {n}",), "bridge" if n % 2 else "comparison", (f"d{n}",))
    for n in range(40)
]


def _rich_report() -> Report:
    """All that a report may hold, with names and texts that try to get out of it."""

    def answered(share: float) -> list[Prediction]:
        return [
            Prediction(
                f"answer {n}" if n < 40 * share else "<script>alert(1)</script>",
                (f"d{n}", "d0") if n else ("d9",),
                {"retrieve": 0.001, "route": 0.002, "prefill": 0.03, "decode": 0.4},
                40,
                5,
            )
            for n in range(40)
        ]

    def scored(name: str, share: float) -> SystemResult:
        predictions = answered(share)
        costs = Costs.of(predictions, [0.5] * 40, [{"process": 10**9}] * 40)
        return score_system(name, _TYPED, predictions, costs=costs)

    systems = [scored(n, s) for n, s in (("own_route", 0.7), ("wrong_route", 0.1), ("closed_book", 0.05))]
    systems += [scored("prag/own_route", 0.3), scored("prag/wrong_route", 0.3)]
    systems += [scored("mine <img src=x> |*x* $1$ 東京", 0.5)]
    routes = {
        "documents": [{"id": "d0", "title": "Mill <i>"}, {"id": "d1", "title": None}],
        "weights": [[0.25, 0.75], [0.5, 0.5]],
        "distances": [[0.0, 0.5], [0.5, 0.0]],
        "nearest": [[{"id": "d1", "title": None, "distance": 0.5}]] * 2,
        "compared": 2,
    }
    codecs = [
        {"codec": c, "bytes_per_document": b, "f1": 0.7, "interval": [0.6, 0.8], "wrong_f1": 0.1}
        for c, b in (("code(64)", 66.6), ("f32", 5763.0))
    ]
    stores = {
        label: Footprint(40, _PARTS, each, 1_474_560, "code(64)", {"train": {"seed": 0}})
        for label, each in (("", 64.0), ("prag", 1_474_560.0))
    }
    return Report.of(
        _TYPED,
        systems,
        leaked=[],
        stores=stores,
        codecs=codecs,
        routes=routes,
        settings={"base_model": "tiny"},
    )


def test_a_report_is_read_back(tmp_path: Path) -> None:
    report = _rich_report()
    report.save(tmp_path / "r.json")
    again = Report.load(tmp_path / "r.json")
    assert again.to_json() == report.to_json()
    assert again.systems == report.systems
    for damage, match in (
        ("[]", "no report"),
        ('{"form": "another"}', "its form is 'another'"),
        ("{}", "lacks 'form'"),
        ("{", "no report"),
    ):
        (tmp_path / "r.json").write_text(damage)
        with pytest.raises(CorpusError, match=match):
            Report.load(tmp_path / "r.json")


def test_every_store_has_its_own_and_wrong() -> None:
    report = _rich_report()
    assert report.differences["own_minus_wrong"][2].mean == pytest.approx(0.6)
    assert report.differences["prag/own_minus_wrong"][2].mean == 0
    assert report.differences["prag/own_minus_closed_book"][1] == "closed_book"
    (warning,) = [w for w in report.warnings if "not above wrong" in w]
    assert "(prag)" in warning
    assert report.ordered[0] == "closed_book"
    assert report.ordered[-1].startswith("mine")
    text = _printed(report, 160)
    assert "+0.600" in text
    assert "prag: own route" in text


def test_types_retrieval_and_costs() -> None:
    found = _rich_report().to_json()["systems"]["own_route"]
    assert found["by_type"]["bridge"]["questions"] == 20
    assert found["by_type"]["bridge"]["f1"] == pytest.approx(0.7)
    assert found["retrieval"] == {"recall@1": 39 / 40, "mrr": 39 / 40}
    assert found["costs"]["seconds"]["decode"] == pytest.approx(0.4)
    assert found["costs"]["peak_bytes"] == {"process": 10**9}
    assert found["bytes_per_document"] == 64.0


def test_the_page_fetches_nothing_and_runs_nothing(tmp_path: Path) -> None:
    _rich_report().save(tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text(encoding="utf-8")

    class Reader(HTMLParser):
        tags: ClassVar[set[str]] = set()
        addresses: ClassVar[list[str]] = []

        def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
            self.tags.add(tag)
            self.addresses += [
                v or ""
                for n, v in attributes
                if n in ("src", "href", "xlink:href", "data", "action", "style")
            ]
            assert not any(name.startswith("on") for name, _ in attributes)

    reader = Reader()
    reader.feed(text)
    assert not reader.tags & {"script", "img", "link", "iframe", "object", "i"}
    for address in reader.addresses:
        inside = address.startswith(("#", "data:image/png;base64,"))
        assert inside or not re.search(r"//|@import|url\((?!#)", address), address
    assert not re.search(r"url\(['\"]?http", text)
    assert text.count("<svg") == 5
    assert "mine &lt;img src=x&gt;" in text
    assert "東京" in text
    assert "&lt;script&gt;alert(1)" in text
    assert "own route minus wrong route" in text


def test_markdown_keeps_its_tables(tmp_path: Path) -> None:
    _rich_report().save(tmp_path / "r.md")
    lines = (tmp_path / "r.md").read_text(encoding="utf-8").splitlines()
    (row,) = [line for line in lines if line.startswith("| mine ") and "route" not in line and "to" in line][
        :1
    ]
    assert row.startswith(r"| mine \<img src=x\> \|\*x\* $1$ 東京 |")
    head = next(i for i, line in enumerate(lines) if line.startswith("| system"))
    columns = lines[head].count(" |")
    assert all(re.sub(r"\\\|", "", line).count(" |") == columns for line in lines[head + 2 : head + 8])


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("redis://:hunter2@host:6379/0", "redis://[redacted]@host:6379/0"),
        ("https://user:pa:ss@host/v1", "https://[redacted]@host/v1"),
        ("postgres://u:p/w@host/db", "postgres://[redacted]@host/db"),
        ("postgres://u:p@ss@host/db?x=a@b", "postgres://[redacted]@host/db?x=a@b"),
        ("https://h/v1?api_key=hunter2&k=3", "https://h/v1?api_key=[redacted]&k=3"),
        ("https://h/v1?a=1&apiKey=hunter2#x", "https://h/v1?a=1&apiKey=[redacted]#x"),
        ("https://h/b?sv=1&sig=hunter2", "https://h/b?sv=1&sig=[redacted]"),
        ("-H 'authorization: bearer hunter2hunter2'", "-H 'authorization: bearer [redacted]'"),
        ("Authorization: Basic dXNlcjpwYXNz", "Authorization: Basic [redacted]"),
        ("sent bearer abcd1234efgh", "sent bearer [redacted]"),
        (
            {"apiKey": "x", "accessKey": "x", "apikey": "x", "Authorization": "x", "pwd": "x"},
            dict.fromkeys(["apiKey", "accessKey", "apikey", "Authorization", "pwd"], "[redacted]"),
        ),
        *(
            (text, text)
            for text in (
                "The author found the key: a bearer certificate, and a standard bearer.",
                "https://host:8080/@user and https://medium.com/@user:x@y",
                "http://host:80 or mail me@example.org; is it 3:4@home? http://h:80?mail=a@b.c",
                "Authorization: the act of an author. Which key? x=1",
                "https://h/q?author=Key&keyboard=yes&monkey=a&design=b",
            )
        ),
        ({"author": "Key", "monkey": "a", "keyboard": "b", "document": "c"},) * 2,
    ],
)
def test_secrets_alone_are_taken_out(given: Any, expected: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PWD", "certificate")
    assert redacted(given) == expected
    assert redacted(expected) == expected


def test_no_secret_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_SERVICE_API_KEY", "correct-horse-battery")
    monkeypatch.setenv("PGPASSWORD", "tr0ub4dor&3")
    monkeypatch.setenv("SHORT_KEY", "1")
    hidden = ["correct-horse-battery", "tr0ub4dor&3", "sk-abcdefghijklmnop1234", "hf_" + "a" * 20, "hunter2!"]
    questions = [Question(f"q{n}", "1?", (f"answer {n}",)) for n in range(40)]
    said = [f"Bearer {hidden[0]} {hidden[2]}", f"{hidden[1]}", hidden[3], *["1"] * 37]
    report = Report.of(
        questions,
        [score_system(f"mine {hidden[0]}", questions, said)],
        settings={
            "api_key": "hunter2!",
            "url": "https://user:hunter2!@example.org/v1",
            "nested": [{"token": "hunter2!"}],
            "max_new_tokens": 32,
        },
    )
    for suffix in (".json", ".md", ".html"):
        path = tmp_path / f"r{suffix}"
        report.save(path)
        text = path.read_text(encoding="utf-8")
        for secret in hidden:
            assert secret not in text, (suffix, secret)
    kept = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert kept["settings"]["max_new_tokens"] == 32
    assert kept["settings"]["url"] == "https://[redacted]@example.org/v1"
    assert kept["questions"][0]["question"] == "1?"
