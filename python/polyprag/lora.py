"""One LoRA a document (PRAG, arXiv 2501.15915), trained many documents at a time as rows of one batch.

The layers hold as many experts as a batch has documents: slots. A step copies the LoRAs of its documents into
them, each sample's route is its own slot, and the slots' gradients go back to the documents.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from polyprag.layers import RoutedModel


class Slots:
    """The experts of a routed model as the LoRAs of a batch's documents.

    A LoRA is a row of numbers: A [r, in] and B [out, r] of every module, one after the other.
    """

    def __init__(self, routed: RoutedModel, rank: int) -> None:
        self._routed = routed
        self._layers = list(routed.layers.values())
        self.rank = rank
        self.slots = routed.route_shape[1]
        self.sizes = [rank * n for m in routed.modules for n in (m.in_features, m.out_features)]
        self.width = sum(self.sizes)

    def start(self) -> NDArray[np.float32]:
        """Where every LoRA begins [width]: the same random A for all, as in PRAG, and B of 0."""
        parts = [part for layer in self._layers for part in (layer.A[: self.rank], layer.B[: self.rank].T)]
        return torch.cat([p.detach().reshape(-1) for p in parts]).float().cpu().numpy()

    @torch.no_grad()
    def fill(self, rows: Tensor) -> None:
        """Put the LoRAs of n documents, rows [n, width], into the first n slots."""
        n = len(rows)
        for layer, (a, b) in zip(self._layers, parts_of(self._routed, rows), strict=True):
            layer.A[: n * self.rank] = a.reshape(n * self.rank, -1)
            layer.B[: n * self.rank] = b.reshape(n * self.rank, -1)

    def routes(self, n: int) -> Tensor:
        """The routes of n documents [n, 1, slots]: each its own slot."""
        return torch.eye(n, self.slots, device=self._layers[0].A.device).unsqueeze(1)

    def gradient(self, n: int) -> Tensor:
        """The gradient of the first n slots as rows [n, width], which the layers forget."""
        parts = []
        for layer in self._layers:
            a, b = (torch.zeros_like(p) if p.grad is None else p.grad for p in (layer.A, layer.B))
            a, b = (g[: n * self.rank].view(n, self.rank, -1) for g in (a, b))
            parts += [a.reshape(n, -1), b.transpose(1, 2).reshape(n, -1)]
            layer.A.grad = layer.B.grad = None
        return torch.cat(parts, dim=1)

    def experts(
        self, blocks: Iterable[tuple[NDArray[np.int64], NDArray[np.float32]]], documents: int
    ) -> dict[str, NDArray[np.float32]]:
        """All documents' LoRAs, given as numbers [n] and rows [n, width], as experts of a store.

        ``{module}.A`` [documents, r, in] and ``{module}.B`` [out, documents, r].
        """
        shapes = [layer.shape for layer in self._layers]
        found: dict[str, NDArray[np.float32]] = {}
        for m in shapes:
            found[f"{m.name}.A"] = np.empty((documents, self.rank, m.in_features), dtype=np.float32)
            found[f"{m.name}.B"] = np.empty((m.out_features, documents, self.rank), dtype=np.float32)
        for numbers, rows in blocks:
            parts = iter(np.split(rows, np.cumsum(self.sizes)[:-1], axis=1))
            for m in shapes:
                found[f"{m.name}.A"][numbers] = next(parts).reshape(-1, self.rank, m.in_features)
                b = next(parts).reshape(-1, m.out_features, self.rank)
                found[f"{m.name}.B"][:, numbers] = b.swapaxes(0, 1)
        return found


def parts_of(routed: RoutedModel, rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The LoRAs of n documents, rows [n, width], layer by layer: A [n, r, in] and B [n, r, out]."""
    sizes = [routed.rank * n for m in routed.modules for n in (m.in_features, m.out_features)]
    parts = iter(rows.split(sizes, dim=1))  # type: ignore[no-untyped-call]
    for m in routed.modules:
        a, b = next(parts), next(parts)
        yield a.view(-1, routed.rank, m.in_features), b.view(-1, m.out_features, routed.rank).transpose(1, 2)


@contextmanager
def lent(routed: RoutedModel, rows: Tensor) -> Iterator[None]:
    """Inside, the experts of a routed model are the LoRAs of n documents, rows [n, width], without gradients.

    A route then has n weights.
    """
    layers = list(routed.layers.values())
    kept, shape = [(layer.A, layer.B) for layer in layers], routed.route_shape
    try:
        for layer, (a, b) in zip(layers, parts_of(routed, rows.detach()), strict=True):
            layer.A, layer.B = (nn.Parameter(side.flatten(0, 1).to(layer.A), False) for side in (a, b))
        routed.route_shape = shape[0], len(rows)
        yield
    finally:
        routed.route_shape = shape
        for layer, (A, B) in zip(layers, kept, strict=True):
            layer.A, layer.B = A, B
