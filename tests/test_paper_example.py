"""examples/paper from the passages to the report, with a tiny random model in the place of the papers'."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from polyprag.errors import InvalidInput

SCRIPT = Path(__file__).resolve().parent.parent / "examples" / "paper" / "run.py"
NAMES = ["amber", "birch", "coral", "denim"]


@pytest.fixture
def main() -> Any:
    spec = importlib.util.spec_from_file_location("paper_run", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.mark.usefixtures("short_answers")
@pytest.mark.parametrize("system", ["polyprag", "prag"])
def test_a_row(main: Any, tmp_path: Path, model_folder: Path, system: str) -> None:
    lines = ["id\ttext\ttitle", *(f"{i + 1}\tThe {n} mill is in Ost.\tMill {n}" for i, n in enumerate(NAMES))]
    passages = tmp_path / "psgs_w100.tsv"
    passages.write_text("\n".join(lines) + "\n")
    main(["index", str(passages), str(tmp_path / "wiki.polyprag")])
    rows = [
        {"ID": f"q{i}", "compositionality_type": "composition", "question": f"Where is the {n} mill?",
         "answers": [{"answer": n, "aliases": []}]}
        for i, n in enumerate(NAMES)
    ]  # fmt: skip
    questions = tmp_path / "cwq.json"
    questions.write_text(json.dumps(rows))
    work = tmp_path / "work"
    words = ["row", "--model", str(model_folder), "--questions", str(questions), "--system", system]
    words += [
        "--wiki",
        str(tmp_path / "wiki.polyprag"),
        "--work",
        str(work),
        "--first",
        "3",
        "--per-type",
        "--k",
        "1",
    ]
    words += ["--set", "train.epochs=1", "--set", "train.experts=2", "--set", "augment.pairs=1"]
    words += ["--device", "cpu", "--dtype", "fp32"]
    main(words)
    report = json.loads((work / f"{system}.json").read_text(encoding="utf-8"))
    assert report["scoring"] == "prag"
    assert [q["type"] for q in report["questions"]] == ["composition"] * 3
    assert {"closed_book", "rag_gold", "own_route", "wrong_route", "combine"} <= set(report["systems"])
    assert report["stores"][""]["documents"] == 3
    assert (work / f"{system}.html").exists()
    before = (work / "answers.jsonl").read_bytes()
    main(words)
    assert (work / "answers.jsonl").read_bytes() == before, "nobody is asked again"
    for changed, of in (
        (["--first", "2"], "asked.jsonl was made with first 3, not 2"),
        (["--seed", "5"], f"{system}.polyprag was made with seed 0, not 5"),
        (["--set", "train.epochs=2"], f"{system}.polyprag was made with set "),
    ):
        with pytest.raises(InvalidInput, match=of):
            main([*words, *changed])
    assert (work / "answers.jsonl").read_bytes() == before
    (work / "asked.jsonl.settings.json").unlink()
    with pytest.raises(InvalidInput, match="made with questions unknown"):
        main(words)
