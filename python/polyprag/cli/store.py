"""The commands that look after a store, and need no base model."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from polyprag import recoding
from polyprag._polyprag import Store
from polyprag.cli.common import (
    AsJson,
    NewStorePath,
    OnDuplicate,
    StorePath,
    counted,
    document_id,
    err,
    print_json,
    say,
    working,
)
from polyprag.errors import StoreError
from polyprag.jsonl import absent
from polyprag.progress import WorkBar

PackedPath = Annotated[
    Path, typer.Argument(metavar="FILE", help="The one file, such as `wiki.tar`.", readable=False)
]


def verify(store: StorePath, as_json: AsJson = False) -> None:
    """Check every byte of a store against its manifest; exit code 4 if anything is wrong.

    Example: `polyprag verify wiki.polyprag`
    """
    try:
        with Store.open(store) as opened:
            found = working(f"Verifying {store}", lambda bar: opened.verify(progress=bar), shown=not as_json)
    except StoreError as error:
        if as_json:
            print_json({"ok": False, "error": str(error)})
        raise
    if as_json:
        print_json({"ok": True, "files": found.files, "bytes": found.bytes, "documents": found.documents})
    else:
        say(
            f"{store}: whole ({counted(found.documents, 'document')}, {found.files} files, "
            f"{found.bytes:,} bytes)"
        )


def digest(
    store: StorePath,
    expect: Annotated[
        str | None, typer.Option(metavar="HEX", help="Exit code 4 unless the digest is this one.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Print the digest of a store: copies have the same, and with `verify` it vouches for every byte.

    Example: `polyprag digest wiki.polyprag`
    """
    if expect is not None and not re.fullmatch(r"[0-9a-f]{64}", expect := expect.strip().lower()):
        raise typer.BadParameter("a digest has 64 hexadecimal digits", param_hint="--expect")
    with Store.open(store, expect_digest=expect) as opened:
        found = opened.digest()
    if as_json:
        print_json({"digest": found})
    else:
        say(found)


def delete(
    store: StorePath,
    id: Annotated[list[str], typer.Argument(metavar="ID", help="Ids of the documents.")],
    as_json: AsJson = False,
) -> None:
    """Delete documents from a store; all of them or, if one is not there, none.

    Their bytes go when the store is compacted.

    Example: `polyprag delete wiki.polyprag Q7259 Q11571`
    """
    with Store.open(store) as opened:
        ids = [document_id(text, opened.spec.id_type) for text in id]
        with opened.writer() as writer:
            deleted = writer.delete(ids)
            generation = writer.commit()
    if as_json:
        print_json({"deleted": deleted, "generation": generation})
    else:
        say(f"{store}: {counted(deleted, 'document')} deleted, generation {generation}")


def compact(store: StorePath, as_json: AsJson = False) -> None:
    """Take deleted and replaced documents out of the files of a store, and join its segments.

    The generation before stays for rollback, and its files with it, until the next commit.

    Example: `polyprag compact wiki.polyprag`
    """
    with Store.open(store) as opened:
        before = opened.info().total_bytes
        generation = working(
            f"Compacting {store}",
            lambda bar: _changed(opened, lambda writer: writer.compact(progress=bar)),
            shown=not as_json,
        )
        after = opened.info().total_bytes
    if as_json:
        print_json({"generation": generation, "total_bytes": after, "total_bytes_before": before})
    else:
        say(f"{store}: {after:,} bytes, {before:,} before; generation {generation}")


def merge(
    into: Annotated[
        Path, typer.Argument(metavar="INTO", help="The store that takes the documents.", readable=False)
    ],
    source: Annotated[
        list[Path],
        typer.Argument(metavar="FROM", help="Stores of the same experts, decoder and codec.", readable=False),
    ],
    on_duplicate: Annotated[OnDuplicate, typer.Option(help="What to do with ids that come again.")] = "error",
    as_json: AsJson = False,
) -> None:
    """Take the documents of other stores into one; those stores stay as they are.

    Only stores that were encoded together, or one from the other by adding documents, have the same experts.

    Example: `polyprag merge wiki.polyprag news.polyprag --on-duplicate replace`
    """

    def work(bar: WorkBar) -> tuple[int, int]:
        read = 0
        with opened.writer() as writer:
            for path in source:
                bar.step(str(path))
                with Store.open(path) as other:
                    read += writer.merge(other, on_duplicate=on_duplicate, progress=bar)
            bar.step("committing")
            return read, writer.commit(progress=bar)

    with Store.open(into) as opened:
        before = len(opened)
        read, generation = working(f"Merging into {into}", work, shown=not as_json)
        opened.refresh()
        after = len(opened)
    if as_json:
        print_json({"read": read, "documents": after, "documents_before": before, "generation": generation})
    else:
        say(
            f"{into}: {counted(after, 'document')}, {before:,} before; {read:,} read, generation {generation}"
        )


def recode(
    store: StorePath,
    dest: NewStorePath,
    codec: Annotated[
        str | None,
        typer.Option(
            help="`f32`, `f16`, `q8`, `q4`, `q2`, `q1`, `code(d)`, `code(d,int4)` or `sparse(k)`. "
            "Default: routes stay as they are."
        ),
    ] = None,
    expert_dtype: Annotated[
        recoding.ExpertDtype | None, typer.Option(help="How the experts are kept. Default: as they are.")
    ] = None,
    sample: Annotated[
        int, typer.Option(help="At most so many documents are fitted to, and as many compared.", min=1)
    ] = recoding.SAMPLE,
    seed: Annotated[int, typer.Option(help="Seed of the two draws, if there are more.", min=0)] = 0,
    as_json: AsJson = False,
) -> None:
    """Write a new store with the same documents, their routes or the experts kept in another way.

    For `code(d)` a decoder is fitted to the routes. Then routes are compared with those of the old store.

    Example: `polyprag recode wiki.polyprag small.polyprag --codec "code(32)"`
    """
    absent(dest)
    if codec is None and expert_dtype is None:
        raise typer.BadParameter("name what is to change: --codec, --expert-dtype or both")

    def work(bar: WorkBar) -> recoding.Recoded:
        return recoding.recode(
            store,
            dest,
            codec=codec,
            expert_dtype=expert_dtype,
            sample=sample,
            seed=seed,
            step=bar.step,
            progress=bar,
        )

    done = working(f"Recoding {store}", work, shown=not as_json)
    if as_json:
        print_json(done.to_json())
        return
    found = done.fidelity
    which = f"{found.documents:,} drawn of {found.of:,} documents" if found.sampled else "all documents"
    say(
        f"{dest}: routes as {done.codec}, {done.route_bytes_per_document:,.1f} bytes a document "
        f"({done.codec_before}: {done.route_bytes_per_document_before:,.1f}); "
        f"{done.total_bytes:,} bytes in all ({done.total_bytes_before:,})"
    )
    divergence = "" if found.mean_kl is None else f"; KL divergence of a group, mean {found.mean_kl:.2g}"
    say(
        f"Weights over {which} with a route: |dw| at most {found.max_dw:.2g}, "
        f"mean {found.mean_dw:.2g}{divergence}"
    )
    if done.note:
        say(f"Note: {done.note}", "yellow", err)


def reindex(store: StorePath, as_json: AsJson = False) -> None:
    """Build the BM25 index anew from the titles and texts that a store keeps.

    Example: `polyprag reindex wiki.polyprag`
    """
    with Store.open(store) as opened:
        generation = working(
            f"Indexing {store}",
            lambda bar: _changed(opened, lambda writer: writer.reindex(progress=bar)),
            shown=not as_json,
        )
    _say_generation(store, generation, "index built anew", as_json)


def rollback(store: StorePath, as_json: AsJson = False) -> None:
    """Go back to what a store held before its last commit; again, and it is undone.

    Example: `polyprag rollback wiki.polyprag`
    """
    with Store.open(store) as opened:
        generation = _changed(opened, lambda w: w.rollback())
        documents = len(opened)
    _say_generation(store, generation, f"back to {counted(documents, 'document')}", as_json)


def snapshot(store: StorePath, dest: NewStorePath, as_json: AsJson = False) -> None:
    """Copy the newest generation of a store, every byte checked, to a new store.

    Example: `polyprag snapshot wiki.polyprag backup.polyprag`
    """
    _copy(store, dest, "Copying", Store.snapshot, as_json)


def pack(store: StorePath, file: PackedPath, as_json: AsJson = False) -> None:
    """Write the newest generation of a store, every byte checked, into one file to ship.

    Example: `polyprag pack wiki.polyprag wiki.tar`
    """
    _copy(store, file, "Packing", Store.pack, as_json)


def unpack(file: PackedPath, store: NewStorePath, as_json: AsJson = False) -> None:
    """Make a new store of a packed one, every byte checked.

    Example: `polyprag unpack wiki.tar wiki.polyprag`
    """
    absent(store)
    working(f"Unpacking {file}", lambda bar: Store.unpack(file, store, progress=bar), shown=not as_json)
    with Store.open(store) as opened:
        _say_copy(store, opened, as_json)


def _changed(opened: Store, change: Callable[[Any], int]) -> int:
    """The generation that a change makes; ``opened`` moves on to it."""
    with opened.writer() as writer:
        generation = change(writer)
    opened.refresh()
    return generation


def _copy(store: Path, dest: Path, doing: str, copy: Callable[..., None], as_json: bool) -> None:
    absent(dest)
    with Store.open(store) as opened:
        working(f"{doing} {store}", lambda bar: copy(opened, dest, progress=bar), shown=not as_json)
        _say_copy(dest, opened, as_json)


def _say_generation(store: Path, generation: int, what: str, as_json: bool) -> None:
    if as_json:
        print_json({"generation": generation})
    else:
        say(f"{store}: {what}, generation {generation}")


def _say_copy(path: Path, copied: Store, as_json: bool) -> None:
    info, digest = copied.info(), copied.digest()
    if as_json:
        about = {"documents": info.documents, "total_bytes": info.total_bytes, "digest": digest}
        print_json({"path": str(path), **about})
    else:
        say(f"{path}: {counted(info.documents, 'document')}, {info.total_bytes:,} bytes, digest {digest}")
