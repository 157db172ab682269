"""Intervals and differences by the bootstrap over questions (Efron and Tibshirani, 1993; pairs: Koehn, 2004).

One value a question goes in. Where a question has several values (draws of a control, training seeds),
average them first: they are not independent questions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from polyprag.errors import InvalidInput

Values: TypeAlias = Sequence[float] | NDArray[np.floating]

#: How many resamples an interval takes unless the caller says otherwise.
RESAMPLES = 10_000
_CELLS = 1 << 21  # numbers drawn at a time: 16 MiB, whatever the number of questions


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over n questions and its percentile bootstrap interval [low, high]."""

    mean: float
    low: float
    high: float
    n: int
    confidence: float
    resamples: int


@dataclass(frozen=True, slots=True)
class Difference:
    """The mean of a minus b over the same n questions, its interval, and the two-sided p-value."""

    mean: float
    low: float
    high: float
    p_value: float
    n: int
    confidence: float
    resamples: int

    @property
    def real(self) -> bool:
        """Whether the difference may be called real: interval and p-value both leave zero out.

        The second half matters for a handful of questions, which can agree by luck and leave the bootstrap
        nothing to vary: at 95% it takes six.
        """
        return (self.low > 0 or self.high < 0) and self.p_value < 1 - self.confidence


def _checked(values: Values, name: str) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise InvalidInput(f"{name} has shape {array.shape}; expected one value a question, and at least one")
    if not np.isfinite(array).all():
        raise InvalidInput(f"{name} holds NaN or infinity at place {int(np.argmin(np.isfinite(array)))}")
    return array


def _resampled_means(
    values: NDArray[np.float64], resamples: int, confidence: float, seed: int
) -> NDArray[np.float64]:
    if resamples < 1:
        raise InvalidInput(f"resamples is {resamples}; expected at least 1")
    if not 0 < confidence < 1:
        raise InvalidInput(f"confidence is {confidence}; expected a number between 0 and 1")
    generator = np.random.default_rng(seed)
    step = max(1, _CELLS // values.size)
    means = np.empty(resamples)
    for start in range(0, resamples, step):
        count = min(step, resamples - start)
        means[start : start + count] = values[
            generator.integers(values.size, size=(count, values.size))
        ].mean(1)
    return means


def _percentiles(means: NDArray[np.float64], confidence: float) -> tuple[float, float]:
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def bootstrap_mean(
    values: Values, *, confidence: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """The mean of one value a question, with a percentile bootstrap interval.

    Questions are drawn with replacement ``resamples`` times; the same seed gives the same interval.
    Raises InvalidInput for no values, NaN, or settings out of range.
    """
    array = _checked(values, "values")
    low, high = _percentiles(_resampled_means(array, resamples, confidence, seed), confidence)
    return Interval(float(array.mean()), low, high, array.size, confidence, resamples)


def paired_difference(
    a: Values, b: Values, *, confidence: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> Difference:
    """Mean of ``a - b``, question by question (``a[i]`` and ``b[i]`` belong to the same question).

    The p-value is twice the share of resamples on the far side of zero (one counted beforehand, so it is
    never 0), so it agrees with the percentile interval; nor is it ever below 2 / 2**m for m questions that
    differ, which is all that the signs of m differences can prove.
    Raises InvalidInput for unequal lengths, no values, NaN, or settings out of range.
    """
    left, right = _checked(a, "a"), _checked(b, "b")
    if left.size != right.size:
        raise InvalidInput(f"a has {left.size} values and b {right.size}; expected one of each a question")
    difference = left - right
    means = _resampled_means(difference, resamples, confidence, seed)
    low, high = _percentiles(means, confidence)
    beyond = min(np.count_nonzero(means <= 0), np.count_nonzero(means >= 0))
    least = 2.0 ** (1 - np.count_nonzero(difference))
    p_value = min(1.0, max(2 * (beyond + 1) / (resamples + 1), least))
    return Difference(float(difference.mean()), low, high, float(p_value), left.size, confidence, resamples)
