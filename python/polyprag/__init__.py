"""Parametric retrieval-augmented generation with latent experts (Poly-PRAG).

A store holds experts that a corpus shares, a route for each document, and a BM25 index.
"""

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

__all__ = [
    "Combination",
    "Document",
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
]
