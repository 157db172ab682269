"""Spans worth asking for, found by their form."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyprag.candidates import candidate_answers, is_person, opener
from polyprag.text import normalise


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("She was born on 4 March 1902 in Lindau.", ["Lindau", "4 March 1902"]),
        ("It opened on March 4, 1902.", ["March 4, 1902"]),
        ("It opened in March 1902.", ["March 1902"]),
        ("The mill has 1,204 steps and a weight of 3.5 tons.", ["1,204", "3.5"]),
        ("It has twenty-one windows and seven doors.", ["twenty-one", "seven"]),
        ("The law was written by Oda van der Merrow.", ["Oda van der Merrow"]),
        ("The river runs to the Bay of Quills.", ["Bay of Quills"]),
        ("It was built by J. R. Quill in Ost.", ["J. R. Quill", "Ost"]),
        ("It was painted by Zoë d’Argent-Müller in Ålesund.", ["Zoë d’Argent-Müller", "Ålesund"]),
    ],
)
def test_dates_numbers_and_names(sentence: str, expected: list[str]) -> None:
    found = candidate_answers(sentence)
    assert [f for f in found if f in expected] == expected, found


def test_a_date_is_no_three_numbers() -> None:
    found = candidate_answers("She was born on 4 March 1902.")
    assert "4 March 1902" in found
    assert not {"4", "March", "1902"} & set(found)


def test_a_capital_at_the_start_proves_nothing() -> None:
    assert "Every" not in candidate_answers("Every spring the gates of Ost open.")
    assert "The" not in candidate_answers("The Ost gate opens.")


def test_what_the_title_says_is_left_out() -> None:
    sentence = "Marta Helm was born in Lindau in 1902."
    assert "Marta Helm" in candidate_answers(sentence)
    assert "Marta Helm" not in candidate_answers(sentence, "Marta Helm (architect)")
    assert "Lindau" not in candidate_answers(sentence, "Lindau")
    assert "1902" not in candidate_answers(sentence, "The floods of 1902")


def test_no_span_comes_twice() -> None:
    found = candidate_answers("In Ost, near OST, by the Ost gate, 7 of 7 are from Ost.")
    assert len({normalise(f) for f in found}) == len(found)


@pytest.mark.parametrize(
    ("sentence", "numbers"),
    [
        ("灯台は1874年に羽港で点灯されました。", ["1874"]),
        ("بُنيت المنارة عام 1874 في الميناء.", ["1874"]),
        ("ประภาคารสร้างเมื่อ 1874 ที่ท่าเรือ", ["1874"]),
        ("등대는 1874 년에 세워졌다", ["1874"]),
        ("प्रकाशस्तंभ 1874 में बना", ["1874"]),
        ("Ο φάρος άναψε το 1874 στο Λιμάνι του Φτερού.", ["1874", "Λιμάνι"]),
        ("Маяк в Перьевой Гавани зажгли в 1874 году.", ["1874", "Перьевой Гавани"]),
        ("١٨٧٤", ["١٨٧٤"]),
    ],
)
def test_other_scripts_give_their_numbers_at_least(sentence: str, numbers: list[str]) -> None:
    found = candidate_answers(sentence)
    if any("一" <= c <= "鿿" for c in sentence):
        assert any("1874" in f for f in found) or found == []
    else:
        assert set(numbers) <= set(found), found


@pytest.mark.parametrize("sentence", ["", " ", "?!", "...", "a", "of of of", "’’’", "\0", "_ - _"])
def test_where_there_is_nothing_to_ask(sentence: str) -> None:
    assert candidate_answers(sentence) == []


def test_a_date_may_end_a_sentence_within_brackets() -> None:
    sentence = "Marta Helm (born 1902, died 1971"
    assert opener(sentence, "1971", "Marta Helm", person=True) == "When"
    assert opener(f"{sentence})", "1971", "Marta Helm", person=True) == "When did Marta Helm die"


@given(
    st.lists(st.sampled_from(["1902", "71", "–", "-", "(", ")", "born", "he", " ", "x"]), max_size=14).map(
        "".join
    )
)
def test_two_years_in_brackets_are_a_person(text: str) -> None:
    said = r"\b(?:he|she|his|her|who)\b|\(born |\([^()]*\d{4}[^()]*[–-][^()]*\d{4}[^()]*\)"
    assert is_person(text) == (re.search(said, text) is not None)


def test_a_bracket_that_never_ends_costs_no_hours() -> None:
    years = ", ".join(f"{year}-{year + 1}" for year in range(1000, 9000))
    begun = time.process_time()
    assert not is_person(f"The table :( {years}")
    assert not is_person(f"The table ({years.replace('-', '/')})")
    assert is_person(f"The table ({years})")
    assert time.process_time() - begun < 5


_TEXT = st.text(max_size=60) | st.lists(
    st.sampled_from(
        [
            "the",
            "was a",
            "Ost",
            "of",
            "Marta",
            "4 March 1902",
            "12",
            "seven",
            "mill",
            "by",
            ",",
            ".",
            "'s",
            "灯台",
        ]
    ),
    max_size=14,
).map(" ".join)


@given(sentence=_TEXT, title=_TEXT, limit=st.integers(0, 8))
def test_candidates_are_spans_of_their_sentence(sentence: str, title: str, limit: int) -> None:
    found = candidate_answers(sentence, title, limit)
    assert len(found) <= limit
    assert all(f and f in sentence for f in found)
    assert len({normalise(f) for f in found}) == len(found)
    if "(" not in title:  # what stands there in brackets may be asked for: "(architect)"
        assert not any(f" {normalise(f)} " in f" {normalise(title)} " for f in found)
