"""Draw what the benches wrote: docs/images/store.svg, and docs/images/popqa.svg of the answers.

pip install matplotlib
python benches/plot.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
import matplotlib.pyplot as plt

from common import PRAG_RATE
from evaluate import kept_rows
from polyprag.evaluation.statistics import bootstrap_mean

RESULTS = Path(__file__).resolve().parent / "results"
IMAGES = RESULTS.parent.parent / "docs" / "images"
IDS = {"u64": "0, 1, 2 …", "wiki": "wiki-000000001 …", "mixed": "random u64", "uuid": "UUID"}


# Rows of evaluate.jsonl: (system, row, documents), their names, and which bytes are each document's own.
ANSWERS = {
    ("base", "closed_book", 300): ("closed book", ()),
    ("base", "rag", 300): ("RAG, passage in the prompt", ("documents", "bm25")),
    ("poly-prag", "own_route", 300): ("Poly-PRAG as first published", ("routes",)),
    ("dyprag", "own_route", 300): ("DyPRAG, a network makes the LoRAs", ("routes",)),
    ("prag", "own_route", 300): ("PRAG, one LoRA a document", ("experts",)),
    ("prag", "bm25_route_k3", 300): ("PRAG, BM25, k = 3", ("experts", "bm25")),
    ("polyprag", "own_route", 300): ("polyprag, own route", ("routes",)),
    ("polyprag", "bm25_route_k3", 300): ("polyprag, BM25, k = 3", ("routes", "bm25")),
    ("polyprag", "wrong_route", 300): ("polyprag, wrong route", ("routes",)),
    ("polyprag", "combine", 300): ("polyprag, combine", ("routes", "documents", "bm25")),
}


def main() -> None:
    mpl.rcParams.update({"font.size": 9, "svg.hashsalt": "polyprag", "axes.spines.right": False})
    mpl.rcParams.update({"axes.spines.top": False, "svg.fonttype": "none"})
    IMAGES.mkdir(parents=True, exist_ok=True)
    stores().savefig(IMAGES / "store.svg", metadata={"Date": None})
    answers().savefig(IMAGES / "popqa.svg", metadata={"Date": None})


def stores() -> Any:
    scale = json.loads((RESULTS / "store_scale.json").read_text(encoding="utf-8"))["results"]
    peers = json.loads((RESULTS / "store_peers.json").read_text(encoding="utf-8"))["results"]
    figure, panels = plt.subplots(2, 2, figsize=(9, 6.4), layout="constrained")
    lines(panels[0, 0], scale, lambda r: r["documents_per_s"] / 1e6, "documents a second, million", 0)
    lines(panels[0, 1], scale, lambda r: r["open_ms"], "open, ms", 0)
    lines(panels[1, 0], scale, lambda r: r["routes_us"], "weights of 10 documents, µs", 0)
    panels[0, 0].legend(frameon=False)
    bars(panels[1, 1], peers)
    return figure


def answers() -> Any:
    """F1 of each system on the questions that all were asked, its 95% interval, and the bytes it needs."""
    usual = [
        r
        for r in kept_rows(RESULTS / "evaluate.jsonl")
        if r["data"] == "popqa" and r["seed"] == 0 and not r["added"] and not r["variant"]
    ]
    named = {
        (r["system"], r["row"], r["documents"]): r
        for r in usual
        if not r["set"] or (r["system"] == "prag" and PRAG_RATE in r["set"])
    }
    shown = [(name, parts, named[key]) for key, (name, parts) in ANSWERS.items() if key in named]
    asked = [q for q in shown[0][2]["f1_by_question"] if all(q in r["f1_by_question"] for _, _, r in shown)]
    figure, panel = plt.subplots(figsize=(9, 0.36 * len(shown) + 0.8), layout="constrained")
    for place, (_name, parts, row) in enumerate(shown):
        f1 = bootstrap_mean([row["f1_by_question"][q] for q in asked])
        colour = "C0" if row["system"] == "polyprag" else "0.45"
        panel.hlines(place, f1.low, f1.high, color=colour)
        panel.plot(f1.mean, place, "o", color=colour, markersize=5)
        size = sum(row["footprint"]["parts"][p]["bytes_per_document"] for p in parts)
        text = f"{f1.mean:.3f}" + (f"   {size:,.0f} bytes a document" if parts else "")
        panel.text(f1.high + 0.015, place, text, va="center")
    panel.set_yticks(range(len(shown)), [name for name, _, _ in shown])
    panel.set(
        xlabel=f"F1, the same {len(asked)} questions of PopQA",
        xlim=(0, 1.3),
        xticks=[0, 0.2, 0.4, 0.6, 0.8, 1],
    )
    panel.invert_yaxis()
    return figure


def lines(panel: Any, rows: list[dict[str, Any]], of: Any, label: str, bottom: float) -> None:
    """One line for each kind of ids, over the number of documents."""
    for kind, name in IDS.items():
        own = [row for row in rows if row["ids"] == kind]
        panel.plot([r["documents"] for r in own], [of(r) for r in own], "o-", markersize=4, label=name)
    panel.set(xscale="log", xlabel="documents", ylabel=label)
    panel.set_ylim(bottom=bottom)


def bars(panel: Any, rows: list[dict[str, Any]]) -> None:
    """Reading the weights of ten documents, and bytes a document, store by store."""
    names = [row["store"].split(" (")[0] for row in rows]
    places = range(len(rows))
    panel.barh(places, [row["weights_us"] for row in rows], color=["C0", *["0.75"] * (len(rows) - 1)])
    for place, row in zip(places, rows, strict=True):
        panel.text(row["weights_us"] * 1.1, place, f"{row['bytes_per_document']:,.0f} B", va="center")
    panel.set(xscale="log", xlabel="weights of 10 documents, µs (bytes a document beside)")
    panel.set_yticks(list(places), names)
    panel.set_xlim(right=max(row["weights_us"] for row in rows) * 12)
    panel.invert_yaxis()


if __name__ == "__main__":
    main()
