"""Reading a model's answer: what is whole is found, whatever stands around it, and nothing raises."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from polyprag._polyprag import Document
from polyprag.augment import AugmentSettings, Pair
from polyprag.augment.answer import parse_answer
from polyprag.augment.checks import keep
from polyprag.text import contains_answer, normalise

A = {"question": "Who built the mill?", "answer": "Jan Reuter"}
B = {"question": "When was the mill built?", "answer": "1761"}
PAIRS = (Pair(*A.values()), Pair(*B.values()))
WHOLE = json.dumps({"rewrite": "Jan Reuter built it.", "pairs": [A, B]}, indent=1)


@pytest.mark.parametrize(
    "text",
    [
        WHOLE,
        f"```json\n{WHOLE}\n```",
        f"Here you are:\n\n{WHOLE}\n\nI hope that this helps [1] {{really}}!",
        f'<think>Perhaps {{"question": "What is it?", "answer": "a mill"}}. No.</think>\n{WHOLE}',
        WHOLE.replace("]", ",]").replace('"1761"', '"1761", ').replace("\n", "\n  "),
        WHOLE.replace('"question"', '"Question "').replace('"pairs"', '"qa"'),
        WHOLE.replace('"1761"', "1761"),
        json.dumps([{"rewrite": "Jan Reuter built it."}, A, B]),
        f'{{"rewrite": "Jan Reuter built it."}}\n{json.dumps(A)}\n{json.dumps(B)}',
        WHOLE.replace("Jan Reuter built it.", "Jan\nReuter  built it."),
        WHOLE[:-3],
    ],
)
def test_what_ought_to_be_json(text: str) -> None:
    found = parse_answer(text)
    assert found is not None
    assert (found.pairs, found.rewrite, found.malformed) == (PAIRS, "Jan Reuter built it.", 0)


def test_one_object_in_the_place_of_a_list() -> None:
    found = parse_answer(json.dumps(A))
    assert found is not None
    assert found.pairs == PAIRS[:1]


def test_a_comma_before_a_bracket_within_a_text_stays() -> None:
    said = {"question": "What is [a, ] here?", "answer": 'a, } and "b, ]"'}
    found = parse_answer(json.dumps([said, A])[:-1] + ",]")
    assert found is not None
    assert found.pairs == (Pair(*said.values()), PAIRS[0])


def test_of_an_answer_that_was_cut_the_whole_pairs_are_kept() -> None:
    for end in range(len(WHOLE)):
        found = parse_answer(WHOLE[:end])
        complete = sum(WHOLE.index("}", WHOLE.index(p.answer)) < end for p in PAIRS)
        assert (() if found is None else found.pairs) == PAIRS[:complete]
        if WHOLE.index('it."') + 4 <= end:
            assert found is not None
            assert found.rewrite == "Jan Reuter built it."


@pytest.mark.parametrize("wrong", [None, [], ["Jan", "Reuter"], {}, "", "  ", "\ud800"])
def test_a_pair_that_is_none_is_counted(wrong: Any) -> None:
    found = parse_answer(json.dumps([A, {**B, "answer": wrong}]))
    assert found is not None
    assert (found.pairs, found.malformed) == (PAIRS[:1], 1)


@pytest.mark.parametrize(
    "text", ["", "I cannot help with that.", "[]", "{}", '{"pairs": []}', "<think>hm", "[" * 300_000]
)
def test_an_answer_without_anything_is_none(text: str) -> None:
    assert parse_answer(text) is None


_nearly = st.recursive(
    st.none()
    | st.booleans()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["Jan Reuter", "1761", "yes"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["question", "answer", "rewrite", "pairs", "x"]), inner, max_size=4)
    ),
    max_leaves=20,
).map(json.dumps)
_scraps = st.lists(
    st.sampled_from(
        [*'{}[],:"\\', "\n", '"question"', '"answer"', '"rewrite":', "```json", "</think>", "\\ud800"]
    )
    | _nearly
    | st.text(max_size=6),
    max_size=30,
).map("".join)


@given(_scraps, st.booleans(), st.integers(1, 4))
@example('[{"question": "Who built the mill in Ost?", "answer": "Jan Reuter", "x": 1e999}]', True, 2)
@example('{"question": "Did Jan Reuter build it?", "answer": true}', True, 1)
def test_nothing_raises_and_only_grounded_pairs_are_kept(text: str, yes_no: bool, limit: int) -> None:
    document = Document(1, "Jan Reuter built it in 1761, yes.", "Tarn Mill")
    found = parse_answer(text)
    pairs = found.pairs if found is not None else ()
    kept, dropped = keep(document, pairs, AugmentSettings(pairs=limit, yes_no=yes_no))
    assert len(kept) <= limit
    assert len({normalise(p.question) for p in kept}) == len(kept)
    for pair in kept:
        plain = normalise(pair.answer)
        assert (yes_no and plain in ("yes", "no")) or contains_answer(f"Tarn Mill. {document.text}", [plain])
    assert min(len(pairs), limit) <= len(kept) + sum(dropped.values()) <= len(pairs)
    json.dumps([vars(p) for p in pairs], ensure_ascii=False).encode()


@given(st.text(max_size=200))
def test_no_text_raises(text: str) -> None:
    parse_answer(text)


@given(
    st.lists(st.tuples(st.text(max_size=20), st.text(max_size=20)), max_size=4),
    st.text(alphabet="ab \n`", max_size=10),
    st.text(alphabet="ab \n`,}]", max_size=10),
)
def test_pairs_come_back_as_they_were(pairs: list[tuple[str, str]], before: str, after: str) -> None:
    expected = [Pair(" ".join(q.split()), " ".join(a.split())) for q, a in pairs]
    text = before + json.dumps({"pairs": [{"question": q, "answer": a} for q, a in pairs]}) + after
    found = parse_answer(text.replace("</think>", ""))
    assert list(found.pairs if found else ()) == [p for p in expected if p.question and p.answer]


def test_yes_and_no_hold_only_where_they_were_asked_for() -> None:
    document = Document(1, "Jan Reuter built it in 1761.", "Tarn Mill")
    pairs = [Pair("Did Jan Reuter build Tarn Mill?", "Yes"), Pair("Is Tarn Mill a bridge, yes or no?", "no")]
    assert keep(document, pairs, AugmentSettings(yes_no=True)) == (pairs, {})
    assert keep(document, pairs, AugmentSettings())[1] == {"answer_not_in_passage": 2}
