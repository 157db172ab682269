"""What an evaluation found: per system, against each other, in bytes; as JSON, and read back from it."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from typing_extensions import Self

from polyprag.errors import CorpusError, InvalidInput
from polyprag.evaluation.data import Question
from polyprag.evaluation.footprint import Footprint
from polyprag.evaluation.memory import cuda_in_use
from polyprag.evaluation.metrics import Scoring
from polyprag.evaluation.redaction import redacted
from polyprag.evaluation.results import Answered, Costs, SystemResult, compare, summarised
from polyprag.evaluation.retrieval import measured
from polyprag.evaluation.statistics import RESAMPLES, Difference
from polyprag.extras import lacking
from polyprag.jsonl import write_atomic

if TYPE_CHECKING:
    from rich.console import Console

#: The usual systems, in the order of the table, and what people read for them.
LABELS: Mapping[str, str] = {
    "closed_book": "closed book",
    "rag": "RAG, BM25 passages",
    "rag_gold": "RAG, gold passages",
    "own_route": "own route",
    "bm25_route": "route by BM25, k=1",
    "bm25_route_k3": "route by BM25, k=3",
    "amortised_route": "route by the amortised router",
    "combine": "combine",
    "combine_wrong_route": "combine, wrong route",
    "wrong_route": "wrong route",
    "uniform_route": "uniform route",
    "mean_route": "mean route",
}

_ROUTED = frozenset({"own_route", "bm25_route", "bm25_route_k3", "amortised_route", "combine"})

#: Differences that every report states where it has both systems: (name, a, b) for a minus b.
DIFFERENCES: Sequence[tuple[str, str, str]] = (
    ("own_minus_wrong", "own_route", "wrong_route"),
    ("own_minus_uniform", "own_route", "uniform_route"),
    ("own_minus_mean", "own_route", "mean_route"),
    ("own_minus_closed_book", "own_route", "closed_book"),
    ("own_minus_rag", "own_route", "rag"),
    ("bm25_minus_own", "bm25_route", "own_route"),
    ("amortised_minus_own", "amortised_route", "own_route"),
    ("combine_minus_rag", "combine", "rag"),
    ("combine_minus_combine_wrong", "combine", "combine_wrong_route"),
)

# What a system of somebody else is compared with.
_YARDSTICKS = ("closed_book", "rag", "bm25_route")

_FORM = "polyprag report 1"


def split_label(name: str) -> tuple[str, str]:
    """The store's label and the system of a name: ``("prag", "own_route")`` of ``prag/own_route``."""
    label, slash, system = name.rpartition("/")
    return (label, system) if slash else ("", name)


def label_of(name: str) -> str:
    """What people read for a name."""
    store, system = split_label(name)
    return f"{store}: {LABELS.get(system, system)}" if store else LABELS.get(system, system)


def differences_of(names: Collection[str]) -> list[tuple[str, str, str]]:
    """The differences (name, a, b) that these systems allow: :data:`DIFFERENCES` for each store, and every
    system that is none of polyprag's against the usual ones.
    """
    found = []
    for store in dict.fromkeys(split_label(name)[0] for name in names):
        before = f"{store}/" if store else ""
        for name, a, b in DIFFERENCES:
            left, right = before + a, before + b if before + b in names else b
            if left in names and right in names:
                found.append((before + name, left, right))
    for name in names:
        if split_label(name)[1] not in LABELS:
            found += [(f"{name}_minus_{b}", name, b) for b in _YARDSTICKS if b in names]
    return found


def versions() -> dict[str, Any]:
    """What ran, and on what: versions of the packages that matter and the machine's processor.

    No host name, user or path is in it. Asks the installed packages' metadata, so nothing is imported.
    """
    found: dict[str, Any] = {"python": platform.python_version(), "system": platform.system()}
    for package in ("polyprag", "torch", "transformers", "numpy"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    # the core is compiled in: it alone knows its Tantivy
    found["tantivy"] = getattr(sys.modules.get("polyprag._polyprag"), "tantivy_version", None)
    found["machine"] = {"processor": _processor(), "architecture": platform.machine(), "cores": _cores()}
    cuda = cuda_in_use()
    if cuda is not None:
        found["machine"]["device"] = cuda.get_device_name()
    return found


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


_FORMS: Mapping[str, Literal["json", "md", "html"]] = {
    ".json": "json",
    ".md": "md",
    ".markdown": "md",
    ".html": "html",
    ".htm": "html",
    "": "json",  # /dev/stdout, for one
}


def form_of(path: str | os.PathLike[str]) -> Literal["json", "md", "html"]:
    """The form of a report's file, by its suffix. Raises InvalidInput for one that tells none."""
    suffix = Path(path).suffix.lower()
    if suffix not in _FORMS:
        known = ", ".join(filter(None, _FORMS))
        raise InvalidInput(f"{os.fspath(path)}: {suffix} is no form of a report; use one of {known}")
    return _FORMS[suffix]


def check_form(path: str | os.PathLike[str]) -> None:
    """Raise InvalidInput for a suffix that tells no form, and ImportError where its form needs packages that
    are not here: at the start, and not when all is asked.
    """
    if form_of(path) == "html":
        for package in ("jinja2", "matplotlib"):
            if importlib.util.find_spec(package) is None:
                raise lacking("pages (.html)", package, "eval")


@dataclass(frozen=True)
class Report:
    """One evaluation. Made by :meth:`of`; ``differences`` holds (a, b, a minus b) under a name.

    systems: by name; of a second store, ``label/own_route`` and so on. leaked: ids of the questions that
    training pairs give away, None where the pairs are not known; leaked_pairs: how many such pairs.
    stores: by label, "" for the first. settings: JSON values only. codecs: see
    :func:`~polyprag.evaluation.run.codec_points`. routes: see :mod:`polyprag.evaluation.routes`.
    seconds: how long each stage took.
    """

    questions: tuple[Question, ...]
    systems: Mapping[str, SystemResult]
    differences: Mapping[str, tuple[str, str, Difference]]
    leaked: frozenset[str] | None = None
    leaked_pairs: int = 0
    stores: Mapping[str, Footprint] = field(default_factory=dict)
    codecs: Sequence[Mapping[str, Any]] = ()
    routes: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    scoring: Scoring = "squad"
    seed: int = 0
    seconds: Mapping[str, float] = field(default_factory=dict)
    versions: Mapping[str, Any] = field(default_factory=versions)

    @classmethod
    def of(
        cls,
        questions: Sequence[Question],
        systems: Sequence[SystemResult],
        *,
        leaked: Collection[str] | None = None,
        confidence: float = 0.95,
        resamples: int = RESAMPLES,
        seed: int = 0,
        **more: Any,
    ) -> Self:
        """Put systems side by side and compare them; ``more`` are the other fields.

        Raises InvalidInput for two systems of one name, or for some that answered other questions.
        """
        by_name = {system.name: system for system in systems}
        if len(by_name) != len(systems):
            raise InvalidInput("two systems of the report have the same name")
        compared = {
            name: (
                a,
                b,
                compare(by_name[a], by_name[b], confidence=confidence, resamples=resamples, seed=seed),
            )
            for name, a, b in differences_of(list(by_name))
        }
        return cls(
            tuple(questions),
            by_name,
            compared,
            None if leaked is None else frozenset(leaked),
            seed=seed,
            **more,
        )

    @property
    def ordered(self) -> list[str]:
        """The names of the systems, as tables have them: store by store, then those of others."""
        labels = list(dict.fromkeys(["", *(split_label(name)[0] for name in self.systems)]))
        places = {system: place for place, system in enumerate(LABELS)}

        def place(name: str) -> tuple[int, int]:
            label, system = split_label(name)
            known = system in places
            return labels.index(label) if known else len(labels), places.get(system, 0)

        return sorted(self.systems, key=place)

    def bytes_per_document(self, name: str) -> float | None:
        """What a document takes, so that one of polyprag's systems can answer from it; else None."""
        label, system = split_label(name)
        footprint = self.stores.get(label)
        if footprint is None or system not in LABELS:
            return None
        if system == "closed_book":
            return 0.0
        parts = [] if system.startswith("rag") else ["route"]
        parts += ["documents"] if system.startswith(("rag", "combine")) else []
        parts += ["bm25"] if system == "rag" or system.startswith(("bm25", "combine")) else []
        return footprint.each(*parts)

    @property
    def warnings(self) -> list[str]:
        """What a reader must know before believing the figures."""
        found = [*self._control_warnings()]
        routed = any(split_label(name)[1] in _ROUTED for name in self.systems)
        if self.leaked is None and routed:
            found.append(
                "the training pairs are not known, so leaked questions (a training pair asks the same) "
                "are not counted: give their file (--augmentation)"
            )
        if self.leaked:
            found.append(
                f"{len(self.leaked)} of {len(self.questions)} questions leaked (a training pair asks the "
                "same): see F1 without leaks"
            )
        if len(self.questions) < 30 and self.systems:
            count = "1 question is" if len(self.questions) == 1 else f"{len(self.questions)} questions are"
            found.append(f"{count} few: intervals of so few are too narrow")
        if self.scoring != "squad":
            found.append(
                "answers are cut before they are scored, as PRAG does: dates, numbers and initials score too "
                "low; for comparison with published figures alone"
            )
        if any(q.documents for q in self.questions) and not measured():
            found.append("retrieval was not measured: pip install 'polyprag[eval]'")
        return found

    def _control_warnings(self) -> Iterable[str]:
        if why := self.settings.get("no_wrong_documents"):
            yield f"no wrong route was asked: {why}"
        for label in dict.fromkeys(split_label(name)[0] for name in self.systems):
            before = f"{label}/" if label else ""
            of = f" ({label})" if label else ""
            found = self.differences.get(f"{before}own_minus_wrong")
            if found is not None and not (found[2].real and found[2].mean > 0):
                yield (
                    f"own route is not above wrong route{of}: "
                    "these figures do not show that routes hold documents"
                )
            if found is None and any(before + system in self.systems for system in _ROUTED):
                yield (
                    f"own minus wrong was not measured{of}: "
                    "F1 alone does not say that a document is in its route"
                )

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values, every question and answer included, and no secret."""
        main = self.stores.get("")
        found: dict[str, Any] = redacted(
            {
                "form": _FORM,
                "systems": {
                    name: {
                        "label": label_of(name),
                        **self.systems[name].to_json(),
                        "f1_without_leaks": self.without_leaks(name),
                        "bytes_per_document": self.bytes_per_document(name),
                    }
                    for name in self.ordered
                },
                "differences": {
                    name: {
                        "a": a,
                        "b": b,
                        "mean": d.mean,
                        "interval": [d.low, d.high],
                        "p_value": d.p_value,
                        "real": d.real,
                        "questions": d.n,
                        "confidence": d.confidence,
                        "resamples": d.resamples,
                    }
                    for name, (a, b, d) in self.differences.items()
                },
                "leaked_questions": None if self.leaked is None else len(self.leaked),
                "leaked_question_ids": None if self.leaked is None else sorted(self.leaked),
                "leaked_training_pairs": None if self.leaked is None else self.leaked_pairs,
                "bytes_per_document": None if main is None else main.bytes_per_document,
                "stores": {label: footprint.to_json() for label, footprint in self.stores.items()},
                "codecs": [dict(point) for point in self.codecs],
                "routes": dict(self.routes),
                "seconds": sum(self.seconds.values()),
                "stage_seconds": dict(self.seconds),
                "settings": dict(self.settings),
                "scoring": self.scoring,
                "seed": self.seed,
                "versions": dict(self.versions),
                "warnings": self.warnings,
                "questions": [asdict(question) for question in self.questions],
            }
        )
        return found

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """The report of :meth:`to_json`; intervals and differences are computed anew from the answers.

        Raises KeyError, TypeError, ValueError or InvalidInput for anything else.
        """
        if value["form"] != _FORM:
            raise InvalidInput(f"its form is {value['form']!r}; expected {_FORM!r}")
        questions = [
            Question(q["id"], q["question"], tuple(q["answers"]), q["type"], tuple(q["documents"]))
            for q in value["questions"]
        ]
        seed = int(value["seed"])
        systems = []
        for name, system in value["systems"].items():
            answers = [Answered(**{**a, "predictions": tuple(a["predictions"])}) for a in system["answers"]]
            if [a.id for a in answers] != [q.id for q in questions]:
                raise InvalidInput(f"{name}: its answers are to other questions than the report's")
            costs = None if system["costs"] is None else Costs(**system["costs"])
            systems.append(
                summarised(name, questions, answers, retrieval=system["retrieval"], costs=costs, seed=seed)
            )
        return cls.of(
            questions,
            systems,
            leaked=value["leaked_question_ids"],
            leaked_pairs=value["leaked_training_pairs"] or 0,
            stores={label: Footprint.from_json(store) for label, store in value["stores"].items()},
            codecs=value["codecs"],
            routes=value["routes"],
            settings=value["settings"],
            scoring=cast(Scoring, value["scoring"]),
            seed=seed,
            seconds=value["stage_seconds"],
            versions=value["versions"],
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what :meth:`save` wrote. Raises OSError, and CorpusError if it is anything else."""
        name = os.fspath(path)
        try:
            return cls.from_json(json.loads(Path(path).read_text(encoding="utf-8")))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            problem = f"lacks {error}" if isinstance(error, KeyError) else str(error)
            raise CorpusError(
                f"{name}: no report of an evaluation ({problem}); "
                "give the JSON file that `polyprag eval --report` wrote"
            ) from error

    def without_leaks(self, name: str) -> float | None:
        """F1 of a system without the leaked questions; None if these are not known, or leave none."""
        return None if self.leaked is None else self.systems[name].f1_without(self.leaked)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the report to a file, the whole of it or nothing, in the form that its suffix tells:
        ``.html``, ``.md``, or JSON. Raises OSError, and InvalidInput for another suffix.
        """
        form = form_of(path)
        if form == "html":
            from polyprag.evaluation.page import page

            text = page([self])
        elif form == "md":
            from polyprag.evaluation.tables import markdown

            text = markdown(self)
        else:
            text = json.dumps(self.to_json(), ensure_ascii=False, allow_nan=False, indent=1) + "\n"
        write_atomic(path, text)

    def print(self, console: Console) -> None:
        """Tables for the terminal: systems, differences, costs, footprint, then the warnings."""
        from polyprag.evaluation.tables import print_report

        print_report(self, console)
