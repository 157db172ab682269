"""Batched generation from a base model: prompts in, continuations out, in the order of the prompts."""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList

from polyprag.errors import InvalidInput
from polyprag.layers import RoutedModel
from polyprag.models import BaseModel


@dataclass(frozen=True)
class GenerationSettings:
    """How to decode: greedy unless a temperature is given; a stop string ends a row and is cut off."""

    max_new_tokens: int = 32
    stop: tuple[str, ...] = ("\n",)
    temperature: float | None = None
    top_p: float = 0.95
    seed: int = 0
    batch_size: int = 16


@dataclass(frozen=True)
class Spent:
    """What one continuation took: seconds, its share of its batch's, and tokens.

    prefill: until the first token is there; decode: the rest. prompt_tokens: with the prefix.
    """

    prefill: float
    decode: float
    prompt_tokens: int
    new_tokens: int


def generate(
    base: BaseModel,
    prompts: Sequence[str],
    settings: GenerationSettings,
    *,
    routed: RoutedModel | None = None,
    routes: Tensor | None = None,
    prefix: str = "",
    spent: dict[int, Spent] | None = None,
) -> Iterator[tuple[int, str]]:
    """Yield (index, continuation) for every prompt, batch by batch, long prompts first.

    Args:
        routes: [len(prompts), groups, K], the route of each prompt, used through ``routed``.
        prefix: a text that all prompts begin with; it is read by the model once.
        spent: is given, under each index, what its continuation took.
    """
    if routes is not None and routed is None:
        raise InvalidInput("routes need the routed model that uses them")
    if routes is not None and len(routes) != len(prompts):
        raise InvalidInput(f"{len(routes)} routes for {len(prompts)} prompts: give one for each")
    if routes is not None and prefix:
        raise InvalidInput("a prefix is read once, without a route: prompts with routes cannot share one")
    tokenizer = base.tokenizer
    head = tokenizer(prefix, add_special_tokens=True).input_ids if prefix else []
    rows = [tokenizer(p, add_special_tokens=not prefix).input_ids for p in prompts]
    cache = _read_prefix(base, head) if head else None
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    for start in range(0, len(order), settings.batch_size):
        batch = order[start : start + settings.batch_size]
        scope: Any = nullcontext()
        if routed is not None and routes is not None:
            scope = routed.route(routes[batch].to(base.device))
        with scope:
            texts, took = _generate_batch(base, [rows[i] for i in batch], settings, head, cache, start)
        if spent is not None:
            spent.update(zip(batch, took, strict=True))
        yield from zip(batch, texts, strict=True)


@torch.no_grad()
def _read_prefix(base: BaseModel, head: list[int]) -> DynamicCache:
    cache = DynamicCache(config=base.model.config)
    base.model(torch.tensor([head], device=base.device), use_cache=True, **{_cache_argument(base): cache})
    return cache


def _cache_argument(base: BaseModel) -> str:
    # transformers renames past_key_values to cache, and drops the old name in 5.40.
    return "cache" if "cache" in inspect.signature(base.model.forward).parameters else "past_key_values"


@torch.no_grad()
def _generate_batch(
    base: BaseModel,
    rows: list[list[int]],
    settings: GenerationSettings,
    head: list[int],
    prefix_cache: DynamicCache | None,
    offset: int,
) -> tuple[list[str], list[Spent]]:
    width = max(len(row) for row in rows)
    pad = base.tokenizer.pad_token_id
    # The prefix, then the padding, then the prompt: positions count only what the mask lets through.
    ids = torch.tensor([head + [pad] * (width - len(r)) + r for r in rows], device=base.device)
    mask = torch.tensor(
        [[1] * len(head) + [0] * (width - len(r)) + [1] * len(r) for r in rows], device=base.device
    )
    # A model's own settings (Qwen2.5: repetition_penalty 1.1) would punish answers that the prompt holds.
    options: dict[str, Any] = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0}
    options["no_repeat_ngram_size"] = 0
    if settings.temperature:
        options |= {
            "do_sample": True,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "top_k": 0,
        }
    if prefix_cache is not None:
        cache = copy.deepcopy(prefix_cache)
        cache.batch_repeat_interleave(len(rows))
        options[_cache_argument(base)] = cache
    stop = _StopAt(base, ids.shape[1], settings.stop)
    model: Any = base.model
    started = time.perf_counter()
    with torch.random.fork_rng([base.device] if base.device.type == "cuda" else []):
        torch.manual_seed(settings.seed + offset)
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=settings.max_new_tokens,
            pad_token_id=pad,
            stopping_criteria=StoppingCriteriaList([stop]),
            **options,
        )
    new = output[:, ids.shape[1] :]
    texts = base.tokenizer.batch_decode(new, skip_special_tokens=True)
    ended = time.perf_counter()
    first = stop.first or ended
    prefill, decode = (first - started) / len(rows), (ended - first) / len(rows)
    lengths = (new != pad).sum(1).tolist()
    took = [Spent(prefill, decode, len(head) + len(r), n) for r, n in zip(rows, lengths, strict=True)]
    return [_cut(text, settings.stop) for text in texts], took


def _cut(text: str, stop: tuple[str, ...]) -> str:
    body = text.lstrip()
    ends = [at for s in stop if (at := body.find(s)) >= 0]
    return body[: min(ends)] if ends else body


class _StopAt(StoppingCriteria):
    """Ends a row once its continuation, past leading blanks, contains a stop string."""

    def __init__(self, base: BaseModel, prompt_length: int, stop: tuple[str, ...]) -> None:
        self.base = base
        self.prompt_length = prompt_length
        self.stop = stop
        self.first: float | None = None  # when the first token was there

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:  # noqa: ARG002 - as called
        texts = self.base.tokenizer.batch_decode(input_ids[:, self.prompt_length :], skip_special_tokens=True)
        if self.first is None:
            self.first = time.perf_counter()  # decoding has waited for the device
        done = [any(s in text.lstrip() for s in self.stop) for text in texts]
        return torch.tensor(done, device=input_ids.device)
