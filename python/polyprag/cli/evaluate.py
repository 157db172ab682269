"""The commands ``eval`` and ``questions``.

torch and transformers are imported where they are used, so that ``--help`` answers at once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from polyprag._polyprag import Store
from polyprag.cli.common import AsJson, check_store, err, out, print_json, say
from polyprag.cli.corpus import Attention, Device, Dtype, Keep, Resumable
from polyprag.cli.options import grouped
from polyprag.errors import InvalidInput

if TYPE_CHECKING:
    from polyprag.evaluation.data import Question
    from polyprag.evaluation.formats import SetFormat
    from polyprag.evaluation.report import Report
    from polyprag.evaluation.run import Evaluation
    from polyprag.models import BaseModel

Format = Literal[
    "auto", "jsonl", "json", "csv", "tsv", "unified", "prag", "popqa", "2wiki", "hotpotqa", "cwq"
]
Scoring = Literal["squad", "prag", "prag-cot"]

_SET = "Questions"
_REPORT = "Report"


@dataclass(frozen=True)
class SetOptions:
    """How questions are read, and which of them are taken."""

    format: Annotated[
        Format,
        typer.Option(
            rich_help_panel=_SET,
            help="`auto` goes by the content: rows of one's own, unified rows, a data_aug file of PRAG, or "
            "the benchmarks as they were published.",
        ),
    ] = "auto"
    keep: Annotated[
        Keep,
        typer.Option(rich_help_panel=_SET, help="Where rows have passages: which of them are documents."),
    ] = "gold"
    aliases: Annotated[
        Path | None,
        typer.Option(rich_help_panel=_SET, help="2WikiMultihopQA's `id_aliases.json`.", readable=False),
    ] = None
    first: Annotated[
        int | None, typer.Option(rich_help_panel=_SET, min=1, help="Only the first so many questions.")
    ] = None
    sample: Annotated[
        int | None,
        typer.Option(rich_help_panel=_SET, min=1, help="Only so many questions, drawn by `--seed`."),
    ] = None
    per_type: Annotated[
        bool, typer.Option("--per-type", rich_help_panel=_SET, help="So many of each type of question.")
    ] = False


@grouped
def evaluate(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="[STORE]... QUESTIONS",
            help="Stores, or none, and then the questions: JSONL or CSV with `question`, `answers` and "
            "`documents` (gold ids), `id` and `type` if there are; or a benchmark's file. In a cell of CSV, "
            "answers and ids are parted by `|`. With `--compare`: reports.",
            readable=False,
        ),
    ],
    options: SetOptions,
    system: Annotated[
        list[str] | None,
        typer.Option(
            help="A system of your own, `module:Class` or `file.py:Class`, a class with `answer(questions)`; "
            "may be given often."
        ),
    ] = None,
    only: Annotated[
        str | None, typer.Option(help="Ask these systems alone, such as `own_route,wrong_route`.")
    ] = None,
    codecs: Annotated[
        str | None,
        typer.Option(help="Ask own and wrong route of the first store in other codecs, too: `q8,q4,q1`."),
    ] = None,
    passages: Annotated[int, typer.Option(min=1, help="Passages in the prompts of RAG and Combine.")] = 1,
    scoring: Annotated[
        Scoring,
        typer.Option(
            help="`prag` and `prag-cot` cut answers as PRAG's code does, to compare with its figures."
        ),
    ] = "squad",
    together: Annotated[
        int, typer.Option(min=1, help="Questions asked at a time; 1 measures the time of one alone.")
    ] = 32,
    augmentation: Annotated[
        Path | None,
        typer.Option(
            help="File of the training pairs, to count leaked questions. Default: those in `STORE.work`.",
            readable=False,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="The base model, if it is not the installed small one or cached: name, folder or GGUF file. "
            "Without a store: ask it closed book."
        ),
    ] = None,
    report: Annotated[
        list[Path] | None,
        typer.Option(
            rich_help_panel=_REPORT,
            help="Write the report to this file; its suffix is the form: `.json` (every answer; none is the "
            "same), `.md` or `.html` (one page with plots). May be given often.",
        ),
    ] = None,
    answers: Annotated[
        Path | None,
        typer.Option(
            rich_help_panel=_REPORT,
            help="Keep answers here as they come, and go on from them. Default: beside the first report.",
            readable=False,
        ),
    ] = None,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare",
            rich_help_panel=_REPORT,
            help="Compare JSON reports: which differences are real, and how far seeds spread.",
        ),
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of the draws, the wrong documents and the intervals.")] = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    attention: Attention = "auto",
    as_json: AsJson = False,
) -> None:
    """Ask every system and every control the same questions: F1 with intervals, costs, footprint.

    Ctrl-C is safe: with a report, every answer is kept beside it, and the same command goes on.

    Example: `polyprag eval wiki.polyprag questions.jsonl --report report.json --report report.html`

    Example: `polyprag eval questions.jsonl --system mine.py:Mine --report mine.json`

    Example: `polyprag eval --compare before.json after.json`
    """
    reports = report or []
    from polyprag.evaluation.report import check_form

    for path in [*reports, *([answers] if answers else [])]:
        if not path.absolute().parent.is_dir():
            raise FileNotFoundError(2, "there is no such folder for the report", str(path.absolute().parent))
    for path in reports:
        check_form(path)
    if compare:
        _compare(paths, reports, as_json)
        return
    *stores, questions = paths
    if questions.is_dir():
        raise InvalidInput(f"{questions} is a folder: name the file of the questions behind the stores")
    for option, given in (("--codecs", codecs), ("--augmentation", augmentation)):
        if given is not None and not stores:
            raise InvalidInput(f"{option} is for a store: name one before {questions}, or leave it out")
    for store in stores:
        check_store(store)
    asked = _questions(questions, options, seed)
    if answers is None and reports:
        answers = reports[0].with_name(f"{reports[0].stem}.answers.jsonl")
    if augmentation is not None and not augmentation.exists():
        raise FileNotFoundError(2, "there is no such augmentation file", str(augmentation))
    if not stores and not system and model is None:
        raise InvalidInput(
            f"there is nobody to ask: name a store before {questions}, a system (--system), "
            "or a model (--model)"
        )
    # a comma also stands in code(16,int4)
    named = [codec.strip() for codec in re.split(r",(?![^(]*\))", codecs)] if codecs is not None else []
    wanted = None if only is None else [name.strip() for name in only.split(",")]
    asked = _checked(asked, stores, wanted, named, seed, base=bool(stores) or model is not None)
    from polyprag.evaluation.run import Evaluation
    from polyprag.progress import system_bar

    going_on = (
        Resumable(f"polyprag eval {' '.join(map(str, paths))} ...") if answers is not None else nullcontext()
    )
    with system_bar(err) as progress, going_on:
        evaluation = Evaluation(
            asked,
            passages=passages,
            only=wanted,
            answers=answers,
            scoring=scoring,
            together=together,
            seed=seed,
            progress=progress,
        )
        loading = {"device": device, "dtype": dtype, "attention": attention}
        base = _ask(evaluation, stores, system or [], model, augmentation, loading)
        if named and base is not None:
            evaluation.ask_codecs(stores[0], base, named)
    found = evaluation.report()
    for path in reports:  # before it is printed, where a closed pipe would end it
        found.save(path)
    if as_json:
        print_json(found.to_json())
    else:
        found.print(out)


def _checked(
    questions: Sequence[Question],
    stores: Sequence[Path],
    only: Sequence[str] | None,
    codecs: Sequence[str],
    seed: int,
    *,
    base: bool,
) -> list[Question]:
    """The questions, with ids as the stores have them. What cannot be asked is refused before anybody is."""
    from polyprag.evaluation.run import check_codecs, check_label, check_only, check_questions, with_ids_of

    with ExitStack() as opened:
        found: dict[str, Store] = {}
        for number, path in enumerate(stores):
            store = opened.enter_context(Store.open(path))
            label = _label(path, number)
            check_label(label, found)
            found[label] = store
            questions = with_ids_of(store, questions)
            check_questions(store, questions)
        check_only(only or (), found, questions, base=base)
        if codecs:
            check_codecs(found[""], codecs, questions, seed)
    return list(questions)


def _label(path: Path, number: int) -> str:
    """What stands before the names of a store's systems: nothing for the first one."""
    return "" if number == 0 else path.absolute().name.removesuffix(".polyprag")


def _ask(
    evaluation: Evaluation,
    stores: Sequence[Path],
    systems: Sequence[str],
    model: str | None,
    augmentation: Path | None,
    loading: dict[str, Any],
) -> BaseModel | None:
    """Every store in turn, the base model and other systems with the first; that base model, if any."""
    from polyprag.augment import read_pairs
    from polyprag.encode import training_pairs
    from polyprag.engine import Engine
    from polyprag.evaluation.loading import load_system
    from polyprag.models import check_fingerprint, load_base_model

    base: BaseModel | None = None
    if not stores:
        base = None if model is None else load_base_model(model, **loading)
        if base is not None:
            evaluation.ask_base(base)
        for target in systems:
            evaluation.ask_system(*load_system(target, {"base": base, "store": None, "engine": None}))
    # All of them before the first is asked.
    pairs = [training_pairs(path) if augmentation is None else read_pairs(augmentation) for path in stores]
    for number, path in enumerate(stores):
        with Engine.open(path, base or model, **loading) as engine:
            base = engine.base
            if number == 0:
                for other in stores[1:]:
                    with Store.open(other) as store:
                        check_fingerprint(store.spec.base_model, base)
                evaluation.ask_base(base, engine.store)
            evaluation.ask_store(engine, pairs[number], label=_label(path, number))
            if number == 0:
                given = {"base": base, "store": engine.store, "engine": engine}
                for target in systems:
                    evaluation.ask_system(*load_system(target, given))
    return base


def _compare(paths: Sequence[Path], reports: Sequence[Path], as_json: bool) -> None:
    from polyprag.evaluation.comparison import comparison_grids, comparison_json, grouped
    from polyprag.evaluation.report import Report, form_of
    from polyprag.evaluation.tables import markdown_grid, print_grid
    from polyprag.jsonl import write_atomic

    if len(paths) < 2:
        raise InvalidInput("--compare needs two reports or more: the JSON files of `polyprag eval --report`")
    read: dict[str, Report] = {}
    for path in paths:
        name = path.stem if path.stem not in read else str(path)
        read[name] = Report.load(path)
    runs = grouped(read)
    grids = comparison_grids(runs)
    for path in reports:
        form = form_of(path)
        if form == "html":
            from polyprag.evaluation.page import page

            text = page(list(read.values()), grids)
        elif form == "md":
            text = "\n".join(map(markdown_grid, grids))
        else:
            text = json.dumps(comparison_json(runs), ensure_ascii=False, indent=1) + "\n"
        write_atomic(path, text)
    if as_json:
        print_json(comparison_json(runs))
    for grid in [] if as_json else grids:
        print_grid(grid, out)


@grouped
def questions(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="QUESTIONS", help="A question set, in any form that `eval` reads.", readable=False
        ),
    ],
    dest: Annotated[Path, typer.Argument(metavar="OUT", help="The JSONL file to write.")],
    options: SetOptions,
    search: Annotated[
        Path | None,
        typer.Option(
            help="A store in which BM25 finds the passages of each question; they take the place of others.",
            readable=False,
        ),
    ] = None,
    k: Annotated[int, typer.Option("--k", "-k", min=1, help="Passages of a question, with `--search`.")] = 3,
    seed: Annotated[int, typer.Option(help="Seed of `--sample`.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Turn a question set into JSONL: chosen questions, with their passages, to encode and to ask.

    Example: `polyprag questions hotpot_dev_distractor_v1.json asked.jsonl --first 300 --per-type`

    Example: `polyprag encode asked.jsonl hotpot.polyprag --format unified`
    """
    from polyprag.evaluation.formats import PLAIN, format_of, read_rows, write_questions, write_rows

    if search is None and (_format(options) or format_of(source)) in PLAIN:
        asked = _questions(source, options, seed)  # which may name their documents
        write_questions(dest, asked)
        _say_written(dest, len(asked), 0, as_json)
        return
    rows = _chosen(read_rows(source, _format(options), aliases=options.aliases), options, seed)
    if search is not None:
        from polyprag.evaluation.passages import with_found

        with Store.open(search) as store:
            rows = with_found(rows, store, k)
    write_rows(dest, rows)
    passages = len({p.id for row in rows for p in row.passages})
    _say_written(dest, len(rows), passages, as_json)


def _say_written(dest: Path, questions: int, passages: int, as_json: bool) -> None:
    if as_json:
        print_json({"questions": questions, "passages": passages, "path": str(dest)})
    else:
        say(f"{questions} questions" + (f", {passages} passages" if passages else "") + f" written to {dest}")


def _format(options: SetOptions) -> SetFormat | None:
    return None if options.format == "auto" else options.format


def _questions(path: Path, options: SetOptions, seed: int) -> list[Question]:
    from polyprag.evaluation.formats import read_set

    found = read_set(path, _format(options), keep=options.keep, aliases=options.aliases)
    return _chosen(list(found.questions), options, seed)


def _chosen(rows: list[Any], options: SetOptions, seed: int) -> list[Any]:
    from polyprag.evaluation.sampling import chosen

    if options.first is not None and options.sample is not None:
        raise InvalidInput("--first and --sample are two ways of choosing: give one")
    if options.first is not None:
        return chosen(rows, options.first, per_type=options.per_type)
    if options.sample is not None:
        return chosen(rows, options.sample, per_type=options.per_type, seed=seed)
    if options.per_type:
        raise InvalidInput("--per-type needs --first or --sample, which say how many")
    return rows
