"""Questions that yes or no answers: grammatical, true or not so, as many of the one as of the other."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyprag import Document
from polyprag.augment import Augmentation, Pair
from polyprag.errors import InvalidInput
from polyprag.models import BaseModel
from polyprag.samples import SampleSettings, build_samples
from polyprag.text import normalise
from polyprag.yes_no import yes_no_pairs


def _asked(of_first: Pair, of_second: Pair, first: str = "", second: str = "") -> list[tuple[int, str, str]]:
    documents = [
        Document("a", f"Ada Ost. {first} {of_first.answer}.", "Ada Ost"),
        Document("b", f"Ben Rud. {second} {of_second.answer}.", "Ben Rud (miller)"),
    ]
    written = [Augmentation("a", (of_first,)), Augmentation("b", (of_second,))]
    return [(row, pair.question, pair.answer) for row, pair in yes_no_pairs(documents, written)]


@pytest.mark.parametrize(
    ("question", "answer", "wrong", "yes", "no"),
    [
        ("When was X born?", "1902", "1911", "Was X born in 1902?", "Was X born in 1911?"),
        (
            "When did X die?",
            "4 May 1902",
            "9 May 1911",
            "Did X die on 4 May 1902?",
            "Did X die on 9 May 1911?",
        ),
        (
            "On what date did X open?",
            "May 1902",
            "June 1911",
            "Did X open in May 1902?",
            "Did X open in June 1911?",
        ),
        ("In what year was X built?", "1761", "1801", "Was X built in 1761?", "Was X built in 1801?"),
        ("Where was X born?", "Lindau", "Ghent", "Was X born in Lindau?", "Was X born in Ghent?"),
        ("Where is X located?", "Ost", "Rud", "Is X located in Ost?", "Is X located in Rud?"),
        ("In what city was X born?", "Ost", "Rud", "Was X born in Ost?", "Was X born in Rud?"),
        ("Where did X live?", "Ost", "Rud", "Did X live in Ost?", "Did X live in Rud?"),
        ("What was the profession of X?", "mason", "actor", "Was X a mason?", "Was X an actor?"),
        ("What is X?", "old mill", "ship", "Is X an old mill?", "Is X a ship?"),
        ("Who was the owner of X?", "Jan", "Ida", "Was Jan the owner of X?", "Was Ida the owner of X?"),
        ("What is the capital of X?", "Ost", "Rud", "Is Ost the capital of X?", "Is Rud the capital of X?"),
        ("Who built X?", "Jan", "Ida", "Was it Jan who built X?", "Was it Ida who built X?"),
    ],
)
def test_a_pair_becomes_a_question_that_is_so_and_one_that_is_not(
    question: str, answer: str, wrong: str, yes: str, no: str
) -> None:
    first = Pair(question.replace("X", "Ada Ost"), answer)
    second = Pair(question.replace("X", "Ben Rud"), wrong)
    asked = _asked(first, second)
    assert asked[:2] == [(0, yes.replace("X", "Ada Ost"), "yes"), (0, no.replace("X", "Ada Ost"), "no")]
    assert [answer for _, _, answer in asked] == ["yes", "no", "yes", "no"]


@pytest.mark.parametrize(
    ("question", "answer", "wrong"),
    [
        ("How is X?", "old", "new"),
        ("How many bridges did X design?", "14", "12"),
        ("What is X?", "German", "Dutch"),  # "a German" is what it is not
        ("What is the name of the dog of X?", "Pepper", "Salt"),
        ("When was X born?", "long ago", "of late"),
        ("Who is X?", "Jan", "Ida"),
        ("Is X a mason?", "yes", "no"),
        ("Wo wurde X geboren?", "Lindau", "Gent"),
        ("Where was X born", "Lindau", "Ghent"),
    ],
)
def test_what_has_no_form_gives_no_question(question: str, answer: str, wrong: str) -> None:
    first, second = (
        Pair(question.replace("X", name), a) for name, a in (("Ada Ost", answer), ("Ben Rud", wrong))
    )
    assert _asked(first, second) == []


def test_a_wrong_answer_is_never_one_that_the_passage_has() -> None:
    mason = Pair("What was the profession of Ada Ost?", "mason")
    actor = Pair("What was the profession of Ben Rud?", "actor")
    asked = _asked(mason, actor, first="She was an Actor, too, and a")
    assert [row for row, *_ in asked] == [1, 1], "of the first, both answers are true"
    assert _asked(mason, mason) == [], "there is no other answer"
    date = Pair("When was Ben Rud born?", "4 May 1902")
    assert _asked(Pair("When was Ada Ost born?", "1902"), date) == [], "a year does not stand for a date"


_WORDS = st.text("abcXYZ Äé漢?'19", max_size=12)


@given(st.lists(st.lists(st.tuples(_WORDS, _WORDS), max_size=3), min_size=1, max_size=4))
def test_whatever_the_pairs_are_yes_and_no_are_balanced(written: list[list[tuple[str, str]]]) -> None:
    openers = ("When was ", "Where did ", "What is the a of ", "Who b ", "What is ")
    documents = [Document(i, "XYZ", "XYZ") for i in range(len(written))]
    augmentations = [
        Augmentation(i, tuple(Pair(f"{openers[(i + n) % 5]}{q}?", a) for n, (q, a) in enumerate(pairs)))
        for i, pairs in enumerate(written)
    ]
    made = list(yes_no_pairs(documents, augmentations))
    assert [pair.answer for _, pair in made] == ["yes", "no"] * (len(made) // 2)
    assert all(pair.question.endswith("?") for _, pair in made)
    assert all(augmentations[row].pairs for row, _ in made)
    assert made == list(yes_no_pairs(documents, augmentations)), "the same every time"


def test_samples_take_turns_and_learn_the_answer_alone(tiny_base: BaseModel) -> None:
    years = [1900 + i for i in range(8)]
    documents = [Document(i, f"Ost {i} was built in {year}.", f"Ost {i}") for i, year in enumerate(years)]
    written = [
        Augmentation(i, (Pair(f"When was Ost {i} built?", str(year)),)) for i, year in enumerate(years)
    ]
    settings = SampleSettings(with_passage=0, yes_no=0.25)
    samples = build_samples(documents, written, tiny_base.tokenizer, settings)
    told = [s for s in samples if s.share < 1]
    decode = tiny_base.tokenizer.decode
    assert [len(samples), len(told)] == [24, 16]
    assert Counter(normalise(str(decode(s.ids[s.loss_from : -1]))) for s in told) == {"yes": 8, "no": 8}
    assert all(str(decode(s.ids[: s.loss_from])).endswith("?\nAnswer:") for s in told)
    for epoch in range(4):
        assert sum(s.in_epoch(epoch) for s in told) == 4, "as many in one epoch as in another"
    assert all(sum(s.in_epoch(epoch) for epoch in range(4)) == 1 for s in told)
    assert len(build_samples(documents, written, tiny_base.tokenizer, SampleSettings(yes_no=0))) == 16
    with pytest.raises(InvalidInput, match="yes_no is a share between 0 and 1"):
        SampleSettings(yes_no=1.5)
