"""Filtering a search on declared metadata, from Python."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from polyprag import Document, Store, errors
from polyprag.filters import check, conditions, declared
from test_store import make_experts, make_spec

FILTERS = {"lang": "string", "year": "i64", "weight": "f64", "open": "bool"}

METADATA: list[dict[str, Any] | None] = [
    {"lang": "en", "year": 1990, "weight": 0.5, "open": True, "undeclared": {"x": [1]}},
    {"lang": ["de", "en"], "year": 2000, "weight": 3, "open": False},
    {"lang": "zh-Hant 漢", "year": None},
    {},
    None,
]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    path = tmp_path / "s"
    with Store.create(path, make_spec(filters=FILTERS), make_experts()) as writer:
        writer.add([Document(f"{i}", "alike", metadata=metadata) for i, metadata in enumerate(METADATA)])
    return Store.open(path)


def ids(store: Store, filter: Any) -> str:
    return "".join(str(hit.id) for hit in store.search("alike", filter=filter))


def test_filters(store: Store) -> None:
    assert store.spec.filters == FILTERS
    assert ids(store, None) == ids(store, {}) == "01234"
    assert ids(store, {"lang": "en"}) == "01"
    assert ids(store, {"lang": ["de", "zh-Hant 漢"]}) == "12"
    assert ids(store, {"year": {"gte": 1990, "lt": 2000}}) == "0"
    assert ids(store, {"year": {"gt": 1990}, "open": False}) == "1"
    assert ids(store, {"weight": {"lte": 0.5}}) == "0"
    assert ids(store, {"weight": 3}) == "1"
    assert ids(store, OrderedDict(open=True)) == "0"
    assert ids(store, MappingProxyType({"lang": ("de", "fr")})) == "1"
    assert [hit.id for hit in store.search("alike", 1, {"lang": "en"})] == ["0"]
    many = store.search_many(["alike", "nothing"] * 5, 3, filter={"lang": "en"})
    assert [[hit.id for hit in hits] for hits in many] == [["0", "1"], []] * 5
    unfiltered = {hit.id: hit.score for hit in store.search("alike")}
    assert all(unfiltered[hit.id] == hit.score for hit in store.search("alike", filter={"lang": "en"}))


def test_a_store_without_filters_names_none(tmp_path: Path) -> None:
    Store.create(tmp_path / "s", make_spec(), make_experts()).commit()
    store = Store.open(tmp_path / "s")
    assert store.spec.filters == {}
    assert store.search("alike", filter={}) == []
    with pytest.raises(errors.InvalidInput, match="which are: none"):
        store.search("alike", filter={"lang": "en"})


@pytest.mark.parametrize(
    ("filter", "words"),
    [
        ({"month": 3}, r'which are: "lang" \(string\), "year" \(i64\), "weight" \(f64\), "open" \(bool\)'),
        ({"lang": 3}, "expected a string, found the number 3"),
        ({"year": 1990.0}, "expected an integer of 64 bits"),
        ({"year": 2**63}, "expected an integer of 64 bits"),
        ({"year": True}, "expected an integer of 64 bits, found true"),
        ({"year": {"from": 3}}, '"from"'),
        ({"open": "yes"}, "expected true or false"),
        ({"weight": float("nan")}, "JSON"),
        ({"lang": {"en"}}, "JSON"),
        ({"lang": None}, "null"),
        ("lang", "mapping"),
        ([("lang", "en")], "mapping"),
    ],
)
def test_filters_that_cannot_be(store: Store, filter: Any, words: str) -> None:
    with pytest.raises(errors.InvalidInput, match=words):
        store.search("alike", filter=filter)
    with pytest.raises(errors.InvalidInput, match=words):
        store.search_many([], filter=filter)


def test_metadata_of_another_type_is_refused(store: Store) -> None:
    with store.writer() as writer:
        good = Document("good", "alike", metadata={"year": 1})
        with pytest.raises(errors.InvalidInput, match=r'document "bad": metadata field "year".*"1990"'):
            writer.add([good, Document("bad", "alike", metadata={"year": "1990"})])
        writer.add([good])
    assert store.refresh()
    assert ids(store, {"year": 1}) == "good"


def test_declarations_that_cannot_be() -> None:
    for filters in ({"a": "date"}, {"": "bool"}, {"a" * 129: "bool"}, {f"{i}": "bool" for i in range(65)}):
        with pytest.raises(errors.InvalidInput, match="filters"):
            make_spec(filters=filters)
    for filters in (["lang"], "lang", {1: "bool"}, {"a": 1}):
        with pytest.raises(errors.InvalidInput, match="filters: expected a mapping of names to kinds"):
            make_spec(filters=filters)


# Declared and asked for by words


DOCUMENTS = [Document(f"{i}", "alike", metadata=metadata) for i, metadata in enumerate(METADATA)]


def test_what_is_declared_is_what_the_store_takes(tmp_path: Path) -> None:
    filters = declared(list(FILTERS), DOCUMENTS)
    assert filters == FILTERS
    assert declared(["year:f64", "lang:string"], DOCUMENTS) == {"year": "f64", "lang": "string"}
    assert declared(["a:b"], [Document("x", "x", metadata={"a:b": True})]) == {"a:b": "bool"}
    check(DOCUMENTS, filters)
    for words, told in (
        (["month"], "'month': no document has it .*, but lang, open, undeclared, weight, year"),
        (["year:date"], "'year:date'"),
        (["year", "year:f64"], "'year' is named twice"),
    ):
        with pytest.raises(errors.InvalidInput, match=told):
            declared(words, DOCUMENTS)


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        *[
            ("string", value)
            for value in ("", "é" * 2_048, "é" * 2_048 + "e", [], ["a", "b"], ["a", 1], 1, {})
        ],
        *[("i64", value) for value in (0, 2**63 - 1, 2**63, -(2**63), -(2**63) - 1, 1.0, True, "1", [1])],
        *[("f64", value) for value in (0, 1.5, 2**70, 1e308, False, "1", [1.5])],
        *[("bool", value) for value in (True, 0, "true", [True])],
        ("i64", None),
    ],
)
def test_the_check_before_training_is_that_of_the_store(tmp_path: Path, kind: Any, value: Any) -> None:
    document = Document("x", "alike", metadata={"key": value})
    with Store.create(tmp_path / "s", make_spec(filters={"key": kind}), make_experts()) as writer:
        try:
            writer.add([document])
        except errors.InvalidInput:
            with pytest.raises(errors.InvalidInput, match="document 'x': metadata field 'key' is a filter"):
                check([document], {"key": kind})
        else:
            check([document], {"key": kind})


def test_conditions_in_words(store: Store) -> None:
    def found(*words: str) -> str:
        return ids(store, conditions(words, store.spec.filters))

    assert conditions([], store.spec.filters) is None
    assert found("lang=en") == "01"
    assert found("lang=de", "lang=zh-Hant 漢") == "12"
    assert found("year>=1990", "year<2000") == "0"
    assert found("year > 1990", "open = False") == "1"
    assert found("weight<=0.5") == "0"
    assert found("lang=a=b") == ""
    for words, told in (
        (["lang"], "expected KEY=VALUE"),
        (["year=soon"], "'year=soon': expected an integer"),
        (["open=maybe"], "expected true or false"),
        (["weight>heavy"], "expected a number"),
        (["year=1990", "year>1"], "not both"),
        (["year>1990", "year>1"], "has that bound already"),
        (["month=3"], "which are: .lang"),
    ):
        with pytest.raises(errors.InvalidInput, match=told):
            found(*words)
