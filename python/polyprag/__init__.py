"""Parametric retrieval-augmented generation with latent experts (Poly-PRAG).

A store holds experts that a corpus shares, a route for each document, and a BM25 index.
"""

from importlib import import_module
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

if TYPE_CHECKING:
    from polyprag.engine import Answer, Engine
    from polyprag.exporting import export_merged, export_peft
    from polyprag.importing import import_peft
    from polyprag.recoding import recode
    from polyprag.serving import ServeSettings, serve

__all__ = [
    "Answer",
    "Combination",
    "Document",
    "Engine",
    "Hit",
    "Module",
    "PartInfo",
    "ServeSettings",
    "Store",
    "StoreInfo",
    "StoreSpec",
    "VerifyReport",
    "Writer",
    "__version__",
    "errors",
    "export_merged",
    "export_peft",
    "import_peft",
    "recode",
    "serve",
]

# These need torch and transformers, or numpy; a store must not wait for them.
_LATER = {
    "Answer": "polyprag.engine",
    "Engine": "polyprag.engine",
    "export_merged": "polyprag.exporting",
    "export_peft": "polyprag.exporting",
    "import_peft": "polyprag.importing",
    "recode": "polyprag.recoding",
    "ServeSettings": "polyprag.serving",
    "serve": "polyprag.serving",
}


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    if name in _LATER:
        try:
            return getattr(import_module(_LATER[name]), name)
        except ModuleNotFoundError as error:
            from polyprag.extras import remedied

            raise ImportError(f"polyprag.{name}: {remedied(error)}", name=error.name) from error
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
