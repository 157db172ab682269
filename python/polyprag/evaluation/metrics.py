"""Exact match and token F1 by the SQuAD rules, for any script.

The rules are those of the SQuAD v1.1 evaluation script (Rajpurkar et al., 2016: lower case, no
punctuation, no articles, whitespace collapsed) with HotpotQA's rule for yes, no and noanswer
(Yang et al., 2018). Text in ASCII scores as it does there, but for two repairs:

- precision and recall come from the *same* alias that gives the best F1, so that the three fit together;
- what the rules would erase altogether ("The The", "A", "!!!") keeps the part that would have been
  lost, so that an empty prediction is never a right answer to such a question.

Predictions are scored whole: nothing is cut at the first "." or ",".

``scoring="prag"`` and ``"prag-cot"`` are the scoring of PRAG's code (arXiv 2501.15915), to compare figures
with those that were published: the prediction is cut (:func:`prag_cut`), which is wrong on dates, numbers and
initials, and F1, precision and recall are each the best over the aliases.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from polyprag.errors import InvalidInput
from polyprag.text import normalise, tokens

__all__ = ["Scores", "Scoring", "exact_match", "normalise", "prag_cut", "score", "token_f1"]

Scoring: TypeAlias = Literal["squad", "prag", "prag-cot"]

_CLOSED = frozenset({"yes", "no", "noanswer"})
_ARTICLE = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True, slots=True)
class Scores:
    """What one prediction is worth. All four lie in [0, 1]; ``alias``: the answer that gives the F1."""

    em: float
    f1: float
    precision: float
    recall: float
    alias: str


def _aliases(answers: str | Sequence[str]) -> Sequence[str]:
    aliases = (answers,) if isinstance(answers, str) else answers
    if not aliases:
        raise InvalidInput("answers is empty: a prediction needs at least one answer to be compared with")
    return aliases


def prag_cut(prediction: str, *, cot: bool = False) -> str:
    """What PRAG scores of a prediction: all before the first full stop, line end and comma, in this order.

    cot: begin behind the first "the answer is", if it is there (for answers with their reasoning).
    """
    if cot:
        _, said, rest = prediction.partition("the answer is")
        prediction = rest if said else prediction
    for mark in (".", "\n", ","):
        prediction = prediction.strip().partition(mark)[0]
    return prediction.strip()


def exact_match(prediction: str, answers: str | Sequence[str]) -> float:
    """1.0 if the prediction equals one of the answers after normalisation, else 0.0.

    Raises InvalidInput if there is no answer.
    """
    predicted = tokens(prediction)
    return float(any(predicted == tokens(alias) for alias in _aliases(answers)))


def _overlap(predicted: list[str], gold: list[str]) -> tuple[float, float, float]:
    """(F1, precision, recall) of two token lists as multisets."""
    if not predicted or not gold:
        equal = float(predicted == gold)
        return equal, equal, equal
    if predicted != gold:
        for side in (predicted, gold):
            if len(side) == 1 and side[0] in _CLOSED:
                return 0.0, 0.0, 0.0
    common = sum((Counter(predicted) & Counter(gold)).values())
    if common == 0:
        return 0.0, 0.0, 0.0
    precision, recall = common / len(predicted), common / len(gold)
    # 2c / (p + g) is the harmonic mean in one division: exactly 1.0 for equal lists
    return 2 * common / (len(predicted) + len(gold)), precision, recall


def score(prediction: str, answers: str | Sequence[str], scoring: Scoring = "squad") -> Scores:
    """Exact match, F1, precision and recall of a prediction against the answer that suits it best.

    The best answer is the one of the highest F1, the first of several. A prediction or answer that is
    only ``yes``, ``no`` or ``noanswer`` counts when both are the same, and not at all otherwise.
    scoring: the rules of the module's text.
    Raises InvalidInput if there is no answer, or for another scoring.
    """
    if scoring not in get_args(Scoring):
        raise InvalidInput(f"scoring is {scoring!r}; expected one of {', '.join(get_args(Scoring))}")
    if scoring != "squad":
        return _prag_score(prag_cut(prediction, cot=scoring == "prag-cot"), answers)
    predicted = tokens(prediction)
    em, best = 0.0, (-1.0, 0.0, 0.0, "")
    for alias in _aliases(answers):
        gold = tokens(alias)
        if predicted == gold:
            em = 1.0
        f1, precision, recall = _overlap(predicted, gold)
        if f1 > best[0]:
            best = (f1, precision, recall, alias)
    return Scores(em, *best)


def _prag_score(prediction: str, answers: str | Sequence[str]) -> Scores:
    predicted = _prag_tokens(prediction)
    em, f1, precision, recall, alias = 0.0, 0.0, 0.0, 0.0, ""
    for answer in _aliases(answers):
        gold = _prag_tokens(answer)
        em = max(em, float(predicted == gold))
        if not predicted or not gold:
            continue  # equal or not, without a common token there is no F1
        found = _overlap(predicted, gold)
        if found[0] > f1:
            alias = answer
        f1, precision, recall = (max(pair) for pair in zip((f1, precision, recall), found, strict=True))
    return Scores(em, f1, precision, recall, alias)


def _prag_tokens(text: str) -> list[str]:
    """SQuAD's rules to the letter: only ASCII's punctuation, and nothing is left of "The The"."""
    return _ARTICLE.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split()


def token_f1(prediction: str, answers: str | Sequence[str]) -> float:
    """The F1 of :func:`score`."""
    return score(prediction, answers).f1
