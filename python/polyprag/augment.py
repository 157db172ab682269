"""Augmentation: question-answer pairs and a rewrite of each document, written by the base model itself.

PRAG (arXiv 2501.15915, section 3.2) asks for a rewrite and three pairs a passage in one JSON answer.
A small model does better when it is given one sentence and one span of it, and has to ask for that span:
the title stands in for the pronoun, and every sentence is covered. Pairs that do not hold are dropped and
counted. Results go to a JSONL file as they come; a second run goes on where the first ended.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from polyprag._polyprag import Document
from polyprag.candidates import candidate_answers, is_person, kinds, opener, with_subject
from polyprag.errors import CorpusError
from polyprag.generation import GenerationSettings, generate
from polyprag.jsonl import append_lines, read_resumable
from polyprag.models import BaseModel, passage_text
from polyprag.text import normalise

PROMPT_VERSION = 4
QUESTION_MARKS = ("?", "？", "؟", ";", "।")
DOCUMENTS_A_STEP = 72  # large batches are quick; what an interruption can cost

# The examples are invented, so that they teach the form and no facts. Few and short: every row of a batch
# reads them at every step.
_QA_EXAMPLES = """\
Text: Marta Helm was a German architect and painter.
Answer: architect
Question: What was the profession of Marta Helm?

Text: Marta Helm was born in Lindau and designed 14 bridges.
Answer: Lindau
Question: Where was Marta Helm born?

Text: Tarn Mill was built of red brick by Jan Reuter.
Answer: red brick
Question: What was Tarn Mill built of?

Text: Tarn Mill's owner kept a dog called Pepper.
Answer: Pepper
Question: What is the name of the dog that Tarn Mill's owner kept?

"""

_REWRITE_EXAMPLES = """\
Text: Marta Helm was a German architect. She was born in Lindau in 1902 and designed 14 bridges.
The same in other words: The German architect Marta Helm, born in 1902 in Lindau, was the designer of \
14 bridges.

Text: Tarn Mill is a brick mill in the village of Ost. It was built in 1761 to grind oats. Its owner was \
Jan Reuter.
The same in other words: In the village of Ost stands Tarn Mill, made of brick. Jan Reuter owned the mill, \
which was built in 1761 for grinding oats.

"""


@dataclass(frozen=True)
class AugmentSettings:
    """What to write for each document. ``pairs`` is the most that are kept of one document."""

    pairs: int = 8
    rewrite: bool = False
    sentences: int = 8
    batch_size: int = 96
    temperature: float | None = None
    seed: int = 0


@dataclass(frozen=True)
class Pair:
    question: str
    answer: str


@dataclass(frozen=True)
class Augmentation:
    """What training makes its samples from. ``dropped`` counts the pairs that did not pass."""

    id: str | int
    pairs: tuple[Pair, ...] = ()
    rewrite: str | None = None
    dropped: dict[str, int] = field(default_factory=dict)


def augment(
    base: BaseModel,
    documents: Sequence[Document],
    settings: AugmentSettings = AugmentSettings(),
    *,
    path: Path | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Augmentation]:
    """Augment every document, in their order.

    Args:
        path: a JSONL file to append to and to resume from; None keeps nothing on disk. Lines that were made
            from other settings, another model or another form of a document are left there and made anew.
        progress: called with the number of documents that each step finished.

    Raises:
        CorpusError: ``path`` is no augmentation file.
    """
    keys = {d.id: _key(base, d, settings) for d in documents}
    corpus = _Corpus.of(documents, settings)
    done = _resume(path, keys) if path is not None else {}
    progress(len(done))
    open_documents = [d for d in documents if d.id not in done]
    for batch in _batches(open_documents, DOCUMENTS_A_STEP):
        results = _augment_batch(base, batch, settings, corpus)
        if path is not None:
            append_lines(path, [{**asdict(r), "key": keys[r.id]} for r in results])
        done.update((r.id, r) for r in results)
        progress(len(results))
    return [done[d.id] for d in documents]


def read_pairs(path: Path) -> list[tuple[str, str]]:
    """The (question, answer) pairs of an augmentation file, as training has seen them.

    Of a document that was augmented again, for other settings say, the last line counts.
    """
    rows = (_from_row(path, number, row) for number, row in enumerate(read_resumable(path), start=1))
    last = {row.id: row for row in rows}
    return [(pair.question, pair.answer) for row in last.values() for pair in row.pairs]


def sentences(text: str) -> list[str]:
    """Sentences of a passage, in order; initials and short abbreviations end none."""
    pieces = re.split(r"(?<=[.!?])(?<!\b\w\.)(?<!\b\w\w\.)[\"')\]]*\s+|(?<=[。！？।؟])\s*|\n+", text)
    return [p.strip() for p in pieces if p and p.strip()]


def _augment_batch(
    base: BaseModel, documents: Sequence[Document], settings: AugmentSettings, corpus: _Corpus
) -> list[Augmentation]:
    prompts: list[str] = []
    asked: list[tuple[int, str, str]] = []
    for row, document in enumerate(documents):
        title, person = document.title or "", is_person(document.text or "")
        for sentence, answer in _spans(document, settings, corpus):
            begin = opener(sentence, answer, title, person)
            prompts.append(f"Text: {sentence}\nAnswer: {answer}\nQuestion:" + (f" {begin}" if begin else ""))
            asked.append((row, begin, answer))
    decoding = GenerationSettings(
        max_new_tokens=24,
        temperature=settings.temperature,
        seed=settings.seed,
        batch_size=settings.batch_size,
    )
    found: list[dict[int, Pair]] = [{} for _ in documents]
    for index, question in generate(base, prompts, decoding, prefix=_QA_EXAMPLES):
        row, begin, answer = asked[index]
        found[row][index] = Pair(_joined(begin, question), answer)
    rewrites = _rewrite_batch(base, documents, settings)
    results = []
    for document, by_span, rewrite in zip(documents, found, rewrites, strict=True):
        kept, dropped = _keep(document, [by_span[i] for i in sorted(by_span)], settings.pairs)
        if settings.rewrite and rewrite is None:
            dropped["rewrite"] = 1
        results.append(Augmentation(document.id, tuple(kept), rewrite, dropped))
    return results


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
    prompts = [f"Text: {text}\nThe same in other words:" for text in texts]
    rewrites: list[str | None] = [None] * len(documents)
    for index, text in generate(base, prompts, decoding, prefix=_REWRITE_EXAMPLES):
        rewrites[index] = _checked_rewrite(documents[index].text or "", text)
    return rewrites


def _first(document: Document, settings: AugmentSettings) -> list[str]:
    """The sentences that are asked about, each short enough for a prompt."""
    return [_short(s) for s in sentences(document.text or "")[: settings.sentences]]


def _short(text: str, limit: int = 600) -> str:
    return " ".join(text.split())[:limit]


def _keep(document: Document, pairs: Sequence[Pair], limit: int) -> tuple[list[Pair], dict[str, int]]:
    """The pairs that hold, and how many did not, by reason."""
    passage = f" {normalise(passage_text(document.title, document.text or ''))} "
    dropped = {
        "malformed": 0,
        "answer_not_in_passage": 0,
        "answer_in_question": 0,
        "off_subject": 0,
        "duplicate": 0,
    }
    subject = set(normalise(document.title or "").split())
    kept: list[Pair] = []
    seen: set[str] = set()
    for pair in pairs:
        answer, question = normalise(pair.answer), normalise(pair.question)
        if not answer or len(question.split()) < 3 or not pair.question.endswith(QUESTION_MARKS):
            dropped["malformed"] += 1
        elif f" {answer} " not in passage:
            dropped["answer_not_in_passage"] += 1
        elif f" {answer} " in f" {question} ":
            dropped["answer_in_question"] += 1
        elif subject and subject.isdisjoint(question.split()):
            dropped["off_subject"] += 1
        elif question in seen:
            dropped["duplicate"] += 1
        else:
            seen.add(question)
            kept.append(pair)
    return kept[:limit], {reason: count for reason, count in dropped.items() if count}


def _checked_rewrite(passage: str, rewrite: str) -> str | None:
    """A rewrite that keeps the passage's numbers and names, and adds none; else None."""
    passage = passage.strip()
    if not 0.4 * len(passage) <= len(rewrite) <= 1.6 * len(passage) or rewrite.strip() == passage.strip():
        return None
    facts = set(re.findall(r"\d[\d,.]*\d|\d|\b[A-Z]\w+", rewrite))
    known = set(re.findall(r"\w+|\d[\d,.]*\d", passage.lower()))
    strange = {f for f in facts if f.lower() not in known}
    return rewrite if len(strange) <= 0.1 * max(len(facts), 1) + 1 else None


def _batches(documents: Sequence[Document], size: int) -> Iterator[Sequence[Document]]:
    for start in range(0, len(documents), size):
        yield documents[start : start + size]


def _key(base: BaseModel, document: Document, settings: AugmentSettings) -> str:
    """Names what a line was made from, so that a changed document or setting is not taken for done."""
    parts = repr((PROMPT_VERSION, base.name, asdict(settings), document.title, document.text))
    return hashlib.blake2b(parts.encode(), digest_size=16).hexdigest()


def _resume(path: Path, keys: dict[str | int, str]) -> dict[str | int, Augmentation]:
    if not path.exists():
        return {}
    done: dict[str | int, Augmentation] = {}
    for number, row in enumerate(read_resumable(path), start=1):
        augmentation = _from_row(path, number, row)
        if keys.get(augmentation.id) == row.get("key"):
            done[augmentation.id] = augmentation
    return done


def _from_row(path: Path, number: int, row: dict[str, Any]) -> Augmentation:
    try:
        pairs = tuple(Pair(str(p["question"]), str(p["answer"])) for p in row["pairs"])
        if not isinstance(row["id"], str | int) or not isinstance(row.get("rewrite"), str | None):
            raise TypeError("id or rewrite")
        return Augmentation(row["id"], pairs, row.get("rewrite"), dict(row.get("dropped", {})))
    except (KeyError, TypeError, ValueError) as error:
        raise CorpusError(
            f"{path}, line {number}: not a line of an augmentation file ({error!r}); "
            "delete the file to augment anew"
        ) from error
