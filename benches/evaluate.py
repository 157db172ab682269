"""Every system and control on real questions: encode what a system needs, ask, append a row as each is done.

    python benches/evaluate.py --work work --documents 300
    python benches/evaluate.py --work work --sets popqa --systems prag --seed 1
    python benches/evaluate.py --work work --sets popqa --systems polyprag --set train.router=true
    python benches/evaluate.py --table

Sets: popqa, 2wiki and hotpotqa, with the gold passages of their questions and so many more that the corpus
has ``--documents``; and cwq, whose documents are the passages that BM25 finds for its questions among 47,208.
Corpora of growing size hold the same first documents, and the questions are about those, so that rows with
other sizes or settings compare; where a set has no more passages, others of the 47,208 follow. PopQA leaves
out the 100 questions of benches/popqa.py, which the augmentation was improved on.

Systems: ``base`` is the base model alone (closed book, RAG, RAG with the gold passage); ``polyprag``,
``poly-prag`` (as first published), ``prag`` (one LoRA a document, at our learning rate) and ``dyprag`` (a
network that makes them of the texts) encode the documents and ask with every route and control.

The same command goes on where it was stopped: a row that is in the results, of the same kind of device, is
not made again, and of one that is not, what is in ``--work`` is used. Needs the shared data: POLYPRAG_DATA,
which defaults to ../shared/data beside the repository.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, TypeAlias, cast, get_args

from rich.console import Console
from rich.table import Table

from common import PRAG_RATE, machine
from polyprag import Document, Store
from polyprag.augment import read_pairs
from polyprag.corpus import UnifiedRow, content_id, read_unified
from polyprag.encode import AUGMENTATION, Recipe, add, encode
from polyprag.engine import Engine
from polyprag.evaluation.controls import leaked
from polyprag.evaluation.data import EvaluationSet, evaluation_set, popqa_rows, read_questions
from polyprag.evaluation.footprint import Footprint
from polyprag.evaluation.harness import Harness
from polyprag.evaluation.passages import text_store
from polyprag.evaluation.report import DIFFERENCES, LABELS
from polyprag.evaluation.results import SystemResult
from polyprag.evaluation.run import Row, base_rows, store_rows
from polyprag.evaluation.statistics import paired_difference
from polyprag.jsonl import append_lines, read_jsonl, read_resumable
from polyprag.models import BaseModel, load_base_model
from polyprag.progress import Bars, system_bar
from polyprag.recipes import recipe_of, with_settings
from polyprag.text import normalise

REPOSITORY = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("POLYPRAG_DATA", REPOSITORY.parent / "shared" / "data"))
RESULTS = REPOSITORY / "benches" / "results" / "evaluate.jsonl"
TUNED_ON = 100  # the questions of benches/popqa.py
# PRAG at its own settings answers hardly anything after one epoch of a model as small (docs/method.md).
SETTINGS = {"prag": [PRAG_RATE, "train.epochs=4", 'train.schedule="linear"']}

BASE_ROWS = ("closed_book", "rag", "rag_gold")
ROUTED_ROWS = (
    *("own_route", "bm25_route", "bm25_route_k3", "wrong_route", "uniform_route", "mean_route"),
    *("combine", "combine_wrong_route"),
)
CODEC_ROWS = ("own_route", "wrong_route")

SetName = Literal["popqa", "2wiki", "hotpotqa", "cwq"]
SystemName = Literal["base", "polyprag", "poly-prag", "prag", "dyprag"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sets", nargs="+", choices=get_args(SetName), default=list(get_args(SetName)))
    parser.add_argument(
        "--systems", nargs="+", choices=get_args(SystemName), default=list(get_args(SystemName))
    )
    parser.add_argument("--rows", nargs="+", help="only these, such as own_route wrong_route")
    parser.add_argument("--documents", type=int, default=100, help="size of the corpus that is encoded")
    parser.add_argument("--questions", type=int, default=100, help="questions a set")
    parser.add_argument("--skip", type=int, default=0, help="leave out so many questions first: another draw")
    parser.add_argument("--seed", type=int, default=0, help="seed of training and of the wrong documents")
    parser.add_argument("--yes-no", action="store_true", help="popqa: ask whether X is what the answer says")
    parser.add_argument("--passages", type=int, default=1, help="passages in the prompts; documents of cwq")
    parser.add_argument("--haystack", action="store_true", help="search among the 47,208 passages, too")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="train.epochs=8")
    parser.add_argument(
        "--codecs", nargs="+", default=[], help="own and wrong route also in f32 q4 code(128)"
    )
    parser.add_argument("--added", type=int, default=0, help="so many of the documents are added afterwards")
    parser.add_argument(
        "--added-first", action="store_true", help="... which the first questions are about; else the last"
    )
    parser.add_argument("--model", help="base model; default: the small one")
    parser.add_argument("--dtype", default="fp32", help="bf16, fp16 or fp32, of the base model")
    parser.add_argument("--work", type=Path, help="stores, augmentation and answers, to resume from")
    parser.add_argument("--note", default="", help="kept in the rows")
    parser.add_argument("--json", type=Path, default=RESULTS, help="append the rows here")
    parser.add_argument("--table", action="store_true", help="only print what the results hold")
    arguments = parser.parse_args()
    if arguments.table:
        tables(kept_rows(arguments.json), Console())
        return
    if arguments.work is None:
        parser.error("--work is needed: a folder to resume from")
    if arguments.codecs and (arguments.added or arguments.haystack or "cwq" in arguments.sets):
        parser.error("--codecs is for stores that hold what was encoded at once, and nothing else")
    arguments.work.mkdir(parents=True, exist_ok=True)
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    base = load_base_model(arguments.model, dtype=arguments.dtype)
    for name in arguments.sets:
        for system in arguments.systems:
            Experiment(arguments, base, name, system).run()
    tables(kept_rows(arguments.json), Console())


@dataclass
class Experiment:
    """One system on one set."""

    arguments: argparse.Namespace
    base: BaseModel
    data: SetName
    system: SystemName

    @property
    def key(self) -> dict[str, Any]:
        """What tells the rows of one experiment from those of others."""
        a = self.arguments
        trained = self.system != "base"
        return {
            "data": self.data,
            "system": self.system,
            "model": self.base.name,
            "documents": len(self.sample.documents),
            "questions": len(self.sample.questions),
            "skip": a.skip,
            "seed": a.seed,
            "passages": a.passages,
            "haystack": a.haystack or self.data == "cwq",
            "set": self.settings if trained else [],
            "added": a.added if trained else 0,
            "added_first": bool(trained and a.added and a.added_first),
            "yes_no": a.yes_no,
            "dtype": a.dtype,
        }

    @property
    def settings(self) -> list[str]:
        return [*SETTINGS.get(self.system, []), *self.arguments.set]

    def run(self) -> None:
        device = device_of({"encoding": self.encoding(), "machine": machine()})
        done = {
            (row["row"], row["variant"])
            for row in kept_rows(self.arguments.json)
            if device_of(row) == device and all(row.get(k) == v for k, v in self.key.items())
        }
        print(f"{self.data}, {self.system}: {json.dumps(self.key)}", flush=True)
        if self.expected() <= done:
            return
        if self.system == "base":
            with Store.open(self.texts) as store:
                rows = base_rows(self.base, store, self.sample.questions, passages=self.arguments.passages)
                self.ask(rows, done, "", Footprint.of(store))
            return
        for variant, path in self.stores():
            with Engine.open(path, self.base) as engine:
                rows = store_rows(
                    engine, self.sample.questions, passages=self.arguments.passages, seed=self.arguments.seed
                )
                rows = [row for row in rows if not variant or row.name in CODEC_ROWS]
                self.ask(rows, done, variant, Footprint.of(engine.store))

    def expected(self) -> set[tuple[str, str]]:
        """The rows that a whole experiment has, each with its codec where that is not the usual one."""
        if self.system == "base":
            rows = {(name, "") for name in BASE_ROWS}
        else:
            names = {*ROUTED_ROWS, *(["amortised_route"] if self.recipe.train.router else [])}
            rows = {(name, "") for name in names}
            rows |= {(name, codec) for name in CODEC_ROWS for codec in self.arguments.codecs}
        return {(name, codec) for name, codec in rows if name in (self.arguments.rows or [name])}

    def ask(
        self, rows: Sequence[Row], done: set[tuple[str, str]], variant: str, footprint: Footprint
    ) -> None:
        wanted = self.arguments.rows
        rows = [r for r in rows if (r.name, variant) not in done and (not wanted or r.name in wanted)]
        with system_bar(Console(stderr=True)) as progress:
            harness = Harness(
                self.sample.questions,
                answers=self.folder / "answers.jsonl",
                seed=self.arguments.seed,
                progress=progress,
            )
            for row in rows:
                result = harness.ask(*row.draws, name=row.name)
                append_lines(self.arguments.json, [self.row(result, variant, footprint)])
                print(f"  {row.name:<20} {variant:<10} F1 {result.f1:.3f}  EM {result.em:.3f}", flush=True)

    def row(self, result: SystemResult, variant: str, footprint: Footprint) -> dict[str, Any]:
        figures = result.to_json()
        answers = figures.pop("answers")
        pairs = read_pairs(self.pairs) if self.system != "base" else []
        leaks = leaked(self.sample.questions, pairs)
        new = {d.id for d in self.parted[1]}
        row = {
            **self.key,
            "row": result.name,
            "variant": variant,
            "codec": "" if self.system == "base" else footprint.codec,
            **figures,
            "leaked_questions": len(leaks.questions),
            "f1_without_leaks": result.f1_without(leaks.questions),
            "footprint": {k: v for k, v in footprint.to_json().items() if k != "recipe"},
            "encoding": self.encoding(),
            "machine": machine(),
            "note": self.arguments.note,
            "f1_by_question": {a["id"]: round(a["f1"], 4) for a in answers},
        }
        if self.arguments.added:
            of_new = [
                a.f1
                for a, q in zip(result.answers, self.sample.questions, strict=True)
                if new.issuperset(q.documents)
            ]
            row |= {"added_questions": len(of_new), "f1_of_added": fmean(of_new) if of_new else None}
        return row

    # -- documents and questions ------------------------------------------------------------

    @cached_property
    def sample(self) -> EvaluationSet:
        a = self.arguments
        if self.data == "cwq":
            found = found_documents(a.work, a.documents, a.questions, a.skip, a.passages)
        else:
            found = corpus(self.data, a.documents, a.questions, a.skip)
        return asked_by_yes_no(found) if a.yes_no else found

    @property
    def parted(self) -> tuple[Sequence[Document], Sequence[Document]]:
        """The documents that are encoded together, and those that are added afterwards."""
        documents, added = self.sample.documents, self.arguments.added
        if self.arguments.added_first:
            return documents[added:], documents[:added]
        return documents[: len(documents) - added], documents[len(documents) - added :]

    @cached_property
    def texts(self) -> Path:
        """A store of the documents without routes: what RAG searches."""
        haystack = self.key["haystack"]
        name = f"texts-{self.data}-{len(self.sample.documents)}-{self.arguments.skip}"
        path = self.arguments.work / f"{name}{'-haystack' * haystack}.polyprag"
        if not path.exists():
            text_store(path, [*self.sample.documents, *(self.others() if haystack else [])])
        return path

    def others(self) -> list[Document]:
        """The passages of the large corpus that are not among the documents."""
        own = {d.id for d in self.sample.documents}
        return [d for d in wikipedia() if d.id not in own]

    # -- stores ------------------------------------------------------------

    @cached_property
    def folder(self) -> Path:
        a, documents = self.arguments, len(self.sample.documents)
        if self.system == "base":
            folder = a.work / f"{self.data}-base-{documents}-{a.skip}-{a.seed}"
        else:
            names = [self.data, self.system, documents, a.skip, a.seed]
            names += [f"added={'first-' * a.added_first}{a.added}"] if a.added else []
            names += ["haystack"] if self.key["haystack"] else []
            names += [a.dtype] if a.dtype != "fp32" else []
            folder = a.work / "-".join([*map(str, names), *(_file_name(s) for s in self.settings)])
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    @property
    def pairs(self) -> Path:
        """One file a set: the pairs are written once for all systems and sizes."""
        return self.arguments.work / f"{self.data}-{AUGMENTATION}"

    def encoding(self) -> dict[str, Any]:
        kept = self.folder / "encoding.json"
        return dict(json.loads(kept.read_text(encoding="utf-8"))) if kept.exists() else {}

    @property
    def recipe(self) -> Recipe:
        recipe = with_settings(recipe_of(cast(Any, self.system)), self.settings)
        return replace(recipe, train=replace(recipe.train, seed=self.arguments.seed))

    def stores(self) -> Iterator[tuple[str, Path]]:
        """The store as a user has it, then those with its routes in other codecs, each with its codec."""
        paths = {"": self.folder / "store.polyprag"}
        paths |= {c: self.folder / f"codec-{_file_name(c)}.polyprag" for c in self.arguments.codecs}
        if not all(path.exists() for path in paths.values()):
            self.encode(paths)
        yield from paths.items()

    def encode(self, paths: dict[str, Path]) -> None:
        """Train once, and write all stores. Those of other codecs have the routes as they were trained, and
        not what the first store has kept of them."""
        recipe = self.recipe
        old, new = self.parted
        scratch = {codec: path.with_name(f"unfinished-{path.name}") for codec, path in paths.items()}
        first = scratch[""]
        started = time.monotonic()
        with Bars(Console(stderr=True)) as bars:
            if not all(path.exists() for path in scratch.values()):
                for path in scratch.values():
                    shutil.rmtree(path, ignore_errors=True)
                encode(
                    self.base,
                    old,
                    first,
                    recipe,
                    also={scratch[codec]: codec for codec in self.arguments.codecs},
                    work=self.folder,
                    reporter=bars,
                    augmentation=self.pairs,
                )
            if new:
                # Those that are there already after an interruption are left out.
                add(self.base, new, first, on_duplicate="skip", work=self.folder, reporter=bars)
        seconds = round(time.monotonic() - started, 1)
        if self.key["haystack"]:
            with Store.open(first) as store, store.writer() as writer:
                writer.add(self.others(), on_duplicate="skip")
        kept = {"seconds": seconds, "recipe": recipe.to_json(), "machine": machine()}
        (self.folder / "encoding.json").write_text(json.dumps(kept), encoding="utf-8")
        for codec, path in paths.items():
            shutil.rmtree(path, ignore_errors=True)  # of a run that had not asked for all of these
            scratch[codec].rename(path)


def _file_name(text: str) -> str:
    return re.sub(r"[^\w=.-]+", "_", text).strip("_")


def wikipedia() -> list[Document]:
    """The 47,208 passages of the shared corpus, each once."""
    documents: dict[str, Document] = {}
    for path in sorted((DATA / "corpus").glob("wiki_passages_*.jsonl.gz")):
        for _, row in read_jsonl(path):
            title, text = row["title"] or None, row["text"]
            if text.strip():
                id = content_id(title, text)
                documents.setdefault(id, Document(id, text, title))
    if not documents:
        raise SystemExit(
            f"{DATA / 'corpus'} has no passages: set POLYPRAG_DATA to the folder of the shared data"
        )
    return list(documents.values())


def found_documents(work: Path, size: int, questions: int, skip: int, passages: int) -> EvaluationSet:
    """ComplexWebQuestions with the passages that BM25 finds for each: nobody has labelled gold ones.

    They stand for gold ones, as in PRAG: the own route is then that of the passages found.
    """
    path = work / "wikipedia.polyprag"
    if not path.exists():
        text_store(path, wikipedia())
    asked = read_questions(DATA / "cwq" / "cwq_test_3531.jsonl")
    random.Random(7).shuffle(asked)
    with Store.open(path) as store:
        found = store.search_many([q.question for q in asked], passages)
        ids = [tuple(hit.id for hit in hits) for hits in found]
        chosen = [
            replace(question, documents=documents)
            for question, documents in zip(asked, ids, strict=True)
            if documents
        ][skip:]
        kept = dict.fromkeys(id for question in chosen[:questions] for id in question.documents)
        for question in chosen[questions:]:
            if len(kept) >= size:
                break
            kept |= dict.fromkeys(question.documents)
        return EvaluationSet(tuple(store.documents(list(kept))), tuple(chosen[:questions]))


def corpus(data: SetName, size: int, questions: int, skip: int) -> EvaluationSet:
    """The first ``size`` documents, and questions about the first of them."""
    keep: Literal["first", "gold"] = "gold"
    rest: list[UnifiedRow] = []
    if data == "popqa":
        path = DATA / "popqa" / "popqa_1000_unified.jsonl"
        rows = popqa_rows(path, matching="substring")
        tuned = {row.id for row in random.Random(42).sample(rows, TUNED_ON)}
        rows = [row for row in rows if row.id not in tuned]
        rest = [row for row in read_unified(path) if row.id not in {r.id for r in rows}]
        keep = "first"
    else:
        name = {
            "2wiki": "2wikimultihopqa/2wiki_sampled_unified.jsonl",
            "hotpotqa": "hotpotqa/hotpotqa_300_unified.jsonl",
        }[data]
        rows = [row for row in read_unified(DATA / name) if any(p.gold for p in row.passages)]
    random.Random(7).shuffle(rows)
    asked = evaluation_set(rows[skip : skip + questions], keep)
    documents: dict[str | int, Document] = {d.id: d for d in asked.documents}
    more = evaluation_set([*rows[skip + questions :], *rows[:skip], *rest], keep)
    for document in chain(more.documents, _strangers()):
        if len(documents) >= size:
            break
        documents.setdefault(document.id, document)
    return EvaluationSet(tuple(documents.values()), asked.questions)


def _strangers() -> Iterator[Document]:
    """The passages of the large corpus in random order; read only if a set is used up."""
    passages = wikipedia()
    random.Random(7).shuffle(passages)
    yield from passages


def asked_by_yes_no(sample: EvaluationSet) -> EvaluationSet:
    """PopQA's questions as "Is X an actor?", in turn with the answer and with one that X's document lacks."""
    texts = {d.id: normalise(f"{d.title} {d.text}") for d in sample.documents}
    questions = []
    for number, question in enumerate(sample.questions):
        told, answer = "yes", question.answers[0]
        if number % 2:
            others = [q for q in sample.questions if q.type == question.type]
            random.Random(question.question).shuffle(others)
            text = " ".join(texts[id] for id in question.documents)
            told, answer = "no", next(q.answers[0] for q in others if normalise(q.answers[0]) not in text)
        if found := re.fullmatch(r"What is (.+?)['’]s? occupation\?", question.question):
            asked = f"Is {found[1]} {'an' if answer[0].lower() in 'aeiou' else 'a'} {answer}?"
        elif found := re.fullmatch(r"In what city was (.+) born\?", question.question):
            asked = f"Was {found[1]} born in {answer}?"
        else:
            raise SystemExit(f"--yes-no: there is no form for {question.question!r}")
        questions.append(replace(question, question=asked, answers=(told,), type=told))
    return EvaluationSet(sample.documents, tuple(questions))


# -- results ------------------------------------------------------------


def kept_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of results; those from before there was a choice say what was done then."""
    return [
        _told({"yes_no": False, "dtype": "fp32", "added_first": False, **row}) for row in read_resumable(path)
    ]


def _told(row: dict[str, Any]) -> dict[str, Any]:
    # The softmax was always of the whole vocabulary before it could be sampled.
    if row["system"] == "polyprag" and "softmax" not in row["encoding"]["recipe"]["train"]:
        row["set"] = [*row["set"], "train.softmax=whole"]
    return row


def device_of(row: dict[str, Any]) -> str | None:
    """The GPU that a row's system was trained on, wherever it was asked; of the base model, asked on."""
    device: str | None = (row["encoding"].get("machine") or row["machine"]).get("device")
    return device


_GROUP = "data model documents questions skip passages haystack yes_no dtype".split()


def tables(rows: Sequence[dict[str, Any]], console: Console) -> None:
    """For each set and size: every row with its interval, then the differences."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        key = [*(row[k] for k in _GROUP), device_of(row)]
        groups.setdefault(json.dumps(key), []).append(row)
    for members in groups.values():
        first = members[0]
        title = f"{first['data']}: {first['questions']} questions, {first['documents']} documents"
        title += ", by yes or no" if first["yes_no"] else ""
        title += f", in {first['dtype']}" if first["dtype"] != "fp32" else ""
        title += f", on {device}" if (device := device_of(first)) else ""
        title += ", searched among 47,208" if first["haystack"] else ""
        table = Table(title=title, title_justify="left")
        for place, column in enumerate(
            ["system", "row", "codec", "seed", "F1", "interval", "EM", "no leaks"]
        ):
            table.add_column(column, justify="right" if place > 2 else "left")
        for row in members:
            clean = row["f1_without_leaks"]
            low, high = row["f1_interval"]
            table.add_row(
                _system(row),
                LABELS.get(row["row"], row["row"]),
                row["codec"],
                str(row["seed"]),
                f"{row['f1']:.3f}",
                f"{low:.3f} to {high:.3f}",
                f"{row['em']:.3f}",
                "" if clean is None else f"{clean:.3f}",
            )
        console.print(table)
        for line in differences(members):
            console.print(f"  {line}", markup=False, highlight=False)


def _system(row: dict[str, Any]) -> str:
    """A system with its settings."""
    added = [f"added={'first-' * row['added_first']}{row['added']}"] if row["added"] else []
    return " ".join([row["system"], *row["set"], *added])


# By seed, what each question was worth; of a row that was made twice the newer.
_Answers: TypeAlias = "dict[int, dict[str, float]]"


def differences(members: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Those of every report, between the rows of one system or those of the base model; then polyprag's own
    route minus that of every other system, and minus its own in other codecs. A question that was asked
    under several seeds is one question, with the mean of its values.
    """
    answers: dict[tuple[str, str, str], _Answers] = {}
    plain: dict[str, str] = {}  # the codec that a system keeps its routes in where nothing is asked
    for row in members:
        system = _system(row)
        answers.setdefault((system, row["codec"], row["row"]), {})[row["seed"]] = row["f1_by_question"]
        if not row["variant"]:
            plain[system] = row["codec"]
    for system, codec in {(system, codec): None for system, codec, _ in answers if system != "base"}:
        for _, a, b in DIFFERENCES:
            left, right = (answers.get((system, codec, name), {}) for name in (a, b))
            if not right and (of_base := answers.get(("base", "", b))):
                # Of no training: it stands beside every seed.
                right = {seed: of_base.get(seed, next(iter(of_base.values()))) for seed in left}
            yield from _difference(f"{system} {codec}: {a} minus {b}", left, right)
    own = ("polyprag", plain.get("polyprag", ""), "own_route")
    for (system, codec, name), other in answers.items():
        if name == own[2] and (system, codec) != own[:2] and (codec == plain[system] or system == own[0]):
            told = f"own_route: {' '.join(own[:2])} minus {system} {codec}"
            yield from _difference(told, answers.get(own, {}), other)


def _difference(told: str, left: _Answers, right: _Answers) -> Iterator[str]:
    """Over the seeds that both have; nothing where they have none in common."""
    seeds = sorted(left.keys() & right.keys())
    both = [by_question for seed in seeds for by_question in (left[seed], right[seed])]
    ids = [id for id in both[0] if all(id in each for each in both)] if both else []
    if not ids:
        return
    d = paired_difference(
        *([fmean(side[seed][id] for seed in seeds) for id in ids] for side in (left, right))
    )
    real = "real" if d.real else "not shown"
    of = f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"
    yield f"{told} {d.mean:+.3f} ({d.low:+.3f} to {d.high:+.3f}), {real}, {of}"


if __name__ == "__main__":
    main()
