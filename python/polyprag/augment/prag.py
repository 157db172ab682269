"""PRAG's augmentation files, ``data_aug/<data set>/<model>/<type>.json``, read as they are.

A list of questions, each with the passages that were found for it, and for each of those a rewrite and
question-answer pairs that a model wrote. The files know passages by their place behind a question; here a
passage is one document, whichever questions it stands behind.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyprag._polyprag import Document
from polyprag.augment.answer import pair_of
from polyprag.augment.base import Augmentation, Pair
from polyprag.corpus import Passage, UnifiedRow
from polyprag.errors import CorpusError

_FORM = (
    "an entry is {test_id, question, answer, augment: [{pid, passage, <model>_rewrite, "
    "<model>_qa: [{question, answer, full_answer}, ...]}, ...]}"
)


@dataclass(frozen=True)
class PragSet:
    """What one file holds.

    rows: its questions, with the passages that were found for each (nobody labelled them gold); entries
    without a question or an answer have none. documents: every passage once, the id made from its text.
    augmentations: one a document, in their order, of ``model``. Pairs are taken as they are: only what
    repeats a question of the same passage, or has no text, is dropped and counted. places: for each entry,
    the ids of its passages, as they are ranked there.
    """

    rows: tuple[UnifiedRow, ...]
    documents: tuple[Document, ...]
    augmentations: tuple[Augmentation, ...]
    model: str
    places: tuple[tuple[str, ...], ...] = ()

    def augmentations_of(self, path: Path, documents: Sequence[Document]) -> list[Augmentation]:
        """The augmentations of documents that may have ids and titles of their own: the text tells.

        Raises:
            CorpusError: a document's text is not in the file.
        """
        by_text = {_folded(d.text or ""): a for d, a in zip(self.documents, self.augmentations, strict=True)}
        found = [by_text.get(_folded(d.text or "")) for d in documents]
        missing = [d.id for d, a in zip(documents, found, strict=True) if a is None]
        if missing:
            raise CorpusError(
                f"{path}: no passage has the text of {len(missing)} of {len(documents)} documents, "
                f"{missing[0]!r} for one; take them out of the corpus, or encode the file itself "
                "(--format prag)"
            )
        return [
            Augmentation(d.id, a.pairs, a.rewrite, a.dropped)
            for d, a in zip(documents, found, strict=True)
            if a is not None
        ]


def is_prag(path: str | os.PathLike[str]) -> bool:
    """Whether a file is one JSON array, as PRAG's are, and not a line a document."""
    with open(path, "rb") as stream:
        return stream.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def read_prag(path: str | os.PathLike[str], model: str | None = None) -> PragSet:
    """Documents, augmentations and questions of a file.

    model: whose rewrites and pairs are taken; needed only if there are several's.

    Raises:
        OSError: the file cannot be read.
        CorpusError: it has not this form; the message names the entry.
    """
    name = os.fspath(path)
    try:
        entries = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise CorpusError(f"{name}: no valid JSON ({error}); copy the file again") from error
    if not isinstance(entries, list) or not entries:
        raise CorpusError(f"{name}: no entry in the file; it needs a list of them, and {_FORM}")
    reader = _Reader(name, model)
    for number, entry in enumerate(entries, start=1):
        reader.read(entry, number)
    return reader.result()


class _Reader:
    def __init__(self, path: str, model: str | None) -> None:
        self.path = path
        self.model = model
        self.where = ""
        self.documents: dict[str, Document] = {}
        self.pairs: dict[str, dict[str, Pair]] = {}
        self.rewrites: dict[str, str] = {}
        self.dropped: dict[str, dict[str, int]] = {}
        self.rows: dict[str, UnifiedRow] = {}
        self.places: list[tuple[str, ...]] = []

    def result(self) -> PragSet:
        augmentations = tuple(
            Augmentation(id, tuple(pairs.values()), self.rewrites.get(id), self.dropped[id])
            for id, pairs in self.pairs.items()
        )
        return PragSet(
            tuple(self.rows.values()),
            tuple(self.documents.values()),
            augmentations,
            self.model or "",
            tuple(self.places),
        )

    def read(self, entry: object, number: int) -> None:
        self.where = f"entry {number}"
        if not isinstance(entry, dict):
            raise self._fails("is no object")
        test_id = entry.get("test_id", number - 1)
        self.where = f"entry {number} (test_id {test_id!r})"
        passages = entry.get("augment")
        if not isinstance(passages, list) or not passages:
            raise self._fails("has no list augment; run PRAG's augmentation on it")
        found = [self._passage(passage, place) for place, passage in enumerate(passages, start=1)]
        self.places.append(tuple(passage.id for passage in found))
        self.where = f"entry {number} (test_id {test_id!r})"
        self._question(entry, str(test_id), number, list(dict.fromkeys(found)))

    def _passage(self, value: object, place: int) -> Passage:
        self.where = f"{self.where.partition(', passage')[0]}, passage {place}"
        if not isinstance(value, dict):
            raise self._fails("is no object")
        text = value.get("passage")
        if not isinstance(text, str) or not text.strip():
            raise self._fails("has no text in passage")
        if not _is_utf8(text):
            raise self._fails("holds half of a surrogate pair; take it out")
        passage = Passage(None, text)
        model = self._model(value)
        pairs = value.get(f"{model}_qa", [])
        rewrite = value.get(f"{model}_rewrite")
        if not isinstance(pairs, list) or not isinstance(rewrite, str | None):
            raise self._fails(f"has a {model}_qa that is no list, or a {model}_rewrite that is no text")
        id = passage.id
        self.documents.setdefault(id, passage.document())
        if rewrite and rewrite.strip() and _is_utf8(rewrite):
            self.rewrites.setdefault(id, rewrite.strip())
        kept, dropped = self.pairs.setdefault(id, {}), self.dropped.setdefault(id, {})
        for pair in pairs:
            read = _pair(pair)
            reason = "malformed" if read is None else "duplicate" if read.question in kept else None
            if reason is not None:
                dropped[reason] = dropped.get(reason, 0) + 1
            elif read is not None:
                kept[read.question] = read
        return passage

    def _model(self, passage: dict[str, Any]) -> str:
        """The model whose rewrite and pairs are read: the same all through a file."""
        models = sorted({key.rpartition("_")[0] for key in passage if key.endswith(("_qa", "_rewrite"))})
        if self.model is None and len(models) > 1:
            raise self._fails(f"is augmented by {', '.join(models)}: name one of them")
        if self.model is None and models:
            self.model = models[0]
        if self.model not in models:
            have = ", ".join(models) or "no model"
            raise self._fails(f"has nothing of the model {self.model!r}, but of {have}")
        return str(self.model)

    def _question(self, entry: dict[str, Any], id: str, number: int, passages: list[Passage]) -> None:
        question, given = entry.get("question"), entry.get("answer")
        answers = given if isinstance(given, list) else [given]
        texts = tuple(dict.fromkeys(a for a in answers if isinstance(a, str) and a.strip() and _is_utf8(a)))
        if not isinstance(question, str) or not question.strip() or not _is_utf8(question) or not texts:
            return
        if id in self.rows:
            raise self._fails("has the test_id of an earlier entry; give each its own")
        kind = entry.get("type")
        self.rows[id] = UnifiedRow(
            id, kind if isinstance(kind, str) else None, question, texts, tuple(passages), number
        )

    def _fails(self, problem: str) -> CorpusError:
        return CorpusError(f"{self.path}, {self.where}: {problem} ({_FORM})")


def _pair(value: object) -> Pair | None:
    if not isinstance(value, dict) or not {"question", "answer"} <= value.keys():
        return None
    return pair_of(value)


def _folded(text: str) -> str:
    return " ".join(text.split())


def _is_utf8(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
