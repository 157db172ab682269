"""Another codec for the routes of a store: a new store beside the old one, and how far its routes moved."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from polyprag._polyprag import Store
from polyprag.errors import InvalidInput

SAMPLE = 20_000
# What a weight of 0 in the new store counts as in the divergence, which would be infinite.
LEAST_WEIGHT = 1e-6

ExpertDtype: TypeAlias = Literal["float32", "bfloat16", "float16", "int8"]
_Array: TypeAlias = NDArray[np.float32]
_BATCH = 1_024


@dataclass(frozen=True)
class Decoder:
    """Logits from codes, z = V c + b, and back, c = P (z - b)."""

    V: _Array
    b: _Array
    P: _Array


@dataclass(frozen=True)
class Fidelity:
    """How far the weights w of routes moved, over all documents that have one or a sample of them.

    documents: how many were compared, of ``of``; sampled: whether these are not all.
    max_dw, mean_dw: |w' - w|, over all experts, groups and compared documents.
    mean_kl: KL(w || w') in nats, mean over groups and documents; group_kl: its mean for each group. None with
    phi ``linear``, whose weights are no distribution.
    """

    documents: int
    of: int
    sampled: bool
    max_dw: float
    mean_dw: float
    mean_kl: float | None
    group_kl: tuple[float, ...] | None


@dataclass(frozen=True)
class Recoded:
    """What became of a store. ``fidelity`` is against the routes as the source keeps them.

    note: that the source was lossy already, if it was, so that its own loss is not in ``fidelity``; and that
    its amortised router was left out, if it was.
    """

    codec_before: str
    codec: str
    fidelity: Fidelity
    route_bytes_per_document_before: float
    route_bytes_per_document: float
    total_bytes_before: int
    total_bytes: int
    note: str | None

    def to_json(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)


def recode(
    source: str | os.PathLike[str],
    dest: str | os.PathLike[str],
    *,
    codec: str | None = None,
    expert_dtype: ExpertDtype | None = None,
    sample: int = SAMPLE,
    seed: int = 0,
    step: Callable[[str], None] = lambda doing: None,
    progress: Callable[[int, int], object] | None = None,
) -> Recoded:
    """Write a new store at ``dest`` with the documents of ``source`` and their routes in another codec.

    For ``code(d)`` a decoder is fitted to the logits of a sample (:func:`fit_decoder`), unless the source
    keeps codes of d numbers: then its decoder, codes and amortised router are taken over. A router goes with
    its decoder: with any other routes it is left out, and :attr:`Recoded.note` says so. Documents, ids and
    index are copied.

    Args:
        codec: None leaves the routes as they are, bit for bit.
        expert_dtype: None leaves the experts as they are.
        sample: at most so many documents are fitted to, and as many compared.
        seed: of the two draws, if there are more.
        step: called with what is being done.
        progress: called with how much of it is done: bytes that are written, documents that are compared.

    Raises:
        InvalidInput: the source keeps weights alone and the codec needs logits, or nothing is to change.
    """
    if codec is None and expert_dtype is None:
        raise InvalidInput("recode: name a codec, an expert_dtype, or both")
    if sample < 1:
        raise InvalidInput(f"sample: expected 1 or more, got {sample}")
    with Store.open(source) as old:
        spec, info = old.spec, old.info()
        codec = codec or spec.codec
        step("choosing documents")
        routed = info.documents - info.unrouted
        fitted, compared = _samples(old, routed, sample, seed)
        decoder = None
        dimensions = _code_dimensions(codec)
        if dimensions is not None and dimensions != _code_dimensions(spec.codec):
            step("fitting the decoder")
            decoder = fit_decoder(_logits(old, fitted), dimensions)
        step("writing")
        old.recode(
            dest,
            codec=codec,
            decoder=None if decoder is None else (decoder.V, decoder.b),
            projection=None if decoder is None else decoder.P,
            expert_dtype=expert_dtype,
            progress=progress,
        )
        step("comparing")
        with Store.open(dest) as new:
            fidelity = compare(old, new, compared, of=routed, progress=progress)
            return Recoded(
                spec.codec,
                new.spec.codec,
                fidelity,
                info.route_bytes_per_document,
                new.info().route_bytes_per_document,
                info.total_bytes,
                new.info().total_bytes,
                _note(spec.codec, old.router is not None and new.router is None),
            )


def fit_decoder(logits: NDArray[np.floating[Any]], dimensions: int) -> Decoder:
    """The decoder that loses least of ``logits`` [n, G * K], in squares.

    b is their mean, and V has the first singular vectors, each scaled by the standard deviation of its code,
    so that codes have like ranges. Directions beyond the rank of the logits are 0.
    """
    n, columns = logits.shape
    z = logits.astype(np.float64)
    b = z.mean(0) if n else np.zeros(columns)
    z -= b
    # The smaller of the two products has the same spectrum.
    if n < columns:
        variances, left = np.linalg.eigh(z @ z.T)
        vectors = z.T @ left
        vectors /= np.maximum(np.linalg.norm(vectors, axis=0), np.finfo(float).tiny)
    else:
        variances, vectors = np.linalg.eigh(z.T @ z)
    order = np.argsort(-variances, kind="stable")[:dimensions]
    deviations = np.sqrt(np.maximum(variances[order], 0) / max(n, 1))
    real = deviations > 1e-6 * max(deviations.max(initial=0.0), np.finfo(float).tiny)
    deviations, order = deviations[real], order[real]
    V, P = np.zeros((columns, dimensions)), np.zeros((dimensions, columns))
    V[:, : len(order)] = vectors[:, order] * deviations
    P[: len(order)] = (vectors[:, order] / deviations).T
    return Decoder(V.astype(np.float32), b.astype(np.float32), P.astype(np.float32))


def compare(
    old: Store,
    new: Store,
    ids: list[str | int],
    *,
    of: int,
    progress: Callable[[int, int], object] | None = None,
) -> Fidelity:
    """The fidelity of ``new`` to ``old`` over documents that both have."""
    groups, are_distributions = old.spec.groups, old.spec.phi != "linear"
    greatest, sum_dw, numbers = 0.0, 0.0, 0
    kl = np.zeros(groups)
    for at, batch in enumerate(_batches(ids), 1):
        w, moved = old.routes(batch).astype(np.float64), new.routes(batch).astype(np.float64)
        dw = np.abs(moved - w)
        greatest = max(greatest, float(dw.max(initial=0.0)))
        sum_dw += float(dw.sum())
        numbers += dw.size
        if are_distributions:
            ratio = np.where(w > 0, w, 1.0) / np.maximum(moved, LEAST_WEIGHT)
            kl += (w * np.log(np.where(w > 0, ratio, 1.0))).sum((0, 2))
        if progress is not None:
            progress(min(at * _BATCH, len(ids)), len(ids))
    count = max(len(ids), 1)
    return Fidelity(
        documents=len(ids),
        of=of,
        sampled=len(ids) < of,
        max_dw=greatest,
        mean_dw=sum_dw / max(numbers, 1),
        mean_kl=float(kl.mean()) / count if are_distributions else None,
        group_kl=tuple((kl / count).tolist()) if are_distributions else None,
    )


def _samples(store: Store, routed: int, size: int, seed: int) -> tuple[list[str | int], list[str | int]]:
    """Ids of documents with a route, to fit to and to compare: all of them, or two draws of which neither
    knows of the other, so that a decoder is not judged by the documents that it was fitted to.
    """
    with_route = iter(store) if routed == len(store) else (id for id in store if store.is_routed(id))
    if routed <= size:
        ids = list(with_route)
        return ids, ids
    rng = np.random.default_rng(seed)
    first, second = (set(rng.choice(routed, size, replace=False).tolist()) for _ in range(2))
    drawn = [(i, id) for i, id in enumerate(with_route) if i in first or i in second]
    return [id for i, id in drawn if i in first], [id for i, id in drawn if i in second]


def _logits(store: Store, ids: list[str | int]) -> _Array:
    columns = store.spec.groups * store.spec.experts
    found = [store.routes(batch, "z").reshape(-1, columns) for batch in _batches(ids)]
    return np.concatenate(found or [np.empty((0, columns), dtype=np.float32)])


def _batches(ids: list[str | int]) -> list[list[str | int]]:
    return [ids[start : start + _BATCH] for start in range(0, len(ids), _BATCH)]


def _code_dimensions(codec: str) -> int | None:
    found = re.match(r"code\((\d+)\b", codec)
    return int(found[1]) if found else None


def _note(codec: str, router_left: bool) -> str | None:
    notes = []
    if codec != "f32":
        notes.append(
            f"the source keeps routes as {codec}, which is lossy: its own loss is not in these figures"
        )
    if router_left:
        notes.append("the amortised router is left out: it makes codes for the source's decoder alone")
    return "; ".join(notes) or None
