"""The tables of a report: once as cells, and from these for the terminal, Markdown and the page."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from polyprag.evaluation.footprint import Footprint
from polyprag.evaluation.redaction import redacted
from polyprag.evaluation.report import Report, label_of, split_label
from polyprag.evaluation.statistics import Difference

if TYPE_CHECKING:
    from rich.console import Console

_STAGES = ("retrieve", "route", "prefill", "decode", "total")


@dataclass(frozen=True, slots=True)
class Grid:
    """A table as texts; the first column reads from the left, the others are figures. bold: rows."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    bold: frozenset[int] = frozenset()


def grids(report: Report) -> list[Grid]:
    """All tables of a report that have something to tell."""
    found = [systems_grid(report)]
    if report.differences:
        found.append(differences_grid(report.differences))
    found += [
        grid
        for grid in (types_grid(report), retrieval_grid(report), costs_grid(report), codecs_grid(report))
        if grid.rows
    ]
    found += [footprint_grid(store, label) for label, store in report.stores.items()]
    # Names and types come from users.
    return [
        Grid(redacted(grid.title), redacted(grid.columns), redacted(grid.rows), grid.bold) for grid in found
    ]


def systems_grid(report: Report) -> Grid:
    """F1 with its interval, exact match, F1 without leaks, and own minus wrong beside own."""
    names = report.ordered
    confidence = report.systems[names[0]].interval.confidence if names else 0.95
    columns = ["system", "F1", f"{confidence:.0%} interval", "EM", "F1 without leaks", "own minus wrong"]
    rows = []
    for name in names:
        system = report.systems[name]
        clean = report.without_leaks(name)
        unknown = "unknown" if report.leaked is None else "none left"
        label, kind = split_label(name)
        own = report.differences.get(f"{label}/own_minus_wrong" if label else "own_minus_wrong")
        rows.append(
            [
                label_of(name),
                f"{system.f1:.3f}",
                f"{system.interval.low:.3f} to {system.interval.high:.3f}",
                f"{system.em:.3f}",
                unknown if clean is None else f"{clean:.3f}",
                _difference(own[2]) if kind == "own_route" and own is not None else "",
            ]
        )
    bold = frozenset(i for i, name in enumerate(names) if split_label(name)[1] == "own_route")
    title = "1 question" if len(report.questions) == 1 else f"{len(report.questions)} questions"
    if report.scoring != "squad":
        title += f", scored as PRAG does ({report.scoring})"
    return Grid(title, columns, rows, bold)


def _difference(d: Difference) -> str:
    return f"{d.mean:+.3f} ({d.low:+.3f} to {d.high:+.3f})"


def differences_grid(differences: Mapping[str, tuple[str, str, Difference]]) -> Grid:
    """Differences; one whose interval spans zero is never called real."""
    return Grid(
        "Differences in F1",
        ["", "mean", "interval", "p", ""],
        [
            [
                f"{label_of(a)} minus {label_of(b)}",
                f"{d.mean:+.3f}",
                f"{d.low:+.3f} to {d.high:+.3f}",
                f"{d.p_value:.4f}",
                "real" if d.real else "not shown",
            ]
            for a, b, d in differences.values()
        ],
    )


def types_grid(report: Report) -> Grid:
    """F1 of each type of question, where there are several."""
    kinds: dict[str, int] = {}
    for system in report.systems.values():
        kinds.update((kind, part.interval.n) for kind, part in system.by_type.items())
    if not 1 < len(kinds) <= 12:
        return Grid("", [], [])
    columns = ["system", *(f"{kind} ({n})" for kind, n in kinds.items()), f"all ({len(report.questions)})"]
    rows = []
    for name in report.ordered:
        system = report.systems[name]
        parts = [f"{system.by_type[k].f1:.3f}" if k in system.by_type else "" for k in kinds]
        rows.append([label_of(name), *parts, f"{system.f1:.3f}"])
    return Grid("F1 by type of question", columns, rows)


def retrieval_grid(report: Report) -> Grid:
    """Recall and MRR of what retrieved; rows that are alike in all are one."""
    names = list(dict.fromkeys(k for s in report.systems.values() for k in s.retrieval))
    rows = [
        [label_of(n), *(f"{r[k]:.3f}" if k in r else "" for k in names)]
        for n in report.ordered
        if (r := report.systems[n].retrieval)
    ]
    return Grid("Retrieval of the gold documents", ["system", *names], rows)


def costs_grid(report: Report) -> Grid:
    """What an answer takes: milliseconds by stage, tokens, memory, and bytes of each document."""
    found = {name: s.costs for name, s in report.systems.items() if s.costs is not None}
    own = {stage for c in found.values() for stage in c.seconds} - set(_STAGES)
    stages = [
        *sorted(own),
        *(stage for stage in _STAGES if any(stage in c.seconds for c in found.values())),
    ]
    columns = ["system", *(f"{stage}, ms" for stage in stages), "prompt tokens", "new tokens"]
    columns += ["peak memory, MB", "bytes a document"]
    rows = []
    for name in report.ordered:
        if (costs := found.get(name)) is None:
            continue
        peak = costs.peak_bytes.get("device", costs.peak_bytes.get("process"))
        each = report.bytes_per_document(name)
        rows.append(
            [
                label_of(name),
                *(f"{costs.seconds[s] * 1e3:,.1f}" if s in costs.seconds else "" for s in stages),
                "" if costs.prompt_tokens is None else f"{costs.prompt_tokens:,.0f}",
                "" if costs.new_tokens is None else f"{costs.new_tokens:,.1f}",
                "" if peak is None else f"{peak / 1e6:,.0f}",
                "" if each is None else f"{each:,.1f}",
            ]
        )
    return Grid("What an answer takes, mean of all questions", columns, rows)


def codecs_grid(report: Report) -> Grid:
    """Own and wrong route in several codecs."""
    rows = [
        [
            str(p["codec"]),
            f"{p['bytes_per_document']:,.1f}",
            f"{p['f1']:.3f}",
            f"{p['interval'][0]:.3f} to {p['interval'][1]:.3f}",
            f"{p['wrong_f1']:.3f}",
        ]
        for p in report.codecs
    ]
    columns = ["codec", "bytes a document", "own route, F1", "interval", "wrong route, F1"]
    return Grid("Routes in other codecs", columns, rows)


def footprint_grid(footprint: Footprint, label: str = "") -> Grid:
    """The bytes of each part, in all and a document, beside one LoRA a document."""
    lora = footprint.lora_bytes_per_document
    rows = [["all of it", f"{footprint.total_bytes:,}", f"{footprint.bytes_per_document:,.1f}"]]
    rows += [[role, f"{size:,}", f"{footprint.each(role):,.1f}"] for role, size in footprint.parts.items()]
    rows.append(["one LoRA a document", f"{lora * footprint.documents:,}", f"{lora:,.1f}"])
    title = f"Footprint, {footprint.documents} documents" + (f" ({label})" if label else "")
    return Grid(title, ["part", "bytes", "bytes a document"], rows, frozenset({0}))


# -- as texts --------------------------------------------------------------------------------------------


_LABEL = 24  # characters of the first column, which may be broken into lines
_FRAME = 3  # between two columns


def print_grid(grid: Grid, console: Console) -> None:
    """The grid as a table, or as several that are no wider than the console."""
    from rich.markup import escape
    from rich.table import Table

    widths = [
        max((len(word) for cell in (column, *cells) for word in cell.split()), default=0)
        for column, *cells in zip(grid.columns, *grid.rows, strict=True)
    ]
    longest = max((len(row[0]) for row in grid.rows), default=0)
    widths[0] = max(widths[0], min(_LABEL, longest))
    for number, columns in enumerate(_fitting(widths, console.width)):
        # Names may come from users: brackets in them are no markup.
        title = grid.title if number == 0 else f"{grid.title} (continued)"
        table = Table(title=escape(title), title_justify="left")
        for place in columns:
            justify: Literal["left", "right"] = "right" if place else "left"
            table.add_column(escape(grid.columns[place]), justify=justify)
        for place, row in enumerate(grid.rows):
            cells = (escape(row[column]) for column in columns)
            table.add_row(*cells, style="bold" if place in grid.bold else None)
        console.print(table)


def _fitting(widths: Sequence[int], width: int) -> list[list[int]]:
    """Which columns go together: the first always, and of the others as many as ``width`` has room for."""
    found, room = [[0]], 0
    for place, wanted in enumerate(widths[1:], 1):
        if place == 1 or (len(found[-1]) > 1 and wanted + _FRAME > room):
            if place > 1:
                found.append([0])
            room = width - 1 - widths[0] - _FRAME
        found[-1].append(place)
        room -= wanted + _FRAME
    return found


def print_report(report: Report, console: Console) -> None:
    """All tables, then the warnings."""
    for grid in grids(report):
        print_grid(grid, console)
    for warning in report.warnings:
        console.print(f"Warning: {warning}.", style="yellow", markup=False, highlight=False)


_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>|~#&])")


def _escaped(text: str) -> str:
    return _MARKDOWN.sub(r"\\\1", " ".join(text.split()))


def markdown_grid(grid: Grid) -> str:
    """A table of GitHub's Markdown under its title."""

    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(map(_escaped, cells))} |"

    body = []
    for place, row in enumerate(grid.rows):
        cells = [f"**{_escaped(cell)}**" if place in grid.bold and cell else _escaped(cell) for cell in row]
        body.append(f"| {' | '.join(cells)} |")
    rule = f"|{'|'.join(['---', *['---:'] * (len(grid.columns) - 1)])}|"
    return "\n".join([f"**{_escaped(grid.title)}**", "", line(grid.columns), rule, *body]) + "\n"


def markdown(report: Report) -> str:
    """The warnings, then all tables, as GitHub's Markdown."""
    warnings = [f"> Warning: {_escaped(warning)}.\n" for warning in report.warnings]
    return "\n".join([*warnings, *map(markdown_grid, grids(report))])
