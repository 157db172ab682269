"""PopQA: 100 questions whose first passage holds the answer, encoded and asked, with every control.

    python benches/popqa.py --seeds 3 --json benches/results/popqa.json

The rows are those whose first passage contains an answer alias, of which ``random.Random(42)`` draws 100; the
documents are their first passages. Encoding and answering are two processes, as for a user. Needs the shared
data: POLYPRAG_DATA, which defaults to ../shared/data beside the repository.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("POLYPRAG_DATA", REPOSITORY.parent / "shared" / "data"))
ROWS = DATA / "popqa" / "popqa_1000_unified.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=1, help="training seeds: 0 to N-1")
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--work", type=Path, help="keep stores and augmentation here, and resume from it")
    parser.add_argument("--model", help="base model; default: the small one")
    arguments = parser.parse_args()
    if not ROWS.exists():
        raise SystemExit(f"{ROWS} is not there: set POLYPRAG_DATA to the folder of the shared data")
    work = arguments.work or Path(tempfile.mkdtemp(prefix="polyprag-popqa-"))
    runs = [run(seed, arguments.questions, work, arguments.model) for seed in range(arguments.seeds)]
    summary = summarise(runs)
    print(json.dumps({k: v for k, v in summary.items() if k != "seeds"}, indent=1))
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def run(seed: int, questions: int, work: Path, model: str | None) -> dict[str, Any]:
    """Encode here, evaluate in a fresh process; an evaluation that is there already is read."""
    from rich.console import Console

    from polyprag.encode import AUGMENTATION, Recipe, encode
    from polyprag.evaluation.data import popqa_sample
    from polyprag.jsonl import write_jsonl
    from polyprag.models import load_base_model
    from polyprag.progress import Bars

    folder = work / f"seed-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    report = folder / "report.json"
    if report.exists():
        return dict(json.loads(report.read_text(encoding="utf-8")))
    sample = popqa_sample(ROWS, n=questions, matching="substring")
    asked = folder / "questions.jsonl"
    write_jsonl(
        asked,
        (
            {
                "id": q.id,
                "type": q.type,
                "question": q.question,
                "answers": list(q.answers),
                "documents": list(q.documents),
            }
            for q in sample.questions
        ),
    )
    store = folder / "popqa.polyprag"
    recipe = Recipe()
    recipe = replace(recipe, train=replace(recipe.train, seed=seed))
    base = load_base_model(model)
    started = time.monotonic()
    if not store.exists():
        # The pairs are greedy, hence the same for all seeds: written once.
        pairs = work / AUGMENTATION
        with Bars(Console(stderr=True)) as bars:
            encode(base, sample.documents, store, recipe, work=folder, reporter=bars, augmentation=pairs)
    encoded = time.monotonic() - started
    command = [sys.executable, "-m", "polyprag", "eval", str(store), str(asked), "--report", str(report)]
    command += ["--augmentation", str(work / AUGMENTATION), "--seed", str(seed)]
    if model is not None:
        command += ["--model", model]
    subprocess.run(command, check=True)
    content: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
    content["stage_seconds"]["encode"] = encoded
    content["seconds"] += encoded
    report.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return content


def summarise(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the seeds under the report's own keys, and every seed's figures without the answers."""
    names = list(runs[0]["systems"])
    mean: dict[str, Any] = {
        "systems": {
            name: {key: fmean(r["systems"][name][key] for r in runs) for key in ("f1", "em")}
            for name in names
        },
        "own_minus_wrong": fmean(r["differences"]["own_minus_wrong"]["mean"] for r in runs),
        "leaked_questions": runs[0]["leaked_questions"],
        "bytes_per_document": fmean(r["bytes_per_document"] for r in runs),
        "seconds": fmean(r["seconds"] for r in runs),
    }
    for result in runs:
        for system in result["systems"].values():
            system.pop("answers", None)
        for part in ("questions", "routes"):
            result.pop(part, None)
    return {**mean, "seeds": runs}


if __name__ == "__main__":
    main()
