"""Exact match and token F1 by the SQuAD rules, for any script.

The rules are those of the SQuAD v1.1 evaluation script (Rajpurkar et al., 2016: lower case, no
punctuation, no articles, whitespace collapsed) with HotpotQA's rule for yes, no and noanswer
(Yang et al., 2018). Text in ASCII scores as it does there, but for two repairs:

- precision and recall come from the *same* alias that gives the best F1, so that the three fit together;
- what the rules would erase altogether ("The The", "A", "!!!") keeps the part that would have been
  lost, so that an empty prediction is never a right answer to such a question.

Predictions are scored whole: nothing is cut at the first "." or ",".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from polyprag.errors import InvalidInput
from polyprag.text import normalise, tokens

__all__ = ["Scores", "exact_match", "normalise", "score", "token_f1"]

_CLOSED = frozenset({"yes", "no", "noanswer"})


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


def score(prediction: str, answers: str | Sequence[str]) -> Scores:
    """Exact match, F1, precision and recall of a prediction against the answer that suits it best.

    The best answer is the one of the highest F1, the first of several. A prediction or answer that is
    only ``yes``, ``no`` or ``noanswer`` counts when both are the same, and not at all otherwise.
    Raises InvalidInput if there is no answer.
    """
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


def token_f1(prediction: str, answers: str | Sequence[str]) -> float:
    """The F1 of :func:`score`."""
    return score(prediction, answers).f1
