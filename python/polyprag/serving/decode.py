"""Continuous decoding: rows join and leave a running batch between one token and the next.

Every row has its own prompt, its own route and its own way to choose a token, and none sees another: its
padding is masked, its positions count its own tokens, and the routed layers gate each row by its own route.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from polyprag.errors import InvalidInput
from polyprag.generation import COLDEST, DECODING
from polyprag.layers import RoutedModel
from polyprag.models import BaseModel, end_tokens
from polyprag.prefixes import cache_argument
from polyprag.stops import begun, cut

_log = logging.getLogger(__name__)

Finish = Literal["stop", "length", "error"]

# How far the logits of a row may be from those that it has alone, relative to their norm: well above what
# rounding does. A mask or positions that a model does not heed are seen by it in float32.
_TOLERANCE = {torch.float32: 1e-3}
_NARROW_TOLERANCE = 0.1


@dataclass(frozen=True)
class Sampling:
    """How a row chooses its tokens; a temperature of 0 takes the likeliest."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(eq=False, kw_only=True)
class Row:
    """A prompt and what is made of it.

    ids: the prompt's tokens. route: [groups, K], or None for the base model alone. limit: the most tokens
    that are generated. stop: strings that end the row, and are cut off. ``finish`` says why it ended.
    """

    ids: list[int]
    route: NDArray[np.float32] | None
    limit: int
    stop: tuple[str, ...] = ()
    sampling: Sampling = Sampling()
    new: list[int] = field(default_factory=list)
    text: str = ""
    finish: Finish | None = None
    _generator: torch.Generator | None = None

    @property
    def length(self) -> int:
        return len(self.ids) + len(self.new)

    def take(self, token: int, tokenizer: Any, ends: frozenset[int]) -> None:
        """Go on by one token; ``text`` grows by what no later token can change."""
        self.new.append(token)
        if token in ends:
            self.finish = "stop"
        elif len(self.new) >= self.limit:
            self.finish = "length"
        body = tokenizer.decode(self.new, **DECODING).lstrip()
        before = cut(body, self.stop)
        if len(before) < len(body):
            self.finish, body = "stop", before
        if self.finish is None:
            body = body.rstrip("\N{REPLACEMENT CHARACTER}")  # half of a character
            body = body[: len(body) - begun(body, self.stop)]
        # What was given out stays: it may have been sent.
        self.text += body.rstrip()[len(self.text) :]

    def choose(self, logits: Tensor) -> int:
        """A token by ``sampling``, from logits [vocabulary].

        Drawn on the CPU, so that a seed means the same on any device.
        """
        if self._generator is None:
            self._generator = torch.Generator().manual_seed(self.sampling.seed)
        z = logits.float().cpu()
        p = torch.softmax((z - z.max()) / max(self.sampling.temperature, COLDEST), dim=-1)
        if self.sampling.top_p < 1:
            falling, order = p.sort(descending=True)
            # The likeliest tokens that together have top_p, the one that reaches it included.
            p[order[falling.cumsum(-1) - falling >= self.sampling.top_p]] = 0.0
        # From the vocabulary as it stands: in falling order, rounding would decide between two tokens that
        # are as likely, and it is not the same in every batch.
        return int(torch.multinomial(p, 1, generator=self._generator))


class Batch:
    """The rows that are decoded together. For one thread.

    >>> batch = Batch(base, routed)
    >>> batch.join([Row(ids=ids, route=route, limit=32)])
    >>> while batch.rows:
    ...     batch.step()
    ...     done = batch.leave()
    """

    def __init__(self, base: BaseModel, routed: RoutedModel) -> None:
        self.base, self.routed = base, routed
        self.rows: list[Row] = []
        self._ends = end_tokens(base)
        parameters = inspect.signature(base.model.forward).parameters
        self._with_positions = "position_ids" in parameters
        self._with_last = "logits_to_keep" in parameters
        self._cache_name = cache_argument(base.model)
        experts = next(iter(routed.experts().values())).shape[0]
        self._no_route = np.zeros((routed.groups, experts), dtype=np.float32)
        self._cache = DynamicCache()
        self._mask = torch.zeros(0, 0, dtype=torch.long, device=base.device)
        self._scope = ExitStack()

    @torch.no_grad()
    def join(self, rows: Sequence[Row]) -> None:
        """Read the prompts of some rows, give each its first token, and take them into the batch."""
        device = self.base.device
        width = max(len(row.ids) for row in rows)
        pad = self.base.tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (width - len(r.ids)) + r.ids for r in rows], device=device)
        mask = torch.tensor([[0] * (width - len(r.ids)) + [1] * len(r.ids) for r in rows], device=device)
        cache = DynamicCache()
        with self.routed.route(self._routes(rows)):
            logits = self._forward(ids, mask, (mask.cumsum(-1) - 1).clamp(min=0), cache)
        self._choose(rows, logits)
        self._cache, self._mask = _joined(self._cache, self._mask, cache, mask)
        self.rows += rows
        self._follow()

    @torch.no_grad()
    def step(self) -> None:
        """The next token of every row."""
        device = self.base.device
        ids = torch.tensor([[row.new[-1]] for row in self.rows], device=device)
        positions = torch.tensor([[row.length - 1] for row in self.rows], device=device)
        self._mask = functional.pad(self._mask, (0, 1), value=1)
        self._choose(self.rows, self._forward(ids, self._mask, positions, self._cache))

    def leave(self, also: Sequence[Row] = ()) -> list[Row]:
        """Take out the rows that have ended, and those of ``also``."""
        gone = [row for row in self.rows if row.finish is not None or row in also]
        if not gone:
            return []
        kept = [i for i, row in enumerate(self.rows) if row not in gone]
        self.rows = [self.rows[i] for i in kept]
        if not kept:
            self.clear()
            return gone
        index = torch.tensor(kept, device=self._mask.device)
        self._mask = self._mask[index]
        # Columns that are padding in all rows that stay.
        start = int(self._mask.any(0).to(torch.int8).argmax())
        self._mask = self._mask[:, start:]
        for layer in _filled(self._cache):
            layer.keys = layer.keys[index, :, start:]  # type: ignore[index]
            layer.values = layer.values[index, :, start:]  # type: ignore[index]
        self._follow()
        return gone

    def clear(self) -> None:
        """Forget all rows."""
        self.rows = []
        self._cache = DynamicCache()
        self._mask = self._mask.new_zeros(0, 0)
        self._scope.close()

    def _follow(self) -> None:
        """Let the layers use the routes of the rows as they are now, until they change."""
        self._scope.close()
        self._scope.enter_context(self.routed.route(self._routes(self.rows)))

    def _routes(self, rows: Sequence[Row]) -> Tensor:
        """[rows, groups, K]; zeros, which add nothing, for rows without a route."""
        routes = np.stack([self._no_route if row.route is None else row.route for row in rows])
        return torch.from_numpy(routes).to(self.base.device)

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache) -> Tensor:
        """The logits of the last token of every row [rows, vocabulary]."""
        options: dict[str, Any] = {self._cache_name: cache}
        if self._with_positions:
            options["position_ids"] = positions
        if self._with_last:
            options["logits_to_keep"] = 1
        logits = self.base.model(input_ids=ids, attention_mask=mask, use_cache=True, **options).logits
        return logits[:, -1]  # type: ignore[no-any-return]

    def _choose(self, rows: Sequence[Row], logits: Tensor) -> None:
        finite = torch.isfinite(logits).all(-1)
        likeliest = logits.argmax(-1)
        for i, (fine, token) in enumerate(zip(finite.tolist(), likeliest.tolist(), strict=True)):
            row = rows[i]
            if not fine:
                row.finish = "error"  # fp16 that overflowed, say: there is no token to take
            elif row.sampling.temperature > 0:
                try:
                    chosen = row.choose(logits[i])
                except Exception:  # noqa: BLE001 - whatever it is, it is this row's
                    _log.exception("no token could be drawn")
                    row.finish = "error"  # the others of the batch have theirs
                else:
                    row.take(chosen, self.base.tokenizer, self._ends)
            else:
                row.take(token, self.base.tokenizer, self._ends)


def check(base: BaseModel, routed: RoutedModel) -> None:
    """Decode two prompts together and alone, and compare: not every model can be batched so.

    Raises:
        InvalidInput: the model keeps something else than keys and values (Mamba), or does not heed the mask.
    """
    prompts = [
        base.tokenizer(text).input_ids for text in ("Question: Who?\nAnswer:", "Where is the old mill?")
    ]

    def rows() -> list[_Watched]:
        return [_Watched(ids=ids, route=None, limit=3) for ids in prompts]

    batched, alone = rows(), rows()
    try:
        batch = Batch(base, routed)
        batch.join(batched[:1])
        batch.step()
        batch.join(batched[1:])
        batch.step()
        batch.leave()
        batch.step()
        batch.clear()
        for row in alone:
            batch.join([row])
            batch.step()
            batch.step()
            batch.clear()
    except Exception as error:
        raise InvalidInput(
            f"{base.name} ({type(base.model).__name__}) cannot be decoded in batches that change: "
            f"{type(error).__name__}: {error}"
        ) from error
    near = _TOLERANCE.get(base.model.dtype, _NARROW_TOLERANCE)
    for a, b in zip(batched, alone, strict=True):
        for together, by_itself in zip(a.seen, b.seen, strict=True):
            if not (together - by_itself).norm() <= near * by_itself.norm():
                raise InvalidInput(
                    f"{base.name} ({type(base.model).__name__}) says something else in a batch than alone: "
                    "it cannot be served"
                )


@dataclass(eq=False, kw_only=True)
class _Watched(Row):
    """Keeps its logits, and goes on by a token of its prompt, whatever is likeliest."""

    sampling: Sampling = Sampling(temperature=1.0)
    seen: list[Tensor] = field(default_factory=list)

    def choose(self, logits: Tensor) -> int:
        self.seen.append(logits.double())
        return self.ids[-1]


def _filled(cache: DynamicCache) -> list[DynamicLayer]:
    """The layers that hold keys and values; those that read another layer's hold none."""
    filled = []
    for layer in cache.layers:
        if type(layer) is not DynamicLayer:
            raise InvalidInput(f"the model keeps a {type(layer).__name__}, which cannot change its rows")
        if layer.get_seq_length():
            filled.append(layer)
    return filled


def _joined(
    cache: DynamicCache, mask: Tensor, more: DynamicCache, more_mask: Tensor
) -> tuple[DynamicCache, Tensor]:
    """Two caches and masks as one: the shorter is filled up on the left."""
    if not len(mask):
        _filled(more)
        return more, more_mask
    width = max(mask.shape[1], more_mask.shape[1])
    pairs = list(zip(_filled(cache), _filled(more), strict=True))
    keys = [torch.cat([_widened(x, width) for x in (a.keys, b.keys)]) for a, b in pairs]
    values = [torch.cat([_widened(x, width) for x in (a.values, b.values)]) for a, b in pairs]
    masks = [functional.pad(m, (width - m.shape[1], 0)) for m in (mask, more_mask)]
    both = torch.cat(masks)
    # From here on nothing can fail: a cache that is half joined would be nobody's.
    for (layer, _), k, v in zip(pairs, keys, values, strict=True):
        layer.keys, layer.values = k, v
    return cache, both


def _widened(states: Tensor | None, width: int) -> Tensor:
    """[rows, heads, tokens, size] with zeros before the tokens, up to ``width`` of them."""
    assert states is not None  # noqa: S101 - a filled layer has both
    return functional.pad(states, (0, 0, width - states.shape[-2], 0))
