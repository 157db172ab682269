"""Systems that answer questions, each one small class with ``answer(questions)``."""

from polyprag.systems.base import System
from polyprag.systems.closed_book import ClosedBook
from polyprag.systems.combine import Combine
from polyprag.systems.polyprag import (
    AmortisedRoute,
    MeanRoute,
    RetrievedRoute,
    RouteOfDocuments,
    UniformRoute,
)
from polyprag.systems.rag import Rag

__all__ = [
    "AmortisedRoute",
    "ClosedBook",
    "Combine",
    "MeanRoute",
    "Rag",
    "RetrievedRoute",
    "RouteOfDocuments",
    "System",
    "UniformRoute",
]
