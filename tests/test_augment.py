"""Augmentation with a scripted stand-in for generation: what is kept, counted, written and resumed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import polyprag.augment.local
from polyprag._polyprag import Document
from polyprag.augment import Augmentation, AugmentSettings, Pair, Prompts, augment, read_pairs, summary
from polyprag.augment.checks import checked_rewrite
from polyprag.augment.local import LocalAugmenter, sentences
from polyprag.candidates import candidate_answers
from polyprag.errors import CorpusError
from polyprag.models import BaseModel
from polyprag.text import contains_answer

OST = Document("ost", "Ost has 412 houses. It was founded in 1761 by Jan Reuter.", "Ost")
TARN = Document(7, "The mill stands in Brask and was built in Brask on 4 March 1902.", "Tarn Mill")
DOCUMENTS = [OST, TARN]
SETTINGS = AugmentSettings(rewrite=False)


class Script:
    """Stands in for generation: answers by a function, long prompts first, and keeps what was asked."""

    def __init__(self) -> None:
        self.prompts: list[str] = []
        self.question: Callable[[str], str] = lambda answer: (
            f"said of Ost and Tarn Mill, and {answer.encode().hex()}?"
        )
        self.rewrite: Callable[[str], str] = lambda prompt: "no"
        self.fail_at: int | None = None

    def __call__(
        self, base: BaseModel, prompts: Sequence[str], settings: object, *, prefix: str = "", **more: Any
    ) -> Iterator[tuple[int, str]]:
        for index in sorted(range(len(prompts)), key=lambda i: -len(prompts[i])):
            prompt = prompts[index]
            self.prompts.append(prompt)
            if self.fail_at is not None and len(self.prompts) > self.fail_at:
                raise KeyboardInterrupt
            if "\nAnswer: " in prompt:
                yield index, self.question(prompt.partition("\nAnswer: ")[2].partition("\n")[0])
            else:
                yield index, self.rewrite(prompt)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    script = Script()
    monkeypatch.setattr(polyprag.augment.local, "generate", script)
    return script


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# What is kept


def test_every_pair_answers_from_its_own_passage(tiny_base: BaseModel, script: Script) -> None:
    found = augment(LocalAugmenter(tiny_base), DOCUMENTS, SETTINGS)
    assert [a.id for a in found] == ["ost", 7]
    for document, augmentation in zip(DOCUMENTS, found, strict=True):
        assert augmentation.pairs
        assert not augmentation.dropped
        assert augmentation.rewrite is None
        assert all(contains_answer(document.text or "", [p.answer]) for p in augmentation.pairs)
        assert all(p.question.endswith(f", and {p.answer.encode().hex()}?") for p in augmentation.pairs)
    assert {"412", "1761", "Jan Reuter"} <= {p.answer for p in found[0].pairs}
    assert {"4 March 1902", "Brask"} <= {p.answer for p in found[1].pairs}


def test_an_answer_that_is_not_in_the_passage_is_dropped_and_counted(
    tiny_base: BaseModel, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    spans = ["Reut", "412", "413", "houses of"]
    monkeypatch.setattr(polyprag.augment.local, "candidate_answers", lambda *arguments, **options: spans)
    (found,) = augment(LocalAugmenter(tiny_base), [Document("ost", "Ost has 412 houses.", "Ost")], SETTINGS)
    assert [p.answer for p in found.pairs] == ["412"]
    assert found.dropped == {"answer_not_in_passage": 3}


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("", "malformed"),
        ("   \n ", "malformed"),
        ("?", "malformed"),
        ("It stands in Brask.", "malformed"),
        ("does Tarn Mill have, Brask, Lindau or Ulm?", "answer_in_question"),
        ("Tarn Mill, Tarn Mill, Tarn Mill?", "duplicate"),
    ],
)
def test_questions_that_do_not_hold_are_dropped_and_counted(
    tiny_base: BaseModel, script: Script, said: str, reason: str
) -> None:
    script.question = lambda answer: said
    # One sentence, three answers of one kind, so that no question differs by how it begins.
    document = Document(7, "It has Brask, Lindau and Ulm.", "Tarn Mill")
    (found,) = augment(LocalAugmenter(tiny_base), [document], SETTINGS)
    asked = len(script.prompts)
    assert asked > 1
    assert found.dropped.get(reason, 0) >= 1
    assert len(found.pairs) + sum(found.dropped.values()) == asked


def test_an_answer_within_a_longer_word_of_the_question_is_no_answer_given_away(
    tiny_base: BaseModel, script: Script
) -> None:
    document = Document("d", "There are 4 of them in all.", "Gulls")
    script.question = lambda answer: "of the gulls were seen in 1945?"
    (found,) = augment(LocalAugmenter(tiny_base), [document], SETTINGS)
    assert [p.answer for p in found.pairs] == ["4"]


def test_no_more_pairs_than_asked_for(tiny_base: BaseModel, script: Script) -> None:
    text = " ".join(f"The house of Name{chr(65 + i)} has {i + 20} rooms in it." for i in range(20))
    for pairs in (1, 3, 5):
        (found,) = augment(LocalAugmenter(tiny_base), [Document("d", text)], replace(SETTINGS, pairs=pairs))
        assert len(found.pairs) == pairs


@pytest.mark.parametrize("text", [None, "", "  \n ", "...", "?!"])
def test_a_passage_without_text_gives_no_pairs_and_stops_nothing(
    tiny_base: BaseModel, script: Script, text: str | None
) -> None:
    documents = [Document(0, text, "Nothing"), TARN, Document(1, text)]
    empty, full, bare = augment(LocalAugmenter(tiny_base), documents, AugmentSettings(rewrite=True))
    assert empty.pairs == bare.pairs == ()
    assert empty.rewrite is None or (text or "").strip()
    assert full.pairs


def test_another_script_and_a_huge_passage_pass_through(tiny_base: BaseModel, script: Script) -> None:
    huge = "It has a house of Reuter and 3 mills and " * 2_000
    documents = [
        Document(0, "東京都は日本の首都である。人口は1400万人。", "東京"),
        Document(1, huge),
        Document(2, "x" * 10**5),
    ]
    found = augment(LocalAugmenter(tiny_base), documents, AugmentSettings(rewrite=True))
    assert [a.id for a in found] == [0, 1, 2]
    assert max(map(len, script.prompts)) < 2000


def test_a_rewrite_is_kept_only_if_it_keeps_to_the_facts(tiny_base: BaseModel, script: Script) -> None:
    passage = TARN.text or ""
    for said, kept in (
        ("Built on 4 March 1902, the mill stands in Brask, as it did.", True),
        (passage, False),
        ("It is.", False),
        (passage * 3, False),
        ("In 1955 Peter Quill and Anna Vogt of Lindau built the mill in Ulm.", False),
        ("", False),
    ):
        script.rewrite = lambda prompt, said=said: said  # type: ignore[misc]
        (found,) = augment(LocalAugmenter(tiny_base), [TARN], AugmentSettings(rewrite=True))
        assert found.rewrite == (said if kept else None)
        assert found.dropped.get("rewrite", 0) == (0 if kept else 1)


def test_numbers_with_commas_and_points_are_known_from_the_passage() -> None:
    passage = "Ost has 1,902 houses, 12,400 sheep and 3.5 square miles, and lies 2.7 miles from Lindau."
    rewrite = "Ost: 12,400 sheep and 1,902 houses on 3.5 square miles, which are 2.7 miles from Lindau."
    assert checked_rewrite(passage, rewrite) == rewrite
    other = "Ost: 12,499 sheep and 1,999 houses on 3.6 square miles, which are 2.8 miles from Lindau."
    assert checked_rewrite(passage, other) is None


def test_what_a_table_of_positions_cannot_hold_is_not_asked_for(
    build_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast
) -> None:
    base = BaseModel(build_model("gpt2"), tokenizer, "gpt2")
    short = AugmentSettings(rewrite=True, prompts=Prompts(question_examples="", rewrite_examples=""))
    documents = [Document(0, "It was built in 1902 and " + "grew and " * 60), Document(1, "In 1902 it rose.")]
    long, other = augment(LocalAugmenter(base), documents, short)
    assert (long.pairs, long.rewrite) == ((), None)
    assert long.dropped["too_long"] == len(candidate_answers(documents[0].text or ""))
    assert "too_long" not in other.dropped


# Resuming


def test_what_is_on_disk_is_not_made_again(tiny_base: BaseModel, script: Script, tmp_path: Path) -> None:
    path, counts = tmp_path / "a.jsonl", []
    first = augment(LocalAugmenter(tiny_base), DOCUMENTS, SETTINGS, path=path, progress=counts.append)
    assert sum(counts) == 2
    assert [row["id"] for row in lines_of(path)] == ["ost", 7]
    content, asked = path.read_bytes(), len(script.prompts)
    counts.clear()
    assert (
        augment(LocalAugmenter(tiny_base), DOCUMENTS[::-1], SETTINGS, path=path, progress=counts.append)
        == first[::-1]
    )
    assert sum(counts) == 2
    assert len(script.prompts) == asked
    assert path.read_bytes() == content
    assert augment(LocalAugmenter(tiny_base), DOCUMENTS, SETTINGS) == first


def test_an_interrupted_run_goes_on_where_it_was(
    tiny_base: BaseModel, script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(polyprag.augment.local, "DOCUMENTS_A_STEP", 2)
    documents = [Document(i, f"The house of Reuter has {i + 20} rooms.", f"House {i}") for i in range(7)]
    path = tmp_path / "a.jsonl"
    whole = augment(LocalAugmenter(tiny_base), documents, SETTINGS)
    total = len(script.prompts)
    script.prompts.clear()
    script.fail_at = total // 2
    with pytest.raises(KeyboardInterrupt):
        augment(LocalAugmenter(tiny_base), documents, SETTINGS, path=path)
    done = len(lines_of(path))
    assert 0 < done < 7
    assert done % 2 == 0
    script.fail_at = None
    script.prompts.clear()
    assert augment(LocalAugmenter(tiny_base), documents, SETTINGS, path=path) == whole
    assert 0 < len(script.prompts) < total
    assert [row["id"] for row in lines_of(path)] == list(range(7))


def test_ctrl_c_while_it_is_written_loses_nothing(
    tiny_base: BaseModel, script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync = os.fsync

    def press(file: int) -> None:
        monkeypatch.setattr(os, "fsync", sync)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", press)
    with pytest.raises(KeyboardInterrupt):
        augment(LocalAugmenter(tiny_base), DOCUMENTS, SETTINGS, path=tmp_path / "a.jsonl")
    assert [row["id"] for row in lines_of(tmp_path / "a.jsonl")] == ["ost", 7]


def test_a_torn_last_line_is_made_again(tiny_base: BaseModel, script: Script, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    whole = augment(LocalAugmenter(tiny_base), DOCUMENTS, SETTINGS, path=path)
    content = path.read_bytes()
    start = content.index(b"\n") + 1
    for cut in (start + 1, start + 40, len(content) - 2, len(content) - 1):
        path.write_bytes(content[:cut])
        script.prompts.clear()
        assert augment(LocalAugmenter(tiny_base), DOCUMENTS, SETTINGS, path=path) == whole
        assert path.read_bytes() == content
        assert bool(script.prompts) == (cut < len(content) - 1)
        assert not any("Reuter" in prompt for prompt in script.prompts)


@pytest.mark.parametrize(
    "changed",
    [
        Document("ost", "Ost has 413 houses. It was founded in 1761 by Jan Reuter.", "Ost"),
        Document("ost", OST.text, "Ost, a village"),
    ],
)
def test_a_changed_document_is_made_again_and_no_other(
    tiny_base: BaseModel, script: Script, tmp_path: Path, changed: Document
) -> None:
    path = tmp_path / "a.jsonl"
    first = augment(LocalAugmenter(tiny_base), DOCUMENTS, SETTINGS, path=path)
    script.prompts.clear()
    second = augment(LocalAugmenter(tiny_base), [changed, TARN], SETTINGS, path=path)
    assert second[1] == first[1]
    assert script.prompts
    assert not any("Brask" in prompt for prompt in script.prompts)
    assert second == augment(LocalAugmenter(tiny_base), [changed, TARN], SETTINGS)
    script.prompts.clear()
    assert augment(LocalAugmenter(tiny_base), [changed, TARN], SETTINGS, path=path) == second
    assert augment(LocalAugmenter(tiny_base), DOCUMENTS, SETTINGS, path=path) == first
    assert script.prompts == []


def test_other_settings_or_another_model_make_all_again(
    tiny_base: BaseModel, script: Script, tmp_path: Path
) -> None:
    path = tmp_path / "a.jsonl"
    augment(LocalAugmenter(tiny_base), DOCUMENTS, SETTINGS, path=path)
    total = len(script.prompts)
    for base, settings in (
        (tiny_base, replace(SETTINGS, seed=1)),
        (BaseModel(tiny_base.model, tiny_base.tokenizer, "another"), SETTINGS),
    ):
        script.prompts.clear()
        augment(LocalAugmenter(base), DOCUMENTS, settings, path=path)
        assert len(script.prompts) == total


def test_pairs_on_disk_are_those_that_training_sees(
    tiny_base: BaseModel, script: Script, tmp_path: Path
) -> None:
    found = augment(LocalAugmenter(tiny_base), DOCUMENTS, SETTINGS, path=tmp_path / "a.jsonl")
    expected = [(p.question, p.answer) for a in found for p in a.pairs]
    assert read_pairs(tmp_path / "a.jsonl") == expected
    other = augment(
        LocalAugmenter(tiny_base), DOCUMENTS, replace(SETTINGS, pairs=1), path=tmp_path / "a.jsonl"
    )
    assert read_pairs(tmp_path / "a.jsonl") == [(p.question, p.answer) for a in other for p in a.pairs]
    script.prompts.clear()
    for _ in range(2):  # with the first settings again, from the same file
        assert augment(LocalAugmenter(tiny_base), DOCUMENTS, SETTINGS, path=tmp_path / "a.jsonl") == found
        assert read_pairs(tmp_path / "a.jsonl") == expected
    assert script.prompts == []
    assert (tmp_path / "a.jsonl").read_bytes().count(b"\n") == 3 * len(DOCUMENTS)


@pytest.mark.parametrize(
    "row",
    [
        '{"text": "no augmentation"}',
        '{"id": 1, "pairs": 3}',
        '{"id": 1, "pairs": ["x"]}',
        '{"id": 1, "pairs": [{"question": "Q"}]}',
        '{"id": 1, "pairs": [], "dropped": "ab"}',
        '{"id": [1], "pairs": []}',
        '{"id": 1, "pairs": [], "rewrite": 3}',
        "[1]",
        "no JSON",
    ],
)
def test_a_file_of_something_else_is_named_with_its_line_and_kept(
    tiny_base: BaseModel, script: Script, tmp_path: Path, row: str
) -> None:
    path = tmp_path / "a.jsonl"
    augment(LocalAugmenter(tiny_base), [OST], SETTINGS, path=path)
    path.write_text(path.read_text() + row + "\n")
    content = path.read_bytes()
    with pytest.raises(CorpusError, match=r"a\.jsonl, line 2") as caught:
        augment(LocalAugmenter(tiny_base), DOCUMENTS, SETTINGS, path=path)
    assert path.read_bytes() == content
    assert "Error(" not in str(caught.value), "the reason is not Python's"


def test_an_existing_augmentation_round_trips(tiny_base: BaseModel, script: Script, tmp_path: Path) -> None:
    script.rewrite = lambda prompt: "Built on 4 March 1902, the mill stands in Brask – »ja«."
    first = augment(
        LocalAugmenter(tiny_base), [TARN], AugmentSettings(rewrite=True), path=tmp_path / "a.jsonl"
    )
    assert first[0].rewrite
    script.prompts.clear()
    assert (
        augment(LocalAugmenter(tiny_base), [TARN], AugmentSettings(rewrite=True), path=tmp_path / "a.jsonl")
        == first
    )
    assert isinstance(first[0].pairs[0], Pair)
    assert script.prompts == []


def test_the_real_generator_fits(tiny_base: BaseModel, tmp_path: Path) -> None:
    found = augment(
        LocalAugmenter(tiny_base), DOCUMENTS, AugmentSettings(rewrite=True), path=tmp_path / "a.jsonl"
    )
    assert [a.id for a in found] == ["ost", 7]
    assert (
        augment(
            LocalAugmenter(tiny_base), DOCUMENTS, AugmentSettings(rewrite=True), path=tmp_path / "a.jsonl"
        )
        == found
    )


# Sentences


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("  \n\n ", []),
        ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]),
        ("J. R. Smith met Dr. Li in St. Ives. Ok then.", ["J. R. Smith met Dr. Li in St. Ives.", "Ok then."]),
        ("It rose 3.14 m. Then it fell.", ["It rose 3.14 m. Then it fell."]),
        ("It rose by 3.14 metres. Then it fell.", ["It rose by 3.14 metres.", "Then it fell."]),
        ("The U.S. Army came, e.g. by sea. All left.", ["The U.S. Army came, e.g. by sea.", "All left."]),
        ("He (the elder.) left. She stayed.", ["He (the elder.", "left.", "She stayed."]),
        ("First line\nsecond line.\n\nThird.", ["First line", "second line.", "Third."]),
        (
            "東京都は首都です。人口は多い！本当？はい",
            ["東京都は首都です。", "人口は多い！", "本当？", "はい"],
        ),
        ("वह गया। वह आया।", ["वह गया।", "वह आया।"]),
        ("No end", ["No end"]),
    ],
)
def test_sentences(text: str, expected: list[str]) -> None:
    assert sentences(text) == expected


@given(st.text(alphabet="ab. !?\n\"')。3J", max_size=60))
def test_sentences_lose_no_letter(text: str) -> None:
    letters = "".join(c for c in text if c.isalnum())
    assert "".join(c for s in sentences(text) for c in s if c.isalnum()) == letters


# Candidate answers


@pytest.mark.parametrize(
    ("sentence", "title", "expected"),
    [
        ("She was born on 4 March 1902 in Lindau.", "Marta Helm", ["Lindau", "4 March 1902"]),
        ("It opened on March 4, 1902.", "", ["March 4, 1902"]),
        ("It has 1,250 rooms and twenty-one doors.", "", ["1,250", "twenty-one"]),
        ("The mill was built by Jan van de Berg.", "", ["Jan van de Berg"]),
        ("Tarn Mill was built by Jan Reuter.", "Tarn Mill", ["Jan Reuter"]),
        ("", "", []),
        ("...", "", []),
    ],
)
def test_candidate_answers_are_dates_numbers_and_names(
    sentence: str, title: str, expected: list[str]
) -> None:
    assert candidate_answers(sentence, title)[: len(expected)] == expected
    if not expected:
        assert candidate_answers(sentence, title) == []


@given(st.text(max_size=80), st.text(max_size=10), st.integers(0, 8))
def test_candidate_answers_are_spans_that_are_not_in_the_title(sentence: str, title: str, limit: int) -> None:
    found = candidate_answers(sentence, title, limit)
    assert len(found) <= limit
    assert all(a in sentence and not contains_answer(title, [a]) for a in found)


def test_where_most_documents_have_no_pair_a_remedy_is_said() -> None:
    bare, asked = Augmentation("a", ()), Augmentation("b", (Pair("Where is it?", "Ost"),))
    assert "--augment-url" in str(summary([bare, bare, asked]))
    assert "--augment-url" not in str(summary([bare, asked]))
