"""What the blocks below the first expert make of each sample: computed once, and read in every epoch after.

No expert is in these blocks, so they say the same of a sample under every route. Training then computes the
blocks above alone: with experts in the upper half of a model, half of its forward pass.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from polyprag.batches import like_length, padded
from polyprag.jsonl import write_at
from polyprag.layers import RoutedModel, place_in_blocks, put_back
from polyprag.models import BaseModel
from polyprag.samples import Sample
from polyprag.sharding import is_sharded
from polyprag.world import World

GROUP = 8  # samples that are computed together
_GPU_GROUP = 32  # where few of them would be a wait for launches
_PROBE = ((1, 2, 3, 5, 3), (2, 5, 1))  # token ids that every vocabulary has
_MOST = 64 << 30  # bytes on disk, and never more than half of what is free, over all processes


class States:
    """The states [tokens, hidden] of every sample, in a file without a name that goes when this does.

    They are computed when they are first asked for, in groups that depend on the samples and the kind of
    device alone: a run that was stopped computes the same numbers again, bit for bit.
    """

    def __init__(
        self, base: BaseModel, lower: _Lower, samples: Sequence[Sample], folder: Path | None
    ) -> None:
        self._base, self._lower, self._samples = base, lower, samples
        self._row = lower.width * base.model.dtype.itemsize
        self._begins = torch.tensor([0, *(len(s.ids) for s in samples)]).cumsum(0)[:-1].tolist()
        order = like_length(samples, range(len(samples)))
        size = GROUP if base.device.type == "cpu" else _GPU_GROUP
        self._groups = [order[i : i + size] for i in range(0, len(order), size)]
        self._group_of = {i: number for number, group in enumerate(self._groups) for i in group}
        self._there = bytearray(len(self._groups))
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed by `close`

    @classmethod
    def of(
        cls, base: BaseModel, routed: RoutedModel, samples: Sequence[Sample], folder: Path | None
    ) -> States | None:
        """None where there is nothing to be had: experts in the first block, a model whose blocks cannot be
        entered in the middle, one in parts, or states that would fill the disk.

        folder: where the file is; None is the system's for temporary files.
        """
        if is_sharded(base.model):
            return None
        lower = _Lower.of(base, routed)
        if lower is None:
            return None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder or tempfile.gettempdir()).free
        needed = sum(len(s.ids) for s in samples) * lower.width * base.model.dtype.itemsize
        if needed * World.current().size > min(_MOST, free // 2):  # each process has a file of its own
            return None
        return cls(base, lower, samples, folder)

    @contextmanager
    def of_batch(self, numbers: Sequence[int]) -> Iterator[None]:
        """Calls of the model inside, with these samples padded on the right as rows, begin above."""
        with self._lower.skipped(self.read(numbers).to(self._base.device)):
            yield

    def read(self, numbers: Sequence[int]) -> Tensor:
        """The states of some samples [rows, longest, hidden], padded with zeros on the right."""
        for group in {self._group_of[i] for i in numbers}:
            if not self._there[group]:
                self._compute(self._groups[group])
                self._there[group] = 1
        lengths = [len(self._samples[i].ids) for i in numbers]
        states = torch.zeros(len(numbers), max(lengths), self._row, dtype=torch.uint8)
        for row, (i, length) in enumerate(zip(numbers, lengths, strict=True)):
            self._read(states[row, :length], self._begins[i] * self._row)
        return states.view(self._base.model.dtype)

    def close(self) -> None:
        """Let the file go. A second call does nothing."""
        self._file.close()

    def _compute(self, group: Sequence[int]) -> None:
        pad = int(self._base.tokenizer.pad_token_id)
        ids, mask = padded([self._samples[i].ids for i in group], pad)
        states = self._lower.states(ids.to(self._base.device), mask.to(self._base.device)).cpu()
        for row, i in enumerate(group):
            own = states[row, : len(self._samples[i].ids)].contiguous().view(torch.uint8)
            content = own.numpy().tobytes()
            write_at(self._file.fileno(), content, self._begins[i] * self._row, "what is kept of a sample")

    def _read(self, into: Tensor, where: int) -> None:
        content = os.pread(self._file.fileno(), into.numel(), where)
        if len(content) != into.numel():
            raise OSError(errno.EIO, "the states of a sample were not read whole")
        into.view(-1).numpy()[:] = np.frombuffer(content, dtype=np.uint8)


class _Reached(Exception):
    """The last block of the lower ones has said what it had to say."""


class _Lower:
    """The blocks of a model below the first that has experts, and how to do without them."""

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module]) -> None:
        self._model, self._blocks = model, blocks
        self._in_tuple = False
        self.width = 0  # numbers of a token's state

    @classmethod
    def of(cls, base: BaseModel, routed: RoutedModel) -> _Lower | None:
        places = [place_in_blocks(base.model, name) for name in routed.layers]
        lists = {id(place[0]): place[0] for place in places if place is not None}
        if len(lists) != 1 or None in places:
            return None
        (blocks,) = lists.values()
        first = min(place[1] for place in places if place is not None)
        lower = cls(base.model.base_model, list(blocks)[:first])
        return lower if first > 0 and lower._works(base) else None

    @torch.no_grad()
    def states(self, ids: Tensor, mask: Tensor) -> Tensor:
        """What these blocks say of rows of tokens [rows, longest, hidden]."""
        said: list[Any] = []

        def reached(*call: Any) -> None:
            said.append(call[-1])  # the block, what it was given, what it says
            raise _Reached

        hook = self._blocks[-1].register_forward_hook(reached)
        try:
            self._model(input_ids=ids, attention_mask=mask, use_cache=False)
        except _Reached:
            pass
        finally:
            hook.remove()
        self._in_tuple = isinstance(said[0], tuple)
        states: Tensor = said[0][0] if self._in_tuple else said[0]
        self.width = states.shape[-1]
        return states

    @contextmanager
    def skipped(self, states: Tensor) -> Iterator[None]:
        """Inside, these blocks compute nothing, and the last of them says ``states``."""
        before = [block.__dict__.get("forward") for block in self._blocks]
        said = (states,) if self._in_tuple else states
        for block in self._blocks:
            block.__dict__["forward"] = lambda *given, **named: said
        try:
            yield
        finally:
            for block, forward in zip(self._blocks, before, strict=True):
                put_back(block, forward)

    @torch.no_grad()
    def _works(self, base: BaseModel) -> bool:
        """Whether the model says the same either way, by trying."""
        ids, mask = (t.to(base.device) for t in padded(_PROBE, 0))
        try:
            whole = self._model(input_ids=ids, attention_mask=mask, use_cache=False)[0]
            states = self.states(ids, mask) * mask.unsqueeze(-1)
            with self.skipped(states):
                entered = self._model(input_ids=ids, attention_mask=mask, use_cache=False)[0]
        except Exception:  # noqa: BLE001 - whatever a model of another make dislikes
            return False
        rows = mask.bool()
        whole, entered = whole[rows].float(), entered[rows].float()
        return (
            states.ndim == 3
            and whole.shape == entered.shape
            and bool(torch.allclose(whole, entered, rtol=1e-3, atol=1e-3 * float(whole.abs().max())))
        )
