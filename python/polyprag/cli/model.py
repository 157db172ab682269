"""The commands that load a base model: encode, add, ask and demo.

torch and transformers are imported where they are used, so that ``--help`` answers at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from polyprag._polyprag import Store
from polyprag.cli.augment import (
    AugmentConcurrency,
    AugmentKey,
    AugmentModel,
    AugmentUrl,
    Pairs,
    PromptFile,
    Rewrite,
    WrittenFile,
    YesNo,
    augment_settings,
    endpoint,
    written,
)
from polyprag.cli.common import (
    AsJson,
    OnDuplicate,
    StorePath,
    counted,
    err,
    out,
    print_json,
    say,
)
from polyprag.cli.config import Config, as_toml, settings_of
from polyprag.cli.corpus import (
    Attention,
    CorpusOptions,
    CorpusPath,
    Device,
    Dtype,
    Model,
    Resumable,
    documents_of,
    preview,
    tokenizer_of,
)
from polyprag.cli.inspect import described, inspect
from polyprag.cli.options import grouped
from polyprag.errors import InvalidInput
from polyprag.filters import conditions, declared
from polyprag.jsonl import absent

if TYPE_CHECKING:
    from polyprag.augment import AugmentSettings
    from polyprag.encode import Recipe

Routing = Literal["code", "table", "lora"]
System = Literal["polyprag", "poly-prag", "prag", "dyprag"]

AskModel = Annotated[
    str | None,
    typer.Option(
        help="The base model, if it is not the installed small one or cached: name, folder or GGUF file."
    ),
]
Work = Annotated[
    Path | None,
    typer.Option(
        help="Folder of the augmentation and the checkpoint, to resume from. Default: `STORE.work`.",
        readable=False,
    ),
]


@grouped
def encode(
    context: typer.Context,
    corpus: CorpusPath,
    store: StorePath,
    options: CorpusOptions,
    config: Config = None,  # noqa: ARG001 - its callback has read it
    model: Model = None,
    system: Annotated[
        System,
        typer.Option(
            help="Whose recipe: ours, Poly-PRAG as first published, PRAG (one LoRA a document), or DyPRAG (a "
            "network makes a document's LoRA of its text)."
        ),
    ] = "polyprag",
    routing: Annotated[
        Routing | None,
        typer.Option(
            help="What is trained for each document. Default: code; a table is larger, and better where "
            "documents are added later."
        ),
    ] = None,
    code_dim: Annotated[
        int | None,
        typer.Option(
            help="Numbers in a code: half as many bytes a document with the default codec. Default: 128."
        ),
    ] = None,
    experts: Annotated[int | None, typer.Option(help="K, the number of latent experts. Default: 16.")] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of an expert. Default: 2.")] = None,
    alpha: Annotated[
        float | None,
        typer.Option(help="LoRA alpha; the experts' output is scaled by alpha / rank. Default: 32."),
    ] = None,
    targets: Annotated[
        list[str] | None,
        typer.Option(
            help="Layers that get experts: last names (`q_proj`), patterns of whole names (`*.mlp.*`) or "
            "`auto`, the layers of the MLPs in the upper half of the model (in all of it with "
            "`--set train.from_depth=0`); several times or with commas. Default: `auto`."
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="Any other setting of the recipe, such as `train.code_lr=0.2` or `train.accumulation=4`; "
            "may be given often.",
        ),
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the samples.")] = None,
    pairs: Pairs = None,
    rewrite: Rewrite = False,
    yes_no: YesNo = False,
    augment_url: AugmentUrl = None,
    augment_model: AugmentModel = None,
    augment_key: AugmentKey = "OPENAI_API_KEY",
    augment_concurrency: AugmentConcurrency = 8,
    prompts: PromptFile = None,
    augmentation: WrittenFile = None,
    codec: Annotated[
        str | None,
        typer.Option(
            help="How routes are kept: `code(d)` or `code(d,int4)` for code routing; `f32`, `f16`, `q8`, "
            "`q4`, `q2`, `q1`, `sparse(k)`."
        ),
    ] = None,
    keep_text: Annotated[
        bool, typer.Option(help="Keep the texts in the store, for RAG, Combine and reindexing.")
    ] = True,
    filters: Annotated[
        list[str] | None,
        typer.Option(
            "--filter",
            metavar="KEY[:KIND]",
            help="A key of the metadata on which `ask` can filter later, such as `lang` or `year:i64` "
            "(`string`, `i64`, `f64`, `bool`; default: what its values are); may be given often.",
        ),
    ] = None,
    work: Work = None,
    seed: Annotated[int, typer.Option(help="Seed of the whole run.")] = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    attention: Attention = "auto",
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Show what would be encoded, and how; write nothing."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Encode a corpus into a new store: augment, train experts and routes, index.

    Ctrl-C is safe: the same command goes on where it stopped. The pairs are written by the base model, by one
    at an endpoint, or are there already; a data_aug file of PRAG (`--format prag`) brings its own.

    Example: `polyprag encode corpus.jsonl wiki.polyprag`

    Example: `polyprag encode handbook/ handbook.polyprag --chunk 100 --chunk-unit words --dry-run`

    Example: `polyprag encode --config encode.toml --seed 1`
    """
    from polyprag.progress import Bars

    told = err if as_json else out
    if not dry_run:
        absent(store)  # told before anything is loaded
    documents = documents_of(corpus, options, tokenizer_of(model))
    kinds = declared(filters or [], documents)
    prag = options.format == "prag" and augmentation is None
    ready = written(Path(corpus) if prag else augmentation, documents, augment_url, told)
    augmenter = endpoint(augment_url, augment_model, augment_key, augment_concurrency)
    if yes_no and augmenter is None:
        raise InvalidInput("--yes-no needs an endpoint (--augment-url): a small model is given its answers")
    # Rewrites that are there are trained with.
    rewrite = rewrite or (ready is not None and any(a.rewrite for a in ready.augmentations))
    recipe = _recipe(
        system,
        settings or [],
        context,
        augment_settings(pairs=pairs, rewrite=rewrite, yes_no=yes_no, prompts=prompts, seed=seed),
        routing=routing,
        code_dim=code_dim,
        experts=experts,
        rank=rank,
        alpha=alpha,
        targets=tuple(t.strip() for given in targets for t in given.split(",")) if targets else None,
        epochs=epochs,
        seed=seed,
    )
    if dry_run:
        plan = recipe.to_json()
        plan["augment"].pop("prompts")  # long, and in a file of their own
        preview(corpus, documents, as_json, {"recipe": plan})
        if not as_json:
            say("\nThe recipe, as the file of --config has it:", "bold")
            say(as_toml(plan), "dim")
        return
    from polyprag.augment import summary
    from polyprag.encode import encode as run
    from polyprag.models import load_base_model
    from polyprag.world import launched

    with launched(device, shard=recipe.train.shard) as world:
        base = load_base_model(model, device=device, dtype=dtype, attention=attention)
        if world.first:
            say(f"{counted(len(documents), 'document')}, {base.name}, {base.device}", console=told)
        with Bars(err, world.first) as bars, Resumable(f"polyprag encode {corpus} {store} ..."):
            found = run(
                base,
                documents,
                store,
                recipe,
                codec=codec,
                keep_text=keep_text,
                filters=kinds,
                work=work,
                augmenter=augmenter,
                written=ready,
                reporter=bars,
            )
    if not world.first:
        return
    if as_json:
        with Store.open(store) as opened:
            print_json({"store": str(store), "pairs": sum(len(a.pairs) for a in found), **described(opened)})
        return
    if ready is None:
        say(str(summary(found)))
    inspect(store)
    say(f'\nNext: polyprag ask {store} "..."')


@grouped
def add(
    corpus: CorpusPath,
    store: StorePath,
    options: CorpusOptions,
    model: AskModel = None,
    on_duplicate: Annotated[
        OnDuplicate, typer.Option(help="What to do with ids that the store has.")
    ] = "error",
    augment_url: AugmentUrl = None,
    augment_model: AugmentModel = None,
    augment_key: AugmentKey = "OPENAI_API_KEY",
    augment_concurrency: AugmentConcurrency = 8,
    augmentation: WrittenFile = None,
    amortised: Annotated[
        bool | None,
        typer.Option(
            "--amortised/--trained",
            help="Codes by the store's router, from the texts alone: no pairs, no training. Encode with "
            "`--set train.router=true` for a store that has one; with up to three thousand documents, such "
            "codes have not been worth it (docs/method.md). Default: as the store's own documents, which "
            "`--system dyprag` makes of their texts.",
        ),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(help="Passes over the pairs; default: as the store's recipe has it (12).", min=1),
    ] = None,
    work: Work = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    attention: Attention = "auto",
    as_json: AsJson = False,
) -> None:
    """Add documents to a store: only their routes are trained, nothing else in it changes.

    With `--on-duplicate replace`, documents whose ids the store has take the place of those: an update. With
    `--amortised` documents are added at the speed of reading them, and committed as it goes on: after Ctrl-C,
    `--on-duplicate skip` leaves out what is there.

    Example: `polyprag add new.jsonl wiki.polyprag`
    """
    from polyprag.encode import Recipe
    from polyprag.encode import add as run
    from polyprag.engine import base_model_of
    from polyprag.progress import Bars
    from polyprag.world import launched

    own = options.format == "prag" and not amortised  # the pairs that the corpus brings
    again = f"polyprag add {corpus} {store}"
    with Store.open(store) as opened:
        recipe = Recipe.of(opened)
        amortises = recipe.amortises(opened)
    if amortised is None and options.format != "prag" and not (augment_url or augmentation):
        amortised = amortises
    # The model that the store's pairs are of, if none is named; where it is, only the user may say.
    known = recipe.augmenter if augment_url is not None else None
    augmenter = endpoint(augment_url, augment_model or known, augment_key, augment_concurrency)
    with launched(device, shard=recipe.train.shard) as world:
        with Store.open(store) as opened:
            base = base_model_of(opened, model, device=device, dtype=dtype, attention=attention)
        if amortised:
            # Some were committed.
            again += f" --amortised --on-duplicate {'skip' if on_duplicate == 'error' else on_duplicate}"
        documents = documents_of(corpus, options, lambda: base.tokenizer)
        given = Path(corpus) if own and augmentation is None else augmentation
        ready = written(given, documents, augment_url, err if as_json else out)
        with Bars(err, world.first) as bars, Resumable(again):
            added = run(
                base,
                documents,
                store,
                on_duplicate=on_duplicate,
                work=work,
                augmenter=augmenter,
                written=ready,
                amortised=amortised,
                epochs=epochs,
                reporter=bars,
            )
    if not world.first:
        return
    if added < len(documents):
        skipped = counted(len(documents) - added, "document")
        say(f"left out, since the store has a document with that id: {skipped}", "yellow", err)
    if as_json:
        with Store.open(store) as opened:
            print_json({"added": added, "documents": len(opened), "generation": opened.generation})
    else:
        say(f"{counted(added, 'document')} added to {store}")


def ask(
    store: StorePath,
    question: Annotated[list[str], typer.Argument(metavar="QUESTION", help="One question or several.")],
    k: Annotated[
        int | None,
        typer.Option("--k", "-k", help="How many documents' routes to combine. Default: as trained."),
    ] = None,
    where: Annotated[
        list[str] | None,
        typer.Option(
            "--filter",
            metavar="CONDITION",
            help="Only documents whose metadata satisfies it: `lang=de`, `year>=1990`, `year<2000`, on keys "
            "that `encode --filter` has declared. Given often, all have to hold; of values for one key, one.",
        ),
    ] = None,
    model: AskModel = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    attention: Attention = "auto",
    allow_base_mismatch: Annotated[
        bool, typer.Option(help="Ask although the weights of the base model differ from the store's.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Ask a store: the answer comes from the weights, no passage is in the prompt.

    Example: `polyprag ask wiki.polyprag "Where was Ada Lovelace born?"`

    Example: `polyprag ask wiki.polyprag "Who built the bridge?" --filter lang=en --filter "year>=1990"`
    """
    with Store.open(store) as opened:  # what is wrong with it, or the filter, is told before torch is loaded
        filter = conditions(where or [], opened.spec.filters)
        opened.search_many([], filter=filter)
    from polyprag.engine import Engine

    with Engine.open(
        store,
        model,
        device=device,
        dtype=dtype,
        attention=attention,
        allow_base_mismatch=allow_base_mismatch,
    ) as engine:
        answers = engine.ask_batch(question, k=k, filter=filter)
        found = {source.id for answer in answers for source in answer.documents}
        routed = {id for id in found if engine.store.is_routed(id)}
    for answer in answers:
        if as_json:
            print_json(
                {
                    "question": answer.question,
                    "answer": answer.text,
                    "documents": [vars(d) for d in answer.documents],
                    "seconds": vars(answer.timings),
                }
            )
            continue
        if len(answers) > 1:
            say(answer.question, "dim")
        say(answer.text or "(no answer)", "bold")
        for source in answer.documents:
            weight = f"weight {source.weight:.2f}" if source.id in routed else "no route"
            say(f"  {source.title or source.id}  (BM25 {source.score:.2f}, {weight})", "dim")
        if not answer.documents:
            say("  no document matches the question: this is the base model's own answer", "yellow")


def demo(
    folder: Annotated[Path, typer.Option(help="Where the store and the report go.")] = Path("demo"),
    seed: Annotated[int, typer.Option(help="Seed of the whole run.")] = 0,
    model: Model = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: AsJson = False,
) -> None:
    """Encode the sample corpus about an invented island and compare all systems on it.

    It takes about a quarter of an hour on 2 cores.

    Example: `polyprag demo`
    """
    from polyprag.demo import run

    with Resumable("polyprag demo"):
        told = err if as_json else out
        report = run(folder, seed=seed, model=model, device=device, dtype=dtype, out=told, err=err)
    if as_json:
        print_json(report)


def _recipe(
    system: System,
    settings: list[str],
    context: typer.Context,
    augment: AugmentSettings,
    *,
    seed: int,
    **train: Any,
) -> Recipe:
    """The recipe of ``system`` with the options given, then the tables of ``--config``, then ``settings``."""
    from dataclasses import replace

    from polyprag.recipes import recipe_of, with_settings

    recipe = recipe_of(system).seeded(seed)
    samples = replace(recipe.samples, with_passage=2) if augment.rewrite else recipe.samples
    given = {name: value for name, value in train.items() if value is not None}
    recipe = replace(recipe, augment=augment, samples=samples, train=replace(recipe.train, **given))
    file, tables = settings_of(context)
    try:
        recipe = with_settings(recipe, tables)
    except InvalidInput as error:
        raise InvalidInput(f"{file}: {error}") from error
    return with_settings(recipe, settings)
