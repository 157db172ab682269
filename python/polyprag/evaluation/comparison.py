"""Reports against each other: which differences are real, and how far seeds spread."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from polyprag.errors import InvalidInput
from polyprag.evaluation.report import Report, label_of
from polyprag.evaluation.statistics import Difference, paired_difference
from polyprag.evaluation.tables import Grid


@dataclass(frozen=True)
class Runs:
    """Reports of one setting that differ in their seeds alone, or a single one. name: as they were given."""

    name: str
    reports: tuple[Report, ...]

    @property
    def systems(self) -> list[str]:
        """Those that all of the reports have."""
        return [n for n in self.reports[0].ordered if all(n in r.systems for r in self.reports)]

    def f1(self, system: str) -> list[float]:
        """One mean a seed."""
        return [report.systems[system].f1 for report in self.reports]

    def by_question(self, system: str) -> dict[str, float]:
        """F1 of each question, the mean over the seeds."""
        found: dict[str, list[float]] = {}
        for report in self.reports:
            for answer in report.systems[system].answers:
                found.setdefault(answer.id, []).append(answer.f1)
        return {id: fmean(values) for id, values in found.items()}


@dataclass(frozen=True)
class Compared:
    """One system in two runs. adjusted: its p-value times what Holm's step-down asks for, over all systems.

    real: whether the interval leaves zero out and the adjusted p-value is below 1 - confidence.
    """

    system: str
    a: float
    b: float
    difference: Difference
    adjusted: float

    @property
    def real(self) -> bool:
        d = self.difference
        return d.real and self.adjusted < 1 - d.confidence


def grouped(reports: Mapping[str, Report]) -> list[Runs]:
    """Reports by name as runs: trainings that differ in seeds alone become one, in the order of their first.

    One store that was evaluated with several seeds is one training: its reports stay apart.
    """
    groups: dict[str, list[tuple[str, Report]]] = {}
    for name, report in reports.items():
        asked = [[q.id, q.question, q.answers] for q in report.questions]  # the mean is question by question
        key = json.dumps([_without_seeds(_setting(report)), list(report.systems), asked], sort_keys=True)
        members = groups.setdefault(key, [])
        if any(_training(other) == _training(report) for _, other in members):
            members = groups.setdefault(f"{key} {name}", [])  # the same training twice: another run
        members.append((name, report))
    return [
        Runs(
            members[0][0] if len(members) == 1 else f"{members[0][0]} and {len(members) - 1} other seeds",
            tuple(report for _, report in members),
        )
        for members in groups.values()
    ]


def _setting(report: Report) -> dict[str, Any]:
    return {
        "settings": dict(report.settings),
        "scoring": report.scoring,
        "stores": {
            label: [store.documents, store.codec, dict(store.recipe)]
            for label, store in report.stores.items()
        },
    }


# Which question has no wrong documents is found in the order of a draw.
_OF_SEED = ("seed", "wrong_of_other_type", "no_wrong_documents")


def _without_seeds(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _without_seeds(v) for k, v in value.items() if k not in _OF_SEED}
    if isinstance(value, list | tuple):
        return [_without_seeds(v) for v in value]
    return value


def _training(report: Report) -> str:
    """What tells trainings apart: the stores that were asked; without any, the seed of the evaluation."""
    if not report.stores:
        return json.dumps(report.seed)
    # A report of an earlier version does not know which store it was.
    return json.dumps(
        {
            label: store.digest or [report.seed, store.recipe.get("train", {}).get("seed")]
            for label, store in report.stores.items()
        }
    )


def compare_runs(a: Runs, b: Runs, *, confidence: float = 0.95) -> list[Compared]:
    """Each system that both have: F1 of b minus F1 of a, paired by question.

    With several seeds a question counts with its mean. Several systems are several chances to be wrong: the
    p-values are adjusted for that (Holm, 1979).

    Raises InvalidInput if they are scored differently, have no system in common, or were asked different
    questions.
    """
    first, second = a.reports[0], b.reports[0]
    if first.scoring != second.scoring:
        raise InvalidInput(
            f"{a.name} is scored by {first.scoring} and {b.name} by {second.scoring}: score both alike; "
            "the answers are kept, so that is quick"
        )
    left = {q.id: (q.question, q.answers) for q in first.questions}
    right = {q.id: (q.question, q.answers) for q in second.questions}
    if left != right:
        other = next(id for id in [*left, *right] if left.get(id) != right.get(id))
        raise InvalidInput(
            f"{a.name} and {b.name} were asked different questions, {other!r} for one: "
            "only answers to the same ones can be compared"
        )
    systems = [name for name in a.systems if name in b.systems]
    if not systems:
        raise InvalidInput(f"{a.name} and {b.name} have no system in common")
    found = []
    for name in systems:
        before, after = a.by_question(name), b.by_question(name)
        ids = list(before)
        found.append(
            paired_difference([after[i] for i in ids], [before[i] for i in ids], confidence=confidence)
        )
    adjusted = holm([d.p_value for d in found])
    return [
        Compared(name, fmean(a.f1(name)), fmean(b.f1(name)), d, p)
        for name, d, p in zip(systems, found, adjusted, strict=True)
    ]


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment: what each p-value counts as, all of them being looked at."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = highest
    return adjusted


def comparison_grids(runs: Sequence[Runs]) -> list[Grid]:
    """Mean and spread over seeds of each run that has several, then every run against the first."""
    found = [seeds_grid(run) for run in runs if len(run.reports) > 1]
    found += [compared_grid(runs[0], run, compare_runs(runs[0], run)) for run in runs[1:]]
    return found


def seeds_grid(run: Runs) -> Grid:
    """F1 of each seed, their mean, standard deviation and range."""
    rows = []
    for name in run.systems:
        values = run.f1(name)
        rows.append(
            [
                label_of(name),
                f"{fmean(values):.3f}",
                f"{stdev(values):.3f}",
                f"{min(values):.3f} to {max(values):.3f}",
                " ".join(f"{value:.3f}" for value in values),
            ]
        )
    title = f"{run.name}: F1 over {len(run.reports)} seeds"
    return Grid(title, ["system", "mean", "standard deviation", "range", "each"], rows)


def compared_grid(a: Runs, b: Runs, compared: Sequence[Compared]) -> Grid:
    """One run against another; a difference whose interval spans zero is never called real."""
    return Grid(
        f"F1 of {b.name} minus {a.name}",
        ["system", a.name, b.name, "difference", "interval", "p, adjusted", ""],
        [
            [
                label_of(c.system),
                f"{c.a:.3f}",
                f"{c.b:.3f}",
                f"{c.difference.mean:+.3f}",
                f"{c.difference.low:+.3f} to {c.difference.high:+.3f}",
                f"{c.adjusted:.4f}",
                "real" if c.real else "not shown",
            ]
            for c in compared
        ],
        frozenset(i for i, c in enumerate(compared) if c.real),
    )


def comparison_json(runs: Sequence[Runs]) -> dict[str, Any]:
    """All of it as JSON values."""
    return {
        "runs": [{"name": r.name, "f1": {name: r.f1(name) for name in r.systems}} for r in runs],
        "differences": [
            {
                "a": runs[0].name,
                "b": run.name,
                "system": c.system,
                "mean": c.difference.mean,
                "interval": [c.difference.low, c.difference.high],
                "p_value": c.difference.p_value,
                "p_adjusted": c.adjusted,
                "real": c.real,
            }
            for run in runs[1:]
            for c in compare_runs(runs[0], run)
        ],
    }
