"""A causal LM in this process writes the pairs and the rewrite: the base model itself, as a rule.

PRAG (arXiv 2501.15915, section 3.2) asks for a rewrite and three pairs a passage in one JSON answer.
A small model does better when it is given one sentence and one span of it, and has to ask for that span:
the title stands in for the pronoun, and every sentence is covered. Pairs that do not hold are dropped and
counted.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass

from polyprag._polyprag import Document
from polyprag.augment.base import Augmentation, AugmentSettings, Pair
from polyprag.augment.checks import checked_rewrite, keep
from polyprag.candidates import candidate_answers, is_person, kinds, opener, with_subject
from polyprag.generation import GenerationSettings, generate, token_ids
from polyprag.models import BaseModel, positions
from polyprag.text import normalise

# Raised when the same prompts would give other pairs: spans, openers, checks.
VERSION = 5
DOCUMENTS_A_STEP = 24  # some batches of prompts of like length; what an interruption can cost


@dataclass(frozen=True)
class LocalAugmenter:
    """Writes with ``base``, in batches."""

    base: BaseModel

    @property
    def name(self) -> str:
        return self.base.name

    def making(self, settings: AugmentSettings) -> tuple[object, ...]:
        s, prompts = settings, settings.prompts
        asked = (s.pairs, s.rewrite, s.sentences, s.batch_size, s.temperature, s.seed)
        rewriting = (prompts.rewrite_examples, prompts.rewrite) if s.rewrite else ()
        return ("local", VERSION, self.name, asked, prompts.question_examples, prompts.question, rewriting)

    def write(
        self, documents: Sequence[Document], todo: Sequence[Document], settings: AugmentSettings
    ) -> Generator[Sequence[Augmentation], None, None]:
        corpus = _Corpus.of(documents, settings)
        for batch in _batches(todo, DOCUMENTS_A_STEP):
            yield _augment_batch(self.base, batch, settings, corpus)


def sentences(text: str) -> list[str]:
    """Sentences of a passage, in order; initials and short abbreviations end none."""
    pieces = re.split(r"(?<=[.!?])(?<!\b\w\.)(?<!\b\w\w\.)[\"')\]]*\s+|(?<=[。！？।؟])\s*|\n+", text)
    return [p.strip() for p in pieces if p and p.strip()]


def _augment_batch(
    base: BaseModel, documents: Sequence[Document], settings: AugmentSettings, corpus: _Corpus
) -> list[Augmentation]:
    examples, tokens = settings.prompts.question_examples, 24
    fits = _fitting(base, examples, tokens)
    prompts: list[str] = []
    asked: list[tuple[int, str, str]] = []
    too_long = [0] * len(documents)
    for row, document in enumerate(documents):
        title, person = document.title or "", is_person(document.text or "")
        for sentence, answer in _spans(document, settings, corpus):
            begin = opener(sentence, answer, title, person)
            prompt = settings.prompts.fill("question", sentence=sentence, answer=answer)
            prompt = f"{prompt} {begin}" if begin else prompt
            if not fits(prompt):
                too_long[row] += 1
                continue
            prompts.append(prompt)
            asked.append((row, begin, answer))
    decoding = GenerationSettings(
        max_new_tokens=tokens,
        temperature=settings.temperature,
        seed=settings.seed,
        batch_size=settings.batch_size,
    )
    found: list[dict[int, Pair]] = [{} for _ in documents]
    for index, question in generate(base, prompts, decoding, prefix=examples):
        row, begin, answer = asked[index]
        found[row][index] = Pair(_joined(begin, question), answer)
    rewrites = _rewrite_batch(base, documents, settings)
    results = []
    for document, by_span, rewrite, unasked in zip(documents, found, rewrites, too_long, strict=True):
        kept, dropped = keep(document, [by_span[i] for i in sorted(by_span)], settings)
        if unasked:
            dropped["too_long"] = unasked
        if settings.rewrite and rewrite is None:
            dropped["rewrite"] = 1
        results.append(Augmentation(document.id, tuple(kept), rewrite, dropped))
    return results


def _fitting(base: BaseModel, examples: str, new: int) -> Callable[[str], bool]:
    """Whether a model has positions for a prompt behind its examples, and for so many new tokens."""
    most = positions(base)
    if most is None:
        return lambda prompt: True
    room = most - (len(token_ids(base, examples)) if examples else 0) - (new - 1)
    return lambda prompt: len(token_ids(base, prompt, alone=not examples)) <= room


def _joined(begin: str, rest: str) -> str:
    """Opener and continuation, without a blank before "'s" or "?"."""
    return re.sub(r" (?=['’?,])", "", " ".join(f"{begin} {rest}".split()))


@dataclass(frozen=True)
class _Corpus:
    """What the first thousand documents tell of the corpus.

    common: spans that a third of it has (the name of an island, say), which tell no document from another;
    a corpus of fewer than 20 has none. kinds: how many documents are said to be a mason, a ship and so on.
    """

    common: frozenset[str]
    kinds: Mapping[str, int]

    @classmethod
    def of(cls, documents: Sequence[Document], settings: AugmentSettings) -> _Corpus:
        sample = documents[:1000]
        spans: Counter[str] = Counter()
        kind_counts: Counter[str] = Counter()
        for document in sample:
            lines, title = _first(document, settings), document.title or ""
            spans.update({normalise(a) for line in lines for a in candidate_answers(line, title)})
            kind_counts.update({k for line in lines for k in kinds(line)})
        enough = len(sample) >= 20
        common = frozenset(span for span, n in spans.items() if enough and 3 * n > len(sample))
        return cls(common, kind_counts)


def _spans(document: Document, settings: AugmentSettings, corpus: _Corpus) -> list[tuple[str, str]]:
    """(sentence, span to ask for), the most worth asking first."""
    title = document.title or ""
    by_sentence = [
        [
            (with_subject(sentence, title, answer), answer)
            for answer in candidate_answers(sentence, title, kinds=corpus.kinds)
            if normalise(answer) not in corpus.common
        ]
        for sentence in _first(document, settings)
    ]
    # The best span of every sentence comes before its second, and the first sentences before the last.
    ranked = sorted(
        (level + place / 2, place, level, span)
        for place, spans in enumerate(by_sentence)
        for level, span in enumerate(spans)
    )
    # A quarter more than are kept, since some will not hold.
    return [span for *_, span in ranked[: settings.pairs * 5 // 4]]


def _rewrite_batch(
    base: BaseModel, documents: Sequence[Document], settings: AugmentSettings
) -> list[str | None]:
    if not settings.rewrite:
        return [None] * len(documents)
    texts = [_short(d.text or "", 1500) for d in documents]
    longest = max(len(base.tokenizer(text).input_ids) for text in texts)
    decoding = GenerationSettings(
        max_new_tokens=min(256, 16 + longest * 5 // 4),
        temperature=settings.temperature,
        seed=settings.seed,
        batch_size=settings.batch_size,
    )
    examples, prompts = settings.prompts.rewrite_examples, {}
    fits = _fitting(base, examples, decoding.max_new_tokens)
    for row, (document, text) in enumerate(zip(documents, texts, strict=True)):
        prompt = settings.prompts.fill("rewrite", title=document.title or "", passage=text)
        if fits(prompt):
            prompts[row] = prompt
    rows = list(prompts)
    rewrites: list[str | None] = [None] * len(documents)
    for index, text in generate(base, list(prompts.values()), decoding, prefix=examples):
        rewrites[rows[index]] = checked_rewrite(documents[rows[index]].text or "", text)
    return rewrites


def _first(document: Document, settings: AugmentSettings) -> list[str]:
    """The sentences that are asked about, each short enough for a prompt."""
    return [_short(s) for s in sentences(document.text or "")[: settings.sentences]]


def _short(text: str, limit: int = 600) -> str:
    return " ".join(text.split())[:limit]


def _batches(documents: Sequence[Document], size: int) -> Iterator[Sequence[Document]]:
    for start in range(0, len(documents), size):
        yield documents[start : start + size]
