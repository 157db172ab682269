"""Scores of single predictions: hand-made cases, and laws that any text has to obey."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyprag.errors import InvalidInput
from polyprag.evaluation.metrics import exact_match, prag_cut, score, token_f1


@pytest.mark.parametrize(
    ("prediction", "answers", "em", "f1"),
    [
        # dates, numbers and initials are scored whole
        ("June 19, 2013", ["June 19, 2013"], 1, 1),
        ("19 June 2013", ["June 19, 2013"], 0, 1),
        ("June 2013", ["June 19, 2013"], 0, 0.8),
        ("15,140", ["15140"], 1, 1),
        ("3.5 million", ["3.5 million"], 1, 1),
        ("35 million", ["3.5 million"], 1, 1),  # punctuation is deleted, as SQuAD does
        ("J. R. R. Tolkien", ["JRR Tolkien", "J.R.R. Tolkien"], 0, 1 / 3),
        ("J.R.R. Tolkien", ["JRR Tolkien"], 1, 1),
        ("St. Louis", ["St Louis"], 1, 1),
        # articles, case, spaces, punctuation
        ("The  BEATLES!", ["beatles"], 1, 1),
        ("a an the", ["the"], 0, 0.5),
        ("The The", ["The The"], 1, 1),
        ("", ["The The"], 0, 0),
        ("An", ["A"], 0, 0),
        # aliases: the best one counts, and precision and recall are its own
        ("New York", ["NYC", "New York City"], 0, 0.8),
        ("politician", ["politician", "pol"], 1, 1),
        # yes and no count whole or not at all
        ("yes", ["yes"], 1, 1),
        ("Yes.", ["yes"], 1, 1),
        ("yes, they were", ["yes"], 0, 0),
        ("no", ["no one"], 0, 0),
        ("noanswer", ["no"], 0, 0),
        # empty
        ("", ["anything"], 0, 0),
        ("", [""], 1, 1),
        ("anything", [""], 0, 0),
        # other scripts
        ("東京都", ["東京"], 0, 0.8),
        ("東京", ["東京"], 1, 1),
        ("Москва", ["москва"], 1, 1),
        ("Straße", ["STRASSE"], 1, 1),
        ("são paulo", ["São Paulo"], 1, 1),
        ("Cafe\u0301", ["café"], 1, 1),
        ("1912–1954", ["19121954"], 1, 1),
        ("서울 특별시", ["서울"], 0, 2 / 3),
        ("«Война и мир»", ["Война и мир"], 1, 1),
    ],
)
def test_squad(prediction: str, answers: list[str], em: float, f1: float) -> None:
    found = score(prediction, answers)
    assert (found.em, found.f1) == (em, pytest.approx(f1))
    assert exact_match(prediction, answers) == em


def test_precision_and_recall_are_of_one_alias() -> None:
    found = score("New York", ["York", "New York City of dreams"])
    assert (found.f1, found.precision, found.recall) == (pytest.approx(2 / 3), 0.5, 1.0)
    assert found.alias == "York"


@pytest.mark.parametrize(
    ("prediction", "cot", "cut"),
    [
        ("June 19, 2013", False, "June 19"),
        ("15,140 people.", False, "15"),
        ("J. R. R. Tolkien", False, "J"),
        ("Paris\nand more", False, "Paris"),
        ("\n\nParis, France", False, "Paris"),
        ("Paris", False, "Paris"),
        (", Paris", False, ""),
        ("He was born in 1912. So the answer is Paris.", True, "Paris"),
        ("the answer is Rome. the answer is Paris", True, "Rome"),
        ("So The answer is Paris.", True, "So The answer is Paris"),
        ("So the answer is", True, ""),
        ("the answer is Paris", False, "the answer is Paris"),
    ],
)
def test_how_prag_cuts(prediction: str, cot: bool, cut: str) -> None:
    assert prag_cut(prediction, cot=cot) == cut


@pytest.mark.parametrize(
    ("prediction", "answers", "em", "f1", "precision", "recall"),
    [
        ("June 19, 2013", ["June 19, 2013"], 0, 0.8, 1, 2 / 3),
        ("Paris, France", ["paris"], 1, 1, 1, 1),
        ("New York", ["York", "New York City of dreams"], 0, 2 / 3, 1, 1),  # each the best of all aliases
        ("yes", ["no"], 0, 0, 0, 0),
        ("yes they were", ["yes"], 0, 0, 0, 0),
        ("The", ["A"], 1, 0, 0, 0),  # nothing is left of either
        ("", ["Paris"], 0, 0, 0, 0),
        ("1912–1954", ["1912-1954"], 0, 0, 0, 0),
    ],
)
def test_prag(
    prediction: str, answers: list[str], em: float, f1: float, precision: float, recall: float
) -> None:
    found = score(prediction, answers, "prag")
    expected = (em, pytest.approx(f1), pytest.approx(precision), pytest.approx(recall))
    assert (found.em, found.f1, found.precision, found.recall) == expected


def test_prag_with_reasoning() -> None:
    text = "Ann was born in 1912 and Bob in 1954. So the answer is Ann Smith."
    assert score(text, ["Ann Smith"], "prag-cot").em == 1
    assert score(text, ["Ann Smith"], "prag").f1 < 0.5


def test_what_cannot_be_scored_is_refused() -> None:
    with pytest.raises(InvalidInput, match="answers is empty"):
        score("x", [])
    with pytest.raises(InvalidInput, match="squad, prag, prag-cot"):
        score("x", ["x"], "bleu")  # type: ignore[arg-type]


@given(st.text(max_size=30), st.lists(st.text(max_size=30), min_size=1, max_size=4))
def test_laws(prediction: str, answers: list[str]) -> None:
    for scoring in ("squad", "prag", "prag-cot"):
        found = score(prediction, answers, scoring)  # type: ignore[arg-type]
        for value in (found.em, found.f1, found.precision, found.recall):
            assert 0 <= value <= 1
        assert score(prediction, answers[::-1], scoring).f1 == found.f1  # type: ignore[arg-type]
    squad = score(prediction, answers)
    assert squad.f1 >= squad.em
    assert score(answers[0], answers).em == 1
    assert token_f1(prediction, answers) == squad.f1
