"""Which pairs and rewrites hold, whoever wrote them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from polyprag._polyprag import Document
from polyprag.augment.base import AugmentSettings, Pair
from polyprag.text import normalise

QUESTION_MARKS = ("?", "？", "؟", ";", "।")
YES_NO = frozenset({"yes", "no"})
_NUMBER = r"\d[\d,.]*\d"  # with its commas and points


def keep(
    document: Document, pairs: Sequence[Pair], settings: AugmentSettings
) -> tuple[list[Pair], dict[str, int]]:
    """The pairs that hold, and how many did not, by reason."""
    passage = f" {normalise(document.title or '')} {normalise(document.text or '')} "
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
        yes_no = settings.yes_no and answer in YES_NO
        if not answer or len(question.split()) < 3 or not pair.question.endswith(QUESTION_MARKS):
            dropped["malformed"] += 1
        elif not yes_no and f" {answer} " not in passage:
            dropped["answer_not_in_passage"] += 1
        elif not yes_no and f" {answer} " in f" {question} ":
            dropped["answer_in_question"] += 1
        elif subject and subject.isdisjoint(question.split()):
            dropped["off_subject"] += 1
        elif question in seen:
            dropped["duplicate"] += 1
        else:
            seen.add(question)
            kept.append(pair)
    return kept[: settings.pairs], {reason: count for reason, count in dropped.items() if count}


def checked_rewrite(passage: str, rewrite: str) -> str | None:
    """A rewrite that is about as long as the passage and adds no numbers and names of its own; else None."""
    passage = passage.strip()
    if not 0.4 * len(passage) <= len(rewrite) <= 1.6 * len(passage) or rewrite.strip() == passage.strip():
        return None
    facts = set(re.findall(rf"{_NUMBER}|\d|\b[A-Z]\w+", rewrite))
    known = set(re.findall(r"\w+", passage.lower())) | set(re.findall(_NUMBER, passage))
    strange = {f for f in facts if f.lower() not in known}
    return rewrite if len(strange) <= 0.1 * max(len(facts), 1) + 1 else None
