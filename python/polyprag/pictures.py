"""Pictures as SVG text: bars, heat maps, a map of points. No script, no file of others, all text escaped.

Colours are those of CSS variables that :data:`STYLE` sets, for light and for dark screens.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np
from numpy.typing import NDArray

STYLE = """
:root { color-scheme: light dark; --ink: #1c2126; --soft: #5b6670; --line: #d9dee3; --paper: #fff;
  --panel: #f6f8fa; --one: #2a78d6; --two: #c8590a; --heat: 42, 120, 214;
  --cold: 200, 89, 10; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ec; --soft: #9aa5b0; --line: #343b43;
  --paper: #14171a; --panel: #1c2126; --one: #5b9df0; --two: #f08a4b; --heat: 108, 170, 250;
  --cold: 240, 138, 75; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto;
  max-width: 960px; padding: 24px; overflow-wrap: anywhere; }
h1 { font-size: 24px; margin: 0 0 4px; } h2 { font-size: 17px; margin: 32px 0 8px; }
p, figcaption { color: var(--soft); margin: 4px 0 12px; max-width: 70ch; }
svg { display: block; max-width: 100%; height: auto; }
svg text { fill: var(--soft); font: 11px system-ui, sans-serif; }
figure { margin: 12px 0; overflow-x: auto; } table { border-collapse: collapse; width: 100%; }
td, th { text-align: left; padding: 4px 12px 4px 0; vertical-align: top;
  border-bottom: 1px solid var(--line); }
td.n, th.n { text-align: right; width: 1%; font-variant-numeric: tabular-nums; }
blockquote { margin: 8px 0; padding: 8px 12px; background: var(--panel); white-space: pre-wrap; }
""".strip()


def bars(rows: Sequence[tuple[str, float, str]], label: str) -> str:
    """Horizontal bars: (name, value, what is written behind it) each; ``label`` says what they are."""
    most = max((value for _, value, _ in rows), default=0.0) or 1.0
    parts = []
    for place, (name, value, text) in enumerate(rows):
        y = place * 26
        width = max(420 * value / most, 1.0 if value else 0.0)
        parts.append(
            f'<text x="112" y="{y + 16}" text-anchor="end">{escape(name)}</text>'
            f'<rect x="120" y="{y + 4}" width="{width:.1f}" height="16" rx="2" fill="var(--one)"/>'
            f'<text x="{128 + width:.1f}" y="{y + 16}">{escape(text)}</text>'
        )
    return _svg(760, 26 * len(rows) + 4, "".join(parts), label)


def heat_map(
    weights: NDArray[np.float32], columns: Sequence[str], label: str, *, most: float | None = None
) -> str:
    """Weights [layers, experts], a column a layer and a row an expert; full colour is ``most``.

    Negative weights have the second colour.
    """
    layers, experts = weights.shape
    most = most or float(np.abs(weights).max(initial=0.0)) or 1.0
    cell = max(8, min(22, 640 // max(layers, 1)))
    height = max(8, min(16, 240 // max(experts, 1)))
    parts = []
    for x in range(layers):
        for y in range(experts):
            weight = float(weights[x, y])
            strength = min(abs(weight) / most, 1.0)
            hue = "cold" if weight < 0 else "heat"
            parts.append(
                f'<rect x="{40 + x * cell}" y="{y * height}" width="{cell - 1}" height="{height - 1}" '
                f'fill="rgba(var(--{hue}), {0.04 + 0.96 * strength:.3f})">'
                f"<title>layer {escape(columns[x])}, expert {y}: {weight:.3f}</title></rect>"
            )
    every = max(1, round(14 / cell))
    parts += [
        f'<text x="{40 + x * cell + cell / 2:.1f}" y="{experts * height + 12}" text-anchor="middle">'
        f"{escape(columns[x])}</text>"
        for x in range(0, layers, every)
    ]
    parts += [
        f'<text x="34" y="{y * height + height - 2}" text-anchor="end">{y}</text>'
        for y in range(0, experts, -(-12 // height))
    ]
    return _svg(48 + layers * cell, experts * height + 18, "".join(parts), label)


def scatter(
    points: NDArray[np.float64], titles: Sequence[str], label: str, *, marked: int | None = None
) -> str:
    """A point for each row of ``points`` [n, 2], with its title where a pointer rests on it."""
    width, height, edge = 720, 420, 12
    low, high = (points.min(0), points.max(0)) if len(points) else (np.zeros(2), np.ones(2))
    span = np.where(high > low, high - low, 1.0)
    at = (points - low) / span * (width - 2 * edge, height - 2 * edge) + edge
    radius = 5 if len(points) <= 500 else 2.5
    order = [i for i in range(len(points)) if i != marked] + ([] if marked is None else [marked])
    parts = []
    for i in order:
        size, colour, solid = (radius * 1.6, "two", 1) if i == marked else (radius, "one", 0.6)
        parts.append(
            f'<circle cx="{at[i, 0]:.1f}" cy="{height - at[i, 1]:.1f}" r="{size}" '
            f'fill="var(--{colour})" fill-opacity="{solid}"><title>{escape(titles[i])}</title></circle>'
        )
    frame = f'<rect width="{width}" height="{height}" fill="var(--panel)" rx="4"/>'
    return _svg(width, height, frame + "".join(parts), label)


def _svg(width: float, height: float, content: str, label: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
        f'height="{height:g}" role="img" aria-label="{escape(label)}">{content}</svg>'
    )
