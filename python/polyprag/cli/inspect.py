"""The command ``inspect``: what a store holds, what one of its documents is, and a page of both."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from polyprag._polyprag import Document, Store
from polyprag.cli.common import AsJson, StorePath, counted, document_id, out, print_json, say
from polyprag.jsonl import last_name, write_atomic

if TYPE_CHECKING:
    from rich.table import Table

    from polyprag._polyprag import StoreInfo
    from polyprag.inspection import Neighbour, Sample

_BAR = 14
_SHADES = " ░▒▓█"
_ON_A_MAP = 3_000  # points that a page draws


def inspect(
    store: StorePath,
    document: Annotated[
        str | None,
        typer.Option(metavar="ID", help="Also show this document: text, route, nearest by route."),
    ] = None,
    nearest: Annotated[int, typer.Option(min=1, help="How many nearest documents.")] = 5,
    html: Annotated[
        Path | None,
        typer.Option(help="Write a page with pictures to this file, which needs no other.", readable=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what a store holds, where its bytes are, and what a document's route is.

    Example: `polyprag inspect wiki.polyprag`

    Example: `polyprag inspect wiki.polyprag --document Q7259 --html wiki.html`
    """
    with Store.open(store) as opened:
        sample = None
        if document is not None or html is not None:
            from polyprag.inspection import draw

            sample = draw(opened)
        about = described(opened)
        found = None
        if document is not None and sample is not None:
            found = _look_at(opened, document_id(document, opened.spec.id_type), sample, nearest)
        if html is not None and sample is not None:
            write_atomic(html, page(opened, about, sample, found))
        if as_json:
            print_json({**about, **({} if found is None else {"document": found.to_json()})})
            return
        _show(opened, about)
    if found is not None:
        _show_document(found)
    if html is not None:
        say(f"\n{html} is a page with pictures")


def described(store: Store) -> dict[str, Any]:
    """What a store holds, for machines."""
    spec = store.spec
    return {
        **store.info().to_dict(),
        "digest": store.digest(),
        "base_model": spec.base_model.get("name"),
        "experts": spec.experts,
        "expert_dtype": store.expert_dtype,
        "rank": spec.rank,
        "alpha": spec.alpha,
        "groups": spec.groups,
        "modules": len(spec.modules),
        "codec": spec.codec,
        "phi": spec.phi,
        "mixing": spec.mixing,
        "combination": {
            "k": spec.combination.k,
            "rule": spec.combination.rule,
            "temperature": spec.combination.temperature,
        },
        "analyser": spec.analyser,
        "filters": spec.filters,
    }


@dataclass(frozen=True)
class Looked:
    """One document as it is shown."""

    document: Document
    weights: Any  # float32 [groups, experts], or None without a route
    facets: list[Any]
    evenness: float | None
    nearest: list[Neighbour]
    compared: int
    of: int

    def to_json(self) -> dict[str, Any]:
        """For machines."""
        from polyprag.inspection import facets_json

        document = self.document
        about = {"id": document.id, "title": document.title, "text": document.text}
        return {
            **about,
            "metadata": document.metadata,
            "routed": self.weights is not None,
            "evenness": self.evenness,
            "route": facets_json(self.facets),
            "nearest": [asdict(near) for near in self.nearest],
            "compared": self.compared,
        }


def _look_at(store: Store, id: str | int, sample: Sample, k: int) -> Looked:
    from polyprag.inspection import evenness, facets, nearest

    (document,) = store.documents([id])
    if not store.is_routed(id):
        return Looked(document, None, [], None, [], 0, sample.of)
    weights = store.routes([id])[0]
    return Looked(
        document,
        weights,
        facets(store, weights),
        float(evenness(weights)),
        nearest(store, id, sample, k),
        len(sample.ids),
        sample.of,
    )


def _show(store: Store, about: dict[str, Any]) -> None:
    from rich.measure import Measurement

    info, spec = store.info(), store.spec
    unrouted = f" ({info.unrouted:,} without a route)" if info.unrouted else ""
    say(f"{info.path}: generation {info.generation}, {counted(info.documents, 'document')}{unrouted}")
    say(
        f"{about['base_model']}; {spec.experts} experts of rank {spec.rank} as {store.expert_dtype}, "
        f"alpha {spec.alpha:g}, {spec.groups} route groups; routes as {spec.codec}"
    )
    if spec.filters:
        say(f"filters: {', '.join(f'{name} ({kind})' for name, kind in spec.filters.items())}")
    table = _footprint(info)
    any_width = out.options.update(width=1_000)
    if Measurement.get(out, any_width, table).minimum > out.width:
        table = _footprint(info, drawn=False)  # the numbers say the same
    out.print(table)


def _footprint(info: StoreInfo, *, drawn: bool = True) -> Table:
    """Where the bytes are; ``drawn``: with bars."""
    from rich.table import Table

    lora = info.lora_bytes_per_document
    parts = sorted(info.parts, key=lambda part: -part.bytes)
    rows = [
        ("all of it", info.total_bytes, info.bytes_per_document),
        *((part.role, part.bytes, part.bytes_per_document) for part in parts),
        ("one LoRA a document", lora * info.documents, lora),
    ]
    numbers = [(f"{whole:,}", f"{each:,.1f}") for _, whole, each in rows]
    bars = [""] * len(rows)
    for place, part in enumerate(parts, start=1):
        bar = "█" * round(_BAR * part.bytes / parts[0].bytes) or "▏"
        bars[place] = f"{bar} {part.bytes / info.total_bytes:.1%}"
    table = Table(title="Footprint", title_justify="left")
    table.add_column("part", min_width=max(len(part.role) for part in parts))
    for name, column in zip(("bytes", "bytes a\ndocument"), zip(*numbers, strict=True), strict=True):
        # A number that is cut off would be read as another one.
        table.add_column(name, justify="right", no_wrap=True, min_width=max(map(len, column)))
    if drawn:
        table.add_column("", no_wrap=True, min_width=max(map(len, bars)))
    for place, (row, number, bar) in enumerate(zip(rows, numbers, bars, strict=True)):
        table.add_row(row[0], *number, *([bar] if drawn else []), style="" if place else "bold")
        if place in (0, len(parts)):
            table.add_section()
    return table


def _show_document(found: Looked) -> None:
    from rich.text import Text

    document = found.document
    say(f"\n{document.id}" + (f"  {document.title}" if document.title else ""), "bold")
    say(document.text if document.text is not None else "(the store keeps no texts)")
    if document.metadata:
        say(json.dumps(document.metadata, ensure_ascii=False), "dim")
    if found.weights is None:
        say("It has no route: it can be found, and is not mixed into answers.", "yellow")
        return
    say(
        "\nIts route, a column a layer and a row an expert (yellow: below zero); "
        f"evenness {found.evenness:.2f}"
    )
    most = float(abs(found.weights).max())
    for facet in found.facets:
        say(f"{facet.name}, layers {facet.layers[0]} to {facet.layers[-1]}", "dim")
        for expert in range(facet.weights.shape[1]):
            line = Text(f"{expert:>4} ", "dim")
            for weight in facet.weights[:, expert].tolist():
                shade = _SHADES[round((len(_SHADES) - 1) * abs(weight) / most)]
                line.append(shade, "yellow" if weight < 0 else "cyan")
            out.print(line, soft_wrap=True)
    whole = "all" if found.compared == found.of else f"{found.compared:,} drawn of {found.of:,}"
    say(f"\nNearest by route, of {whole} documents with one (0: the same, 1: no expert in common)")
    for near in found.nearest:
        say(f"  {near.distance:.3f}  {near.title or near.id}")


def page(store: Store, about: dict[str, Any], sample: Sample, found: Looked | None) -> str:
    """The page that ``--html`` writes."""
    from polyprag.inspection import evenness, facets, map_of
    from polyprag.pictures import STYLE, bars, heat_map, scatter

    info, spec = store.info(), store.spec
    name = last_name(info.path)
    parts = [
        f"<h1>{escape(name)}</h1>",
        f"<p>{counted(info.documents, 'document')}, {info.bytes_per_document:,.1f} bytes a document</p>",
        _facts(about, info),
        "<h2>Where the bytes are</h2>",
        _figure(
            bars(
                [
                    (p.role, p.bytes, f"{p.bytes:,} ({p.bytes_per_document:,.1f} a document)")
                    for p in sorted(info.parts, key=lambda part: -part.bytes)
                ],
                "Bytes of each part of the store",
            ),
            f"One LoRA a document of this rank would be {info.lora_bytes_per_document:,} bytes each.",
        ),
    ]
    if found is not None:
        parts += _document_html(found)
    if len(sample.ids):
        drawn = "all" if sample.whole else f"{len(sample.ids):,} drawn of {sample.of:,}"
        mean = sample.weights.mean(0)
        spread = evenness(sample.weights)
        parts += [
            "<h2>How the experts are used</h2>",
            f"<p>Mean weight of each expert, over {drawn} documents with a route. How even a document's "
            f"own route is: {spread.mean():.2f} on average (1: all {spec.experts} experts alike).</p>",
        ]
        most = float(abs(mean).max())
        for facet in facets(store, mean):
            label = f"Mean weights of {facet.name}: a column a layer, a row an expert"
            parts.append(
                _figure(
                    heat_map(facet.weights, facet.layers, label, most=most),
                    f"{facet.name}: a column a layer, a row an expert",
                )
            )
        shown = slice(0, _ON_A_MAP)
        ids = sample.ids[shown]
        titles = [d.title or str(d.id) for d in store.documents(list(ids))]
        marked = ids.index(found.document.id) if found is not None and found.document.id in ids else None
        parts += [
            "<h2>A map of the documents</h2>",
            _figure(
                scatter(map_of(sample.weights[shown]), titles, "Documents by their routes", marked=marked),
                f"{len(ids):,} documents by the two principal components of their routes; titles where the "
                "pointer rests. Near each other: answered with much the same experts.",
            ),
        ]
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(name)}</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _facts(about: dict[str, Any], info: StoreInfo) -> str:
    combination = about["combination"]
    rows = {
        "Generation": f"{info.generation}, digest {about['digest']}",
        "Base model": str(about["base_model"]),
        "Experts": f"{about['experts']} of rank {about['rank']}, alpha {about['alpha']:g}, "
        f"as {about['expert_dtype']}",
        "Route": f"{about['groups']} groups over {about['modules']} modules, {about['phi']}, "
        f"kept as {about['codec']}, {info.route_bytes_per_document:,.1f} bytes a document",
        "Asked with": f"{combination['k']} documents by {combination['rule']}"
        + (f", temperature {combination['temperature']:g}" if combination["rule"] == "score" else ""),
        "Without a route": f"{info.unrouted:,} documents",
    }
    cells = "".join(f"<tr><th>{escape(key)}</th><td>{escape(value)}</td></tr>" for key, value in rows.items())
    return f"<table>{cells}</table>"


def _document_html(found: Looked) -> list[str]:
    from polyprag.pictures import heat_map

    document = found.document
    parts = [
        f"<h2>{escape(document.title or str(document.id))}</h2>",
        f"<p>Document {escape(str(document.id))}</p>",
        f"<blockquote>{escape(document.text or '(the store keeps no texts)')}</blockquote>",
    ]
    if found.weights is None:
        return [*parts, "<p>It has no route: it can be found, and is not mixed into answers.</p>"]
    most = float(abs(found.weights).max())
    for facet in found.facets:
        label = f"Route of {document.id}, {facet.name}: a column a layer, a row an expert"
        parts.append(
            _figure(
                heat_map(facet.weights, facet.layers, label, most=most),
                f"{facet.name}: a column a layer, a row an expert",
            )
        )
    rows = "".join(
        f'<tr><td class="n">{near.distance:.3f}</td><td>{escape(near.title or str(near.id))}</td></tr>'
        for near in found.nearest
    )
    head = '<tr><th class="n">distance</th><th>nearest documents by route</th></tr>'
    return [*parts, f"<table>{head}{rows}</table>"]


def _figure(picture: str, caption: str) -> str:
    return f"<figure>{picture}<figcaption>{escape(caption)}</figcaption></figure>"
