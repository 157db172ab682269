"""Augmenting a corpus, and the file that keeps what was written: one line a document, appended as it is done.

A line names what it was made from, so that a second run goes on where the first ended and nothing that was
made otherwise is taken for done.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from polyprag._polyprag import Document
from polyprag.augment.base import Augmentation, Augmenter, AugmentSettings, Pair
from polyprag.corpus import content_id
from polyprag.errors import CorpusError
from polyprag.jsonl import append_lines, read_resumable


def augment(
    augmenter: Augmenter,
    documents: Sequence[Document],
    settings: AugmentSettings = AugmentSettings(),
    *,
    path: Path | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Augmentation]:
    """Augment every document, in their order.

    Args:
        path: a JSONL file to append to and to resume from; None keeps nothing on disk. Lines that were made
            from other settings or prompts, another model or another form of a document are left there and
            made anew.
        progress: called with the number of documents that each step finished.

    Raises:
        CorpusError: ``path`` is no augmentation file.
        EndpointError: an endpoint refuses, or does not answer; what came before is kept.
    """
    made, contents = _made(augmenter, settings), {d.id: _content(d) for d in documents}
    done: dict[str | int, Augmentation] = {}
    overtaken: dict[str | int, dict[str, Any]] = {}
    for line in _lines(path) if path is not None else ():
        id = line.augmentation.id
        if line.made == made and contents.get(id) == line.content:
            done[id] = line.augmentation
            overtaken.pop(id, None)
        elif id in done:
            overtaken[id] = _row(done[id], augmenter.name, contents[id], made)
    if path is not None and overtaken:
        # The last line of a document tells others what was trained, and another's must not.
        _append(path, list(overtaken.values()))
    progress(len(done))
    todo = [d for d in documents if d.id not in done]
    if todo:
        # Closed at once when anything fails: an endpoint is still being asked.
        with closing(augmenter.write(documents, todo, settings)) as results:

            def keep(batch: Sequence[Augmentation]) -> None:
                if path is not None:
                    _append(path, [_row(r, augmenter.name, contents[r.id], made) for r in batch])
                done.update((r.id, r) for r in batch)
                progress(len(batch))

            try:
                for batch in results:
                    keep(batch)
            except KeyboardInterrupt as stopped:
                keep(results.throw(stopped))  # what has come meanwhile, if anything has
                raise
    return [done[d.id] for d in documents]


def others_in(path: Path, augmenter: Augmenter, settings: AugmentSettings) -> Counter[str]:
    """How many lines of a file were not made by this augmenter, prompts and settings: by model.

    Raises:
        CorpusError: ``path`` is no augmentation file.
    """
    made = _made(augmenter, settings)
    return Counter(line.by for line in _lines(path) if line.made != made)


def read_pairs(path: Path) -> list[tuple[str, str]]:
    """The (question, answer) pairs of an augmentation file, as training has seen them.

    Of a document that was augmented again, for other settings say, the last line counts.
    """
    last = {line.augmentation.id: line.augmentation for line in _lines(path)}
    return [(pair.question, pair.answer) for row in last.values() for pair in row.pairs]


def read_augmentations(path: Path, documents: Sequence[Document]) -> tuple[list[Augmentation], str]:
    """What an augmentation file has for each of ``documents``, in their order; and who wrote it.

    The lines may have been changed by hand. Of a document that has several the last one counts.

    Raises:
        CorpusError: it is no augmentation file, lacks a document, or has one with another text.
    """
    last = {line.augmentation.id: line for line in _lines(path)}
    missing = [d.id for d in documents if d.id not in last]
    if missing:
        raise CorpusError(
            f"{path}: nothing for {len(missing)} of {len(documents)} documents, {missing[0]!r} for one; "
            "finish it with polyprag augment, or take the documents out of the corpus"
        )
    for document in documents:
        content = last[document.id].content
        if content is not None and content != _content(document):
            raise CorpusError(
                f"{path}: the document {document.id!r} had another title or text when this was written; "
                "augment it anew, or restore it"
            )
    by = sorted({last[d.id].by for d in documents})
    return [last[d.id].augmentation for d in documents], ", ".join(by)


def append_augmentations(
    path: Path, documents: Sequence[Document], augmentations: Sequence[Augmentation], by: str
) -> None:
    """Append to an augmentation file what it does not end with already: the last line of a document counts.

    The lines that are there stay, since they may have been paid for. Raises CorpusError as the readers do.
    """
    last = {line.augmentation.id: (line.augmentation, line.content) for line in _lines(path)}
    given = [(a, _content(d)) for d, a in zip(documents, augmentations, strict=True)]
    _append(path, [_row(a, by, content, "") for a, content in given if last.get(a.id) != (a, content)])


@dataclass(frozen=True)
class Summary:
    """What came out of an augmentation: what to look at before hours of training."""

    documents: int
    pairs: int
    rewrites: int
    without_pairs: int
    dropped: Mapping[str, int]

    def __str__(self) -> str:
        text = f"{self.pairs} pairs and {self.rewrites} rewrites of {self.documents} documents"
        text += f", {self.without_pairs} of them without a pair"
        reasons = ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in self.dropped.items())
        text += f"; dropped: {reasons or 'none'}"
        if 2 * self.without_pairs > self.documents:
            text += (
                ". What no pair asks is not learnt: let a larger model write them, or one that knows the "
                "language (--model, --augment-url)"
            )
        return text


def summary(augmentations: Iterable[Augmentation]) -> Summary:
    """Counts over all documents, the commonest reason first."""
    found = list(augmentations)
    dropped: Counter[str] = Counter()
    for augmentation in found:
        dropped.update(augmentation.dropped)
    return Summary(
        documents=len(found),
        pairs=sum(len(a.pairs) for a in found),
        rewrites=sum(a.rewrite is not None for a in found),
        without_pairs=sum(not a.pairs for a in found),
        dropped=dict(dropped.most_common()),
    )


@dataclass(frozen=True)
class _Line:
    """A line of a file; ``content`` is None where somebody else wrote it."""

    augmentation: Augmentation
    by: str
    content: str | None
    made: str | None


def _append(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    try:
        append_lines(path, rows)
    except KeyboardInterrupt:
        # An append that is broken off leaves nothing, and these may have been paid for. Twice does no harm.
        append_lines(path, rows)
        raise


def _row(augmentation: Augmentation, by: str, content: str, made: str) -> dict[str, Any]:
    return {**asdict(augmentation), "by": by, "content": content, "made": made}


def _content(document: Document) -> str:
    return content_id(document.title, document.text or "")


def _made(augmenter: Augmenter, settings: AugmentSettings) -> str:
    return hashlib.blake2b(repr(augmenter.making(settings)).encode(), digest_size=16).hexdigest()


def _lines(path: Path) -> list[_Line]:
    return [_line(path, number, row) for number, row in enumerate(read_resumable(path), start=1)]


def _line(path: Path, number: int, row: dict[str, Any]) -> _Line:
    try:
        pairs = tuple(Pair(str(p["question"]), str(p["answer"])) for p in row["pairs"])
        if not isinstance(row["id"], str | int) or not isinstance(row.get("rewrite"), str | None):
            raise TypeError("id or rewrite is of another type")
        augmentation = Augmentation(row["id"], pairs, row.get("rewrite"), dict(row.get("dropped", {})))
        return _Line(augmentation, str(row.get("by", "unknown")), row.get("content"), row.get("made"))
    except (KeyError, TypeError, ValueError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise CorpusError(
            f"{path}, line {number}: not a line of an augmentation file ({reason}); give a file that "
            "`polyprag augment` wrote, or another name to augment anew"
        ) from error
