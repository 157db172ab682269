"""Systems that answer questions, each one small class with ``name`` and ``answer(questions)``."""

from polyprag.systems.base import System
from polyprag.systems.closed_book import ClosedBook
from polyprag.systems.combine import Combine
from polyprag.systems.polyprag import RetrievedRoute, RouteOfDocuments, UniformRoute
from polyprag.systems.rag import Rag

__all__ = ["ClosedBook", "Combine", "Rag", "RetrievedRoute", "RouteOfDocuments", "System", "UniformRoute"]
