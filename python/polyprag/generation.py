"""Batched generation from a base model: prompts in, continuations out, each under a route of its own.

The batches run through transformers' ``generate``: its caches, padding, beams and attention kernels. What it
lacks is here: text row by row as it comes, stop strings that are cut off, and sampling that neither touches
torch's global generator nor depends on what else is in the batch.
"""

from __future__ import annotations

import contextvars
import math
import queue
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional
from transformers import (
    CompileConfig,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from polyprag.errors import InvalidInput
from polyprag.layers import Merged, RoutedModel
from polyprag.models import BaseModel, check_length, end_tokens
from polyprag.prefixes import Prefixes, Read, cache_argument
from polyprag.stops import begun, cut

#: A text, or its tokens as they are (see :func:`polyprag.models.chat_prompt`).
Prompt: TypeAlias = str | Sequence[int]
#: Takes the index of a prompt and the next piece of its continuation.
OnText: TypeAlias = Callable[[int, str], None]


#: How tokens become a text.
#: Some tokenizers would take out a blank once a comma follows: it may be sent by then.
DECODING = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}

COMPILER = "inductor"
COLDEST = 1e-30  # the lowest temperature that is divided by: below, float32 has no numbers for what comes
_CACHE_STEP = 64  # tokens, by which caches of fixed length differ: each length is compiled for


@dataclass(frozen=True)
class GenerationSettings:
    """How to decode: greedy, unless there is a temperature or there are beams.

    ``stop``: strings that end a continuation, past leading blanks, and are cut off.
    ``temperature``: samples; each continuation is drawn by a generator of its own, from ``seed`` and its
    number, so it is the same in every batch. ``top_p`` and ``top_k`` (0: all) are the usual cuts.
    ``batch_size``: prompts at a time.
    ``beams``: of beam search. ``sequences``: continuations for each prompt: its best beams, or samples.
    ``compile``: have torch compile the step of decoding, over a cache of fixed length: a minute
    or more for each length, once; then a step is faster. Beams, and prompts with a prefix, go without.
    """

    max_new_tokens: int = 32
    stop: tuple[str, ...] = ("\n",)
    temperature: float | None = None
    top_p: float = 0.95
    seed: int = 0
    batch_size: int = 16
    top_k: int = 0
    beams: int = 1
    sequences: int = 1
    compile: bool = False

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "batch_size", "beams", "sequences"):
            if getattr(self, name) < 1:
                raise InvalidInput(f"{name} is at least 1, not {getattr(self, name)}")
        if self.temperature is not None and not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise InvalidInput(f"temperature is a number of at least 0, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise InvalidInput(f"top_p is above 0 and at most 1, not {self.top_p}")
        if self.top_k < 0:
            raise InvalidInput(f"top_k is at least 1, or 0 for all tokens, not {self.top_k}")
        if "" in self.stop:
            raise InvalidInput("a stop string is empty, which every text contains")
        if self.temperature and self.beams > 1:
            raise InvalidInput("beam search does not sample: give a temperature or beams, not both")
        if self.sequences > max(self.beams, 1) and not self.temperature:
            raise InvalidInput(
                f"{self.sequences} sequences of a prompt: give as many beams, or a temperature to sample"
            )


@dataclass(frozen=True)
class Spent:
    """What one continuation took: seconds, its share of its batch's, and tokens.

    prefill: until the first token is there; decode: the rest. prompt_tokens: with the prefix.
    new_tokens: of all its sequences. ended: by a stop string or an end of text, not by the limit of tokens
    (every one of them).
    """

    prefill: float
    decode: float
    prompt_tokens: int
    new_tokens: int
    ended: bool = True


def generate(
    base: BaseModel,
    prompts: Sequence[Prompt],
    settings: GenerationSettings,
    *,
    routed: RoutedModel | None = None,
    routes: Tensor | Merged | None = None,
    prefix: str = "",
    spent: dict[int, Spent] | None = None,
    on_text: OnText | None = None,
) -> Iterator[tuple[int, str]]:
    """Yield (index, continuation) for every prompt, batch by batch, long prompts first.

    May run in many threads at once. What ``settings.sequences`` asks for comes one after the other.

    Args:
        routes: [len(prompts), groups, K], the route of each prompt, used through ``routed``; or one route
            of all prompts in merged form.
        prefix: a text that all prompts begin with; a model that keeps keys and values of all tokens reads it
            once.
        spent: is given, under each index, what its continuation took.
        on_text: is called with every piece of text as soon as it is sure to belong to the continuation. What
            it raises ends the generation.

    Raises:
        InvalidInput: routes that do not fit the prompts; an empty prompt, or one too long for the model's
            positions; pieces of text of several sequences or beams.
    """
    if routes is not None and routed is None:
        raise InvalidInput("routes need the routed model that uses them")
    if isinstance(routes, Tensor) and len(routes) != len(prompts):
        raise InvalidInput(f"{len(routes)} routes for {len(prompts)} prompts: give one for each")
    if routes is not None and prefix:
        raise InvalidInput("a prefix is read once, without a route: prompts with routes cannot share one")
    if on_text is not None and max(settings.beams, settings.sequences) > 1:
        raise InvalidInput("text cannot be had as it comes from beams or of several sequences")
    head = token_ids(base, prefix) if prefix else []
    rows = [token_ids(base, p, alone=not prefix) for p in prompts]
    if empty := next((i + 1 for i, row in enumerate(rows) if not row), None):
        raise InvalidInput(f"prompt {empty} of {len(rows)} has no token")
    if rows:
        longest = max(range(len(rows)), key=lambda i: len(rows[i]))
        # The last new token is not read.
        tokens = len(head) + len(rows[longest]) + settings.max_new_tokens - 1
        check_length(base, tokens, f"prompt {longest + 1} of {len(rows)} with max_new_tokens: lower either")
    share = routes is None and not settings.compile
    prefixes = Prefixes(base, head, rows, new=settings.max_new_tokens, share=share)
    for numbers in prefixes.batches(settings.batch_size):
        own = routes[numbers].to(base.device) if isinstance(routes, Tensor) else routes
        whole = [[*head, *rows[i]] for i in numbers]
        batch = _Batch(base, settings, prefixes, numbers, whole, routed, own, on_text)
        texts = batch.run()
        if spent is not None:
            spent.update(batch.spent())
        for place, number in enumerate(numbers):
            for text in texts[place * settings.sequences : (place + 1) * settings.sequences]:
                yield number, text


def stream(
    base: BaseModel,
    prompts: Sequence[Prompt],
    settings: GenerationSettings,
    *,
    routed: RoutedModel | None = None,
    routes: Tensor | Merged | None = None,
    spent: dict[int, Spent] | None = None,
) -> Iterator[tuple[int, str]]:
    """Yield (index, piece) as the pieces come, of all prompts of a batch in turn; see :func:`generate`.

    The pieces of a prompt make up its continuation. The model runs in a thread of its own; closing the
    iterator ends that too, before the next piece.
    """
    pieces: queue.SimpleQueue[tuple[int, str] | BaseException | None] = queue.SimpleQueue()
    closed = threading.Event()

    def hand_on(number: int, piece: str) -> None:
        if closed.is_set():
            raise _Closed
        pieces.put((number, piece))

    def work() -> None:
        try:
            for _ in generate(
                base, prompts, settings, routed=routed, routes=routes, spent=spent, on_text=hand_on
            ):
                pass
            pieces.put(None)
        except BaseException as error:  # noqa: BLE001 - raised again where the pieces are read
            pieces.put(error)

    thread = threading.Thread(target=contextvars.copy_context().run, args=(work,), name="polyprag-stream")
    thread.start()
    try:
        while (piece := pieces.get()) is not None:
            if isinstance(piece, BaseException):
                raise piece
            yield piece
    finally:
        closed.set()
        thread.join()


class _Closed(Exception):
    """Nobody reads a stream any more."""


def token_ids(base: BaseModel, prompt: Prompt, *, alone: bool = True) -> list[int]:
    """The tokens of a prompt; of a text with what the tokenizer puts before one that stands ``alone``."""
    if isinstance(prompt, str):
        return list(base.tokenizer(prompt, add_special_tokens=alone).input_ids)
    return list(prompt)


class _Batch:
    """Some prompts, and what becomes of them.

    A call of transformers' ``generate`` decodes all rows until the last has ended. Where rows can be taken
    out, it is stopped when half of them have ended, and another goes on with the rest.
    """

    def __init__(
        self,
        base: BaseModel,
        settings: GenerationSettings,
        prefixes: Prefixes,
        numbers: list[int],
        rows: list[list[int]],
        routed: RoutedModel | None,
        routes: Tensor | Merged | None,
        on_text: OnText | None,
    ) -> None:
        self.base, self.settings = base, settings
        self.prefixes, self.numbers, self.rows = prefixes, numbers, rows
        # Beams are made from a row by ``generate``; samples are rows from the start.
        self.copies = settings.sequences if settings.beams == 1 else 1
        self.routed = routed
        self.routes = routes.repeat_interleave(self.copies, 0) if isinstance(routes, Tensor) else routes
        self.watch = _Watch(self, on_text)

    @torch.no_grad()
    def run(self) -> list[str]:
        """All continuations, those of one prompt together."""
        limit = self.settings.max_new_tokens
        self.started = time.perf_counter()
        read = self.prefixes.read(self.numbers)
        ids, mask = self._inputs(read)
        options = self._options(read)
        may_halt = self.prefixes.plain and self.settings.beams == 1 and not self._fixed(read)
        self.watch.begin(ids.shape[1], may_halt=may_halt)
        routes, going = self.routes, list(range(len(ids)))
        output = self._decode(ids, mask, limit, routes, options)
        self.new = output[:, ids.shape[1] :].tolist()
        while read.cache is not None and self.watch.halted and len(self.new[going[0]]) < limit:
            places = self.watch.take_out()
            going = [going[place] for place in places]
            index = torch.tensor(places, device=self.base.device)
            read.cache.batch_select_indices(index)
            for sampler in options.get("logits_processor", []):
                sampler.keep(places)
            routes = routes[index] if isinstance(routes, Tensor) else routes
            ids = output[index]
            mask = functional.pad(mask[index], (0, ids.shape[1] - mask.shape[1]), value=1)
            output = self._decode(ids, mask, limit - len(self.new[going[0]]), routes, options)
            for row, more in zip(going, output[:, ids.shape[1] :].tolist(), strict=True):
                self.new[row] += more
        texts = [
            cut(text.lstrip(), self.settings.stop)
            for text in self.base.tokenizer.batch_decode(self.new, **DECODING)
        ]
        self.watch.finish(texts)
        self.ended = time.perf_counter()
        return texts

    def _decode(
        self, ids: Tensor, mask: Tensor, limit: int, routes: Tensor | Merged | None, options: dict[str, Any]
    ) -> Tensor:
        """The rows and what comes after them, up to ``limit`` tokens."""
        model: Any = self.base.model
        scope: Any = nullcontext()
        if self.routed is not None and routes is not None:
            scope = self.routed.route(routes)
        options["generation_config"].max_new_tokens = limit
        with scope:
            found: Tensor = model.generate(
                input_ids=ids,
                attention_mask=mask,
                stopping_criteria=StoppingCriteriaList([self.watch]),
                **options,
            )
        return found

    def _inputs(self, read: Read) -> tuple[Tensor, Tensor]:
        rest = [row[length:] for row, length in zip(self.rows, read.lengths, strict=True)]
        width, pad = max(map(len, rest)), self.base.tokenizer.pad_token_id
        # What is read, then padding, then the rest: positions count only what the mask lets through.
        ids = [a + [pad] * (width - len(r)) + r for a, r in zip(read.ids, rest, strict=True)]
        mask = [a + [0] * (width - len(r)) + [1] * len(r) for a, r in zip(read.mask, rest, strict=True)]
        given = (torch.tensor(x, device=self.base.device) for x in (ids, mask))
        ids_of_all, mask_of_all = (x.repeat_interleave(self.copies, 0) for x in given)
        return ids_of_all, mask_of_all

    def _fixed(self, read: Read) -> bool:
        """Whether the cache is of a fixed length, for compiled steps."""
        return self.settings.compile and self.settings.beams == 1 and not any(read.lengths)

    def _options(self, read: Read) -> dict[str, Any]:
        s = self.settings
        config = _Config(  # type: ignore[no-untyped-call]
            num_beams=s.beams,
            num_return_sequences=s.sequences // self.copies,
            pad_token_id=self.base.tokenizer.pad_token_id,
            eos_token_id=sorted(end_tokens(self.base)) or None,
        )
        options: dict[str, Any] = {"generation_config": config}
        if s.temperature:
            names = [f"{s.seed}/{n}/{copy}" for n in self.numbers for copy in range(self.copies)]
            options["logits_processor"] = LogitsProcessorList([_Sampler(s, names, self.base.device)])
        name = cache_argument(self.base.model)
        if self._fixed(read):
            # One of its own: generate's static caches are kept in the model, where threads would share them.
            length = max(map(len, self.rows)) + s.max_new_tokens
            options[name] = StaticCache(self.base.model.config, -(-length // _CACHE_STEP) * _CACHE_STEP)
            config.compile_config = _compile_config(self.base)
        elif read.cache is not None:
            if any(read.lengths):
                read.cache.batch_repeat_interleave(self.copies * s.beams)
            options[name] = read.cache
        return options

    def spent(self) -> Iterator[tuple[int, Spent]]:
        """What each prompt took, by its number."""
        first = self.watch.first or self.ended
        prefill, decode = ((b - a) / len(self.rows) for a, b in ((self.started, first), (first, self.ended)))
        per = self.settings.sequences
        tokens = self.watch.tokens(self.new)
        for place, number in enumerate(self.numbers):
            new = self.new[place * per : (place + 1) * per]
            yield (
                number,
                Spent(
                    prefill,
                    decode,
                    len(self.rows[place]),
                    sum(tokens[place * per : (place + 1) * per]),
                    all(map(self._has_ended, new)),
                ),
            )

    def _has_ended(self, new: list[int]) -> bool:
        if len(new) < self.settings.max_new_tokens or not self.watch.ends.isdisjoint(new):
            return True
        text = str(self.base.tokenizer.decode(new, **DECODING)).lstrip()
        return any(s in text for s in self.settings.stop)


class _Config(GenerationConfig):
    """What ``generate`` is told, and nothing of what the model's own settings say.

    They are meant for chats, or left over from training: a penalty of repetition (Qwen2.5: 1.1) would punish
    answers that the prompt holds, and without a cache (``use_cache``) ours would be read twice.
    """

    def update(
        self, defaults_only: bool = False, allow_custom_entries: bool = False, **values: Any
    ) -> dict[str, Any]:
        if allow_custom_entries:  # how ``generate`` fills in the model's own
            return {}
        unused: dict[str, Any] = super().update(  # type: ignore[no-untyped-call]
            defaults_only, allow_custom_entries, **values
        )
        return unused


def _compile_config(base: BaseModel) -> CompileConfig:
    on_gpu = base.device.type == "cuda"
    config = CompileConfig(backend=COMPILER, mode="reduce-overhead" if on_gpu else "default")
    config._compile_all_devices = True  # type: ignore[assignment]
    return config


class _Watch(StoppingCriteria):
    """Reads along: ends a row once its text, past leading blanks, contains a stop string, hands text on."""

    def __init__(self, batch: _Batch, on_text: OnText | None) -> None:
        self.batch = batch
        self.first: float | None = None  # when the first token was there
        self.ends = end_tokens(batch.base)
        self._width = 0  # of the prompts
        self._may_halt = self.halted = False
        self._readers = self._going = [
            _Reader(batch.base.tokenizer, batch.settings.stop, on_text, number)
            for number in batch.numbers
            for _ in range(batch.copies)
        ]

    def begin(self, width: int, *, may_halt: bool) -> None:
        """The prompts have so many tokens, padding among them. may_halt: when half of the rows have ended."""
        self._width, self._may_halt = width, may_halt

    def take_out(self) -> list[int]:
        """Go on without the rows that have ended; gives the places of the others."""
        places = [place for place, reader in enumerate(self._going) if not reader.done]
        self._going = [self._going[place] for place in places]
        self.halted = False
        return places

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:  # noqa: ARG002 - as called
        if self.batch.settings.beams > 1:  # which change places: a row is not what it was
            decode = self.batch.base.tokenizer.batch_decode
            texts = decode(input_ids[:, self._width :], **DECODING)
            done = [any(s in text.lstrip() for s in self.batch.settings.stop) for text in texts]
        else:
            for reader, token in zip(self._going, input_ids[:, -1].tolist(), strict=True):
                reader.read(token, last=token in self.ends)
            done = [reader.done for reader in self._going]
            if self._may_halt and len(done) / 2 <= sum(done) < len(done):
                self.halted, done = True, [True] * len(done)
        if self.first is None:
            self.first = time.perf_counter()  # reading has waited for the device
        return torch.tensor(done, device=input_ids.device)

    def tokens(self, rows: Sequence[Sequence[int]]) -> list[int]:
        """How many tokens were made for each row: the end of a text counts, padding does not."""
        if self.batch.settings.beams == 1:
            return [reader.tokens for reader in self._readers]  # padding may look like an end
        firsts = [next((i + 1 for i, token in enumerate(row) if token in self.ends), None) for row in rows]
        pad = self.batch.base.tokenizer.pad_token_id
        return [
            sum(token != pad for token in row) if first is None else first
            for row, first in zip(rows, firsts, strict=True)
        ]

    def finish(self, texts: Sequence[str]) -> None:
        """Hand on what was held back."""
        if self.batch.settings.beams == 1:
            for reader, text in zip(self._readers, texts, strict=True):
                reader.finish(text)


class _Reader:
    """The text of one row, made from its tokens as they come."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stop: tuple[str, ...], on_text: OnText | None, number: int
    ) -> None:
        self.done = False
        self.tokens = 0
        self._tokenizer, self._stop, self._on_text, self._number = tokenizer, stop, on_text, number
        self._longest = max(map(len, stop), default=1)
        self._ids: list[int] = []
        self._begin = self._read = 0
        self._text = ""
        self._given = 0

    def read(self, token: int, *, last: bool) -> None:
        if self.done:
            return  # it is padding
        self.tokens += 1
        if not self._stop and self._on_text is None:
            self.done = last
            return
        self._ids.append(token)
        old = len(self._text)
        self._text = (self._text + self._decode()).lstrip()
        begin = max(0, old - self._longest + 1)
        found = [at for s in self._stop if (at := self._text.find(s, begin)) >= 0]
        self.done = last or bool(found)
        if self._on_text is not None:
            self._give(min(found) if found else len(self._text) - begun(self._text, self._stop))

    def finish(self, text: str) -> None:
        """Give what of the whole ``text`` has not been given: it is sure now."""
        self.done = True
        if self._on_text is not None and text.startswith(self._text[: self._given]):
            self._text = text
            self._give(len(text))

    def _decode(self) -> str:
        """What the last token adds; nothing yet where it ends within a character.

        With the tokens before it, since some tokenizers drop a blank at the beginning of a text.
        """
        before = self._tokenizer.decode(self._ids[self._begin : self._read], **DECODING)
        after = str(self._tokenizer.decode(self._ids[self._begin :], **DECODING))
        if after.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        self._begin, self._read = self._read, len(self._ids)
        return after[len(before) :]

    def _give(self, end: int) -> None:
        if end > self._given and self._on_text is not None:
            piece = self._text[self._given : end]
            self._given = end
            self._on_text(self._number, piece)


class _Sampler(LogitsProcessor):
    """Scores whose greatest is a sample of softmax(scores): by noise of the Gumbel distribution for each row.

    What ``generate`` itself draws, all rows of all threads draw from torch's one global generator.
    """

    def __init__(self, settings: GenerationSettings, names: Sequence[str], device: torch.device) -> None:
        self._cuts = LogitsProcessorList([TemperatureLogitsWarper(max(settings.temperature or 1.0, COLDEST))])
        if settings.top_k:
            self._cuts.append(TopKLogitsWarper(settings.top_k))
        if settings.top_p < 1:
            self._cuts.append(TopPLogitsWarper(settings.top_p))
        seeds = [random.Random(name).getrandbits(63) for name in names]
        self._draws = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def keep(self, places: Sequence[int]) -> None:
        """Go on with these rows alone."""
        self._draws = [self._draws[place] for place in places]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.float()
        # The greatest is 0 at any temperature, and the others are below it, be it without end.
        scores = self._cuts(input_ids, scores - scores.amax(-1, keepdim=True))  # type: ignore[arg-type]
        noise = [
            torch.empty_like(row).exponential_(generator=g)
            for row, g in zip(scores, self._draws, strict=True)
        ]
        return scores - torch.stack(noise).log()
