"""Hugging Face data sets: a store's documents and routes as one.

The other way, :func:`polyprag.corpus.read_corpus` reads one, in memory, on disk or on the hub. Needs
``datasets`` (``pip install 'polyprag[datasets]'``).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from typing import Any, Literal

import datasets

from polyprag._polyprag import Store

_BATCH = 1_024


def to_dataset(store: Store, routes: Literal["w", "z", "code"] | None = None) -> Any:
    """The documents of a store as a ``datasets.Dataset``, which holds all of them in memory.

    Columns: ``id``, ``title``, ``text``, ``metadata`` (JSON text), and with ``routes`` ``route``: the weights
    or logits as float32 [groups, experts], or the code as float32 [d]; null for a document without one.
    """
    number = "uint64" if store.spec.id_type == "u64" else "string"
    columns: dict[str, Any] = {
        "id": datasets.Value(number),
        "title": datasets.Value("string"),
        "text": datasets.Value("string"),
        "metadata": datasets.Value("string"),
    }
    if routes is not None:
        inner = datasets.Value("float32")
        columns["route"] = datasets.List(inner if routes == "code" else datasets.List(inner))

    def rows() -> Iterator[dict[str, Any]]:
        ids = iter(store)
        while batch := list(islice(ids, _BATCH)):
            known = [id for id in batch if routes is not None and store.is_routed(id)]
            found = dict(zip(known, store.routes(known, routes), strict=True)) if known and routes else {}
            for document in store.documents(batch):
                row: dict[str, Any] = {
                    "id": document.id,
                    "title": document.title,
                    "text": document.text,
                    "metadata": None if document.metadata is None else json.dumps(document.metadata),
                }
                if routes is not None:
                    route = found.get(document.id)
                    row["route"] = None if route is None else route.tolist()
                yield row

    return datasets.Dataset.from_list(list(rows()), features=datasets.Features(columns))
