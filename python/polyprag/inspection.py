"""What a store's routes look like: which experts documents use, and which documents use the same."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polyprag._polyprag import Store
from polyprag.errors import InvalidInput, Unrouted

#: At most so many documents are compared or averaged, and so many looked through to draw them.
SAMPLE = 20_000
_LOOKED_THROUGH = 2_000_000
_BATCH = 1_024


@dataclass(frozen=True)
class Neighbour:
    """A document and how far its route is, 0 to 1."""

    id: str | int
    title: str | None
    distance: float


@dataclass(frozen=True)
class Facet:
    """Part of the weights of a route, drawn as one heat map: the layers of one kind.

    rows: the experts; columns: the layers, by their number where they have one. weights: [layers, experts].
    """

    name: str
    layers: tuple[str, ...]
    weights: NDArray[np.float32]


@dataclass(frozen=True)
class Sample:
    """Documents that were drawn, and their weights, float32 of shape [n, groups, experts]."""

    ids: tuple[str | int, ...]
    weights: NDArray[np.float32]
    of: int

    @property
    def whole(self) -> bool:
        """Whether all routed documents are in it."""
        return len(self.ids) == self.of


def draw(store: Store, size: int = SAMPLE, seed: int = 0) -> Sample:
    """Documents with a route, all or ``size`` drawn; of the first two million, if there are more."""
    info = store.info()
    routed = info.documents - info.unrouted
    known: Iterator[str | int] = iter(store)
    if info.unrouted:
        known = (id for id in known if store.is_routed(id))
    within = min(routed, _LOOKED_THROUGH)
    if within <= size:
        ids = list(islice(known, within))
    else:
        chosen = set(np.random.default_rng(seed).choice(within, size, replace=False).tolist())
        ids = [id for place, id in enumerate(islice(known, within)) if place in chosen]
    batches = [store.routes(ids[start : start + _BATCH]) for start in range(0, len(ids), _BATCH)]
    empty = np.empty((0, store.spec.groups, store.spec.experts), dtype=np.float32)
    return Sample(tuple(ids), np.concatenate(batches or [empty]), routed)


def nearest(store: Store, id: str | int, sample: Sample, k: int = 10) -> list[Neighbour]:
    """The ``k`` documents of a sample whose routes are nearest to that of ``id``, nearest first.

    Distance is the sum of the weights' absolute differences as a share of both routes' absolute weights,
    averaged over groups: 0 for the same route, 1 for routes that share no expert. Where weights are positive
    and sum to 1 that is their total variation.

    Raises:
        UnknownId: the store has no such document. Unrouted: it has no route. InvalidInput: k below 1.
    """
    if k < 1:
        raise InvalidInput(f"k is at least 1, not {k}")
    own = _route(store, id)
    found = np.empty(len(sample.ids))
    for start in range(0, len(found), _BATCH):
        part = sample.weights[start : start + _BATCH]
        both = np.abs(part).sum(-1) + np.abs(own).sum(-1)
        apart = np.abs(part - own).sum(-1) / np.maximum(both, 1e-12)
        found[start : start + len(part)] = apart.mean(-1)
    order = [int(i) for i in np.argsort(found, kind="stable") if sample.ids[i] != id][:k]
    documents = store.documents([sample.ids[i] for i in order])
    return [
        Neighbour(sample.ids[i], document.title, float(found[i]))
        for i, document in zip(order, documents, strict=True)
    ]


def facets(store: Store, weights: NDArray[np.float32]) -> list[Facet]:
    """Weights [groups, experts] by the kind and the number of the layers that they gate.

    A group of several modules goes by its first one.
    """
    first: dict[int, str] = {}
    for module in store.spec.modules:
        first.setdefault(module.group, module.name)
    by_kind: dict[str, list[tuple[str, int]]] = {}
    for group, name in sorted(first.items()):
        number = re.search(r"(?:^|\.)(\d+)\.", name)
        by_kind.setdefault(name.rpartition(".")[2], []).append((number[1] if number else name, group))
    return [
        Facet(kind, tuple(layer for layer, _ in layers), weights[[group for _, group in layers]])
        for kind, layers in by_kind.items()
    ]


def evenness(weights: NDArray[np.float32]) -> NDArray[np.float64]:
    """How evenly routes [..., groups, experts] spread: 1 for all experts alike, 1 / experts for one alone.

    The exponential of the entropy of each group (the effective number of experts), as a share of K, averaged
    over groups. Of weights of any sign (phi ``linear``) their sizes count.
    """
    w = np.clip(np.abs(weights.astype(np.float64)), 1e-12, None)
    w /= w.sum(-1, keepdims=True)
    spread: NDArray[np.float64] = np.exp(-(w * np.log(w)).sum(-1)).mean(-1) / weights.shape[-1]
    return spread


def map_of(weights: NDArray[np.float32]) -> NDArray[np.float64]:
    """Two coordinates a document, the first two principal components of the weights [n, groups, experts]."""
    flat = weights.reshape(len(weights), -1).astype(np.float64)
    flat = flat - flat.mean(0)
    if min(flat.shape) < 2 or not flat.any():
        return np.zeros((len(flat), 2))
    # Of few documents by their products, of many by those of the columns: the smaller matrix of the two.
    if len(flat) <= flat.shape[1]:
        values, vectors = np.linalg.eigh(flat @ flat.T)
        found = vectors[:, -2:] * np.sqrt(np.clip(values[-2:], 0, None))
    else:
        found = flat @ np.linalg.eigh(flat.T @ flat)[1][:, -2:]
    coordinates: NDArray[np.float64] = found[:, ::-1]
    return coordinates


def facets_json(found: Sequence[Facet], digits: int = 4) -> list[dict[str, Any]]:
    """Facets for machines; weights rounded to ``digits``."""
    return [
        {"name": f.name, "layers": list(f.layers), "weights": f.weights.round(digits).tolist()} for f in found
    ]


def _route(store: Store, id: str | int) -> NDArray[np.float32]:
    if id in store and not store.is_routed(id):
        raise Unrouted(
            f"{store.path}: the document {id!r} has no route: it can be found, and not be mixed in"
        )
    route: NDArray[np.float32] = store.routes([id])[0]
    return route
