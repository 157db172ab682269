"""Properties of the sample corpus in ``polyprag/demo``: an invented island.

The data are read with ``json`` alone, so these tests need neither the compiled
core nor a model.
"""

import json
import re
from collections import Counter
from pathlib import Path

import pytest

DEMO = Path(__file__).resolve().parents[1] / "python" / "polyprag" / "demo"
KINDS = {
    "person",
    "place",
    "work",
    "law",
    "ship",
    "species",
    "festival",
    "building",
    "dish",
    "institution",
    "event",
    "office",
}
ARTICLES = {"a", "an", "the"}


def read(name):
    lines = (DEMO / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


DOCUMENTS = read("island.jsonl")
QUESTIONS = read("questions.jsonl")
BY_ID = {document["id"]: document for document in DOCUMENTS}

each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d["id"])
each_question = pytest.mark.parametrize("question", QUESTIONS, ids=lambda q: q["id"])


def normalise(text):
    """Lower case, no punctuation, no articles, single spaces."""
    text = re.sub(r"(?<=\d),(?=\d)", "", text.lower())
    words = re.sub(r"[^a-z0-9]+", " ", text).split()
    return " ".join(word for word in words if word not in ARTICLES)


def holds(text, phrase):
    """Whether the words of ``phrase`` stand one after another in ``text``."""
    return f" {normalise(phrase)} " in f" {normalise(text)} "


def documents_with(phrase):
    return [d["id"] for d in DOCUMENTS if holds(d["title"], phrase) or holds(d["text"], phrase)]


def test_counts():
    assert len(DOCUMENTS) == 72
    assert len(QUESTIONS) == 120


def test_ids_and_titles_are_unique():
    assert len(BY_ID) == len(DOCUMENTS)
    assert len({normalise(d["title"]) for d in DOCUMENTS}) == len(DOCUMENTS)
    assert [q["id"] for q in QUESTIONS] == [f"q{i:03d}" for i in range(1, 121)]


def test_texts_are_unique():
    assert len({normalise(d["text"]) for d in DOCUMENTS}) == len(DOCUMENTS)


def test_every_kind_occurs():
    assert {d["metadata"]["kind"] for d in DOCUMENTS} == KINDS


def test_subjects_share_no_first_word_and_people_no_surname():
    first = Counter(normalise(d["title"]).split()[0] for d in DOCUMENTS)
    assert [word for word, n in first.items() if n > 1] == []
    people = [d for d in DOCUMENTS if d["metadata"]["kind"] == "person"]
    last = Counter(normalise(d["title"]).split()[-1] for d in people)
    assert [word for word, n in last.items() if n > 1] == []


def test_no_title_is_named_in_another_document():
    for document in DOCUMENTS:
        assert documents_with(document["title"]) == [document["id"]]


@each_document
def test_document_shape(document):
    assert set(document) == {"id", "title", "text", "metadata"}
    assert set(document["metadata"]) == {"kind"}
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", document["id"])
    assert document["text"] == " ".join(document["text"].split())
    assert document["text"].isascii()


@each_document
def test_document_length_and_opening(document):
    assert 40 <= len(document["text"].split()) <= 65
    assert document["text"].startswith(document["title"] + " ")
    assert document["text"].endswith(".")
    assert "Ossavel" in document["text"]


def test_every_document_has_one_or_two_questions():
    asked = Counter(q["documents"][0] for q in QUESTIONS)
    assert set(asked) == set(BY_ID)
    assert max(asked.values()) <= 2


def test_types():
    types = Counter(q["type"] for q in QUESTIONS)
    assert 8 <= len(types) <= 10
    assert min(types.values()) >= 9


def test_questions_are_unique():
    texts = Counter(normalise(q["question"]) for q in QUESTIONS)
    assert [text for text, n in texts.items() if n > 1] == []


def test_no_answer_serves_more_than_three_documents():
    gold = {}
    for question in QUESTIONS:
        for answer in question["answers"]:
            gold.setdefault(normalise(answer), set()).update(question["documents"])
    assert {a: d for a, d in gold.items() if len(d) > 3} == {}


def test_answers_differ_within_a_type():
    seen = Counter((q["type"], normalise(a)) for q in QUESTIONS for a in q["answers"])
    # Spellings that normalise alike within one question are one answer.
    for question in QUESTIONS:
        own = Counter((question["type"], normalise(a)) for a in question["answers"])
        seen.subtract({key: n - 1 for key, n in own.items() if n > 1})
    assert [key for key, n in seen.items() if n > 1] == []


@each_question
def test_question_shape(question):
    assert set(question) == {"id", "type", "question", "answers", "documents"}
    assert question["question"].endswith("?")
    assert len(question["documents"]) == 1
    assert question["documents"][0] in BY_ID
    assert len(set(question["answers"])) == len(question["answers"]) >= 1


@each_question
def test_question_names_its_subject(question):
    title = BY_ID[question["documents"][0]]["title"]
    assert title in question["question"]
    named = [d["title"] for d in DOCUMENTS if holds(question["question"], d["title"])]
    assert named == [title]


@each_question
def test_first_answer_is_short_and_only_in_its_document(question):
    answer = question["answers"][0]
    assert 1 <= len(answer.split()) <= 4
    assert answer in BY_ID[question["documents"][0]]["text"]
    assert documents_with(answer) == question["documents"]


@each_question
def test_no_alias_stands_in_many_documents(question):
    for answer in question["answers"]:
        assert len(documents_with(answer)) <= 3


@each_question
def test_answers_are_not_in_the_question_or_title(question):
    title = BY_ID[question["documents"][0]]["title"]
    for answer in question["answers"]:
        assert not holds(question["question"], answer)
        assert not holds(title, answer)


@each_question
def test_question_gives_away_no_word_of_the_first_answer(question):
    words = set(normalise(question["question"]).split())
    assert words.isdisjoint(normalise(question["answers"][0]).split())
