from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyprag.errors import InvalidInput
from polyprag.evaluation import statistics
from polyprag.evaluation.statistics import bootstrap_mean, paired_difference

_SCORES = st.lists(st.floats(0, 1), min_size=1, max_size=30)


@settings(max_examples=40)
@given(_SCORES, st.integers(0, 5))
def test_the_interval_lies_in_the_data_and_comes_back_with_its_seed(values: list[float], seed: int) -> None:
    interval = bootstrap_mean(values, resamples=200, seed=seed)
    assert interval == bootstrap_mean(values, resamples=200, seed=seed)
    assert min(values) - 1e-9 <= interval.low <= interval.high <= max(values) + 1e-9
    assert interval.mean == pytest.approx(np.mean(values))
    assert (interval.n, interval.resamples, interval.confidence) == (len(values), 200, 0.95)


def test_the_interval_covers_the_mean_as_often_as_it_says() -> None:
    generator = np.random.default_rng(7)
    truth, trials, covered = 0.3, 300, 0
    for seed in range(trials):
        interval = bootstrap_mean(generator.binomial(1, truth, 80).astype(float), resamples=400, seed=seed)
        covered += interval.low <= truth <= interval.high
    assert 0.90 <= covered / trials <= 0.98


def test_the_interval_is_near_the_normal_one_for_many_values() -> None:
    values = np.random.default_rng(0).normal(0.5, 0.2, 2000)
    interval = bootstrap_mean(values)
    error = values.std() / np.sqrt(len(values))
    assert interval.low == pytest.approx(values.mean() - 1.96 * error, abs=0.1 * error)
    assert interval.high == pytest.approx(values.mean() + 1.96 * error, abs=0.1 * error)


def test_resamples_in_pieces_are_the_same_as_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).random(30)
    whole = bootstrap_mean(values, resamples=500)
    monkeypatch.setattr(statistics, "_CELLS", 100)
    assert bootstrap_mean(values, resamples=500) == whole


def test_a_paired_difference_uses_the_pairing() -> None:
    generator = np.random.default_rng(1)
    hard = generator.random(100)  # questions differ far more than the systems do
    a, b = hard + 0.05 + generator.normal(0, 0.01, 100), hard
    difference = paired_difference(a, b)
    assert difference.real
    assert difference.low > 0.04
    assert difference.high < 0.06
    assert difference.p_value < 0.001
    turned = paired_difference(b, a)
    assert turned.mean == pytest.approx(-difference.mean)
    assert turned.real
    assert turned.high == pytest.approx(-difference.low)


def test_no_difference_is_not_called_real() -> None:
    same = np.random.default_rng(2).random(50)
    difference = paired_difference(same, same)
    assert (difference.mean, difference.low, difference.high, difference.p_value) == (0, 0, 0, 1)
    assert not difference.real


@settings(max_examples=60)
@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=20))
def test_a_difference_whose_interval_spans_zero_is_never_real(pairs: list[tuple[float, float]]) -> None:
    a, b = zip(*pairs, strict=True)
    difference = paired_difference(a, b, resamples=200)
    assert 0 < difference.p_value <= 1
    if difference.low <= 0 <= difference.high:
        assert not difference.real


def test_chance_is_rarely_called_real() -> None:
    generator = np.random.default_rng(3)
    trials = 300
    real = sum(
        paired_difference(generator.random(40), generator.random(40), resamples=400, seed=seed).real
        for seed in range(trials)
    )
    assert real / trials < 0.09


def test_a_handful_of_questions_proves_nothing() -> None:
    assert not paired_difference([1.0], [0.0]).real
    assert not paired_difference([1.0] * 5, [0.0] * 5).real
    assert paired_difference([1.0] * 6, [0.0] * 6).real
    assert not paired_difference([1.0] * 5 + [0.5] * 50, [0.0] * 5 + [0.5] * 50).real


@pytest.mark.parametrize("values", [[], [float("nan")], [0.1, float("inf")], [[0.1, 0.2]]])
def test_unusable_values_are_refused(values: list[float]) -> None:
    with pytest.raises(InvalidInput, match="values"):
        bootstrap_mean(values)
    with pytest.raises(InvalidInput):
        paired_difference(values, values)


def test_unusable_settings_are_refused() -> None:
    with pytest.raises(InvalidInput, match="one of each"):
        paired_difference([0.1], [0.1, 0.2])
    with pytest.raises(InvalidInput, match="resamples"):
        bootstrap_mean([0.1], resamples=0)
    with pytest.raises(InvalidInput, match="confidence"):
        bootstrap_mean([0.1], confidence=95)
