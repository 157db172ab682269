"""The commands that trade with other software: routes out as adapters or models, adapters in as a store."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from polyprag import recoding
from polyprag._polyprag import Store
from polyprag.cli.common import (
    AsJson,
    NewStorePath,
    StorePath,
    counted,
    document_id,
    print_json,
    say,
    working,
)
from polyprag.cli.corpus import CorpusOptions, Device, documents_of, tokenizer_of
from polyprag.cli.model import AskModel
from polyprag.cli.options import grouped
from polyprag.errors import InvalidInput
from polyprag.jsonl import absent

if TYPE_CHECKING:
    from polyprag._polyprag import Document
    from polyprag.augment.prag import PragSet

Rule = Literal["mean", "score", "first", "sum"]


def export(
    store: StorePath,
    dest: Annotated[
        Path,
        typer.Argument(metavar="FOLDER", help="The new folder of the adapter or model.", readable=False),
    ],
    id: Annotated[
        list[str], typer.Argument(metavar="ID", help="Ids of the documents whose routes are combined.")
    ],
    peft: Annotated[
        bool,
        typer.Option(
            "--peft/--merged",
            help="A LoRA that PEFT and vLLM load, or the base model with the route in its weights.",
        ),
    ] = True,
    weight: Annotated[
        list[float] | None,
        typer.Option(help="The weight of each document, in their order. Default: all alike, 1/n."),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(
            help="LoRA only: at most this rank, by singular values; its loss is printed. Default: exact."
        ),
    ] = None,
    base_model: Annotated[
        str | None,
        typer.Option(help="LoRA only: what it says that it belongs to. Default: the name in the store."),
    ] = None,
    model: AskModel = None,
    device: Device = "auto",
    dtype: Annotated[
        str, typer.Option(help="`auto`, `bf16`, `fp16` or `fp32`; a LoRA is fp32 unless another is named.")
    ] = "auto",
    allow_base_mismatch: Annotated[
        bool, typer.Option(help="Merge although the weights of the base model differ from the store's.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write the combined route of documents as a LoRA of PEFT, or as a merged model.

    The LoRA is exact: its rank is that of all experts together. vLLM takes it with `--max-lora-rank` at least
    as large.

    Example: `polyprag export wiki.polyprag ada-lora Q7259 Q11571`
    """
    absent(dest)
    from polyprag.exporting import export_merged, export_peft

    with Store.open(store) as opened:
        ids = [document_id(text, opened.spec.id_type) for text in id]
        if peft:
            adapter = export_peft(
                opened,
                ids,
                dest,
                weights=weight,
                rank=rank,
                dtype="fp32" if dtype == "auto" else dtype,
                base_model=base_model,
            )
            if as_json:
                print_json(vars(adapter) | {"path": str(dest)})
                return
            loss = _loss(adapter.rank, adapter.exact_rank, adapter.error)
            say(f"{dest}: a LoRA of rank {adapter.rank}, {loss}")
            if adapter.error:
                say(f"  most in {adapter.worst_module}: {adapter.worst_error:.2%}", "dim")
            return
        if rank is not None or base_model is not None:
            raise InvalidInput("--rank and --base-model are for a LoRA: leave them out with --merged")
        merged = export_merged(
            opened,
            ids,
            dest,
            model,
            weights=weight,
            device=device,
            dtype=dtype,
            allow_base_mismatch=allow_base_mismatch,
        )
    if as_json:
        print_json(vars(merged) | {"path": str(dest)})
    else:
        say(
            f"{dest}: {merged.modules} layers merged, as {merged.dtype}; rounding changed them by "
            f"{merged.rounding:.2%} of what the route changes"
        )


@grouped
def import_(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="ADAPTERS",
            help="Folder of the adapters: one LoRA a document, or a Poly checkpoint.",
            readable=False,
        ),
    ],
    store: NewStorePath,
    options: CorpusOptions,
    corpus: Annotated[
        str | None,
        typer.Option(
            help="The documents, so that questions find them: a corpus whose ids are the folders' paths, or "
            "the data_aug file of PRAG's folders (`--format prag`); for Poly, one document a task.",
        ),
    ] = None,
    codec: Annotated[
        str | None, typer.Option(help="Poly only: how its logits are kept. Default: `f32`.")
    ] = None,
    expert_dtype: Annotated[
        recoding.ExpertDtype | None,
        typer.Option(help="How the experts are kept. Default: as the adapters are."),
    ] = None,
    k: Annotated[
        int, typer.Option("--k", "-k", min=1, help="How many documents are combined when asking.")
    ] = 3,
    rule: Annotated[
        Rule | None, typer.Option(help="How they are. Default: PRAG's `sum` for LoRAs, `score` for Poly.")
    ] = None,
    model: AskModel = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Make a store of LoRAs or of a Poly checkpoint that PEFT saved.

    The store computes what the adapters compute. PRAG's folders (`data_0/passage_2`) become one store, in
    which a passage that stands behind several questions is kept once.

    Example: `polyprag import offline/.../total prag.polyprag --corpus data_aug/total.json --format prag`
    """
    absent(store)
    documents = None if corpus is None else _documents(corpus, options, tokenizer_of(model))
    from polyprag.importing import import_peft

    found = working(
        f"Reading {source}",
        lambda bar: import_peft(
            source,
            store,
            model,
            documents=documents,
            codec=codec,
            expert_dtype=expert_dtype,
            k=k,
            rule=rule,
            device=device,
            progress=bar,
        ),
        shown=not as_json,
    )
    if as_json:
        print_json(vars(found))
        return
    what = "a LoRA each" if found.kind == "lora" else "the tasks of a Poly checkpoint"
    say(
        f"{store}: {counted(found.documents, 'document')}, {what}; "
        f"{found.experts:,} experts of rank {found.rank}"
    )
    if found.unrouted:
        say(f"  {found.unrouted:,} of them have no adapter, so they are found and never mixed", "yellow")
    if found.repeated:
        say(f"  {found.repeated:,} adapters left out: their passage had one already", "dim")


def _documents(corpus: str, options: CorpusOptions, tokenizer: Callable[[], Any]) -> list[Document] | PragSet:
    if options.format != "prag":
        return documents_of(corpus, options, tokenizer)
    from polyprag.augment.prag import read_prag

    return read_prag(corpus)


def _loss(rank: int, exact: int, error: float) -> str:
    if rank == exact:
        return "exact"
    return f"of {exact} that would be exact: {error:.2%} of the change is lost"
