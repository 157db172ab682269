"""Draw what the benches of the store wrote: docs/images/store.svg.

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

RESULTS = Path(__file__).resolve().parent / "results"
IMAGE = RESULTS.parent.parent / "docs" / "images" / "store.svg"
IDS = {"u64": "0, 1, 2 …", "wiki": "wiki-000000001 …", "mixed": "random u64", "uuid": "UUID"}


def main() -> None:
    scale = json.loads((RESULTS / "store_scale.json").read_text(encoding="utf-8"))["results"]
    peers = json.loads((RESULTS / "store_peers.json").read_text(encoding="utf-8"))["results"]
    mpl.rcParams.update({"font.size": 9, "svg.hashsalt": "polyprag", "axes.spines.right": False})
    mpl.rcParams.update({"axes.spines.top": False, "svg.fonttype": "none"})
    figure, panels = plt.subplots(2, 2, figsize=(9, 6.4), layout="constrained")
    lines(panels[0, 0], scale, lambda r: r["documents_per_s"] / 1e6, "documents a second, million", 0)
    lines(panels[0, 1], scale, lambda r: r["open_ms"], "open, ms", 0)
    lines(panels[1, 0], scale, lambda r: r["routes_us"], "weights of 10 documents, µs", 0)
    panels[0, 0].legend(frameon=False)
    bars(panels[1, 1], peers)
    IMAGE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(IMAGE, metadata={"Date": None})


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
