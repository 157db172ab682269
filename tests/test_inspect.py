"""``polyprag inspect``: a document's route and its neighbours, and the page; the library behind it."""

from __future__ import annotations

import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from polyprag import Document, Module, Store, StoreSpec
from polyprag.cli import common
from polyprag.cli.exits import ExitCode
from polyprag.errors import InvalidInput, UnknownId, Unrouted
from polyprag.inspection import draw, evenness, facets, map_of, nearest
from polyprag.pictures import heat_map

HOSTILE = "<script>alert(\"x\")</script> & 'quoted'"
LAYERS = [f"model.layers.{n}.mlp.{kind}_proj" for n in range(3) for kind in ("up", "down")]


def logits(*preferred: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """A route of one expert: [groups, experts], of an expert for each document."""
    z = np.full((len(preferred), len(LAYERS), 4), -8.0, dtype=np.float32)
    for row, expert in enumerate(preferred):
        z[row, :, expert] = 8.0
    return z


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Four documents: two of expert 0, one of expert 1, one without a route; a title that is no good."""
    modules = [Module(name, 3, 5, group) for group, name in enumerate(LAYERS)]
    spec = StoreSpec(
        modules=modules, experts=4, rank=2, alpha=8.0, codec="f32", phi="softmax", base_model={"name": "tiny"}
    )
    experts = {}
    for name in LAYERS:
        experts[f"{name}.A"] = np.zeros((4, 2, 3), dtype=np.float32)
        experts[f"{name}.B"] = np.zeros((5, 4, 2), dtype=np.float32)
    documents = [
        Document("a", "The first mill.", "Mill", {"n": 1}),
        Document("b", HOSTILE, HOSTILE),
        Document("c", "The fjord.", "Fjord"),
    ]
    path = tmp_path / "s"
    with Store.create(path, spec, experts) as writer:
        writer.add(documents, logits(0, 0, 1))
        writer.add([Document("d", "No route.", "Plain")])
    return path


def test_neighbours_by_route(store: Path) -> None:
    with Store.open(store) as opened:
        sample = draw(opened)
        assert (sample.ids, sample.of, sample.whole) == (("a", "b", "c"), 3, True)
        found = nearest(opened, "a", sample)
        assert [near.id for near in found] == ["b", "c"]
        assert found[0].distance == pytest.approx(0, abs=1e-6)
        assert found[1].distance == pytest.approx(1, abs=1e-5), "no expert in common"
        w = opened.routes(["a", "c"]).astype(np.float64)
        assert found[1].distance == pytest.approx(np.abs(w[0] - w[1]).sum(-1).mean() / 2)
        assert [near.id for near in nearest(opened, "a", sample, k=1)] == ["b"]
        with pytest.raises(Unrouted):
            nearest(opened, "d", sample)
        with pytest.raises(UnknownId):
            nearest(opened, "nope", sample)
        with pytest.raises(InvalidInput):
            nearest(opened, "a", sample, k=0)
        assert len(draw(opened, size=2).ids) == 2
        assert draw(opened, size=2, seed=5).ids == draw(opened, size=2, seed=5).ids


def test_layers_by_kind_and_number(store: Path) -> None:
    with Store.open(store) as opened:
        up, down = facets(opened, np.arange(24, dtype=np.float32).reshape(6, 4))
    assert (up.name, up.layers) == ("up_proj", ("0", "1", "2"))
    assert (down.name, down.weights[:, 0].tolist()) == ("down_proj", [4, 12, 20])


def test_evenness_and_the_map() -> None:
    even = np.full((1, 3, 4), 0.25, dtype=np.float32)
    alone = np.zeros((1, 3, 4), dtype=np.float32)
    alone[..., 2] = 1
    assert evenness(np.concatenate([even, alone])).tolist() == pytest.approx([1, 0.25])
    rng = np.random.default_rng(0)
    for rows in (6, 90):  # fewer and more than columns: two ways to the same components
        weights = rng.dirichlet(np.ones(4), (rows, 5)).astype(np.float32)
        flat = weights.reshape(rows, -1).astype(np.float64)
        u, s, _ = np.linalg.svd(flat - flat.mean(0), full_matrices=False)
        np.testing.assert_allclose(np.abs(map_of(weights)), np.abs(u[:, :2] * s[:2]), atol=1e-6)
    assert not map_of(np.concatenate([even, even])).any()


def test_a_document_is_shown(run: Callable[..., Any], store: Path) -> None:
    code, out, err = run("inspect", store, "--document", "a")
    assert (code, err) == (0, "")
    assert "a  Mill\nThe first mill.\n" in out
    assert "of all documents with one" in out
    assert f"0.000  {HOSTILE}" in out
    assert "   0 ███\n   1    \n" in out, "all of its weight is on expert 0"
    found = json.loads(run("inspect", store, "--document", "a", "--nearest", "1", "--json")[1])
    assert found["documents"] == 4
    about = found["document"]
    assert (about["text"], about["metadata"], about["routed"]) == ("The first mill.", {"n": 1}, True)
    assert [near["id"] for near in about["nearest"]] == ["b"]
    assert about["route"][0]["weights"][0][0] == pytest.approx(1, abs=1e-3)
    assert "It has no route" in run("inspect", store, "--document", "d")[1]
    code, out, err = run("inspect", store, "--document", "nope")
    assert (code, out) == (ExitCode.INPUT, "")
    assert "nope" in err


def test_in_a_narrow_terminal_numbers_are_whole_and_bars_go(
    run: Callable[..., Any], store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Store.open(store) as opened:
        numbers = [f"{part.bytes:,}" for part in opened.info().parts]
    for width, bars in ((80, True), (60, True), (50, False), (40, False)):
        monkeypatch.setattr(common.out, "_width", width)
        shown = run("inspect", store)[1].partition("Footprint")[2]
        assert max(map(len, shown.splitlines())) <= width
        assert ("█" in shown) == bars
        assert all(f" {number} │" in shown for number in numbers)


def test_titles_cannot_command_the_terminal(run: Callable[..., Any], make_store: Any, tmp_path: Path) -> None:
    text = "A mill.\r\n\x1b]0;owned\x07It \x9b31mstands."
    path = make_store(tmp_path / "s", [Document("a", text, "Mi\x1b[2Jll"), Document("b", "A fjord.")])
    code, out, err = run("inspect", path, "--document", "a")
    assert (code, err) == (0, "")
    assert "a  Mi[2Jll\nA mill.\n]0;ownedIt 31mstands.\n" in out
    assert not set(out) & set("\x1b\x9b\x07\r")


class Page(HTMLParser):
    """Tags and texts of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.references: list[str] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_the_page_needs_no_other_and_runs_nothing(
    run: Callable[..., Any], store: Path, tmp_path: Path
) -> None:
    file = tmp_path / "page.html"
    code, out, err = run("inspect", store, "--document", "b", "--html", file)
    assert (code, err) == (0, "")
    assert str(file) in out
    text = file.read_text()
    page = Page(text)
    assert page.references == []
    assert "script" not in page.tags
    assert page.tags.count("svg") == 6, "bytes, the document twice, the experts twice, the map"
    assert HOSTILE in page.texts
    assert "default-src 'none'" in text
    assert "1.000" in "".join(page.texts)

    empty = tmp_path / "empty.html"
    with Store.open(store) as opened, opened.writer() as writer:
        writer.delete(["a", "b", "c"])
    assert run("inspect", store, "--html", empty)[0] == 0
    assert Page(empty.read_text()).tags.count("svg") == 1


def test_weights_of_any_sign(tmp_path: Path) -> None:
    w = np.array([[[0.5, -0.5, 0, 0]], [[-0.5, 0.5, 0, 0]]], dtype=np.float32)
    assert evenness(w).tolist() == pytest.approx([0.5, 0.5])
    assert "--cold" in heat_map(w[0], ["0"], "x")
    assert "--cold" not in heat_map(np.abs(w[0]), ["0"], "x")
