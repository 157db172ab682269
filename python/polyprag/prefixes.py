"""What prompts begin with is read by the model once: what all of them begin with, and what some do.

Ten questions are asked about the sentences of a passage, some about each: their prompts are alike up to the
answer. Only the tokens that follow are read for each prompt.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, takewhile
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from polyprag.models import BaseModel

Row = Sequence[int]

_ROWS = 16  # that are read together


@dataclass(frozen=True)
class Read:
    """What the model has read of some prompts.

    lengths: how many tokens of each. ids, mask: the slots of ``cache``, a row for each prompt, all of one
    width. The cache is empty where nothing has been read, and None where the model may want one of its own.
    """

    lengths: list[int]
    ids: list[list[int]]
    mask: list[list[int]]
    cache: DynamicCache | None


class Prefixes:
    """Prompts that are read in batches, each batch up to where its prompts begin to differ.

    prefix: tokens that stand before all rows. new: how many may come behind each. share: look for what some
    rows begin with, too.
    plain: the model keeps keys and values of every token and nothing else, so that rows can be read up to
    any token, and be taken out. Of another model nothing is shared: a state cannot be cut, and in a window
    the padding behind a prefix would take the place of tokens.
    """

    def __init__(self, base: BaseModel, prefix: Row, rows: Sequence[Row], *, new: int, share: bool) -> None:
        self._base, self._rows = base, rows
        # What rows share is padded, and so is what follows it.
        most = len(prefix) + 2 * max(map(len, rows), default=0) + new
        self._cache = _new_cache(base.model, most)
        self._heeds_mask = _takes_cache(base.model)
        self.plain = self._heeds_mask and _keeps_all(base.model, self._cache)
        self._prefix = list(prefix) if self.plain else []
        if self._prefix:
            self._forward([self._prefix], [[1] * len(prefix)], self._cache)
        # A row of no token at all, which attends to nothing, need not come to numbers.
        readable = bool(prefix) or min(map(len, rows), default=0) > 1
        self._groups = groups_of(rows) if share and self.plain and readable else []
        if all(len(members) == 1 for _, members in self._groups):
            self._groups = [(0, list(range(len(rows))))]
        self._group_of = {i: n for n, (_, members) in enumerate(self._groups) for i in members}

    def batches(self, size: int) -> Iterator[list[int]]:
        """The numbers of all rows, so many at a time: long ones first, those that begin alike together."""
        order = [
            i
            for _, members in sorted(self._groups, key=lambda group: -group[0])
            for i in sorted(members, key=lambda i: -len(self._rows[i]))
        ]
        # A model that does not heed the mask can read no padding: the rows of a batch are of one length.
        for _, alike in groupby(order, lambda i: 0 if self._heeds_mask else len(self._rows[i])):
            some = list(alike)
            for start in range(0, len(some), size):
                yield some[start : start + size]

    @torch.no_grad()
    def read(self, numbers: Sequence[int]) -> Read:
        """Read what the rows of a batch share with each other; the cache is the caller's own."""
        places: dict[int, int] = {}  # of the groups in what is read here
        for i in numbers:
            places.setdefault(self._group_of[i], len(places))
        own = [places[self._group_of[i]] for i in numbers]
        stems = [list(self._rows[members[0]][:n]) for n, members in (self._groups[group] for group in places)]
        before, width, pad = len(self._prefix), max(map(len, stems)), int(self._base.tokenizer.pad_token_id)
        lengths = [before + len(stem) for stem in stems]
        ids = [self._prefix + stem + [pad] * (width - len(stem)) for stem in stems]
        mask = [[1] * length + [0] * (before + width - length) for length in lengths]
        cache = None
        if width:
            cache = self._with_stems(ids, mask, lengths)
            cache.batch_select_indices(torch.tensor(own, device=self._base.device))
        elif self.plain:
            cache = copy.deepcopy(self._cache)
            if before:
                cache.batch_repeat_interleave(len(numbers))
        return Read([lengths[p] for p in own], [ids[p] for p in own], [mask[p] for p in own], cache)

    def _with_stems(self, ids: list[list[int]], mask: list[list[int]], lengths: list[int]) -> DynamicCache:
        """A cache of these slots, read some rows at a time: neighbours are of like length."""
        before, width = len(self._prefix), len(ids[0])
        parts = []
        for start in range(0, len(ids), _ROWS):
            some = slice(start, start + _ROWS)
            end = max(lengths[some])
            part = copy.deepcopy(self._cache)
            if before:
                part.batch_repeat_interleave(len(ids[some]))
            if end > before:
                self._forward([row[before:end] for row in ids[some]], [row[:end] for row in mask[some]], part)
            parts.append(part)
        for layers in zip(*(part.layers for part in parts), strict=True):
            for name in ("keys", "values"):
                states = [getattr(layer, name) for layer in layers]
                if states[0] is not None:  # a layer that reads another's holds none
                    filled = [functional.pad(x, (0, 0, 0, width - x.shape[-2])) for x in states]
                    setattr(layers[0], name, torch.cat(filled))
        return parts[0]

    @torch.no_grad()
    def _forward(self, ids: list[list[int]], mask: list[list[int]], cache: DynamicCache) -> None:
        # Without the head: nobody asks what comes next.
        model, device = self._base.model.base_model, self._base.device
        given = torch.tensor(ids, device=device), torch.tensor(mask, device=device)
        model(input_ids=given[0], attention_mask=given[1], use_cache=True, **{cache_argument(model): cache})


def _takes_cache(model: Any) -> bool:
    """Whether the model takes a cache of transformers' own; others, such as RWKV, keep a state instead that
    no such cache holds, and read padding as if it were text.
    """
    return bool(getattr(model, "_supports_default_dynamic_cache", lambda: True)())


def _new_cache(model: Any, tokens: int) -> DynamicCache:
    """A cache for so many tokens: a window that is as wide forgets none of them, and is as none."""
    cache = DynamicCache(config=model.config)
    for number, layer in enumerate(cache.layers):
        if type(layer) is DynamicSlidingWindowLayer and tokens <= layer.sliding_window:
            cache.layers[number] = DynamicLayer()  # type: ignore[no-untyped-call]
    return cache


def _keeps_all(model: Any, cache: DynamicCache) -> bool:
    """Whether the cache keeps the keys and values of every token, nothing else, and all of them are read."""
    # GPT-Neo's windows are in its attention alone: its caches do not tell of them.
    windows = getattr(model.config.get_text_config(), "attention_types", None)
    return not windows and bool(cache.layers) and all(type(layer) is DynamicLayer for layer in cache.layers)


def groups_of(rows: Sequence[Row]) -> list[tuple[int, list[int]]]:
    """Rows that begin alike: how many tokens they share, which is at least half of each and never all of one,
    and their numbers. A row that is like no other is alone, with all of its tokens but the last.
    """
    groups: list[tuple[int, list[int]]] = []
    longest = 0  # of the last group
    for i in sorted(range(len(rows)), key=lambda i: list(rows[i])):
        if groups:
            shared, members = groups[-1]
            shared = min(shared, len(rows[i]) - 1, _alike(rows[members[-1]], rows[i]))
            longest = max(longest, len(rows[i]))
            if 2 * shared >= longest:
                groups[-1] = shared, [*members, i]
                continue
        groups.append((max(len(rows[i]) - 1, 0), [i]))
        longest = len(rows[i])
    return groups


def _alike(a: Row, b: Row) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def cache_argument(model: nn.Module) -> str:
    """What a model calls its cache: transformers renames past_key_values, and drops the old name in 5.40."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
