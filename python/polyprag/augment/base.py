"""What augmentation asks for and gives, and the one interface of all that write it."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from polyprag._polyprag import Document
from polyprag.augment.prompts import Prompts


@dataclass(frozen=True)
class AugmentSettings:
    """What to write for each document. ``pairs`` is the most that are kept of one document.

    ``sentences`` and ``batch_size`` count for a local model, ``yes_no`` (also ask what is answered by yes or
    no) for an endpoint. Without a temperature a local model is greedy, and an endpoint does as it likes.
    """

    pairs: int = 8
    rewrite: bool = False
    sentences: int = 8
    batch_size: int = 96
    temperature: float | None = None
    seed: int = 0
    yes_no: bool = False
    prompts: Prompts = Prompts()


@dataclass(frozen=True)
class Pair:
    question: str
    answer: str


@dataclass(frozen=True)
class Augmentation:
    """What training makes its samples from. ``dropped`` counts what did not pass, by reason."""

    id: str | int
    pairs: tuple[Pair, ...] = ()
    rewrite: str | None = None
    dropped: dict[str, int] = field(default_factory=dict)


class Augmenter(Protocol):
    """Writes pairs and rewrites: a model in this process, or one at an endpoint."""

    @property
    def name(self) -> str:
        """The model, as tables and files name it."""
        ...

    def making(self, settings: AugmentSettings) -> tuple[object, ...]:
        """All that its results depend on but the document. What differs in it is never taken for the same."""
        ...

    def write(
        self, documents: Sequence[Document], todo: Sequence[Document], settings: AugmentSettings
    ) -> Generator[Sequence[Augmentation], None, None]:
        """Yield the augmentations of ``todo``, in any order, as they are done.

        ``documents`` is the whole corpus, ``todo`` the part of it that is not done yet.
        """
        ...
