"""The demo: an invented island is encoded, reopened in a fresh process, and asked about."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from polyprag.corpus import read_corpus
from polyprag.encode import Recipe, encode
from polyprag.jsonl import write_atomic
from polyprag.models import load_base_model
from polyprag.progress import Bars

HERE = Path(__file__).parent
CORPUS = HERE / "island.jsonl"
QUESTIONS = HERE / "questions.jsonl"
EXAMPLE = "Where was Ilsabet Corrow born?"


def run(
    folder: Path, *, seed: int, model: str | None, device: str, dtype: str, out: Console, err: Console
) -> dict[str, Any]:
    """Encode the sample corpus into ``folder/island.polyprag``, evaluate it in a fresh process, and write
    ``folder/report.json``. A store of an earlier, finished run is replaced. Returns the report.

    Raises:
        subprocess.CalledProcessError: the evaluation failed; it has said why.
    """
    store, report = folder / "island.polyprag", folder / "report.json"
    started = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    if store.exists():
        shutil.rmtree(store)
    with read_corpus(CORPUS) as reader:
        documents = list(reader)
    base = load_base_model(model, device=device, dtype=dtype)
    loaded = time.monotonic()
    out.print(
        f"{len(documents)} passages about an island that no model can know, encoded into {base.name}",
        highlight=False,
    )
    with Bars(err) as bars:
        encode(base, documents, store, Recipe().seeded(seed), reporter=bars)
    encoded = time.monotonic()

    out.print("The store is closed. A fresh process opens it and answers.", highlight=False)
    command = [sys.executable, "-m", "polyprag", "eval", str(store), str(QUESTIONS), "--report", str(report)]
    if all(importlib.util.find_spec(name) for name in ("jinja2", "matplotlib")):
        command += ["--report", str(report.with_suffix(".html"))]
    command += ["--seed", str(seed), "--device", device, "--dtype", dtype]
    if model is not None:
        command += ["--model", model]
    # What the process prints goes where the rest does.
    subprocess.run(command, check=True, stdout=2 if out.stderr else None)  # noqa: S603 - our own interpreter, module and paths
    ended = time.monotonic()

    content = json.loads(report.read_text(encoding="utf-8"))
    content["seconds"] = ended - started
    content["stage_seconds"] = {
        "load": loaded - started,
        "encode": encoded - loaded,
        **content["stage_seconds"],
    }
    write_atomic(report, json.dumps(content, ensure_ascii=False, indent=1) + "\n")
    out.print(f"{ended - started:.0f} s in all; everything is in {report}", highlight=False)
    out.print(f'\nNext: polyprag ask {store} "{EXAMPLE}"', style="bold", highlight=False)
    return dict(content)
