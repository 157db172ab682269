"""What a hypernetwork learns from: the trained LoRA of each document (DyPRAG, arXiv 2503.23895).

DyPRAG makes the LoRA of a document from its hidden states. Its last layer mixes a few A's and a few B's of
every module, with weights that the text gives: these are latent experts mixed by factors, and the weights are
a route. So here the network is the amortised router, the decoder and the experts, and what it makes of a
document is kept as a code. It is trained on three losses: that of language modelling, the squared error of
the LoRA that it makes against the one that was trained for the document alone, and the divergence of what
the model says under the one from what it says under the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from polyprag.errors import InvalidInput
from polyprag.layers import RoutedModel
from polyprag.lora import lent, parts_of

_BLOCK = 1024  # LoRAs that are read at a time


class Teacher:
    """The LoRAs of all documents, rows [n, width] of :class:`polyprag.lora.Slots`; maybe in a file."""

    def __init__(self, routed: RoutedModel, loras: NDArray[np.float32]) -> None:
        width = sum(routed.rank * n for m in routed.modules for n in (m.in_features, m.out_features))
        if loras.ndim != 2 or loras.shape[1] != width:
            raise InvalidInput(f"loras: expected one of {width} numbers a document, not {loras.shape}")
        self._routed, self._loras = routed, loras
        total = np.zeros(width)
        for begin in range(0, len(loras), _BLOCK):
            total += loras[begin : begin + _BLOCK].sum(axis=0, dtype=np.float64)
        self.mean = (total / len(loras)).astype(np.float32)

    def read(self, documents: NDArray[np.int64]) -> Tensor:
        """The LoRAs of some documents [n, width]."""
        return torch.from_numpy(np.asarray(self._loras[documents])).to(self._routed.parameters()[0].device)

    @torch.no_grad()
    def begin(self) -> None:
        """Have the experts begin at the mean of the LoRAs: the start that the squared error asks for.

        Their A's stay as different from one another as they were drawn. The mean is most of every LoRA: from
        numbers near 0, as published, the error would first have to fall by it.
        """
        mean = torch.from_numpy(self.mean).unsqueeze(0).to(self._routed.parameters()[0].device)
        for layer, (a, b) in zip(self._routed.layers.values(), parts_of(self._routed, mean), strict=True):
            A = layer.A.view(-1, *a.shape[1:])
            A += a - A.mean(0, keepdim=True)
            layer.B.view(-1, *b.shape[1:]).add_(b)

    def errors(self, routes: Tensor, loras: Tensor) -> Tensor:
        """The squared error of each document's LoRA, made by its route [n, G, K]: the sum over matrices of
        their means [n].
        """
        total = torch.zeros(len(loras), device=loras.device)
        for layer, (a, b) in zip(self._routed.layers.values(), parts_of(self._routed, loras), strict=True):
            w = routes[:, layer.shape.group]
            for experts, lora in ((layer.A, a), (layer.B, b)):
                made = w @ experts.view(w.shape[1], -1)
                total = total + (made - lora.reshape(made.shape)).square().mean(1)
        return total

    @contextmanager
    def lent(self, loras: Tensor, mixing: Tensor) -> Iterator[None]:
        """Inside, the model computes under the LoRAs [n, width], each row under a mean of them by its weights
        ``mixing`` [rows, n].
        """
        groups = self._routed.groups
        with lent(self._routed, loras), self._routed.route(mixing.unsqueeze(1).expand(-1, groups, -1)):
            yield
