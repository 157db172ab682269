"""A system of somebody else, from a file or a module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from polyprag.errors import InvalidInput
from polyprag.evaluation.data import Question
from polyprag.evaluation.loading import load_system

SOURCE = """
from __future__ import annotations

from dataclasses import dataclass

@dataclass
class Fixed:
    text: str = "x"
    def answer(self, questions):
        return [self.text] * len(questions)

class OfEngine:
    def __init__(self, engine, k=3):
        self.engine = engine
    def answer(self, questions):
        return [f"{self.engine} {q.id}" for q in questions]

class Demanding:
    def __init__(self, temperature):
        pass
    def answer(self, questions):
        return []

class Silent:
    pass

def make(base):
    return Fixed(base)

ready = Fixed("ready")
number = 3
"""
QUESTIONS = [Question("q0", "?", ("x",))]
NOTHING = {"base": None, "store": None, "engine": None}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(SOURCE)
    return path


@pytest.mark.parametrize(
    ("name", "given", "answers"),
    [
        ("Fixed", NOTHING, ["x"]),
        ("OfEngine", {**NOTHING, "engine": "E"}, ["E q0"]),
        ("make", {**NOTHING, "base": "B"}, ["B"]),
        ("ready", NOTHING, ["ready"]),
    ],
)
def test_what_makes_a_system(file: Path, name: str, given: dict[str, Any], answers: list[str]) -> None:
    system, taken = load_system(f"{file}:{name}", given)
    assert system.answer(QUESTIONS) == answers
    assert taken == {part: value for part, value in given.items() if value is not None}


def test_from_a_module_of_the_current_folder(
    tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.rename(tmp_path / "my_own_system.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["nowhere"])
    assert load_system("my_own_system:Fixed", NOTHING)[0].answer(QUESTIONS) == ["x"]
    with pytest.raises(InvalidInput, match="no module no_such_one"):
        load_system("no_such_one:Fixed", NOTHING)


@pytest.mark.parametrize(
    ("target", "match"),
    [
        ("{file}", "expected module:Class"),
        ("own_route", "polyprag's own systems are chosen by --only"),
        (":Fixed", "expected module:Class"),
        ("{file}:Absent", "no Absent in it; it has Fixed, OfEngine, Demanding"),
        ("{file}:Silent", "no method answer"),
        ("{file}:number", "it is int"),
        ("{file}:OfEngine", "'engine' needs a store"),
        ("{file}:Demanding", "'temperature' can be given base, store, engine"),
        ("{file}.py:Fixed", "there is no file"),
    ],
)
def test_what_is_none_is_refused(file: Path, target: str, match: str) -> None:
    with pytest.raises(InvalidInput, match=match):
        load_system(target.replace("{file}", str(file)), NOTHING)


def test_what_its_code_raises_comes_through(file: Path) -> None:
    file.write_text("import a_package_that_is_not_there")
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_not_there"):
        load_system(f"{file}:Fixed", NOTHING)
