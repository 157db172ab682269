from __future__ import annotations

import re
import string
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyprag.errors import InvalidInput
from polyprag.evaluation.metrics import exact_match, normalise, score, token_f1
from polyprag.text import contains_answer, tokens

_WORDS = st.lists(
    st.sampled_from(
        ["the", "a", "yes", "no", "tern", "Tern!", "15,140", "J.R.R.", "Ångström", "東京", "ดี", "كتاب", "-"]
    ),
    max_size=6,
).map(" ".join)
_ANY = st.text(max_size=20) | _WORDS


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Tern,\tand an Auk.", "tern and auk"),
        ("June 19, 2013", "june 19 2013"),
        ("15,140", "15140"),
        ("St. John's", "st johns"),
        ("J. R. R. Tolkien", "j r r tolkien"),
        ("A. A. Milne", "milne"),  # SQuAD takes initials for articles
        ("theatre another", "theatre another"),
        ("Émile Zola", "émile zola"),
        ("E\u0301mile", "émile"),  # a letter and its mark are the letter with the mark
        ("Emile", "emile"),  # but accents count
        ("STRASSE Straße", "strasse strasse"),
        ("“Quoted” – text…", "quoted text"),
        ("1914–1918", "19141918"),  # as with the ASCII hyphen
        ("１２３ ＡＢＣ", "123 abc"),  # full width
        ("東京都です。", "東 京 都 で す"),
        ("BBC東京 2024年", "bbc 東 京 2024 年"),
        ("대한민국 서울", "대한민국 서울"),
        ("Москва, Россия", "москва россия"),
        ("القاهرة، مصر", "القاهرة مصر"),
        ("दिल्ली।", "दिल्ली"),
        ("ก็ดี", "ก็ ดี"),  # vowels and tones stay with their letter
        ("The The", "the the"),  # what the rules would erase altogether stays
        ("A", "a"),
        ("!!!", "!!!"),
        ("  ", ""),
        ("", ""),
    ],
)
def test_normalise(text: str, normal: str) -> None:
    assert normalise(text) == normal


@given(_ANY)
def test_normalise_is_idempotent(text: str) -> None:
    assert tokens(normalise(text)) == tokens(text)
    assert normalise(normalise(text)) == normalise(text)


@given(st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=30))
def test_ascii_is_normalised_as_squad_does(text: str) -> None:
    lowered = "".join(c for c in text.lower() if c not in set(string.punctuation))
    official = " ".join(re.sub(r"\b(a|an|the)\b", " ", lowered).split())
    if official:
        assert normalise(text) == official


@pytest.mark.parametrize(
    ("prediction", "answers", "em", "f1"),
    [
        ("June 19, 2013", ["June 19, 2013"], 1, 1),
        ("It was June 19, 2013.", ["June 19, 2013"], 0, 0.75),
        ("15140", ["15,140"], 1, 1),
        ("U.S.A.", ["United States", "USA"], 1, 1),
        ("the tern", ["Tern"], 1, 1),
        ("tern", ["tern tern"], 0, 2 / 3),  # multisets
        ("auk", ["tern"], 0, 0),
        ("", ["tern"], 0, 0),
        ("", ["The The"], 0, 0),
        ("The The", ["The The"], 1, 1),
        ("b", ["A"], 0, 0),
        ("Yes.", ["yes"], 1, 1),
        ("yes it is", ["yes"], 0, 0),
        ("no", ["no one"], 0, 0),
        ("no", ["yes"], 0, 0),
        ("no", ["yes", "no one", "No"], 1, 1),
        ("noanswer", ["tern"], 0, 0),
        ("東京", ["東京都"], 0, 0.8),
        ("東京 都", ["東京都"], 1, 1),
        ("Emile", ["Émile"], 0, 0),
        ("서울", ["서울"], 1, 1),
    ],
)
def test_scores(prediction: str, answers: list[str], em: float, f1: float) -> None:
    assert exact_match(prediction, answers) == em
    assert token_f1(prediction, answers) == pytest.approx(f1)
    assert score(prediction, answers).em == em


def test_precision_and_recall_are_those_of_one_alias() -> None:
    # maxima over aliases apart would give precision 1 and recall 1 to a prediction of F1 0.8
    scores = score("cat sat", ["cat", "big cat sat", "a cat that sat down somewhere"])
    assert (scores.alias, scores.precision) == ("big cat sat", 1.0)
    assert scores.recall == pytest.approx(2 / 3)
    assert scores.f1 == pytest.approx(0.8)


def test_the_answer_may_be_one_string_but_not_none() -> None:
    assert exact_match("tern", "Tern") == 1.0
    with pytest.raises(InvalidInput, match="at least one answer"):
        score("tern", [])
    with pytest.raises(InvalidInput):
        exact_match("tern", [])


@given(_ANY, _ANY)
def test_f1_is_symmetric_and_bounded(left: str, right: str) -> None:
    one, other = score(left, [right]), score(right, [left])
    assert one.f1 == other.f1
    assert one.em == other.em
    assert one.precision == other.recall
    assert one.recall == other.precision
    assert 0 <= one.em <= one.f1 <= 1
    assert min(one.precision, one.recall) - 1e-12 <= one.f1 <= max(one.precision, one.recall) + 1e-12


@given(_ANY, st.lists(_ANY, min_size=1, max_size=4))
def test_the_best_alias_counts(prediction: str, answers: list[str]) -> None:
    scores = score(prediction, answers)
    assert scores.f1 == max(score(prediction, [answer]).f1 for answer in answers)
    assert scores.em == exact_match(prediction, answers)
    assert scores.alias in answers
    if scores.em:
        assert scores.f1 == scores.precision == scores.recall == 1
    closed = Counter(tokens(prediction)) in (Counter(["yes"]), Counter(["no"]))
    if closed:
        assert scores.f1 in (0, 1)


@pytest.mark.parametrize(
    ("text", "answer", "found"),
    [
        ("She was a Polish politician.", "pol", False),
        ("She was a Polish politician.", "The Politician", True),
        ("born in Saint-Denis, 1850", "1850", True),
        ("born in 東京都 in 1850", "東京", True),
        ("born in East Berlin", "Berlin East", False),
        ("anything", "", False),
        ("anything", " ", False),
        ("", "anything", False),
    ],
)
def test_contains_answer(text: str, answer: str, found: bool) -> None:
    assert contains_answer(text, [answer]) is found
    assert contains_answer(text, ["missing", answer]) is found
