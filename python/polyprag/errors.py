"""Everything that polyprag raises by itself.

One tree with an abstract root. Failures of the operating system are not in it: a missing
path, a refused permission or a full disk stay the builtin :class:`OSError` kinds.
The Rust core raises these very classes (``rust/python/src/errors.rs`` is the only map).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Self


class PolypragError(Exception):
    """Abstract root: catch it to catch every failure that polyprag itself reports."""

    def __new__(cls, *args: object) -> Self:
        if cls is PolypragError:
            raise TypeError("PolypragError is abstract: raise one of its subclasses")
        return super().__new__(cls, *args)


class InvalidInput(PolypragError, ValueError):
    """An argument has the wrong shape, type or value; the message says which and what was expected."""


class StoreError(PolypragError):
    """Something about one store; base of the classes below."""


class NotAStore(StoreError):
    """The path exists, but no committed store lives there."""


class CorruptStore(StoreError):
    """A file of the store is not what its manifest says: truncated, altered or malformed."""


class CorruptIndex(CorruptStore):
    """The BM25 index cannot be read. Routes by id go on working without it."""


class UnsupportedFormat(StoreError):
    """The store was written by a newer polyprag, or needs a feature that this one lacks."""


class IndexTooOld(StoreError):
    """The BM25 index was written by a Tantivy version that can no longer be read."""


class StoreLocked(StoreError):
    """Another writer holds the store; the message names it."""


class StoreClosed(StoreError, ValueError):
    """The store or writer was closed before this call."""


class DuplicateId(StoreError, ValueError):
    """An id is already in the store, or appears twice in one call."""


class UnknownId(StoreError, KeyError):
    """No document of the store has this id."""

    def __str__(self) -> str:  # KeyError would print the repr of the message
        return str(self.args[0]) if self.args else ""


class Unrouted(StoreError):
    """The document is searchable but has no route, so it cannot be mixed into an answer."""


class CorpusError(PolypragError, ValueError):
    """A corpus, question or augmentation file is not usable; names the file, the line and the remedy."""


class BaseModelMissing(PolypragError):
    """The base model is neither given, nor cached, nor installed; the message says how to get it."""


class BaseModelMismatch(PolypragError):
    """The store was trained for another base model than the one at hand."""


class CheckpointMismatch(PolypragError):
    """A checkpoint belongs to other settings or other data than this run."""


class EndpointError(PolypragError):
    """A model's endpoint refuses, cannot be reached or answers nothing useful; the message has the remedy."""
