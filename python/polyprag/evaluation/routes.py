"""What the routes of a report look like: mean weights of experts, and which documents are near by route."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from polyprag._polyprag import Store
from polyprag.corpus import DocumentId
from polyprag.inspection import Sample, draw, nearest

SHOWN = 24  # documents in a picture
COMPARED = 2_000  # documents among which the nearest are looked for
NEAREST = 3
_MOST_EXPERTS = 64  # of one LoRA a document, a picture says nothing


def route_facts(store: Store, documents: Sequence[DocumentId], seed: int = 0) -> dict[str, Any]:
    """Facts about the routes of documents, as JSON values; distances are those of ``inspection.nearest``.

    documents: ``[{id, title}]`` of those shown, the first of the given ones; weights: ``[n][K]``, each
    expert's mean weight over the groups; distances: ``[n][n]``; nearest: for each
    ``[{id, title, distance}]``, the nearest first, among ``compared`` documents of the store.
    Empty if fewer than two have a route, or if there is an expert for each document.
    """
    shown = [id for id in dict.fromkeys(documents) if id in store and store.is_routed(id)][:SHOWN]
    if len(shown) < 2 or store.spec.experts > _MOST_EXPERTS:
        return {}
    routes = store.routes(shown)
    among = Sample(tuple(shown), routes, len(shown))
    sample = draw(store, COMPARED, seed)
    distances = np.zeros((len(shown), len(shown)))
    for row, id in enumerate(shown):
        for neighbour in nearest(store, id, among, len(shown)):
            distances[row, shown.index(neighbour.id)] = neighbour.distance
    titles = store.documents(shown)
    return {
        "documents": [{"id": document.id, "title": document.title} for document in titles],
        "weights": np.round(routes.mean(1), 5).tolist(),
        "distances": np.round(distances, 4).tolist(),
        "nearest": [
            [
                {"id": n.id, "title": n.title, "distance": round(n.distance, 4)}
                for n in nearest(store, id, sample, NEAREST)
            ]
            for id in shown
        ],
        "compared": len(sample.ids),
    }
