"""What an amortised router reads of each document, kept in a file: computed once, for more than memory holds.

Blocks of documents are computed one by one, and each is on disk before it is marked as done. So a run that
was stopped goes on with the next block, and processes that train together share the blocks.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polyprag._polyprag import Document
from polyprag.jsonl import write_at, write_atomic
from polyprag.models import BaseModel, fingerprint, passage_text
from polyprag.router import DEPTHS, TOKENS, feature_size, text_features
from polyprag.world import World

_BLOCK = 1024  # documents
_KEY = 16  # bytes that name the run, before one byte a block: 1 if it is done


def document_features(
    base: BaseModel, documents: Sequence[Document], progress: Callable[[int], None] = lambda done: None
) -> NDArray[np.float32]:
    """:func:`polyprag.router.text_features` of titles and texts [n, f], in memory."""
    return text_features(base, [passage_text(d.title, d.text or "") for d in documents], progress=progress)


def features_in_file(
    base: BaseModel,
    documents: Sequence[Document],
    folder: Path,
    *,
    progress: Callable[[int], None] = lambda done: None,
) -> NDArray[np.float32]:
    """The same in ``folder``/features.npy, memory-mapped and read-only; blocks that are there stay.

    Called by all processes that train together, which have to share the folder. What was computed by another
    base model or of other documents is computed anew.

    progress: called with the number of documents of each block that is there.
    """
    world = World.current()
    shape = len(documents), feature_size(base)
    file = _File(folder, shape, _key(base, documents))
    with world.one_by_one():
        file.begin()
    missing = file.missing()
    world.wait()  # all have looked before the first block is added
    progress(shape[0] - sum(len(documents[file.block(number)]) for number in missing))
    for place, number in enumerate(missing):
        block = documents[file.block(number)]
        if place % world.size == world.rank:
            file.write(number, document_features(base, block))
        progress(len(block))
    world.wait()
    return file.read()


class _File:
    """An array [n, f] of float32 in blocks of rows, and a file of marks that says which are there."""

    def __init__(self, folder: Path, shape: tuple[int, int], key: bytes) -> None:
        self._path, self._marks = folder / "features.npy", folder / "features.done"
        self._shape, self._key = shape, key
        self._blocks = -(-shape[0] // _BLOCK)

    def block(self, number: int) -> slice:
        return slice(number * _BLOCK, min((number + 1) * _BLOCK, self._shape[0]))

    def begin(self) -> None:
        """Make both files, unless they are there and of this run."""
        if self._begun():
            return
        self._marks.unlink(missing_ok=True)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        np.lib.format.open_memmap(self._path, "w+", dtype=np.float32, shape=self._shape)
        write_atomic(self._marks, self._key + bytes(self._blocks))

    def missing(self) -> list[int]:
        """The blocks that are not there yet."""
        marks = self._marks.read_bytes()[_KEY:]
        return [number for number, mark in enumerate(marks) if not mark]

    def write(self, number: int, rows: NDArray[np.float32]) -> None:
        """A block is on disk before its mark is."""
        where = self.read().offset + self.block(number).start * self._shape[1] * rows.itemsize
        _write(self._path, rows.tobytes(), where)
        _write(self._marks, b"\1", _KEY + number)

    def read(self) -> np.memmap[Any, np.dtype[np.float32]]:
        return np.lib.format.open_memmap(self._path, "r")

    def _begun(self) -> bool:
        try:
            marks = self._marks.read_bytes()
            return (
                marks[:_KEY] == self._key
                and len(marks) == _KEY + self._blocks
                and self.read().shape == self._shape
            )
        except (FileNotFoundError, ValueError):  # ValueError: numpy's word for a torn file
            return False


def _write(path: Path, content: bytes, where: int) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        write_at(file, content, where, "a block", path)
        os.fsync(file)
    finally:
        os.close(file)


def _key(base: BaseModel, documents: Sequence[Document]) -> bytes:
    """Names what is read, and by what."""
    digest = hashlib.blake2b(digest_size=_KEY)
    digest.update(json.dumps([fingerprint(base), str(base.model.dtype), TOKENS, DEPTHS, _BLOCK]).encode())
    for document in documents:
        digest.update(repr((document.title, document.text)).encode())
    return digest.digest()
