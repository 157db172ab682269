from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyprag.corpus import read_unified
from polyprag.errors import InvalidInput
from polyprag.evaluation.controls import derangement, leaked
from polyprag.evaluation.data import Question, evaluation_set, popqa_sample
from polyprag.text import normalise, tokens


def _question(number: int, answer: str, kind: str | None = None, documents: int = 1) -> Question:
    ids = tuple(f"d{number}.{part}" for part in range(documents))
    return Question(f"q{number}", f"question {number}", (answer,), kind, ids)


def _check(questions: list[Question], draws: tuple[tuple[tuple[str | int, ...], ...], ...]) -> None:
    answers_of: dict[str | int, set[str]] = {}
    for question in questions:
        for id in question.documents:
            answers_of.setdefault(id, set()).update(map(normalise, question.answers))
    for draw in draws:
        assert len(draw) == len(questions)
        for question, wrong in zip(questions, draw, strict=True):
            assert 1 <= len(wrong) <= len(set(question.documents))
            assert len(set(wrong)) == len(wrong)
            assert not set(wrong) & set(question.documents)
            for id in wrong:
                assert not answers_of[id] & set(map(normalise, question.answers))


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(st.sampled_from("uvwxyz"), st.sampled_from(["born", "works", None]), st.integers(1, 3)),
        min_size=2,
        max_size=12,
    ),
    st.integers(0, 9),
)
def test_wrong_documents_are_wrong(rows: list[tuple[str, str | None, int]], seed: int) -> None:
    questions = [_question(n, *row) for n, row in enumerate(rows)]
    questions += [_question(100, "someone"), _question(101, "else")]  # so that everyone has someone else
    result = derangement(questions, seed)
    assert result == derangement(questions, seed)
    assert len(result.draws) == 3
    _check(questions, result.draws)
    short = sum(
        len(w) < len(q.documents) for draw in result.draws for q, w in zip(questions, draw, strict=True)
    )
    assert result.fewer == short


def test_wrong_documents_are_of_the_same_type_and_dealt_evenly() -> None:
    questions = [_question(n, f"answer {n}", "born" if n % 2 else "works") for n in range(40)]
    result = derangement(questions, 1)
    assert (result.other_type, result.fewer) == (0, 0)
    kinds = {question.documents[0]: question.type for question in questions}
    for draw in result.draws:
        assert all(kinds[wrong[0]] == question.type for question, wrong in zip(questions, draw, strict=True))
        assert max(Counter(wrong[0] for wrong in draw).values()) <= 2
    assert len(set(result.draws)) == 3
    assert derangement(questions, 2).draws != result.draws


def test_the_type_gives_way_and_that_is_counted() -> None:
    questions = [_question(0, "x", "born"), _question(1, "y", "works"), _question(2, "z", "works")]
    result = derangement(questions)
    assert result.other_type == 3  # the only birth, once a draw
    _check(questions, result.draws)


def test_too_few_other_documents_are_counted() -> None:
    questions = [_question(0, "x", documents=2), _question(1, "y", documents=1)]
    result = derangement(questions)
    assert result.fewer == 3
    _check(questions, result.draws)


def test_answers_are_compared_after_normalisation_and_through_all_questions_of_a_document() -> None:
    questions = [
        Question("q0", "?", ("The Tern",), None, ("d0",)),
        Question("q1", "?", ("tern!",), None, ("d1",)),
        Question("q2", "?", ("auk",), None, ("d2",)),
        Question("q3", "?", ("tern",), None, ("d2",)),  # so d2 answers "tern" as well
        Question("q4", "?", ("skua",), None, ("d4",)),
    ]
    for draw in derangement(questions).draws:
        assert draw[0] == draw[1] == draw[3] == ("d4",)


def test_what_cannot_be_deranged_is_an_error() -> None:
    with pytest.raises(InvalidInput, match=r"question 'q[01]': every document is its own"):
        derangement([_question(0, "x"), _question(1, "X.")])
    with pytest.raises(InvalidInput, match="no gold document"):
        derangement([Question("q", "?", ("x",))])
    with pytest.raises(InvalidInput, match="draws"):
        derangement([_question(0, "x"), _question(1, "y")], draws=0)


def _asked(*texts: str) -> list[Question]:
    return [Question(f"q{n}", text, ("x",)) for n, text in enumerate(texts)]


def test_leaks() -> None:
    questions = _asked("Where was the Tern born?", "Who wrote the long book of small birds?", "???")
    pairs = [
        ("where was tern born", "a"),  # equal after normalisation
        ("Where was the Auk born?", "b"),  # 3 of 5
        ("Who wrote long book of the small brown birds", "c"),  # 7 of 8
        ("", "d"),
        ("born Tern was where", "e"),  # the same set
    ]
    result = leaked(questions, pairs)
    assert [(leak.question, leak.pair) for leak in result.pairs] == [("q0", 0), ("q1", 2), ("q0", 4)]
    assert result.questions == {"q0", "q1"}
    assert len(result) == 3
    assert result.pairs[1].jaccard == pytest.approx(7 / 8)


def test_exactly_the_threshold_is_a_leak() -> None:
    assert len(leaked(_asked("b c d e f"), [("b c d e", "")])) == 1  # 4 of 5
    assert len(leaked(_asked("b c d e f"), [("b c d g e", "")])) == 0  # 4 of 6
    with pytest.raises(InvalidInput):
        leaked([], [], threshold=0)


_SENTENCES = st.lists(st.sampled_from("bcdefgh"), max_size=8).map(" ".join)


@given(
    st.lists(_SENTENCES, max_size=8),
    st.lists(_SENTENCES, max_size=8),
    st.sampled_from([0.2, 0.5, 0.6, 0.75, 0.8, 1.0]),
)
def test_the_index_finds_what_a_full_comparison_finds(
    tests: list[str], training: list[str], threshold: float
) -> None:
    expected = []
    for number, pair in enumerate(training):
        for place, test in enumerate(tests):
            left, right = set(tokens(pair)), set(tokens(test))
            if left | right and len(left & right) >= threshold * len(left | right) - 1e-9:
                expected.append((f"q{place}", number))
    found = leaked(_asked(*tests), [(pair, "") for pair in training], threshold)
    assert [(leak.question, leak.pair) for leak in found.pairs] == expected


def test_leaks_are_found_quickly() -> None:
    source = random.Random(0)
    words = [f"w{n}" for n in range(2000)]

    def ask() -> str:
        return f"What is the {' '.join(source.choices(words, k=5))} of it?"

    questions, pairs = _asked(*(ask() for _ in range(1000))), [(ask(), "") for _ in range(20_000)]
    pairs += [(question.question, "") for question in questions]
    start = time.perf_counter()
    assert len(leaked(questions, pairs).questions) == 1000
    assert time.perf_counter() - start < 10  # comparing all pairs would take minutes


def test_real_questions(real_data: Callable[[str], Path]) -> None:
    popqa = popqa_sample(real_data("popqa/popqa_1000_unified.jsonl"))
    result = derangement(popqa.questions, 42)
    assert (result.other_type, result.fewer) == (0, 0)
    _check(list(popqa.questions), result.draws)
    hotpot = evaluation_set(read_unified(real_data("2wikimultihopqa/2wiki_sampled_unified.jsonl")))
    _check(list(hotpot.questions), derangement(hotpot.questions, 42).draws)
