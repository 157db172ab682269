"""One self-contained HTML page of a report, or of several side by side: tables, plots and answers.

Every text is escaped, plots are SVG in the page, and nothing is fetched from anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from typing import Any

from polyprag.evaluation import plots
from polyprag.evaluation.redaction import redacted
from polyprag.evaluation.report import Report, label_of
from polyprag.evaluation.tables import Grid, grids

#: Questions whose answers a page shows; the JSON report has all.
SHOWN = 50
# Whose answers are read side by side, and what else there is of other people's.
_READ = ("closed_book", "rag", "own_route", "bm25_route", "wrong_route", "combine")


def page(reports: Sequence[Report], comparison: Sequence[Grid] = ()) -> str:
    """The page of one report, or of several with what compares them first.

    Needs jinja2 and matplotlib: ``pip install 'polyprag[eval]'``.
    """
    from jinja2 import Environment
    from markupsafe import Markup

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    source = resources.files("polyprag.evaluation").joinpath("page.html.jinja").read_text(encoding="utf-8")

    def drawn(title: str, note: str, svg: str) -> dict[str, Any]:
        return {"title": title, "note": note, "svg": Markup(svg)}  # noqa: S704 - matplotlib has escaped it

    sections = []
    for number, report in enumerate(reports, start=1):
        figures = [
            drawn(
                "F1 by system",
                "Dots are means, lines 95% bootstrap intervals over questions; controls are light.",
                plots.systems_plot(report),
            ),
            drawn(
                "Own against wrong route",
                "The route of the right document against those of others: what the route holds lies between.",
                plots.own_wrong_plot(report),
            ),
            drawn(
                "F1 against bytes a document",
                "One training, its routes in several codecs; the band is the interval of the own route.",
                plots.codecs_plot(report),
            ),
            drawn(
                "Time by stage", "Batched; the rest of the wall time is Python.", plots.stages_plot(report)
            ),
            drawn(
                "Routes",
                "Left: the weight of each expert, mean of all layers. Right: how far apart routes are: 0 "
                "(dark) is the same, 1 has no expert in common.",
                plots.routes_plot(report.routes),
            ),
        ]
        sections.append(
            {
                "heading": _heading(report, number, len(reports)),
                "warnings": report.warnings,
                "grids": grids(report),
                "figures": [figure for figure in figures if figure["svg"]],
                "nearest": _nearest(report),
                "answers": _answers(report),
                "facts": _facts(report),
            }
        )
    growth = drawn(
        "F1 against the number of documents",
        "One report a size; bands are 95% bootstrap intervals.",
        plots.documents_plot(reports),
    )
    return environment.from_string(source).render(
        sections=sections, comparison=comparison, growth=growth if growth["svg"] else None
    )


def _heading(report: Report, number: int, of: int) -> str:
    model = report.settings.get("base_model")
    documents = report.stores[""].documents if "" in report.stores else None
    parts = [str(model)] if model else []
    parts += [f"{documents:,} documents"] if documents else []
    parts += [f"{len(report.questions):,} questions", f"seed {report.seed}"]
    return str(redacted((f"{number}. " if of > 1 else "") + ", ".join(parts)))


def _nearest(report: Report) -> list[tuple[str, list[tuple[str, str]]]]:
    """(document, its nearest with their distance) for those that the heat map shows."""
    if not report.routes:
        return []
    found = [
        (
            str(document["title"] or document["id"]),
            [(str(each["title"] or each["id"]), f"{each['distance']:.2f}") for each in nearest],
        )
        for document, nearest in zip(report.routes["documents"], report.routes["nearest"], strict=True)
    ]
    return list(redacted(found))


def _answers(report: Report) -> dict[str, Any]:
    """The first questions with what some systems said."""
    names = [n for n in report.ordered if n in _READ or report.bytes_per_document(n) is None][:8]
    rows = []
    for place, question in enumerate(report.questions[:SHOWN]):
        said = [report.systems[name].answers[place] for name in names]
        rows.append(
            {
                "question": question.question,
                "answer": question.answers[0],
                "said": [{"text": a.predictions[0], "right": a.f1 >= 0.5} for a in said],
            }
        )
    found: dict[str, Any] = redacted({"names": [label_of(n) for n in names], "rows": rows})
    return found | {"of": len(report.questions)}


def _facts(report: Report) -> list[tuple[str, str]]:
    """What a reader needs to do it again: settings and versions, one line each."""
    shown: dict[str, Any] = {**report.settings, "scoring": report.scoring, "seed": report.seed}
    for label, store in report.stores.items():
        shown[f"store {label}".strip()] = {"codec": store.codec, **store.recipe.get("train", {})}
    shown |= report.versions
    flat: dict[str, Any] = redacted(shown)
    return [(name, _line(value)) for name, value in flat.items() if value not in (None, {}, [])]


def _line(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_line(inner)}" for name, inner in value.items() if inner is not None)
    if isinstance(value, list | tuple):
        return ", ".join(map(_line, value))
    return str(value)
