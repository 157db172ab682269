"""The plots of a report, as SVG to be put into a page: texts stay texts, nothing is fetched."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from polyprag.evaluation.redaction import redacted
from polyprag.evaluation.report import LABELS, Report, label_of, split_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Told apart in grey as well: dark, middle, light.
_OWN, _PLAIN, _CONTROL = "#1f4e79", "#4d4d4d", "#a3a3a3"
_WRONG = "#c1571a"
_CONTROLS = frozenset({"wrong_route", "uniform_route", "mean_route", "combine_wrong_route"})
_WIDTH = 6.5  # inches, a column of a page
_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # which matplotlib brings; the page shows its own, which is narrower
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "lines.linewidth": 1.2,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "text.parse_math": False,
    "figure.constrained_layout.use": True,
}


def systems_plot(report: Report) -> str:
    """F1 of each system with its interval: the routes dark, controls light."""
    names = report.ordered
    with _figure("systems", 0.25 * len(names) + 0.6) as (figure, svg):
        panel = figure.subplots()
        for place, name in enumerate(names):
            system = report.systems[name]
            kind = split_label(name)[1]
            colour = (
                _CONTROL if kind in _CONTROLS else _OWN if "route" in kind or kind == "combine" else _PLAIN
            )
            panel.hlines(place, system.interval.low, system.interval.high, color=colour)
            panel.plot(system.f1, place, "o", color=colour, markersize=4)
        _rows(panel, [label_of(name) for name in names])
        panel.set(xlabel="F1", xlim=(0, _limit([report.systems[n].interval.high for n in names])))
    return svg()


def own_wrong_plot(report: Report) -> str:
    """Own against wrong route, for each store and each type of question; empty without them."""
    rows: list[tuple[str, tuple[float, float, float], tuple[float, float, float]]] = []
    for label in report.stores:
        before = f"{label}/" if label else ""
        own, wrong = (report.systems.get(before + n) for n in ("own_route", "wrong_route"))
        if own is None or wrong is None:
            continue
        heading = f"{label}: all" if label else "all"
        rows.append((heading, _point(own.f1, own.interval), _point(wrong.f1, wrong.interval)))
        if 1 < len(own.by_type) <= 12:
            for kind, part in own.by_type.items():
                other = wrong.by_type[kind]
                name = f"{label}: {kind}" if label else kind
                rows.append((name, _point(part.f1, part.interval), _point(other.f1, other.interval)))
    if not rows:
        return ""
    with _figure("own-wrong", 0.38 * len(rows) + 0.9) as (figure, svg):
        panel = figure.subplots()
        for place, (_, own_point, wrong_point) in enumerate(rows):
            for (mean, low, high), colour, shift, mark in (
                (own_point, _OWN, -0.12, "o"),
                (wrong_point, _WRONG, 0.12, "D"),
            ):
                panel.hlines(place + shift, low, high, color=colour)
                panel.plot(mean, place + shift, mark, color=colour, markersize=4)
        panel.plot([], [], "o-", color=_OWN, markersize=4, label="own route")
        panel.plot([], [], "D-", color=_WRONG, markersize=4, label="wrong route")
        figure.legend(loc="outside upper right", ncols=2)
        _rows(panel, [name for name, *_ in rows])
        panel.set(xlabel="F1", xlim=(0, _limit([row[1][2] for row in rows] + [row[2][2] for row in rows])))
    return svg()


def codecs_plot(report: Report) -> str:
    """F1 of own and wrong route against bytes a document, over codecs; empty for fewer than two."""
    points = sorted([(float(p["bytes_per_document"]), p) for p in report.codecs], key=lambda point: point[0])
    if len(points) < 2:
        return ""
    with _figure("codecs", 2.8) as (figure, svg):
        panel = figure.subplots()
        sizes = [size for size, _ in points]
        low, high = ([p["interval"][end] for _, p in points] for end in (0, 1))
        panel.fill_between(sizes, low, high, color=_OWN, alpha=0.12, linewidth=0)
        panel.plot(sizes, [p["f1"] for _, p in points], "o-", color=_OWN, markersize=4, label="own route")
        panel.plot(
            sizes, [p["wrong_f1"] for _, p in points], "D--", color=_WRONG, markersize=4, label="wrong route"
        )
        for size, point in points:
            panel.annotate(
                str(point["codec"]),
                (size, point["f1"]),
                (0, 6),
                textcoords="offset points",
                ha="center",
                fontsize=8,
            )
        panel.set(xscale="log", xlabel="bytes of route a document", ylabel="F1")
        _plain_numbers(panel)
        panel.set_ylim(0, _limit(high))
        panel.legend()
    return svg()


def documents_plot(reports: Sequence[Report]) -> str:
    """F1 against the number of documents, from reports of several sizes; empty for one size."""
    shown = ("own_route", "wrong_route", "bm25_route", "rag", "combine", "closed_book")
    lines: dict[str, list[tuple[int, float, float, float]]] = {}
    for report in reports:
        if "" not in report.stores:
            continue
        for name in shown:
            if name in report.systems:
                system = report.systems[name]
                point = (report.stores[""].documents, *_point(system.f1, system.interval))
                lines.setdefault(name, []).append(point)
    if len({size for points in lines.values() for size, *_ in points}) < 2:
        return ""
    marks = {"own_route": ("o-", _OWN), "wrong_route": ("D--", _WRONG), "bm25_route": ("s-", "#6f9bc8")}
    others = {"rag": ("^-", _PLAIN), "combine": ("v-", "#3a7d44"), "closed_book": ("x:", _CONTROL)}
    with _figure("documents", 2.8) as (figure, svg):
        panel = figure.subplots()
        for name, points in lines.items():
            mark, colour = {**marks, **others}[name]
            sizes, means, low, high = zip(*sorted(points), strict=True)
            panel.plot(sizes, means, mark, color=colour, markersize=4, label=LABELS[name])
            if name in ("own_route", "wrong_route"):
                panel.fill_between(sizes, low, high, color=colour, alpha=0.12, linewidth=0)
        panel.set(xscale="log", xlabel="documents", ylabel="F1")
        _plain_numbers(panel)
        panel.set_ylim(bottom=0)
        figure.legend(loc="outside right upper")
    return svg()


def stages_plot(report: Report) -> str:
    """Seconds of an answer by stage, one bar a system; empty where nobody measured stages."""
    stages = {"retrieve": "0.85", "route": _WRONG, "prefill": "#6f9bc8", "decode": _OWN}
    found = {n: s.costs.seconds for n, s in report.systems.items() if s.costs is not None}
    names = [n for n in report.ordered if n in found and found[n].keys() & stages.keys()]
    if not names:
        return ""
    with _figure("stages", 0.25 * len(names) + 0.9) as (figure, svg):
        panel = figure.subplots()
        left = [0.0] * len(names)
        for stage, colour in stages.items():
            widths = [found[n].get(stage, 0.0) * 1e3 for n in names]
            panel.barh(range(len(names)), widths, 0.6, left=left, color=colour, label=stage)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        _rows(panel, [label_of(name) for name in names])
        panel.set(xlabel="milliseconds a question, its share of its batch")
        figure.legend(loc="outside upper right", ncols=4)
    return svg()


def routes_plot(routes: Mapping[str, Any]) -> str:
    """Heat maps: each document's mean weights of the experts, and how far apart documents are by route."""
    if not routes:
        return ""
    titles = [_short(str(d["title"] or d["id"])) for d in routes["documents"]]
    n = len(titles)
    with _figure("routes", 0.17 * n + 1.2) as (figure, svg):
        left, right = figure.subplots(1, 2, sharey=True)
        lowest = min(min(row) for row in routes["weights"])
        highest = max(max(map(abs, row)) for row in routes["weights"])
        # Weights of phi "linear" have any sign.
        colours: dict[str, Any] = {"cmap": "Blues", "vmin": 0.0}
        if lowest < 0:
            colours = {"cmap": "RdBu_r", "vmin": -highest, "vmax": highest}
        weights = left.pcolormesh(routes["weights"], **colours)
        left.set(title="weight of each expert", xlabel="expert")
        figure.colorbar(weights, ax=left, location="bottom", shrink=0.8)
        near = right.pcolormesh(routes["distances"], cmap="Greys_r", vmin=0)
        right.set(title="distance of routes", xlabel="document, as on the left")
        figure.colorbar(near, ax=right, location="bottom", shrink=0.8)
        experts = range(0, len(routes["weights"][0]), 5)
        left.set_xticks([place + 0.5 for place in experts], [str(place) for place in experts])
        left.set_yticks([place + 0.5 for place in range(n)], titles, fontsize=7)
        left.invert_yaxis()
        for panel in (left, right):
            panel.tick_params(length=0)
            panel.set_frame_on(False)
        right.set_xticks([])
    return svg()


def _short(text: str) -> str:
    return text if len(text) <= 24 else f"{text[:23]}…"


def _point(mean: float, interval: Any) -> tuple[float, float, float]:
    return mean, interval.low, interval.high


def _limit(highest: Sequence[float]) -> float:
    return min(1.02, max(0.1, max(highest) * 1.08))


def _plain_numbers(panel: Axes) -> None:
    """A logarithmic axis whose numbers are no formulas."""
    panel.xaxis.set_major_formatter("{x:,.0f}")
    panel.xaxis.set_minor_formatter("")


def _rows(panel: Axes, labels: Sequence[str]) -> None:
    panel.set_yticks(range(len(labels)), redacted(list(labels)))
    panel.set_ylim(len(labels) - 0.4, -0.6)
    panel.tick_params(axis="y", length=0)
    panel.spines["left"].set_visible(False)
    panel.grid(axis="x", color="0.9", linewidth=0.6)
    panel.set_axisbelow(True)


@contextmanager
def _figure(name: str, height: float) -> Iterator[tuple[Figure, Callable[[], str]]]:
    """A figure and what gives its SVG, once it is drawn. No state of pyplot is touched."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    text = ""
    with mpl.rc_context({**_STYLE, "svg.hashsalt": f"polyprag {name}"}), warnings.catch_warnings():
        # Of other scripts the font here may have no letters; the reader's has.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure = Figure(figsize=(_WIDTH, height))
        yield figure, lambda: text
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata=dict.fromkeys(["Creator", "Date", "Format", "Type"]))
    # Inside of a page there is no XML declaration, and the size is the page's: the view box keeps the shape.
    body = stream.getvalue()
    svg = body[body.index("<svg") :]
    head = svg[: svg.index(">")]
    text = str(redacted(re.sub(r' (?:width|height)="[^"]*"', "", head) + svg[len(head) :]))
