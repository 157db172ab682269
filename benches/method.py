"""One experiment of the study in docs/method.md: encode a corpus, ask about it, append a row of figures.

    python benches/method.py --documents 300 --set train.epochs=6

Corpora of growing size hold the same first documents, and the questions are about those, so rows with other
sizes or settings compare. PopQA here leaves out the 100 questions of benches/popqa.py, which the augmentation
was improved on. Needs the shared data: POLYPRAG_DATA, which defaults to ../shared/data beside the repository.
An experiment that was stopped goes on with the same command and the same ``--work``.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any, get_args

from rich.console import Console

from common import machine
from polyprag import Document, recode
from polyprag.augment import read_pairs
from polyprag.corpus import read_unified
from polyprag.encode import AUGMENTATION, Recipe, add, encode
from polyprag.engine import Engine
from polyprag.evaluation.controls import derangement, leaked
from polyprag.evaluation.data import EvaluationSet, Question, evaluation_set, popqa_rows
from polyprag.evaluation.report import SystemResult, score_system
from polyprag.evaluation.statistics import paired_difference
from polyprag.models import BaseModel, load_base_model
from polyprag.progress import Bars
from polyprag.recipes import System as Preset
from polyprag.recipes import recipe_of, with_settings
from polyprag.systems import Combine, Rag, RetrievedRoute, RouteOfDocuments, UniformRoute
from polyprag.systems.base import System

REPOSITORY = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("POLYPRAG_DATA", REPOSITORY.parent / "shared" / "data"))
RESULTS = REPOSITORY / "benches" / "results" / "method.jsonl"
TUNED_ON = 100  # the questions of benches/popqa.py
WRONG_DRAWS = 3


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", choices=("popqa", "2wiki", "hotpotqa"), default="popqa")
    parser.add_argument("--documents", type=int, default=100, help="size of the corpus")
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--skip", type=int, default=0, help="leave out so many questions first: another draw")
    parser.add_argument("--seed", type=int, default=0, help="seed of the training")
    parser.add_argument("--system", choices=get_args(Preset), default="polyprag", help="whose recipe")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="train.epochs=6")
    parser.add_argument("--model", help="base model; default: the small one")
    parser.add_argument("--work", type=Path, required=True, help="stores and augmentation, to resume from")
    parser.add_argument("--added", type=int, default=0, help="so many of the documents are added afterwards")
    parser.add_argument("--combine", action="store_true", help="also passages with right and wrong route")
    parser.add_argument("--note", default="", help="kept in the row")
    parser.add_argument("--json", type=Path, default=RESULTS, help="append the row here")
    arguments = parser.parse_args()
    row = experiment(arguments)
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    with arguments.json.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")
    print(json.dumps({k: v for k, v in row.items() if k not in ("recipe", "own_by_question")}, indent=1))


def experiment(arguments: argparse.Namespace) -> dict[str, Any]:
    recipe = with_settings(recipe_of(arguments.system), arguments.set)
    recipe = replace(recipe, train=replace(recipe.train, seed=arguments.seed))
    sample = corpus(arguments.data, arguments.documents, arguments.questions, arguments.skip)
    names = [arguments.data, arguments.system, len(sample.documents), arguments.skip, arguments.seed]
    names += [f"added={arguments.added}"] if arguments.added else []
    folder = arguments.work / "-".join([*map(str, names), *(s.replace("/", "_") for s in arguments.set)])
    pairs = arguments.work / f"{arguments.data}-{AUGMENTATION}"
    folder.mkdir(parents=True, exist_ok=True)
    base = load_base_model(arguments.model)
    started = time.monotonic()
    stores = encoded(base, sample, folder, pairs, recipe, arguments.added)
    seconds = time.monotonic() - started
    new = {d.id for d in sample.documents[len(sample.documents) - arguments.added :]}
    figures: dict[str, Any] = {}
    own = []
    for store in stores:
        with Engine.open(store, base) as engine:
            results = ask(engine, sample.questions, arguments.combine and not own)
            figures[engine.store.spec.codec] = {
                **{name: round(result.f1, 4) for name, result in results.items()},
                "own_minus_wrong": difference(results["own_route"], results["wrong_route"]),
                "bytes_per_document": engine.store.info().route_bytes_per_document,
            }
            own.append(results["own_route"])
            for name in ("own_route", "wrong_route") if new else ():
                scores = [
                    a.f1
                    for a, q in zip(results[name].answers, sample.questions, strict=True)
                    if new.issuperset(q.documents)
                ]
                figures[engine.store.spec.codec][f"{name}_of_{len(scores)}_added"] = round(fmean(scores), 4)
    leaks = leaked(sample.questions, read_pairs(pairs))
    return {
        "data": arguments.data,
        "documents": len(sample.documents),
        "questions": len(sample.questions),
        "skip": arguments.skip,
        "seed": arguments.seed,
        "system": arguments.system,
        "set": arguments.set,
        "figures": figures,
        "added": arguments.added,
        "small_minus_f32": difference(*own) if len(own) == 2 else None,
        "leaked_questions": len(leaks.questions),
        "encode_seconds": round(seconds, 1),
        "machine": machine(),
        "note": arguments.note,
        "recipe": recipe.to_json(),
        "own_by_question": [[round(a.f1, 4) for a in result.answers] for result in own],
    }


def encoded(
    base: BaseModel, sample: EvaluationSet, folder: Path, pairs: Path, recipe: Recipe, added: int
) -> list[Path]:
    """The stores of an experiment: with small routes and with f32 ones, where both can be had."""
    full, small = folder / "full.polyprag", folder / "small.polyprag"
    both = recipe.train.routing != "lora" and not added
    old = sample.documents[: len(sample.documents) - added]
    with Bars(Console(stderr=True)) as bars:
        if not full.exists():
            codec = "f32" if both else None
            encode(base, old, full, recipe, codec=codec, work=folder, reporter=bars, augmentation=pairs)
        if added:
            # Those that are there already after an interruption are left out.
            rest = sample.documents[len(old) :]
            add(base, rest, full, on_duplicate="skip", work=folder, reporter=bars)
    if not both:
        return [full]
    if not small.exists():
        codec = f"code({recipe.train.code_dim})" if recipe.train.routing == "code" else "q8"
        recode(full, small, codec=codec)
    return [small, full]


def ask(engine: Engine, questions: tuple[Question, ...], combine: bool) -> dict[str, SystemResult]:
    """Every route and control; with ``combine`` also passages in the prompt."""
    wrong = derangement(questions, draws=WRONG_DRAWS)
    systems: list[list[System]] = [
        [RouteOfDocuments(engine, [q.documents for q in questions])],
        [RouteOfDocuments(engine, draw, name="wrong_route") for draw in wrong.draws],
        [RetrievedRoute(engine, k=1)],
        [RetrievedRoute(engine, k=3, name="bm25_route_k3")],
        [RetrievedRoute(engine, k=3, rule="mean", name="bm25_route_k3_mean")],
        [UniformRoute(engine)],
    ]
    if combine:
        systems += [
            [Rag(engine.base, engine.store)],
            [Combine(engine)],
            [Combine(engine, documents=draw, name="combine_wrong_route") for draw in wrong.draws],
        ]
    return {
        draws[0].name: score_system(draws[0].name, questions, *[s.answer(questions) for s in draws])
        for draws in systems
    }


def difference(a: SystemResult, b: SystemResult) -> list[float]:
    """Mean F1 of a - b over the questions, with its 95% interval."""
    d = paired_difference([x.f1 for x in a.answers], [x.f1 for x in b.answers])
    return [round(x, 4) for x in (d.mean, d.low, d.high)]


def corpus(data: str, size: int, questions: int, skip: int) -> EvaluationSet:
    """The first ``size`` documents, and questions about the first of them."""
    if data == "popqa":
        path = DATA / "popqa" / "popqa_1000_unified.jsonl"
        rows = popqa_rows(path, matching="substring")
        tuned = {row.id for row in random.Random(42).sample(rows, TUNED_ON)}
        rows = [row for row in rows if row.id not in tuned]
        rest = [row for row in read_unified(path) if row.id not in {r.id for r in rows}]
        keep = "first"
    else:
        path = {
            "2wiki": DATA / "2wikimultihopqa" / "2wiki_sampled_unified.jsonl",
            "hotpotqa": DATA / "hotpotqa" / "hotpotqa_300_unified.jsonl",
        }[data]
        rows = [row for row in read_unified(path) if any(p.gold for p in row.passages)]
        rest = []
        keep = "gold"
    random.Random(7).shuffle(rows)
    asked = evaluation_set(rows[skip : skip + questions], keep)  # type: ignore[arg-type]
    documents: dict[str | int, Document] = {d.id: d for d in asked.documents}
    more = evaluation_set([*rows[skip + questions :], *rows[:skip], *rest], keep)  # type: ignore[arg-type]
    for document in more.documents:
        if len(documents) >= size:
            break
        documents.setdefault(document.id, document)
    return EvaluationSet(tuple(documents.values()), asked.questions)


if __name__ == "__main__":
    main()
