"""Questions that yes or no answers, made of pairs: "When was X born?", "1902" gives "Was X born in 1902?".

A route that is only taught names, dates and what things are answers with one of those whatever is asked. The
forms are English; a pair of another form or language gives none.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from zlib import crc32

from polyprag._polyprag import Document
from polyprag.augment.base import Augmentation, Pair
from polyprag.augment.checks import YES_NO
from polyprag.text import normalise

_DATE = r"(?P<date>(?=.*\d)(?:\d{1,2} )?[A-Z][a-z]+(?: \d{1,2},?)?(?: \d{4})?)"
_IN_A_PLACE = re.compile(r"(?i)Where (is|was|are|were) (.+ (?:born|set|held|built|found|\w+ed))")
_IN_WHAT_PLACE = re.compile(r"(?i)In (?:what|which) (?:city|town|country|state|village|place) (\w+) (.+)")
_WHERE_DID = re.compile(r"(?i)Where (did|does|do) (.+)")
_WHEN = re.compile(r"(?i)(?:When|(?:In|On) (?:what|which) (?:year|date|month|day)) (\w+) (.+)")
_PROFESSION = re.compile(r"(?i)What (is|was) (?:the profession|the occupation) of (.+)")
_THE = re.compile(r"(?i)(?:What|Who) (is|was) (the (?!name )(.+?) (?:of|that|in|for) .+)")
_WHAT = re.compile(r"(?i)What (is|was) (.+)")
_WHO = re.compile(r"(?i)Who (?!is\b|was\b|are\b|were\b|do\b|does\b|did\b)((\w+) .+)")
_AUXILIARIES = frozenset("is was are were did does do has had can will".split())
_TRIES = 16  # answers of others that are looked at for a wrong one


@dataclass(frozen=True)
class _Form:
    """A question that lacks its answer. ``kind``: only answers of the same kind could stand in it."""

    kind: str
    ask: Callable[[str], str]


def yes_no_pairs(
    documents: Sequence[Document], augmentations: Sequence[Augmentation]
) -> Iterator[tuple[int, Pair]]:
    """(position of the document, pair): of every pair that has a form, one that is true and one that is not.

    The wrong answer is that of another document to a question of the same form, and is not in the passage. A
    pair for which there is none gives no question at all, so that yes and no are equally frequent.
    """
    found: list[tuple[int, Pair, _Form]] = []
    answers: defaultdict[str, dict[str, None]] = defaultdict(dict)
    for row, (document, augmentation) in enumerate(zip(documents, augmentations, strict=True)):
        for pair in augmentation.pairs:
            form = _form(pair, document.title or "")
            if form is not None:
                found.append((row, pair, form))
                answers[form.kind][pair.answer] = None
    pools = {kind: list(of_kind) for kind, of_kind in answers.items()}
    for row, pair, form in found:
        document = documents[row]
        wrong = _wrong(pair, pools[form.kind], f"{document.title or ''} {document.text or ''}")
        if wrong is not None:
            yield row, Pair(form.ask(pair.answer), "yes")
            yield row, Pair(form.ask(wrong), "no")


def so_asked(question: str, answer: str) -> str | None:
    """The question that a pair makes which is answered by yes, whatever the title; None if it makes none."""
    pair = Pair(question, answer)
    form = _form(pair, None)
    return None if form is None else form.ask(answer)


def _wrong(pair: Pair, pool: Sequence[str], passage: str) -> str | None:
    """An answer of the pool that the passage does not have."""
    passage = f" {normalise(passage)} "
    start = crc32(pair.question.encode())
    for step in range(min(_TRIES, len(pool))):
        answer = pool[(start + step) % len(pool)]
        if f" {normalise(answer)} " not in passage:
            return answer
    return None


def _form(pair: Pair, title: str | None) -> _Form | None:
    """The form of a pair's question, if it is one of those that are known.

    Without a title "What is X?" is taken as if X were it.
    """
    question, answer = pair.question.strip().rstrip("?").rstrip(), pair.answer.strip()
    if not answer or normalise(answer) in YES_NO or not pair.question.strip().endswith("?"):
        return None
    if (m := _IN_A_PLACE.fullmatch(question)) or (m := _WHERE_DID.fullmatch(question)):
        return _with_end("place", m[1], m[2], "in") if answer[0].isupper() else None
    if (m := _IN_WHAT_PLACE.fullmatch(question)) and m[1].lower() in _AUXILIARIES:
        return _with_end("place", m[1], m[2], "in")
    if (m := _WHEN.fullmatch(question)) and m[1].lower() in _AUXILIARIES:
        if re.fullmatch(r"\d{4}", answer):
            return _with_end("year", m[1], m[2], "in")
        if re.fullmatch(_DATE, answer):
            preposition = "on" if re.search(r"\b\d{1,2}\b", answer) else "in"
            return _with_end(f"date {preposition}", m[1], m[2], preposition)
        return None
    if m := _PROFESSION.fullmatch(question):
        return _called(m[1], m[2]) if answer[0].islower() else None
    if m := _THE.fullmatch(question):
        verb, rest = m[1].capitalize(), m[2]
        return _Form(f"the {m[3].lower()}", lambda answer: f"{verb} {answer} {rest}?")
    if (m := _WHAT.fullmatch(question)) and answer[0].islower():
        return _called(m[1], m[2]) if title is None or normalise(m[2]) == _name(title) else None
    if (m := _WHO.fullmatch(question)) and answer[0].isupper():
        did = m[1]
        return _Form(f"who {m[2].lower()}", lambda answer: f"Was it {answer} who {did}?")
    return None


def _with_end(kind: str, verb: str, rest: str, preposition: str) -> _Form:
    if kind == "place":  # where one is born others are born, where a mill stands there are mills
        kind += f" {verb.lower()} {rest.rsplit(maxsplit=1)[-1].lower()}"
    return _Form(
        kind,
        lambda answer: f"{verb.capitalize()} {rest} {preposition} {answer}?",
    )


def _called(verb: str, subject: str) -> _Form:
    def ask(answer: str) -> str:
        return f"{verb.capitalize()} {subject} {'an' if answer[:1].lower() in 'aeiou' else 'a'} {answer}?"

    return _Form("called", ask)


def _name(title: str) -> str:
    return normalise(re.sub(r" ?\([^()]*\)", "", title))
