"""Controls without which an F1 says little: wrong documents, and training pairs that give a question away."""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from polyprag.corpus import DocumentId
from polyprag.errors import InvalidInput
from polyprag.evaluation.data import Question
from polyprag.text import normalise, tokens

_Draw: TypeAlias = tuple[tuple[DocumentId, ...], ...]


@dataclass(frozen=True, slots=True)
class Derangement:
    """Wrong documents: ``draws[d][q]`` are those of question q in draw d, as many as it has gold ones.

    other_type: how often (over all draws) a question got a document of another type than its own, for want of
    one of the same. fewer: how often it got fewer documents than it has gold ones.
    """

    draws: tuple[_Draw, ...]
    other_type: int
    fewer: int


class _Pool:
    """Documents in random order, each used once before any is used again."""

    def __init__(self, documents: Sequence[DocumentId], random_source: random.Random) -> None:
        self._all, self._random = list(documents), random_source
        self._waiting: list[DocumentId] = []

    def take(self, count: int, allowed: Callable[[DocumentId], bool]) -> list[DocumentId]:
        """Up to ``count`` different allowed documents, those first that wait longest."""
        taken = self._pick(self._waiting, count, allowed)
        if len(taken) < count:
            fresh = self._random.sample(self._all, len(self._all))
            more = self._pick(fresh, count - len(taken), lambda id: id not in taken and allowed(id))
            if more:  # else a question that nothing suits would fill the pool with copies
                self._waiting += fresh
                taken += more
        return taken

    @staticmethod
    def _pick(
        waiting: list[DocumentId], count: int, allowed: Callable[[DocumentId], bool]
    ) -> list[DocumentId]:
        taken: list[DocumentId] = []
        place = 0
        while place < len(waiting) and len(taken) < count:
            if waiting[place] not in taken and allowed(waiting[place]):
                taken.append(waiting.pop(place))
            else:
                place += 1
        return taken


def derangement(questions: Sequence[Question], seed: int = 0, draws: int = 3) -> Derangement:
    """For each question, wrong documents: the gold documents of others.

    As many as its gold ones, of the same type where labelled, not gold for it, and sharing no normalised
    answer with it (the answers of a document are those of all questions that it is gold for). Documents
    are dealt as evenly as these rules allow. The same questions and seed give the same documents.
    Only the type gives way where nothing else is left, and that is counted.
    Raises InvalidInput if a question has no gold document, or if no document at all can be wrong for it.
    """
    if draws < 1:
        raise InvalidInput(f"draws is {draws}; expected at least 1")
    answers = [frozenset(map(normalise, question.answers)) for question in questions]
    answers_of: dict[DocumentId, set[str]] = {}
    by_type: dict[str, dict[DocumentId, None]] = defaultdict(dict)  # dicts as ordered sets
    for question, own in zip(questions, answers, strict=True):
        if not question.documents:
            raise InvalidInput(f"question {question.id!r} has no gold document, so none can be wrong for it")
        for id in question.documents:
            answers_of.setdefault(id, set()).update(own)
            if question.type is not None:
                by_type[question.type][id] = None

    other_type = fewer = 0
    drawn: list[_Draw] = []
    for draw in range(draws):
        source = random.Random(f"{seed}:{draw}")
        everything = _Pool(list(answers_of), source)
        pools = {kind: _Pool(list(ids), source) for kind, ids in by_type.items()}
        chosen: list[tuple[DocumentId, ...]] = [()] * len(questions)
        for place in source.sample(range(len(questions)), len(questions)):
            question, own = questions[place], answers[place]
            gold = frozenset(question.documents)

            def wrong(id: DocumentId, gold: frozenset[DocumentId] = gold, own: frozenset[str] = own) -> bool:
                return id not in gold and own.isdisjoint(answers_of[id])

            count = len(gold)
            pool = everything if question.type is None else pools[question.type]
            taken = pool.take(count, wrong)
            if len(taken) < count and pool is not everything:
                more = everything.take(count - len(taken), lambda id: id not in taken and wrong(id))  # noqa: B023
                other_type += bool(more)
                taken += more
            if not taken:
                raise InvalidInput(
                    f"question {question.id!r}: every document is its own or shares an answer with it; "
                    "a wrong-document control needs questions with different answers"
                )
            fewer += len(taken) < count
            chosen[place] = tuple(taken)
        drawn.append(tuple(chosen))
    return Derangement(tuple(drawn), other_type, fewer)


@dataclass(frozen=True, slots=True)
class Leak:
    """A training pair that asks what a test question asks. ``pair`` is its place among the training pairs."""

    question: str
    pair: int
    training_question: str
    jaccard: float


@dataclass(frozen=True, slots=True)
class Leaks:
    """All leaks, in the order of the training pairs; ``questions``: the ids of the questions given away."""

    pairs: tuple[Leak, ...]
    questions: frozenset[str]

    def __len__(self) -> int:
        return len(self.pairs)


def _prefix(ordered: Sequence[str], threshold: float) -> Sequence[str]:
    """The rarest tokens of a set, enough of them that any set of at least this Jaccard shares one."""
    size = len(ordered)
    return ordered[: size - math.ceil(threshold * size - 1e-9) + 1]


def leaked(
    questions: Sequence[Question], training_pairs: Iterable[tuple[str, str]], threshold: float = 0.8
) -> Leaks:
    """Training pairs (question, answer) whose question equals a test question after normalisation, or whose
    set of tokens has a Jaccard index of at least ``threshold`` with it.

    Exact, by an inverted index over prefixes (Bayardo et al., 2007): sets that overlap so much share one of
    their few rarest tokens, and only those few are looked up.
    Raises InvalidInput for a threshold outside of (0, 1].
    """
    if not 0 < threshold <= 1:
        raise InvalidInput(f"threshold is {threshold}; expected more than 0 and at most 1")
    sets = [frozenset(tokens(question.question)) for question in questions]
    frequency: dict[str, int] = defaultdict(int)
    for own in sets:
        for token in own:
            frequency[token] += 1

    def rarest_first(own: frozenset[str]) -> list[str]:
        return sorted(own, key=lambda token: (frequency.get(token, 0), token))

    index: dict[str, list[int]] = defaultdict(list)
    for place, own in enumerate(sets):
        for token in _prefix(rarest_first(own), threshold):
            index[token].append(place)

    found: list[Leak] = []
    for number, (training_question, _) in enumerate(training_pairs):
        other = frozenset(tokens(training_question))
        candidates: set[int] = set()
        for token in _prefix(rarest_first(other), threshold):
            candidates.update(index.get(token, ()))
        for place in sorted(candidates):
            common = len(other & sets[place])
            jaccard = common / (len(other) + len(sets[place]) - common)
            if jaccard >= threshold - 1e-9:
                found.append(Leak(questions[place].id, number, training_question, jaccard))
    return Leaks(tuple(found), frozenset(leak.question for leak in found))
