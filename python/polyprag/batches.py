"""The order of training samples: which are in a step, and as what tensors.

The sequence of batches depends on the samples, the seed and the batch size alone, not on how many processes
share a batch or in how many parts they work it off.
"""

from __future__ import annotations

import math
import random
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from polyprag.samples import Sample


class Order:
    """The batches of every epoch, as numbers of samples; ``steps`` in all."""

    def __init__(self, samples: Sequence[Sample], batch_size: int, seed: int, epochs: int) -> None:
        self._samples, self._batch_size, self._seed = samples, batch_size, seed
        sizes = [math.ceil(sum(s.in_epoch(epoch) for s in samples) / batch_size) for epoch in range(epochs)]
        self._starts = list(accumulate(sizes, initial=0))
        self._epoch: tuple[int, list[list[int]]] | None = None

    @property
    def steps(self) -> int:
        return self._starts[-1]

    def batch(self, step: int) -> list[int]:
        epoch = bisect_right(self._starts, step) - 1
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = (epoch, self._batches(epoch))
        return self._epoch[1][step - self._starts[epoch]]

    def _batches(self, epoch: int) -> list[list[int]]:
        """Samples of like length together, for little padding, and the batches in random order."""
        rng = random.Random(f"{self._seed}/{epoch}")
        order = [i for i, sample in enumerate(self._samples) if sample.in_epoch(epoch)]
        rng.shuffle(order)
        order = like_length(self._samples, order)
        batches = [order[i : i + self._batch_size] for i in range(0, len(order), self._batch_size)]
        rng.shuffle(batches)
        return batches


def like_length(samples: Sequence[Sample], numbers: Iterable[int]) -> list[int]:
    """Sorted in coarse steps of length; inside a step the numbers stay in their order."""
    return sorted(numbers, key=lambda i: len(samples[i].ids) // 4)


def collate(batch: Sequence[Sample], pad: int) -> tuple[Tensor, Tensor, Tensor]:
    """ids, mask and targets [rows, longest], padded on the right.

    A target is the token that follows, or -100 where none is to be learnt.
    """
    ids, mask = padded([s.ids for s in batch], pad)
    targets = torch.full_like(ids, -100)
    for row, sample in enumerate(batch):
        n, begin = len(sample.ids), max(sample.loss_from, 1)
        targets[row, begin - 1 : n - 1] = ids[row, begin:n]
    return ids, mask, targets


def padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Rows of token ids as ids and mask [rows, longest], padded on the right."""
    ids = torch.full((len(rows), max(map(len, rows))), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
    return ids, mask


def learnt(sample: Sample) -> int:
    """How many tokens of a sample count in the loss."""
    return len(sample.ids) - max(sample.loss_from, 1)
