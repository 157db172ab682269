"""The engine: question -> documents -> routes -> one combined route -> answer.

The experts are attached to the base model once, when the engine opens. A question costs one BM25 search
and one route; nothing is loaded for it, and every row of a batch has its own route. One engine serves many
threads: a route is an argument of a call, and no call changes what another sees.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeAlias, cast

import numpy as np
import torch
from numpy.typing import NDArray
from typing_extensions import Self

from polyprag._polyprag import Hit, Store
from polyprag.errors import BaseModelMissing, InvalidInput, StoreClosed
from polyprag.forms import Form, FormChoice
from polyprag.generation import GenerationSettings, OnText, Prompt, Spent, generate, stream, token_ids
from polyprag.layers import Kernels, Merged, Mixing, ModuleShape, RoutedModel
from polyprag.models import (
    SMALL_MODEL,
    BaseModel,
    answer_text,
    check_fingerprint,
    load_base_model,
    question_prompt,
)
from polyprag.routing import CombinationRule, combination_weights

ANSWERS = GenerationSettings(max_new_tokens=32)
MERGED_BYTES = 1 << 30

#: The route [groups, K] of a prompt; None is the bare base model.
Route: TypeAlias = NDArray[np.float32] | None


@dataclass(frozen=True)
class Source:
    """A document that an answer came from: its BM25 score, and the weight that its route has in the combined
    one. 0: it has no route, or the rule leaves it out (``first``).
    """

    id: str | int
    title: str | None
    score: float
    weight: float


@dataclass(frozen=True)
class Timings:
    """Seconds. In a batch, each question carries its share."""

    retrieve: float
    route: float
    generate: float


@dataclass(frozen=True)
class Answer:
    """``documents`` is empty where BM25 found nothing: the text is then the base model's own."""

    question: str
    text: str
    documents: tuple[Source, ...]
    timings: Timings


class Engine:
    """Answers from a store's routes.

    >>> with polyprag.Engine.open("island.polyprag") as engine:
    ...     print(engine.ask("Where was Ilsabet Corrow born?").text)
    """

    def __init__(
        self,
        store: Store,
        base: BaseModel,
        routed: RoutedModel,
        *,
        owns_store: bool,
        form: Form = "gates",
        merged_bytes: int = MERGED_BYTES,
        compile: bool = False,
    ) -> None:
        self.store = store
        self.base = base
        self.routed = routed
        self.forms = FormChoice(routed, form, merged_bytes)
        self.compile = compile
        self._owns_store = owns_store
        self._closed = False

    @classmethod
    def open(
        cls,
        store: str | os.PathLike[str] | Store,
        model: str | os.PathLike[str] | BaseModel | None = None,
        *,
        device: str = "auto",
        dtype: str = "auto",
        attention: str = "auto",
        allow_base_mismatch: bool = False,
        form: Form = "gates",
        merged_bytes: int = MERGED_BYTES,
        compile: bool = False,
    ) -> Engine:
        """Open a store and its base model, and attach the experts.

        Args:
            model: a name, a path, a loaded model, or None: the model that the store names, if it is
                installed or cached here. It is never downloaded on the word of a store.
            device, dtype, attention: as in :func:`polyprag.models.load_base_model`, for a model that is not
                loaded yet.
            form: how routes are used: ``gates``, ``merged``, or ``auto``, what is sooner done by times
                measured here (:mod:`polyprag.forms`).
            merged_bytes: what the merged routes that are kept may take, the last used ones.
            compile: have torch compile the steps of decoding (see :class:`GenerationSettings`).

        Raises:
            BaseModelMissing, BaseModelMismatch, and what ``Store.open`` raises.
        """
        owns = not isinstance(store, Store)
        opened = Store.open(store) if not isinstance(store, Store) else store
        try:
            base = base_model_of(opened, model, device=device, dtype=dtype, attention=attention)
            check_fingerprint(opened.spec.base_model, base, allow_base_mismatch=allow_base_mismatch)
            routed = attach_store(base, opened)
            try:
                return cls(
                    opened,
                    base,
                    routed,
                    owns_store=owns,
                    form=form,
                    merged_bytes=merged_bytes,
                    compile=compile,
                )
            except BaseException:
                routed.detach()
                raise
        except BaseException:
            if owns:
                opened.close()
            raise

    def ask(
        self,
        question: str,
        *,
        k: int | None = None,
        rule: CombinationRule | None = None,
        temperature: float | None = None,
        max_new_tokens: int | None = None,
        filter: Mapping[str, Any] | None = None,
    ) -> Answer:
        """Answer one question; see :meth:`ask_batch`."""
        return self.ask_batch(
            [question],
            k=k,
            rule=rule,
            temperature=temperature,
            max_new_tokens=max_new_tokens,
            filter=filter,
        )[0]

    def ask_batch(
        self,
        questions: Sequence[str],
        *,
        k: int | None = None,
        rule: CombinationRule | None = None,
        temperature: float | None = None,
        max_new_tokens: int | None = None,
        filter: Mapping[str, Any] | None = None,
    ) -> list[Answer]:
        """Answer several questions at once, each with its own route.

        Args:
            k, rule, temperature: how many documents are combined and how; None is what the store
                was trained for.
            filter: only documents whose metadata satisfies it; see :meth:`polyprag.Store.search`.

        Raises:
            InvalidInput: a question that is empty or no valid Unicode, k below 1, or a filter that the store
                does not declare.
        """
        combination = self._combination(questions, k, rule, temperature)
        started = time.perf_counter()
        found = self.store.search_many(list(questions), combination.k, filter)
        retrieved = time.perf_counter()
        mixed = [self.combine(hits, combination.rule, combination.temperature) for hits in found]
        routed = time.perf_counter()
        texts = self.answer(list(questions), [route for route, _ in mixed], max_new_tokens=max_new_tokens)
        generated = time.perf_counter()

        n = max(len(questions), 1)
        timings = Timings((retrieved - started) / n, (routed - retrieved) / n, (generated - routed) / n)
        return [
            Answer(question, text, self._sources(hits, weights), timings)
            for question, text, hits, (_, weights) in zip(questions, texts, found, mixed, strict=True)
        ]

    def stream(
        self,
        question: str,
        *,
        k: int | None = None,
        rule: CombinationRule | None = None,
        temperature: float | None = None,
        max_new_tokens: int | None = None,
        filter: Mapping[str, Any] | None = None,
    ) -> Iterator[str | Answer]:
        """The pieces of an answer as they come, and last the whole :class:`Answer`; see :meth:`ask_batch`.

        Closing the iterator ends the generation.
        """
        combination = self._combination([question], k, rule, temperature)
        started = time.perf_counter()
        (hits,) = self.store.search_many([question], combination.k, filter)
        retrieved = time.perf_counter()
        route, weights = self.combine(hits, combination.rule, combination.temperature)
        routed = time.perf_counter()
        text = ""
        for _, piece in self.stream_prompts([question_prompt(question)], [route], _answers(max_new_tokens)):
            text += piece
            yield piece
        timings = Timings(retrieved - started, routed - retrieved, time.perf_counter() - routed)
        yield Answer(question, answer_text(text), self._sources(hits, weights), timings)

    def _combination(
        self,
        questions: Sequence[str],
        k: int | None,
        rule: CombinationRule | None,
        temperature: float | None,
    ) -> _Combined:
        """How documents are combined: as asked, or as the store was trained for."""
        for number, question in enumerate(questions):
            if not question.strip():
                raise InvalidInput(f"question {number + 1} of {len(questions)} is empty")
            try:
                question.encode()
            except UnicodeEncodeError as error:  # typed in a terminal of another encoding, say
                raise InvalidInput(
                    f"question {number + 1} of {len(questions)} is no valid Unicode; send UTF-8"
                ) from error
        own = self.store.spec.combination
        k = own.k if k is None else k
        if k < 1:
            raise InvalidInput(f"k is at least 1, not {k}")
        return _Combined(
            k,
            rule or cast(CombinationRule, own.rule),
            own.temperature if temperature is None else temperature,
        )

    def combine(
        self, hits: Sequence[Hit], rule: CombinationRule, temperature: float
    ) -> tuple[Route, dict[str | int, float]]:
        """The combined route [groups, K] of the hits that have one, and each one's weight; else None."""
        usable = [hit for hit in hits if self.store.is_routed(hit.id)]
        if not usable:
            return None, {}
        weights = combination_weights([hit.score for hit in usable], rule, temperature)
        ids = [hit.id for hit in usable]
        route = self.store.combined_route(ids, weights)
        return route, dict(zip(ids, map(float, weights), strict=True))

    def answer(
        self,
        questions: Sequence[str],
        routes: Sequence[Route],
        *,
        passages: Sequence[list[str]] | None = None,
        max_new_tokens: int | None = None,
        spent: dict[int, Spent] | None = None,
        on_text: OnText | None = None,
    ) -> list[str]:
        """The model's answer to each question under the route beside it; None is the bare base model.

        Args:
            routes: [groups, K] each.
            passages: texts to put into each prompt (Combine); None leaves the knowledge to the route.
            spent: is given, under each question's place, what its answer took.
            on_text: as of :meth:`generate`.

        Raises:
            StoreClosed: the engine was closed; without its experts the model would answer by itself.
        """
        given = passages or [[]] * len(questions)
        prompts = [question_prompt(q, p) for q, p in zip(questions, given, strict=True)]
        texts = self.generate(prompts, routes, _answers(max_new_tokens), spent=spent, on_text=on_text)
        return [answer_text(text) for text in texts]

    def generate(
        self,
        prompts: Sequence[Prompt],
        routes: Sequence[Route],
        settings: GenerationSettings = ANSWERS,
        *,
        spent: dict[int, Spent] | None = None,
        on_text: OnText | None = None,
    ) -> list[str]:
        """The continuation of each prompt under the route beside it, ``settings.sequences`` of each.

        Prompts are texts, or tokens such as :func:`polyprag.models.chat_prompt` gives. For many threads.

        Args:
            routes: [groups, K] each; None is the bare base model. They may be mixed.
            spent: is given, under each prompt's place, what its continuation took.
            on_text: is called with a prompt's place and each piece of text as it comes, in this thread; what
                it raises ends the generation.

        Raises:
            StoreClosed: the engine was closed; without its experts the model would answer by itself.
            InvalidInput: as :func:`polyprag.generation.generate`.
        """
        spent = {} if spent is None else spent
        settings = replace(settings, compile=settings.compile or self.compile)
        rows, chosen = self._prepared(prompts, routes, settings)
        made = generate(
            self.base, rows, settings, routed=self.routed, routes=chosen, spent=spent, on_text=on_text
        )
        found: list[list[str]] = [[] for _ in rows]
        for place, text in made:
            found[place].append(text)
        self._learn(spent, settings)
        return [text for texts in found for text in texts]

    def stream_prompts(
        self,
        prompts: Sequence[Prompt],
        routes: Sequence[Route],
        settings: GenerationSettings = ANSWERS,
        *,
        spent: dict[int, Spent] | None = None,
    ) -> Iterator[tuple[int, str]]:
        """As :meth:`generate`, but yields (place, piece) as the pieces come; closing the iterator ends it."""
        spent = {} if spent is None else spent
        settings = replace(settings, compile=settings.compile or self.compile)
        rows, chosen = self._prepared(prompts, routes, settings)
        yield from stream(self.base, rows, settings, routed=self.routed, routes=chosen, spent=spent)
        self._learn(spent, settings)

    def _prepared(
        self, prompts: Sequence[Prompt], routes: Sequence[Route], settings: GenerationSettings
    ) -> tuple[list[list[int]], torch.Tensor | Merged | None]:
        """The tokens of prompts, and their routes in the form that suits them."""
        if self._closed:
            raise StoreClosed("the engine was closed; open another one")
        if len(prompts) != len(routes):
            raise InvalidInput(f"{len(routes)} routes for {len(prompts)} prompts: give one for each, or None")
        rows = [token_ids(self.base, prompt) for prompt in prompts]
        if all(route is None for route in routes):
            return rows, None
        # A route of zeros is the base model.
        nothing = np.zeros(self.routed.route_shape, dtype=np.float32)
        batch = torch.from_numpy(np.stack([nothing if route is None else route for route in routes]))
        tokens = sum(map(len, rows)) * settings.sequences
        return rows, self.forms.choose(batch, tokens, settings.max_new_tokens)

    def _learn(self, spent: dict[int, Spent], settings: GenerationSettings) -> None:
        for each in spent.values():
            self.forms.took(each.new_tokens / settings.sequences, settings.max_new_tokens)

    def close(self) -> None:
        """Detach the experts, and close the store if the engine opened it."""
        self._closed = True
        self.routed.detach()
        self.forms.merged.clear()
        if self._owns_store:
            self.store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> Literal[False]:
        self.close()
        return False

    def _sources(self, hits: Sequence[Hit], weights: dict[str | int, float]) -> tuple[Source, ...]:
        documents = self.store.documents([hit.id for hit in hits])
        return tuple(
            Source(hit.id, document.title, hit.score, weights.get(hit.id, 0.0))
            for hit, document in zip(hits, documents, strict=True)
        )


@dataclass(frozen=True)
class _Combined:
    k: int
    rule: CombinationRule
    temperature: float


def _answers(max_new_tokens: int | None) -> GenerationSettings:
    return ANSWERS if max_new_tokens is None else replace(ANSWERS, max_new_tokens=max_new_tokens)


def attach_store(base: BaseModel, store: Store, kernels: Kernels = "torch") -> RoutedModel:
    """The base model with the store's experts around its layers.

    ``kernels``: see :meth:`RoutedModel.attach`.
    """
    spec = store.spec
    shapes = [ModuleShape(m.name, m.in_features, m.out_features, m.group) for m in spec.modules]
    routed = RoutedModel.attach(
        base.model,
        experts=spec.experts,
        rank=spec.rank,
        alpha=spec.alpha,
        targets=shapes,
        mixing=cast(Mixing, spec.mixing),
        dtype=base.model.dtype,
        kernels=kernels,
    )
    try:
        routed.load_experts(store_experts(store))
    except BaseException:
        routed.detach()
        raise
    return routed


def store_experts(store: Store) -> dict[str, torch.Tensor]:
    """Copies of the experts in float32: the map itself must never be written to."""
    experts = store.experts
    # Taken out one by one: where they are no views, only one of them is in memory twice.
    return {name: torch.from_numpy(np.array(experts.pop(name), dtype=np.float32)) for name in list(experts)}


def base_model_of(
    store: Store,
    model: str | os.PathLike[str] | BaseModel | None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    attention: str = "auto",
) -> BaseModel:
    """The given base model, or the one that the store names if it is installed or cached here."""
    if isinstance(model, BaseModel):
        return model
    if model is not None:
        return load_base_model(model, device=device, dtype=dtype, attention=attention)
    named = store.spec.base_model.get("name")
    return named_base_model(named, store.path, device=device, dtype=dtype, attention=attention)


def named_base_model(
    named: object, by: str, *, device: str = "auto", dtype: str = "auto", attention: str = "auto"
) -> BaseModel:
    """The base model that a file from outside names, if it is installed or cached here.

    Raises BaseModelMissing if it is not; ``by`` says there what names it.
    """
    if named == SMALL_MODEL:
        return load_base_model(None, device=device, dtype=dtype, attention=attention)
    # It may name a cached model, but no path of this machine.
    if (
        not isinstance(named, str)
        or not named
        or Path(named).is_absolute()
        or named.startswith(".")
        or Path(named).exists()
    ):
        raise BaseModelMissing(f"{by} was made for {named!r}: name its folder or file (--model)")
    return load_base_model(named, device=device, dtype=dtype, attention=attention, local_only=True)
