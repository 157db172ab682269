from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from polyprag.errors import InvalidInput
from polyprag.evaluation.data import Question
from polyprag.evaluation.report import Footprint, Report, compare, score_system, versions

_QUESTIONS = [Question(f"q{n}", f"question {n}", (f"answer {n}",), None, (f"d{n}",)) for n in range(20)]
_RIGHT = [f"answer {n}" for n in range(20)]
_WRONG = ["nothing"] * 20
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
        "footprint": Footprint(20, _PARTS, 64.0, 1_474_560),
        "settings": {"k": 3},
        "seed": 42,
        "seconds": {"own_route": 1.5},
    }
    return Report.of(systems, **{**settings, **more})  # type: ignore[arg-type]


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
    assert result.interval.n == 20


def test_without_leaks() -> None:
    predictions = [f"answer {n}" if n < 5 else "nothing" for n in range(20)]
    result = score_system("own_route", _QUESTIONS, predictions)
    assert result.f1 == pytest.approx(0.25)
    assert result.f1_without({f"q{n}" for n in range(5)}) == 0
    assert result.f1_without({f"q{n}" for n in range(20)}) is None


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
    assert read["bytes_per_document"] == pytest.approx(sum(_PARTS.values()) / 20)
    assert read["footprint"]["parts"]["routes"] == {"bytes": 1280, "bytes_per_document": 64.0}
    assert read["footprint"]["total_bytes"] == sum(_PARTS.values())
    assert (read["seed"], read["settings"], read["seconds"]) == (42, {"k": 3}, 1.5)
    assert read["stage_seconds"] == {"own_route": 1.5}
    assert read["versions"]["python"]


def test_tables() -> None:
    text = _printed(_report(_RIGHT, _WRONG))
    for piece in ("own route", "1.000 to 1.000", "own route minus wrong route", "+1.000", "real", "1,280"):
        assert piece in text
    assert "one LoRA a document" in text
    assert "29,491,200" in text
    assert "not above wrong" not in text
    assert "2 of 20 questions leaked" in text


def test_a_difference_that_spans_zero_is_never_called_real_and_is_warned_of() -> None:
    halves = [_RIGHT[n] if n % 2 else _WRONG[n] for n in range(20)]
    others = [_RIGHT[n] if n % 2 == 0 else _WRONG[n] for n in range(20)]
    report = Report.of(
        [score_system("own_route", _QUESTIONS, halves), score_system("wrong_route", _QUESTIONS, others)]
    )
    difference = report.to_json()["differences"]["own_minus_wrong"]
    assert difference["interval"][0] < 0 < difference["interval"][1]
    assert not difference["real"]
    assert any("not above wrong route" in warning for warning in report.warnings)
    text = _printed(report)
    assert "not shown" in text
    assert "not above wrong route" in text.replace("\n", " ")


def test_own_below_wrong_is_warned_of_though_the_difference_is_real() -> None:
    systems = [score_system("own_route", _QUESTIONS, _WRONG), score_system("wrong_route", _QUESTIONS, _RIGHT)]
    report = Report.of(systems)
    assert report.differences["own_minus_wrong"][2].real
    assert any("not above wrong route" in warning for warning in report.warnings)


def test_a_route_without_its_control_is_warned_of() -> None:
    own, rag = score_system("own_route", _QUESTIONS, _RIGHT), score_system("rag", _QUESTIONS, _RIGHT)
    assert any("not measured" in warning for warning in Report.of([own]).warnings)
    assert Report.of([rag]).warnings == []


def test_names_are_no_markup_and_unknown_systems_are_shown() -> None:
    report = Report.of([score_system("[red]mine[/red]", _QUESTIONS, _RIGHT)])
    assert "[red]mine[/red]" in _printed(report)


def test_what_does_not_fit_together_is_refused() -> None:
    whole, half = score_system("a", _QUESTIONS, _RIGHT), score_system("b", _QUESTIONS[:10], _RIGHT[:10])
    with pytest.raises(InvalidInput, match="different questions"):
        compare(whole, half)
    with pytest.raises(InvalidInput, match="same name"):
        Report.of([whole, whole])
    with pytest.raises(InvalidInput, match="10 predictions for 20 questions"):
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
