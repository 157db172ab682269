"""The command ``augment``, and what it shares with ``encode`` and ``add``: who writes the pairs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from polyprag.cli.common import AsJson, counted, err, out, print_json, say
from polyprag.cli.corpus import (
    Attention,
    CorpusOptions,
    CorpusPath,
    Device,
    Dtype,
    Model,
    Resumable,
    documents_of,
    tokenizer_of,
)
from polyprag.cli.options import grouped
from polyprag.errors import CorpusError, InvalidInput

if TYPE_CHECKING:
    from rich.console import Console

    from polyprag._polyprag import Document
    from polyprag.augment import Augmenter, AugmentSettings
    from polyprag.augment.endpoint import EndpointAugmenter
    from polyprag.encode import Written

AugmentUrl = Annotated[
    str | None,
    typer.Option(
        help="Let a model behind this OpenAI-compatible endpoint write the pairs, such as "
        "`http://localhost:8000/v1`. Default: the base model."
    ),
]
AugmentModel = Annotated[str | None, typer.Option(help="The model's name at the endpoint.")]
AugmentKey = Annotated[
    str,
    typer.Option("--augment-key-env", help="The environment variable with the endpoint's key."),
]
AugmentConcurrency = Annotated[
    int, typer.Option(help="How many documents the endpoint is asked about at once.", min=1)
]
PromptFile = Annotated[
    Path | None,
    typer.Option(
        "--prompts",
        help="A TOML file of prompts to use instead of those that `polyprag augment --show-prompts` prints.",
        readable=False,
    ),
]
Pairs = Annotated[int | None, typer.Option(help="At most so many question-answer pairs a document.", min=1)]
Rewrite = Annotated[
    bool,
    typer.Option(help="Also let the model rewrite each passage, and train a pair behind the rewrite."),
]
YesNo = Annotated[
    bool, typer.Option(help="Also ask the endpoint for questions that are answered by yes or no.")
]
WrittenFile = Annotated[
    Path | None,
    typer.Option(
        "--augmentation",
        help="Pairs that are there already: what `polyprag augment` wrote, or a data_aug file of PRAG.",
        readable=False,
    ),
]


def _show_prompts(value: bool) -> None:
    if value:
        from polyprag.augment import prompts_as_toml

        say(prompts_as_toml())
        raise typer.Exit


@grouped
def augment(
    corpus: CorpusPath,
    out_file: Annotated[
        Path, typer.Option("--out", help="The JSONL file, a line a document.", readable=False)
    ],
    options: CorpusOptions,
    model: Model = None,
    augment_url: AugmentUrl = None,
    augment_model: AugmentModel = None,
    augment_key: AugmentKey = "OPENAI_API_KEY",
    augment_concurrency: AugmentConcurrency = 8,
    prompts: PromptFile = None,
    pairs: Pairs = None,
    rewrite: Rewrite = False,
    yes_no: YesNo = False,
    show_prompts: Annotated[  # noqa: ARG001 - its callback has done it
        bool,
        typer.Option(
            "--show-prompts", callback=_show_prompts, is_eager=True, help="Print the usual prompts."
        ),
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    attention: Attention = "auto",
    as_json: AsJson = False,
) -> None:
    """Write the question-answer pairs of a corpus to a file and stop, to be looked at before the training.

    Ctrl-C is safe: the same command goes on where it stopped. Then `polyprag encode ... --augmentation FILE`.

    Example: `polyprag augment corpus.jsonl --out pairs.jsonl --augment-url http://localhost:8000/v1
    --augment-model qwen`
    """
    from polyprag.augment import augment as run
    from polyprag.augment import others_in, summary
    from polyprag.progress import Bars

    documents = documents_of(corpus, options, tokenizer_of(model))
    settings = augment_settings(pairs=pairs, rewrite=rewrite, yes_no=yes_no, prompts=prompts, seed=seed)
    augmenter: Augmenter | None = endpoint(augment_url, augment_model, augment_key, augment_concurrency)
    if augmenter is None:
        if yes_no:
            raise InvalidInput(
                "--yes-no needs an endpoint (--augment-url): a small model is given its answers"
            )
        from polyprag.augment.local import LocalAugmenter
        from polyprag.models import load_base_model

        augmenter = LocalAugmenter(load_base_model(model, device=device, dtype=dtype, attention=attention))
    others = others_in(out_file, augmenter, settings)
    if others:
        raise CorpusError(
            f"{out_file}: {others.total()} lines are of {', '.join(sorted(others))} with other prompts, "
            "settings or another model than these; give another --out, or delete the file"
        )
    say(f"{counted(len(documents), 'document')}, {augmenter.name}", console=err if as_json else out)
    done = 0
    with Bars(err) as bars, Resumable(f"polyprag augment {corpus} --out {out_file} ..."):

        def progress(count: int) -> None:
            nonlocal done
            done += count
            bars.augmenting(done, len(documents))

        found = run(augmenter, documents, settings, path=out_file, progress=progress)
    if as_json:
        pairs, rewrites = sum(len(a.pairs) for a in found), sum(bool(a.rewrite) for a in found)
        print_json({"path": str(out_file), "documents": len(found), "pairs": pairs, "rewrites": rewrites})
        return
    say(str(summary(found)))
    for document, augmentation in list(zip(documents, found, strict=True))[:3]:
        say(f"\n{document.title or document.id}", "bold")
        for pair in augmentation.pairs[:3]:
            say(f"  {pair.question}  {pair.answer}", "dim")
    same = options.as_typed()
    say(f"\nNext: look at {out_file}, then polyprag encode {corpus} STORE --augmentation {out_file}{same}")


def endpoint(url: str | None, model: str | None, key: str, concurrency: int) -> EndpointAugmenter | None:
    """The augmenter that the options describe; None where the base model writes."""
    if url is None:
        if model is not None:
            raise InvalidInput("--augment-model is a model at an endpoint: give its --augment-url too")
        return None
    if model is None:
        raise InvalidInput("--augment-url needs the model's name there: give it as --augment-model")
    from polyprag.augment.endpoint import EndpointAugmenter

    return EndpointAugmenter(url, model, key_variable=key, concurrency=concurrency)


def augment_settings(
    *, pairs: int | None, rewrite: bool, yes_no: bool, prompts: Path | None, seed: int
) -> AugmentSettings:
    """The settings that the options describe."""
    from polyprag.augment import AugmentSettings, Prompts, read_prompts

    return AugmentSettings(
        pairs=pairs or AugmentSettings.pairs,
        rewrite=rewrite,
        yes_no=yes_no,
        prompts=Prompts() if prompts is None else read_prompts(prompts),
        seed=seed,
    )


def written(
    path: Path | None, documents: Sequence[Document], url: str | None, console: Console = out
) -> Written | None:
    """The augmentations of a file, and what is in them told; None where they are still to be written."""
    if path is None:
        return None
    if url is not None:
        raise InvalidInput("--augmentation has the pairs already: leave out --augment-url")
    from polyprag.augment import read_augmentations, summary
    from polyprag.augment.prag import is_prag, read_prag
    from polyprag.encode import Written

    if is_prag(path):
        prag = read_prag(path)
        found, by = prag.augmentations_of(path, documents), prag.model
    else:
        found, by = read_augmentations(path, documents)
    say(f"{path}: {summary(found)}", console=console)
    return Written(found, by)
