r"""One row of the papers' full setting: a model, a data set, a system.

    python examples/paper/run.py index psgs_w100.tsv wiki.polyprag
    python examples/paper/run.py row --model meta-llama/Llama-3.2-1B-Instruct --questions popQA.tsv \
        --wiki wiki.polyprag --system polyprag --work work/popqa-1b

Questions are the first 300, or so many of each type; their documents are the three passages that BM25 finds
for each in DPR's Wikipedia. The same command goes on where it was stopped. See README.md beside this file for
the commands of every row, and for what differs from the papers.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from rich.console import Console

from polyprag import Store
from polyprag.augment import read_pairs
from polyprag.corpus import read_corpus
from polyprag.encode import AUGMENTATION, encode
from polyprag.engine import Engine
from polyprag.errors import InvalidInput
from polyprag.evaluation.data import evaluation_set
from polyprag.evaluation.formats import read_rows, write_rows
from polyprag.evaluation.passages import text_store, with_found
from polyprag.evaluation.run import Evaluation
from polyprag.evaluation.sampling import chosen
from polyprag.jsonl import write_atomic
from polyprag.models import load_base_model
from polyprag.progress import Bars, system_bar
from polyprag.recipes import System, recipe_of, with_settings

#: The arguments that asked.jsonl and the store depend on: with others, neither is used again.
ASKED = ("questions", "aliases", "wiki", "first", "per_type", "k")
STORE = ("model", "set", "seed", "dtype")


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    index = commands.add_parser("index", help="make a store of all passages, to be searched")
    index.add_argument("passages", type=Path, help="psgs_w100.tsv (.gz)")
    index.add_argument("wiki", type=Path)
    index.set_defaults(run=make_index)
    row = commands.add_parser("row", help="find documents, encode them, ask, report")
    row.add_argument("--model", required=True, help="name or folder of the base model")
    row.add_argument("--questions", type=Path, required=True, help="the data set, as it was published")
    row.add_argument("--aliases", type=Path, help="2WikiMultihopQA's id_aliases.json")
    row.add_argument("--wiki", type=Path, required=True, help="what `index` made")
    row.add_argument("--system", choices=get_args(System), default="polyprag")
    row.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="train.epochs=2")
    row.add_argument("--first", type=int, default=300, help="so many questions")
    row.add_argument("--per-type", action="store_true", help="... of each type")
    row.add_argument("--k", type=int, default=3, help="passages of a question")
    row.add_argument("--scoring", choices=("squad", "prag", "prag-cot"), default="prag")
    row.add_argument("--seed", type=int, default=0)
    row.add_argument("--device", default="auto")
    row.add_argument("--dtype", default="auto")
    row.add_argument(
        "--work", type=Path, required=True, help="a folder for the store, the pairs and the report"
    )
    row.set_defaults(run=make_row)
    arguments = parser.parse_args(words)
    arguments.run(arguments)


def make_index(arguments: argparse.Namespace) -> None:
    console = Console(stderr=True)
    with read_corpus(arguments.passages, format="dpr") as documents:
        text_store(
            arguments.wiki, documents, lambda done: console.print(f"{done:,} passages", highlight=False)
        )


def make_row(arguments: argparse.Namespace) -> None:
    work: Path = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    asked = work / "asked.jsonl"
    store = work / f"{arguments.system}.polyprag"
    # Both at first: what is refused is refused before anything is made.
    keep_settings(asked, {n: _plain(getattr(arguments, n)) for n in ASKED})
    keep_settings(store, {n: _plain(getattr(arguments, n)) for n in STORE})
    if not asked.exists():
        rows = chosen(
            read_rows(arguments.questions, aliases=arguments.aliases),
            arguments.first,
            per_type=arguments.per_type,
        )
        with Store.open(arguments.wiki) as wiki:
            found = with_found(rows, wiki, arguments.k)
        write_rows(asked, [row for row in found if row.passages])
    # What was found is a question's own, as in the papers.
    documents, questions = evaluation_set(read_rows(asked, "unified"), lambda row: row.passages)

    base = load_base_model(arguments.model, device=arguments.device, dtype=arguments.dtype)
    recipe = with_settings(recipe_of(arguments.system).seeded(arguments.seed), arguments.set)
    if not store.exists():
        with Bars(Console(stderr=True)) as bars:
            encode(base, documents, store, recipe, work=work, reporter=bars)

    with system_bar(Console(stderr=True)) as progress, Engine.open(store, base) as engine:
        evaluation = Evaluation(
            questions,
            passages=arguments.k,
            answers=work / "answers.jsonl",
            scoring=arguments.scoring,
            seed=arguments.seed,
            progress=progress,
        )
        evaluation.ask_base(base, engine.store)
        evaluation.ask_store(engine, read_pairs(work / AUGMENTATION))
        report = evaluation.report({"system": arguments.system})
    report.print(Console())
    for suffix in ("json", "md", "html"):
        report.save(work / f"{arguments.system}.{suffix}")


def keep_settings(made: Path, settings: Mapping[str, Any]) -> None:
    """Keep beside a file what it is made with. Raises InvalidInput if it is there, made with others."""
    path = made.with_name(f"{made.name}.settings.json")
    if made.exists():
        before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        for name, value in settings.items():
            if name not in before or before[name] != value:
                was = json.dumps(before[name]) if name in before else "unknown"
                raise InvalidInput(
                    f"{made} was made with {name} {was}, not {json.dumps(value)}: "
                    "give the same, or another --work"
                )
    else:
        write_atomic(path, json.dumps(settings, indent=1) + "\n")


def _plain(value: Any) -> Any:
    return str(value.absolute()) if isinstance(value, Path) else value


if __name__ == "__main__":
    main()
