"""Reports against each other: seeds of one setting, and differences that are real."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest

from polyprag.errors import InvalidInput
from polyprag.evaluation.comparison import compare_runs, comparison_grids, comparison_json, grouped, holm
from polyprag.evaluation.data import Question
from polyprag.evaluation.footprint import Footprint
from polyprag.evaluation.report import Report
from polyprag.evaluation.results import score_system

QUESTIONS = [Question(f"q{n}", f"question {n}", (f"answer {n}",)) for n in range(60)]


def report(
    shares: dict[str, float],
    *,
    seed: int = 0,
    train_seed: int = 0,
    store: str = "",
    questions: Sequence[Question] = QUESTIONS,
    **more: Any,
) -> Report:
    draw = random.Random(f"{seed} {train_seed}")
    systems = [
        score_system(name, questions, [q.answers[0] if draw.random() < share else "x" for q in questions])
        for name, share in shares.items()
    ]
    recipe = {"train": {"seed": train_seed, "epochs": 4}}
    stores = {"": Footprint(60, {"routes": 60}, 1.0, 9, "code(64)", recipe, store)}
    return Report.of(questions, systems, seed=seed, stores=stores, **more)


def test_seeds_are_one_run_and_spread() -> None:
    seeds = {f"s{n}": report({"own_route": 0.7}, seed=n, train_seed=n) for n in range(3)}
    (run,) = grouped(seeds)
    assert run.name == "s0 and 2 other seeds"
    (grid,) = comparison_grids([run])
    values = run.f1("own_route")
    mean = sum(values) / 3
    deviation = (sum((v - mean) ** 2 for v in values) / 2) ** 0.5
    assert grid.rows[0][1:3] == [f"{mean:.3f}", f"{deviation:.3f}"]
    assert len(run.by_question("own_route")) == 60


def test_another_setting_or_the_same_seeds_are_another_run() -> None:
    one = report({"own_route": 0.7})
    runs = grouped(
        {
            "a": one,
            "b": report({"own_route": 0.7}, settings={"passages": 3}),
            "c": report({"own_route": 0.7}, train_seed=1),
            "d": report({"own_route": 0.7}),  # the seeds of a again
        }
    )
    assert [run.name for run in runs] == ["a and 1 other seeds", "b", "d"]


def test_one_store_asked_with_two_seeds_is_one_training() -> None:
    a, b, c = (
        report({"own_route": 0.7}, seed=seed, train_seed=trained, store=f"store {trained}")
        for seed, trained in ((0, 0), (1, 0), (1, 1))
    )
    assert [run.name for run in grouped({"a": a, "b": b})] == ["a", "b"]
    assert [run.name for run in grouped({"a": a, "c": c})] == ["a and 1 other seeds"]


def test_trainings_that_were_asked_other_questions_are_no_seeds_of_each_other() -> None:
    drawn = [
        report({"own_route": 0.7}, seed=n, train_seed=n, store=f"store {n}", questions=QUESTIONS[n : n + 50])
        for n in range(2)
    ]
    runs = grouped(dict(zip("ab", drawn, strict=True)))
    assert [run.name for run in runs] == ["a", "b"]
    with pytest.raises(InvalidInput, match="different questions"):
        comparison_grids(runs)


def test_a_difference_is_real_or_not_shown() -> None:
    before = report({"own_route": 0.4, "rag": 0.5, "mean_route": 0.3})
    after = report({"own_route": 0.9, "rag": 0.5, "mean_route": 0.35}, settings={"x": 1})
    a, b = grouped({"before": before, "after": after})
    found = {c.system: c for c in compare_runs(a, b)}
    own = found["own_route"]
    assert own.real
    assert own.difference.mean == pytest.approx(own.b - own.a)
    assert not found["rag"].real
    assert found["rag"].difference.mean == 0
    grid = comparison_grids([a, b])[0]
    assert [row[-1] for row in grid.rows] == ["not shown", "real", "not shown"]
    told = comparison_json([a, b])["differences"]
    assert {d["system"]: d["real"] for d in told} == {n: c.real for n, c in found.items()}


def test_many_systems_are_many_chances_to_be_wrong() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([0.04]) == [0.04]
    assert holm([]) == []


def test_what_cannot_be_compared_is_refused() -> None:
    one = report({"own_route": 0.7})
    moved = [*QUESTIONS[:59], Question("q59", "another", ("answer 59",))]
    for other, match in (
        (report({"own_route": 0.7}, questions=moved), "different questions, 'q59' for one"),
        (report({"own_route": 0.7}, questions=QUESTIONS[:50]), "different questions, 'q50' for one"),
        (report({"rag": 0.7}), "no system in common"),
        (report({"own_route": 0.7}, scoring="prag"), "scored by squad and b by prag"),
    ):
        a, b = grouped({"a": one, "b": other})
        with pytest.raises(InvalidInput, match=match):
            compare_runs(a, b)
