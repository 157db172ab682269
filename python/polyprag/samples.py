"""Training samples: what a document's route has to make the model say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedTokenizerBase

from polyprag._polyprag import Document
from polyprag.augment import Augmentation
from polyprag.errors import InvalidInput
from polyprag.models import passage_text, question_prompt

LossOn = Literal["all", "answer"]


@dataclass(frozen=True)
class SampleSettings:
    """Which samples a document gives.

    ``with_passage``: how many of its pairs come once more behind the passage (the first behind the passage
    itself, the second behind its rewrite, and so on in turn), on average: 0.25 is one pair of every fourth
    document. Every pair comes without.
    """

    with_passage: float = 1.0
    passage_tokens: int = 96
    loss_on: LossOn = "all"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.with_passage) and self.with_passage >= 0):
            raise InvalidInput(f"with_passage is a number of at least 0, not {self.with_passage}")

    def behind_passage(self, document: int) -> int:
        """How many pairs of document number ``document`` come behind its passage."""
        return math.floor((document + 1) * self.with_passage) - math.floor(document * self.with_passage)


@dataclass(frozen=True)
class Sample:
    """Token ids under one document's route; the loss counts from ``loss_from`` on."""

    document: int
    ids: tuple[int, ...]
    loss_from: int


def build_samples(
    documents: Sequence[Document],
    augmentations: Sequence[Augmentation],
    tokenizer: PreTrainedTokenizerBase,
    settings: SampleSettings = SampleSettings(),
) -> list[Sample]:
    """The samples of all documents; ``document`` is the position in ``documents``.

    A document without pairs still gives its passage, so that its route is not left untrained.
    Only one without any text gives nothing.
    """
    samples: list[Sample] = []
    for row, (document, augmentation) in enumerate(zip(documents, augmentations, strict=True)):
        passages = [passage_text(document.title, document.text or "")]
        if augmentation.rewrite:
            passages.append(passage_text(document.title, augmentation.rewrite))
        passages = [_truncate(tokenizer, p, settings.passage_tokens) for p in passages]
        for number, pair in enumerate(augmentation.pairs[: settings.behind_passage(row)]):
            passage = passages[number % len(passages)]
            samples.append(
                _sample(tokenizer, row, question_prompt(pair.question, [passage]), pair.answer, settings)
            )
        if not augmentation.pairs:
            samples.append(_sample(tokenizer, row, "", passages[0], settings))
        samples += [
            _sample(tokenizer, row, question_prompt(pair.question), pair.answer, settings)
            for pair in augmentation.pairs
        ]
    return [s for s in samples if len(s.ids) > max(s.loss_from, 1)]


def _truncate(tokenizer: PreTrainedTokenizerBase, text: str, limit: int) -> str:
    head = text[: 32 * limit]  # far more than the limit, far less than a megabyte
    ids = tokenizer(head, add_special_tokens=False).input_ids
    return head if len(ids) <= limit else str(tokenizer.decode(ids[:limit]))


def _sample(
    tokenizer: PreTrainedTokenizerBase, row: int, prompt: str, answer: str, settings: SampleSettings
) -> Sample:
    # Tokenised apart, because asking ends at the prompt: its last token must be the same in both.
    head = tokenizer(prompt).input_ids
    tail = tokenizer(f" {answer}" if prompt else answer, add_special_tokens=False).input_ids
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return Sample(row, tuple(head + tail + end), len(head) if settings.loss_on == "answer" else 0)
