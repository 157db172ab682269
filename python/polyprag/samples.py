"""Training samples: what a document's route has to make the model say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from transformers import PreTrainedTokenizerBase

from polyprag._polyprag import Document
from polyprag.augment import Augmentation
from polyprag.augment.checks import YES_NO
from polyprag.errors import InvalidInput
from polyprag.models import passage_text, question_prompt
from polyprag.text import normalise

LossOn = Literal["all", "answer"]

_TORN = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class SampleSettings:
    """Which samples a document gives.

    ``with_passage``: how many of its pairs come once more behind the passage (the first behind the passage
    itself, the second behind its rewrite, and so on in turn). Of a fraction the documents take turns: 0.25 is
    one pair in every fourth epoch. Every pair comes without. ``loss_on`` all tokens, or the answer's alone;
    where that is yes or no it is always the answer's, since such a question may well say what is not so.
    """

    with_passage: float = 0.25
    passage_tokens: int = 96
    loss_on: LossOn = "all"

    def __post_init__(self) -> None:
        if self.loss_on not in get_args(LossOn):
            raise InvalidInput(f"loss_on is one of {', '.join(get_args(LossOn))}, not {self.loss_on!r}")
        if not (math.isfinite(self.with_passage) and self.with_passage >= 0):
            raise InvalidInput(f"with_passage is a number of at least 0, not {self.with_passage}")


@dataclass(frozen=True)
class Sample:
    """Token ids under one document's route; the loss counts from ``loss_from`` on.

    ``share``: of the epochs that it is trained in, above 0; the documents take turns.
    """

    document: int
    ids: tuple[int, ...]
    loss_from: int
    share: float = 1.0

    def in_epoch(self, epoch: int) -> bool:
        """Whether it is trained in epoch number ``epoch``."""
        turn = self.document + epoch
        return math.floor((turn + 1) * self.share) > math.floor(turn * self.share)


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
        for number, pair in enumerate(augmentation.pairs[: math.ceil(settings.with_passage)]):
            prompt = question_prompt(pair.question, [passages[number % len(passages)]])
            sample = _sample(tokenizer, row, prompt, pair.answer, settings)
            samples.append(replace(sample, share=min(settings.with_passage - number, 1.0)))
        if not augmentation.pairs and passages[0]:  # a tokenizer may put a token before no text, too
            samples.append(_sample(tokenizer, row, "", passages[0], settings))
        samples += [
            _sample(tokenizer, row, question_prompt(pair.question), pair.answer, settings)
            for pair in augmentation.pairs
        ]
    return [s for s in samples if len(s.ids) > max(s.loss_from, 1)]


def _truncate(tokenizer: PreTrainedTokenizerBase, text: str, limit: int) -> str:
    head = text[: 32 * limit]  # far more than the limit, far less than a megabyte
    ids = tokenizer(head, add_special_tokens=False).input_ids
    if len(ids) <= limit:
        return head
    # The last of these tokens may be the beginning of a character.
    return str(tokenizer.decode(ids[:limit], clean_up_tokenization_spaces=False)).rstrip(_TORN)


def _sample(
    tokenizer: PreTrainedTokenizerBase, row: int, prompt: str, answer: str, settings: SampleSettings
) -> Sample:
    # Tokenised apart, because asking ends at the prompt: its last token must be the same in both.
    answer_alone = settings.loss_on == "answer" or normalise(answer) in YES_NO
    head = tokenizer(prompt).input_ids
    tail = tokenizer(f" {answer}" if prompt else answer, add_special_tokens=False).input_ids
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return Sample(row, tuple(head + tail + end), len(head) if answer_alone else 0)
