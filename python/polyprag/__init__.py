"""Parametric retrieval-augmented generation with latent experts (Poly-PRAG).

A store holds experts that a corpus shares, a route for each document, and a BM25 index.
"""

from typing import TYPE_CHECKING, Any

from polyprag import errors
from polyprag._polyprag import (
    Combination,
    Document,
    Hit,
    Module,
    PartInfo,
    Store,
    StoreInfo,
    StoreSpec,
    VerifyReport,
    Writer,
    __version__,
)
from polyprag.recoding import recode

if TYPE_CHECKING:
    from polyprag.engine import Answer, Engine

__all__ = [
    "Answer",
    "Combination",
    "Document",
    "Engine",
    "Hit",
    "Module",
    "PartInfo",
    "Store",
    "StoreInfo",
    "StoreSpec",
    "VerifyReport",
    "Writer",
    "__version__",
    "errors",
    "recode",
]


def __getattr__(name: str) -> Any:
    # The engine needs torch and transformers; a store does not, and must not wait for them.
    if name in ("Answer", "Engine"):
        from polyprag import engine

        return getattr(engine, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
